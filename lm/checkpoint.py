"""Checkpoints that a kill at any instant cannot spoil: safetensors and JSON, checksummed.

A run folder holds ``checkpoints/000500/`` for step 500, written under another name, synchronised
and then renamed, so that a folder of that name is whole. It holds the model as a Hugging Face
folder, the optimizer in ``optimizer/`` by PyTorch's distributed checkpointing (any number of
processes can read what any other number wrote), and the rest in ``state.json``. No pickle is read.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from . import hf
from .atomic import sha256, sync
from .config import read_json
from .parallel import World, inner

Facts = dict[str, Any]
Saver = Callable[[Any, Path, dict[str, Tensor]], None]  # of a model, by its whole weights
_SUMS, _PARAMETERS = "checksums.json", "parameters.safetensors"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def write(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: Facts,
    world: World,
    save_model: Saver = hf.save,
) -> Path:
    """Saves a checkpoint, every process its share; gives its folder.

    Args:
        run: The run folder.
        step: Steps taken.
        model: The model, spread over the processes or not.
        optimizer: Its optimizer.
        facts: Plain data to keep beside them.
        world: This process.
        save_model: Writes the model's files.
    """
    folder = run / "checkpoints" / f"{step:06d}"
    part = folder.with_name(f"{folder.name}.part")
    if world.main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    world.wait()
    weights = whole_weights(model)
    with _alone(world) as no_dist:
        writer = HuggingFaceStorageWriter(str(part / "optimizer"), save_distributed=True)
        tensors = _tensors(_optimizer_state(model, optimizer))
        dcp.save(tensors, storage_writer=writer, no_dist=no_dist)
    if world.main:
        save_model(inner(model), part, weights)
        (part / "state.json").write_text(json.dumps({"step": step, **facts}, indent=1))
        files = sorted(p for p in part.rglob("*") if p.is_file())
        sums = {p.relative_to(part).as_posix(): sha256(p) for p in files}
        (part / _SUMS).write_text(json.dumps(sums, indent=1))
        for path in (*part.rglob("*"), part):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        sync(folder.parent)
    world.wait()
    return folder


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The weights of a model spread over processes, which all call this; only the main one's."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=whole)


def save_parameters(model: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
    """Writes a model of any kind, adapters and heads included, by its own names."""
    from safetensors.torch import save_file

    own = {name: weights[name].contiguous() for name, _ in model.named_parameters()}  # tied: once
    save_file(own, folder / _PARAMETERS)


def load_parameters(model: nn.Module, folder: Path) -> None:
    """Gives a model what ``save_parameters`` wrote of one like it.

    Raises:
        ValueError: It was of a model of another shape.
    """
    from safetensors.torch import load_file

    found = load_file(folder / _PARAMETERS)
    own = {name: p.shape for name, p in model.named_parameters()}
    if {name: t.shape for name, t in found.items()} != own:
        raise ValueError(f"{folder / _PARAMETERS} must hold the model of --checkpoint; it differs")
    model.load_state_dict(found, strict=False)  # it has a tied weight under one of its names


def publish(run: Path, folder: Path) -> None:
    """Puts a checkpoint's model files at the top of the run folder, each in one rename."""
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        if path.name in (_SUMS, "state.json"):
            continue
        part = run / f".{path.name}.part"
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:  # a file system without hard links
            shutil.copy2(path, part)
        part.replace(run / path.name)
    sync(run)


def remove_old(run: Path, keep: int) -> None:
    """Removes all checkpoints but the newest ``keep``."""
    for old in steps(run)[:-keep]:
        shutil.rmtree(run / "checkpoints" / f"{old:06d}")


def steps(run: Path) -> list[int]:
    """The steps that have a whole checkpoint, oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit())


def newest(run: Path) -> tuple[Path, Facts]:
    """The newest checkpoint of a run, and the plain data in it, ``step`` among them.

    Raises:
        ValueError: There is none, or its files are not as they were written.
    """
    found = steps(run)
    if not found:
        raise ValueError(f"{run} must hold a checkpoint to go on from; it has none")
    folder = run / "checkpoints" / f"{found[-1]:06d}"
    verify(folder)
    return folder, read_json(folder / "state.json")


def read_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> None:
    """Gives the optimizer the states of a checkpoint."""
    have = _optimizer_state(model, optimizer)
    tensors = _tensors(have)
    with _alone(world) as no_dist:
        reader = HuggingFaceStorageReader(str(folder / "optimizer"))
        dcp.load(tensors, storage_reader=reader, no_dist=no_dist)
    set_optimizer_state_dict(model, optimizer, have | tensors, options=_FLAT)


def verify(folder: Path) -> None:
    """Raises ValueError where a file of a checkpoint is missing or has other contents."""
    for name, digest in read_json(folder / _SUMS).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if sha256(path) != digest:
            raise ValueError(f"{path} is not what was saved: its checksum differs")


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """States and settings by the parameter's name."""
    return dict(get_optimizer_state_dict(model, optimizer, options=_FLAT))


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The states. Learning rates and the like come from the run's settings."""
    return {name: t for name, t in state.items() if isinstance(t, Tensor)}


@contextlib.contextmanager
def _alone(world: World) -> Iterator[bool]:
    """Whether there is no process group; PyTorch's warning that there is none is kept back."""
    with warnings.catch_warnings():
        if world.size == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield world.size == 1
