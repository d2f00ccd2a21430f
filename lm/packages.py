"""Which package of the standard library is a snippet from: text classification with no download.

Ten classes. Of each file the last fifth is held out, so that a held-out snippet was never seen but
its neighbours were.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .words import words

PACKAGES = (
    "asyncio", "email", "xml", "multiprocessing", "unittest",
    "importlib", "http", "logging", "tkinter", "idlelib",
)  # fmt: skip
WORDS = 48  # of a snippet


def snippets() -> Iterator[dict[str, Any]]:
    """Lines of a data file: text, label and split.

    Raises:
        ValueError: This Python has none of a package's sources on disk.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for label in PACKAGES:
        files = [
            path
            for path in sorted((root / label).rglob("*.py"))
            if not {"test", "tests", "idle_test"} & set(path.parts)
        ]
        if not files:
            raise ValueError(f"make-data: {root / label} must hold Python's sources; it has none")
        for path in files:
            yield from _of_file(path, label)


def _of_file(path: Path, label: str) -> Iterator[dict[str, Any]]:
    found = words(path.read_text(encoding="utf-8", errors="replace"))
    cut = len(found) * 4 // 5
    for split, part in (("train", found[:cut]), ("validation", found[cut:])):
        for start in range(0, len(part) - WORDS + 1, WORDS):
            text = " ".join(part[start : start + WORDS])
            yield {"text": text, "label": label, "split": split}
