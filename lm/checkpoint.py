"""Checkpoints that a kill at any instant cannot spoil: safetensors and JSON, checksummed.

A run folder holds ``checkpoints/000500/`` for step 500, written under another name, synchronised
and then renamed, so that a folder of that name is whole. Only tensors and JSON are read, never
pickles.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_SUMS = "checksums.json"


@dataclass
class State:
    """What a training run needs beside its weights to go on as if it had never stopped.

    Attributes:
        step: Steps taken.
        tensors: Optimizer states by name.
        facts: The rest, as plain data.
    """

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def write(run: Path, state: State, save_model: Callable[[Path], None], keep: int) -> Path:
    """Saves a checkpoint, then removes all but the newest ``keep``; gives its folder."""
    folder = run / "checkpoints" / f"{state.step:06d}"
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_model(part)
    save_file(state.tensors, part / "state.safetensors")
    (part / "state.json").write_text(json.dumps({"step": state.step, **state.facts}, indent=1))
    sums = {p.name: _digest(p) for p in sorted(part.iterdir())}
    (part / _SUMS).write_text(json.dumps(sums, indent=1))
    for path in (*part.iterdir(), part):
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    _sync(folder.parent)
    for old in steps(run)[:-keep]:
        shutil.rmtree(run / "checkpoints" / f"{old:06d}")
    return folder


def publish(run: Path, folder: Path) -> None:
    """Puts a checkpoint's model files at the top of the run folder, each in one rename."""
    for path in sorted(folder.iterdir()):
        if path.name in (_SUMS, "state.json", "state.safetensors"):
            continue
        part = run / f".{path.name}.part"
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:  # a file system without hard links
            shutil.copy2(path, part)
        part.replace(run / path.name)
    _sync(run)


def steps(run: Path) -> list[int]:
    """The steps that have a whole checkpoint, oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit())


def read(run: Path) -> tuple[Path, State]:
    """The newest checkpoint of a run.

    Raises:
        ValueError: There is none, or its files are not as they were written.
    """
    found = steps(run)
    if not found:
        raise ValueError(f"resume: {run} must hold a checkpoint; it has none")
    folder = run / "checkpoints" / f"{found[-1]:06d}"
    verify(folder)
    facts = _json(folder / "state.json")
    try:
        tensors = load_file(folder / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"resume: {folder / 'state.safetensors'} cannot be read; {error}"
        ) from None
    return folder, State(facts.pop("step"), tensors, facts)


def verify(folder: Path) -> None:
    """Raises ValueError where a file of a checkpoint is missing or has other contents."""
    for name, digest in _json(folder / _SUMS).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint: {path} is missing")
        if _digest(path) != digest:
            raise ValueError(f"checkpoint: {path} is not what was saved; its checksum differs")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read; {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"checkpoint: {path} must hold a JSON object")
    return found


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- optimizers ---------------------------------------------------------------------------------


def flattened(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors by name, and the rest as plain data."""
    tensors, rest = {}, {}
    for parameter, fields in state_dict["state"].items():
        for name, value in fields.items():
            key = f"{parameter}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value.detach().cpu().contiguous()
            else:
                rest[key] = value
    groups = [dict(g) for g in state_dict["param_groups"]]
    return tensors, {"state": rest, "param_groups": groups}


def unflattened(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``flattened``."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *rest["state"].items()):
        parameter, name = key.split(".", 1)
        state.setdefault(int(parameter), {})[name] = value
    groups = [
        {**g, "betas": tuple(g["betas"])} if "betas" in g else g for g in rest["param_groups"]
    ]
    return {"state": state, "param_groups": groups}
