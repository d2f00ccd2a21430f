"""Byte pairs learned from the texts of a task (Sennrich et al. 2016), read with no package.

A tiny model spends its depth on spelling where tokens are bytes. A few hundred merges make most
words of a small task one token each: sequences a third as long, and prompts that can be copied from
word by word. The tokenizer.json that is written opens in Hugging Face's ``tokenizers`` as well.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .tokenizer import ByteTokenizer, byte_letters, write_tokenizer

Pair = tuple[bytes, bytes]
# Words, punctuation and other space, the space before a word its own. All by ranges of characters:
# classes such as \w mean one thing here and another in the Rust of ``tokenizers``.
_PIECE = r" ?[0-9A-Za-z_\u0080-\U0010ffff]+| ?[!-/:-@\[-\^`{-~]+|[\x00-\x20\x7f]+"
_PIECES = re.compile(_PIECE)
_JSON_PIECE = r" ?[0-9A-Za-z_\x{80}-\x{10ffff}]+| ?[!-/:-@\[-\^`{-~]+|[\x{00}-\x{20}\x{7f}]+"


class BytePairTokenizer(ByteTokenizer):
    """Bytes, and pairs of tokens merged to one: token 256 + i is the i-th merge."""

    def __init__(self, merges: Sequence[Pair]):
        super().__init__()
        self.merges = list(merges)
        self.vocab_size = 256 + len(self.merges)
        self._pieces = [*(bytes((b,)) for b in range(256)), *(a + b for a, b in self.merges)]
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        self._ranks = {pair: i for i, pair in enumerate(self.merges)}
        self._known: dict[str, list[int]] = {}  # pieces of text that were encoded before

    def encode(self, text: str | bytes) -> list[int]:
        """The tokens of a text: in each word, the earliest merge first."""
        text = text if isinstance(text, str) else text.decode()
        return [token for piece in _PIECES.findall(text) for token in self._encoded(piece)]

    def _encoded(self, piece: str) -> list[int]:
        if piece not in self._known:
            symbols = [bytes((b,)) for b in piece.encode()]
            while True:
                pairs = [p for p in itertools.pairwise(symbols) if p in self._ranks]
                if not pairs:
                    break
                symbols = _merged(symbols, min(pairs, key=self._ranks.__getitem__))
            self._known[piece] = [self._ids[symbol] for symbol in symbols]
        return self._known[piece]

    def piece(self, token: int) -> bytes:
        """The bytes of one token."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"decode: ids must be below {self.vocab_size}; got {token}")
        return self._pieces[token]

    def save(self, folder: str | Path) -> None:
        """Writes a tokenizer.json."""
        split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": _JSON_PIECE}}
        split |= {"behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        level["use_regex"] = False
        model = {
            "type": "BPE",
            "vocab": {_written(piece): i for i, piece in enumerate(self._pieces)},
            "merges": [f"{_written(a)} {_written(b)}" for a, b in self.merges],
        }
        before = {"type": "Sequence", "pretokenizers": [split, level]}
        write_tokenizer(Path(folder), before, level, model)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "BytePairTokenizer | None":
        """The tokenizer of a tokenizer.json that ``save`` wrote; None for another."""
        try:
            (split, _), merges = data["pre_tokenizer"]["pretokenizers"], data["model"]["merges"]
            if split["pattern"] != {"Regex": _JSON_PIECE}:
                return None
        except (KeyError, TypeError, ValueError):
            return None
        letters = {letter: byte for byte, letter in enumerate(byte_letters())}
        pairs = []
        for merge in merges:
            a, b = (bytes(letters[c] for c in part) for part in merge.split(" "))
            pairs.append((a, b))
        return cls(pairs)


def _written(piece: bytes) -> str:
    letters = byte_letters()
    return "".join(letters[b] for b in piece)


# --- learning -----------------------------------------------------------------------------------


def learn_merges(texts: Iterable[str], count: int) -> list[Pair]:
    """The ``count`` merges, the most frequent pair first, or as many as occur more than once."""
    pieces = Counter(piece for text in texts for piece in _PIECES.findall(text))
    words = [([bytes((b,)) for b in piece.encode()], n) for piece, n in pieces.items()]
    pairs: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = defaultdict(set)
    for i, (symbols, n) in enumerate(words):
        _count(symbols, n, i, pairs, where)
    merges: list[Pair] = []
    while len(merges) < count and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        for i in sorted(where[best]):
            symbols, n = words[i]
            _count(symbols, -n, i, pairs, where)
            words[i] = (_merged(symbols, best), n)
            _count(words[i][0], n, i, pairs, where)
    return merges


def _count(
    symbols: list[bytes], n: int, i: int, pairs: Counter[Pair], where: dict[Pair, set[int]]
) -> None:
    """Adds a word's pairs, or takes them away where n is negative."""
    for pair in itertools.pairwise(symbols):
        pairs[pair] += n
        if not pairs[pair]:
            del pairs[pair]
        if n > 0:
            where[pair].add(i)
        else:
            where[pair].discard(i)


def _merged(symbols: list[bytes], pair: Pair) -> list[bytes]:
    """Symbols with each such pair, from the left, made one."""
    out: list[bytes] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            out.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out
