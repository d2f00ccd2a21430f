"""``fastlm tokenize``: text to files of tokens that training maps into memory.

A folder holds ``train.bin`` and ``val.bin``, tokens end to end as little-endian uint16 or uint32;
``index.json``, which says what they are and their checksums; and the tokenizer's own files.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .atomic import replacing
from .data import FORMAT, INDEX, STDLIB, open_tokens, stdlib_files, text_files
from .tokenizer import Tokenizer, load_tokenizer

_PIECE = 2**18  # characters encoded at a time: progress is seen, and memory stays small


def tokenize(files: list[Path], tokenizer: Tokenizer, out: Path, progress: "Progress") -> None:
    """Writes a folder of tokens: held out is every tenth file, or the last tenth of each of few.

    Files end with the tokenizer's end of text, or a new line where it has none.
    """
    if (out / INDEX).exists():
        raise ValueError(f"--out must be a new folder; {out} holds tokens already")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    between = tokenizer.eos_token_id
    gap = tokenizer.encode("\n") if between is None else [between]
    every_tenth = len(files) >= 10
    with (
        replacing(out / "train.bin") as train_path,
        replacing(out / "val.bin") as val_path,
        train_path.open("wb") as train,
        val_path.open("wb") as val,
    ):
        writers = {"train": _Writer(train, dtype), "val": _Writer(val, dtype)}
        for i, file in enumerate(files):
            for name, piece in _pieces(file, i, len(files), every_tenth):
                writers[name].add(tokenizer.encode(piece))
                progress.add(len(piece.encode()))
            writers["val" if every_tenth and i % 10 == 9 else "train"].add(gap)
    tokens = sum(w.tokens for w in writers.values())
    tokenizer.save(out)
    index = {
        "format": FORMAT,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": progress.done / max(tokens, 1),
        "files": len(files),
        **{name: {"tokens": w.tokens, "sha256": w.sha.hexdigest()} for name, w in writers.items()},
    }
    with replacing(out / INDEX) as path:
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Writer:
    """Appends tokens to a file and counts them."""

    def __init__(self, file: BinaryIO, dtype: np.dtype):
        self.file, self.dtype = file, dtype
        self.tokens, self.sha = 0, hashlib.sha256()

    def add(self, ids: list[int]) -> None:
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        self.file.write(data)
        self.sha.update(data)
        self.tokens += len(ids)


def _pieces(file: Path, i: int, n: int, every_tenth: bool) -> Iterator[tuple[str, str]]:
    """(part, text) of a file, cut at ends of lines so that no word is."""
    text = file.read_text(encoding="utf-8")
    cut = len(text)
    if every_tenth and i % 10 == 9:
        cut = 0
    elif not every_tenth:  # the last tenth of each: of few files none is typical of all
        cut = text.rfind("\n", 0, max(len(text) * 9 // 10, 1)) + 1 or len(text) * 9 // 10
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        while part:
            end = len(part) if len(part) <= _PIECE else part.rfind("\n", 0, _PIECE) + 1 or _PIECE
            yield name, part[:end]
            part = part[end:]


class Progress:
    """A bar on a terminal, nothing elsewhere.

    Attributes:
        done: Bytes of text so far.
    """

    def __init__(self, total: int):
        self.total, self.done, self.began, self.shown = max(total, 1), 0, time.monotonic(), 0.0

    def add(self, size: int) -> None:
        """Counts bytes; draws ten times a second at most."""
        self.done += size
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self.shown < 0.1 and self.done < self.total):
            return
        self.shown, share = now, min(self.done / self.total, 1.0)
        speed = self.done / max(now - self.began, 1e-6)
        bar = "#" * int(30 * share) + "." * (30 - int(30 * share))
        left = (self.total - self.done) / speed
        sys.stderr.write(
            f"\r{bar} {share:4.0%}  {speed / 1e6:.1f} MB/s  {max(left, 0):.0f} s left "
        )
        sys.stderr.write("\n" if share == 1.0 else "")
        sys.stderr.flush()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``fastlm tokenize``."""
    parser.add_argument(
        "--data", default=STDLIB, metavar="DIR",
        help="a file or a folder of UTF-8 text (default: Python's own standard library)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", default="bytes", metavar="DIR",
        help="a folder with tokenizer.json, or GPT-2's two files (default: bytes)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")


def run(args: argparse.Namespace) -> int:
    """Runs ``fastlm tokenize`` and gives its exit code."""
    tokenizer = load_tokenizer(args.tokenizer)
    files = stdlib_files() if args.data == STDLIB else text_files(Path(args.data))
    progress = Progress(sum(file.stat().st_size for file in files))
    tokenize(files, tokenizer, args.out, progress)
    found = open_tokens(args.out)
    print(
        f"{len(found.train):,} tokens to train on and {len(found.val):,} held out, "
        f"{found.bytes_per_token:.2f} bytes a token, in {args.out}"
    )
    return 0
