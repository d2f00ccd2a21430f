"""Text as tokens, and batches of it that are a pure function of (seed, step, rank).

The default text is the Python standard library's own source, as bytes: a fresh machine has it.
"""

import functools
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .atomic import sha256
from .config import read_json

STDLIB = "stdlib"
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on, and tokens held out.

    Attributes:
        name: Where they came from.
        train: (n,) unsigned integers; may lie in a file.
        val: The same.
        vocab_size: Every token is below it.
        bytes_per_token: Of the text, on average.
        digest: Of both parts, in hexadecimal: another text has another.
        folder: Of files of tokens: ``load_tokenizer`` opens it. None: tokens are bytes.
    """

    name: str
    train: np.ndarray
    val: np.ndarray
    vocab_size: int
    bytes_per_token: float
    digest: str
    folder: Path | None = None


def load(source: str, block_size: int) -> Corpus:
    """The text of ``"stdlib"``, or of a file or a folder of UTF-8 text, as bytes; or tokens.

    Every tenth file is held out; of fewer than ten files, the last tenth of all. A folder that
    ``fastlm tokenize`` wrote is mapped into memory as it is.

    Raises:
        ValueError: No such place, no text there, or not enough for one sequence.
    """
    if source != STDLIB and is_token_folder(Path(source)):
        corpus = open_tokens(source)
    else:
        files = stdlib_files() if source == STDLIB else text_files(Path(source))
        corpus = corpus_of_bytes(source, [f.read_bytes() for f in files])
    for part in ("train", "val"):
        n = len(getattr(corpus, part))
        if n <= block_size:
            raise ValueError(
                f"data: {source} must hold more than {block_size} tokens to train on and to "
                f"hold out, one sequence each; got {n} in {part}"
            )
    return corpus


def corpus_of_bytes(name: str, texts: Sequence[bytes]) -> Corpus:
    """A corpus whose tokens are bytes."""
    if len(texts) >= 10:
        train = b"\n".join(t for i, t in enumerate(texts) if i % 10 != 9)
        val = b"\n".join(texts[9::10])
    else:
        whole = b"\n".join(texts)
        cut = len(whole) * 9 // 10
        train, val = whole[:cut], whole[cut:]
    digest = hashlib.sha256(train + b"\0" + val).hexdigest()[:16]
    tokens = [np.frombuffer(part, dtype=np.uint8) for part in (train, val)]
    return Corpus(name, tokens[0], tokens[1], 256, 1.0, digest)


def stdlib_files() -> list[Path]:
    """The standard library's source files, tests left out, in a fixed order.

    Raises:
        ValueError: This Python has no sources on disk.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(set(below) - _SKIPPED)
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    if not found:
        raise ValueError(f"data: {root} must hold Python's sources; give --data a folder of text")
    return found


def text_files(place: Path) -> list[Path]:
    """A file of text, or those below a folder, in a fixed order.

    Raises:
        ValueError: No such place, or no UTF-8 text there.
    """
    if not place.exists():
        raise ValueError(f"data: {str(place)!r} must be a file or a folder of text; not found")
    candidates = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    found = [p for p in candidates if _is_text(p)]
    if not found:
        raise ValueError(
            f"data: {str(place)!r} must hold UTF-8 text; none in {len(candidates)} files"
        )
    return found


def _is_text(path: Path) -> bool:
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return bool(data.strip()) and b"\0" not in data


# --- files of tokens ----------------------------------------------------------------------------

FORMAT = "fastlm tokens 1"
INDEX = "index.json"


def is_token_folder(folder: Path) -> bool:
    """Whether a folder holds tokens and not text."""
    return (folder / INDEX).is_file() and (folder / "train.bin").is_file()


def open_tokens(folder: str | Path, *, verify: bool = False) -> Corpus:
    """Maps a folder of tokens.

    Args:
        folder: What ``fastlm tokenize`` wrote.
        verify: Read all of it and compare the checksums.

    Raises:
        ValueError: A file is missing, damaged, or of another format.
    """
    folder = Path(folder)
    index = read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise ValueError(f"{folder / INDEX} must be {FORMAT!r}; got {index.get('format')!r}")
    try:
        parts = [
            _mapped(folder / f"{name}.bin", index["dtype"], index[name], verify)
            for name in ("train", "val")
        ]
        sums = index["train"]["sha256"] + index["val"]["sha256"]
        digest = hashlib.sha256(sums.encode()).hexdigest()[:16]
        size, density = index["vocab_size"], index["bytes_per_token"]
        return Corpus(str(folder), parts[0], parts[1], size, density, digest, folder)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} is damaged; {error!r} is not as it must be") from None


def _mapped(path: Path, dtype: str, facts: dict, verify: bool) -> np.ndarray:
    if dtype not in ("<u2", "<u4"):
        raise ValueError(f"{path}: dtype must be '<u2' or '<u4'; got {dtype!r}")
    want = facts["tokens"] * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.is_file() else -1
    if size != want:
        got = "no such file" if size < 0 else f"{size}"
        raise ValueError(f"{path} must be {want} bytes by {INDEX}; got {got}")
    if verify and sha256(path) != facts["sha256"]:
        raise ValueError(f"{path} is not what was written; its checksum differs")
    return np.memmap(path, dtype, "r") if want else np.empty(0, dtype)


# --- batches ------------------------------------------------------------------------------------


def permuted(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a permutation of range(n), one for each key, sends each index.

    A Feistel network over the next even power of two, walked until it falls below n: nothing to
    store however many windows there are.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    values = index.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (_scrambled(right, key * 4 + turn) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= n
    return values.astype(np.int64)


def _scrambled(x: np.ndarray, key: int) -> np.ndarray:
    """Bits that depend on all of x and key (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        z = x + np.uint64((key * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & (2**64 - 1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def starts(n: int, T: int, seed: int, step: int, rows: int) -> np.ndarray:
    """Where the sequences of a step begin in ``n`` tokens: (rows,).

    Windows of T tokens side by side, each once an epoch in an order of its own; each epoch's
    windows lie elsewhere.
    """
    windows = max(1, (n - T) // T)
    index = step * rows + np.arange(rows)
    epochs, places = index // windows, index % windows
    begins = np.empty(rows, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        key = seed * 1_000_003 + int(epoch)
        shift = int(_scrambled(np.zeros(1, np.uint64), key)[0]) % (n - windows * T)
        begins[chosen] = permuted(places[chosen], windows, key) * T + shift
    return begins


def batch(tokens: np.ndarray, begins: np.ndarray, T: int) -> tuple[Tensor, Tensor]:
    """Sequences and the token that follows each of theirs: two (rows, T) int64."""
    rows = tokens[begins[:, None] + np.arange(T + 1)].astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


@functools.lru_cache(maxsize=8)
def held_out_starts(n: int, T: int, most: int) -> np.ndarray:
    """Where at most ``most`` sequences begin, spread evenly over ``n`` held-out tokens."""
    windows = (n - 1) // T
    return np.linspace(0, windows - 1, min(most, windows)).astype(np.int64) * T
