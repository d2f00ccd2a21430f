"""Tiles that ``fastlm bench tune`` found faster on this machine than the ones that ship.

A function that chooses a tile is marked with ``tunable``. Winners lie in the user's cache, keyed by
device, driver, Triton and a hash of this package's sources. They are read once, when the package is
imported; a launch looks up a dictionary. Without winners the mark costs one comparison.
"""

import functools
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
import triton
from torch import Tensor

from . import _dispatch

P = ParamSpec("P")
R = TypeVar("R")
Tile = dict[str, int]
Seen = Callable[[str, Tile, tuple[str, ...]], None]

_winners: dict[str, dict[str, Tile]] = {}  # by device, then by key
_trial: Mapping[str, Tile] = {}
_observer: Seen | None = None


# --- the choice ---------------------------------------------------------------------------------


def tunable(*fields: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Marks a function that gives a tile, a dict or a named tuple, of which ``fields`` may change.

    A field that is None is not one of this tile's. A change must leave results right whatever it
    is: the caller derives grid and buffers from the tile that it is given.
    """

    def decorate(choose: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(choose)
        def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
            tile = choose(*args, **kwargs)
            if not (_winners or _trial or _observer):
                return tile
            home = choose.__module__
            if home.rpartition(".")[2].startswith("_"):  # shared by ops, whose best tiles differ
                frame = sys._getframe(1)
                while frame.f_globals["__name__"] == choose.__module__ and frame.f_back:
                    frame = frame.f_back
                home = frame.f_globals["__name__"]
            caller = home.rpartition(".")[2]
            words = [_word(value) for value in (*args, *kwargs.values())]
            key = f"{caller}: {choose.__name__}({', '.join(words)})"
            return cast(R, _replaced(tile, key, fields))

        return chosen

    return decorate


def _word(value: Any) -> str:
    """An argument as a part of a key: of a tensor its dtype and last dimension."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {value.shape[-1]}"
    return str(value)


def _fields(tile: Any) -> Tile:
    fields = dict(tile) if isinstance(tile, Mapping) else tile._asdict()
    return {name: value for name, value in fields.items() if value is not None}


def _replaced(tile: Any, key: str, fields: tuple[str, ...]) -> Any:
    """The tile with what was found for this key."""
    plain = _fields(tile)
    if _observer is not None:
        _observer(key, plain, tuple(name for name in fields if name in plain))
    found = _trial.get(key)
    if found is None and _winners and _dispatch._cpu_runner is None:
        found = _winners.get(_device(torch.cuda.current_device()), {}).get(key)
    if found is None:
        return tile
    changed = {name: found[name] for name in fields if name in found}
    return {**plain, **changed} if isinstance(tile, Mapping) else tile._replace(**changed)


@functools.cache
def _device(index: int) -> str:
    return torch.cuda.get_device_name(index)


@contextmanager
def trial(tiles: Mapping[str, Tile]) -> Iterator[None]:
    """Takes these tiles inside the block, by key; for measuring them."""
    global _trial
    before, _trial = _trial, tiles
    try:
        yield
    finally:
        _trial = before


@contextmanager
def observed(seen: Seen) -> Iterator[None]:
    """Calls ``seen`` with key, tile and changeable fields for each choice inside the block."""
    global _observer
    before, _observer = _observer, seen
    try:
        yield
    finally:
        _observer = before


# --- the cache ----------------------------------------------------------------------------------


def cache_file() -> Path:
    """``tiles.json`` in ``$FASTLM_CACHE_DIR``, or in fastlm's folder of the user's cache."""
    folder = os.environ.get("FASTLM_CACHE_DIR")
    if folder:
        return Path(folder) / "tiles.json"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "fastlm" / "tiles.json"


def kernels_hash() -> str:
    """Of the sources of this package: another source may want other tiles."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def driver_version() -> str:
    """Of NVIDIA's kernel module, as it says itself; it touches no device."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else "unknown"


def key_of(device: str) -> dict[str, str]:
    """What winners on this device hold for."""
    return {
        "device": device,
        "driver": driver_version(),
        "triton": triton.__version__,
        "kernels": kernels_hash(),
    }


def read_entries(file: Path) -> list[dict[str, Any]]:
    """What the file holds: keys as of ``key_of`` beside their ``tiles``.

    Raises:
        ValueError: Not such a file.
    """
    try:
        entries = json.loads(file.read_text())
        for entry in entries:
            for found in entry["tiles"].values():
                if not all(isinstance(value, int) for value in found["tile"].values()):
                    raise ValueError("a tile is not of integers")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not a file of fastlm bench tune: {error}") from None
    return entries


def keep(device: str, tiles: Mapping[str, Mapping[str, Any]]) -> Path:
    """Adds winners to the user's cache, over older ones of the same keys.

    Args:
        device: Its name.
        tiles: By key, each with its ``tile``, and what was measured.
    """
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = read_entries(file) if file.is_file() else []
    mine = key_of(device)
    others = [e for e in entries if any(e[name] != value for name, value in mine.items())]
    old = [e["tiles"] for e in entries if e not in others]
    merged = {key: found for part in (*old, tiles) for key, found in part.items()}
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps([*others, {**mine, "tiles": merged}], indent=1) + "\n")
    os.replace(part, file)
    return file


def load() -> None:
    """Reads the winners that hold for this driver, Triton and package."""
    _winners.clear()
    file = cache_file()
    if not file.is_file():
        return
    try:
        entries = read_entries(file)
    except ValueError as error:
        warnings.warn(f"{error}; the tiles that ship are used", stacklevel=2)
        return
    for entry in entries:
        if entry == {**key_of(entry["device"]), "tiles": entry["tiles"]}:
            _winners[entry["device"]] = {k: found["tile"] for k, found in entry["tiles"].items()}


load()
