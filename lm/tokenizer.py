"""Text to tokens and back: bytes, GPT-2's pairs, or any tokenizer.json of Hugging Face."""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from .atomic import replacing
from .config import read_json

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_GPT2_END = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the model needs of a tokenizer.

    Attributes:
        vocab_size: Every token is below it.
        eos_token_id: Ends a text; None where the vocabulary has no such token.
    """

    vocab_size: int
    eos_token_id: int | None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; U+FFFD where they are no whole character."""

    def token_id(self, token: str) -> int | None:
        """The number of a special token, or None."""

    def stream(self) -> TextStream:
        """Decodes tokens one by one."""

    def save(self, folder: str | Path) -> None:
        """Writes files that ``load_tokenizer`` and ``transformers`` open."""


class TextStream(Protocol):
    """Text out of tokens as they come, never half a character."""

    def push(self, token: int) -> str:
        """The text that is certain now: none while a character is unfinished."""

    def finish(self) -> str:
        """What is left."""


class ByteTokenizer:
    """Each byte of UTF-8 is a token, 0 to 255; special tokens have the numbers after those.

    Args:
        specials: Texts of special tokens. The first of them ends a text.
    """

    def __init__(self, specials: Iterable[str] = ()):
        self.specials = {text: 256 + i for i, text in enumerate(specials)}
        self.vocab_size = 256 + len(self.specials)
        self.eos_token_id = 256 if self.specials else None
        self._texts = {i: text.encode() for text, i in self.specials.items()}

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of a text. What looks like a special token in it is text like any other."""
        return list(text.encode() if isinstance(text, str) else text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The very bytes of tokens.

        Raises:
            ValueError: A number that is no token.
        """
        return b"".join(map(self.piece, ids))

    def piece(self, token: int) -> bytes:
        """The bytes of one token."""
        if token in self._texts:
            return self._texts[token]
        if not 0 <= token < 256:
            raise ValueError(f"decode: ids must be below {self.vocab_size}; got {token}")
        return bytes((token,))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; U+FFFD where they are no UTF-8."""
        return self.decode_bytes(ids).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        """The number of a special token, or None."""
        return self.specials.get(token)

    def stream(self) -> TextStream:
        """Decodes tokens one by one."""
        return _ByteStream(self)

    def save(self, folder: str | Path) -> None:
        """Writes a tokenizer.json: pairs of bytes of which none is merged."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        level["use_regex"] = False
        vocabulary = {letter: i for i, letter in enumerate(byte_letters())}
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        write_tokenizer(Path(folder), level, level, model, self.specials)


class _ByteStream:
    """Decodes UTF-8 as far as its characters are whole."""

    def __init__(self, tokenizer: ByteTokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(self.tokenizer.piece(token))

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)


class HubTokenizer:
    """A tokenizer of the package ``tokenizers``.

    Args:
        inner: The package's object.
        end: The text of the token that ends a text, if there is one.
        chat_template: Jinja that makes a text of a conversation, kept for ``transformers``.

    Raises:
        ValueError: Its vocabulary is empty, or ``end`` is not in it.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        end: str | None = None,
        chat_template: str | None = None,
    ):
        self.inner, self.end, self.chat_template = inner, end, chat_template
        vocabulary = inner.get_vocab(with_added_tokens=True)
        if inner.get_vocab_size(with_added_tokens=False) == 0:
            raise ValueError("tokenizer: the vocabulary must not be empty; got 0 tokens")
        self.vocab_size = max(vocabulary.values()) + 1
        if end is not None and end not in vocabulary:
            raise ValueError(f"tokenizer: the token that ends a text, {end!r}, is not in it")
        self.eos_token_id = None if end is None else vocabulary[end]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, special ones where it names them."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones among it."""
        return self.inner.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """The number of a token, or None."""
        return self.inner.token_to_id(token)

    def stream(self) -> TextStream:
        """Decodes tokens one by one."""
        return _HubStream(self)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        with replacing(Path(folder) / FILE) as file:
            self.inner.save(str(file))
        _write_config(Path(folder), self.end, self.chat_template)


class _HubStream:
    """Decodes a window of tokens again with each, since a token's text depends on its neighbours.

    The window begins one emission back: a token at the beginning of a text loses its space.
    """

    def __init__(self, tokenizer: HubTokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.begin = self.emitted = 0

    def push(self, token: int) -> str:
        self.ids.append(token)
        text = self.new_text()
        if not text or text.endswith("\ufffd"):  # half a character, or a byte that is none
            return ""
        self.begin, self.emitted = self.emitted, len(self.ids)
        return text

    def finish(self) -> str:
        return self.new_text()

    def new_text(self) -> str:
        """What the tokens say beyond what was emitted."""
        known = self.tokenizer.decode(self.ids[self.begin : self.emitted])
        return self.tokenizer.decode(self.ids[self.begin :])[len(known) :]


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a name or a place.

    Args:
        source: ``"bytes"``; a folder with tokenizer.json, or with GPT-2's vocab.json and merges.txt
            (or encoder.json and vocab.bpe); or a tokenizer.json or a .gguf file itself. Nothing is
            downloaded.

    Raises:
        ValueError: There is none, it is damaged or its vocabulary is empty; or the package
            ``tokenizers`` is wanted and missing.
    """
    if str(source) == "bytes":
        return ByteTokenizer()
    path = Path(source)
    if path.suffix == ".gguf":
        from .gguf import tokenizer_of

        return tokenizer_of(path)
    if path.is_file():
        return _from_json(path)
    if (path / FILE).is_file():
        return _from_json(path / FILE)
    for vocabulary, merges in _GPT2_FILES:
        if (path / vocabulary).is_file() and (path / merges).is_file():
            return _from_gpt2(path / vocabulary, path / merges)
    config = path / "config.json"
    if config.is_file() and read_json(config).get("vocab_size") == 256:  # bytes need no file
        return ByteTokenizer()
    wanted = " or ".join((FILE, *(" and ".join(pair) for pair in _GPT2_FILES)))
    raise ValueError(f"tokenizer must be 'bytes' or a folder that holds {wanted}; got {source}")


def _from_json(path: Path) -> Tokenizer:
    data = read_json(path)
    specials = _byte_specials(data)
    if specials is not None:
        return ByteTokenizer(specials)
    from .byte_pairs import BytePairTokenizer  # which builds on this module

    pairs = BytePairTokenizer.from_json(data)
    if pairs is not None:
        return pairs
    package = library(path)
    try:
        inner = package.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more exact
        raise ValueError(f"{path} must be a tokenizer of Hugging Face; {error}") from None
    try:
        return HubTokenizer(inner, *_custom(path.parent, inner))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _from_gpt2(vocabulary: Path, merges: Path) -> Tokenizer:
    """GPT-2's byte pairs (Radford et al. 2019) from its two files."""
    package = library(vocabulary)
    numbers = read_json(vocabulary)
    pairs = []
    for line in merges.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#version"):
            pair = tuple(line.split(" "))
            if len(pair) != 2 or "".join(pair) not in numbers:
                raise ValueError(f"{merges} must hold pairs of {vocabulary.name}; got {line!r}")
            pairs.append(pair)
    if not numbers:
        raise ValueError(f"{vocabulary}: the vocabulary must not be empty; got 0 tokens")
    missing = [letter for letter in byte_letters() if letter not in numbers]
    if missing:
        raise ValueError(f"{vocabulary} must hold all 256 bytes; it lacks {missing[0]!r}")
    inner = package.Tokenizer(package.models.BPE(numbers, pairs))
    inner.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = package.decoders.ByteLevel()
    end = _GPT2_END if _GPT2_END in numbers else None
    if end is not None:
        inner.add_special_tokens([end])
    return HubTokenizer(inner, end)


def library(path: Path) -> Any:
    """The package ``tokenizers``, which ``path`` wants. Raises ValueError where it is missing."""
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} wants the package tokenizers: pip install 'fastlm[tokenizers]'"
        ) from None
    return tokenizers


def _custom(folder: Path, inner: tokenizers.Tokenizer) -> tuple[str | None, str | None]:
    """The text of the token that ends a text, and the chat template, by the file beside."""
    config = folder / "tokenizer_config.json"
    said = read_json(config) if config.is_file() else {}
    end, template = said.get("eos_token"), said.get("chat_template")
    if isinstance(end, dict):
        end = end.get("content")
    if end is None:
        usual = (_GPT2_END, "</s>", "<|im_end|>")
        end = next((token for token in usual if inner.token_to_id(token) is not None), None)
    return end, template if isinstance(template, str) else None


def _byte_specials(data: dict[str, Any]) -> list[str] | None:
    """The special tokens of a tokenizer.json that ``ByteTokenizer`` wrote; None for another."""
    model = data.get("model")
    if not isinstance(model, dict) or model.get("merges") != []:
        return None
    if model.get("vocab") != {letter: i for i, letter in enumerate(byte_letters())}:
        return None
    added = data.get("added_tokens") or []
    numbers = [token["id"] for token in added]
    return [t["content"] for t in added] if numbers == [*range(256, 256 + len(added))] else None


@functools.cache
def byte_letters() -> list[str]:
    """The printable letter that GPT-2 writes for each byte: itself, or one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    stand_ins = {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(stand_ins.get(byte, byte)) for byte in range(256)]


def write_tokenizer(
    folder: Path,
    pre_tokenizer: dict[str, Any],
    decoder: dict[str, Any],
    model: dict[str, Any],
    specials: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Writes a tokenizer.json and the tokenizer_config.json beside it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **plain, "special": True} for text, i in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    _write_json(folder / FILE, data)
    _write_config(folder, next(iter(specials), None))


def _write_config(folder: Path, end: str | None, chat_template: str | None = None) -> None:
    data: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        data["chat_template"] = chat_template
    _write_json(folder / "tokenizer_config.json", data)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with replacing(path) as file:
        text = json.dumps(data, indent=2, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")
