"""Several processes under torchrun: who is who, and models spread over them by PyTorch's means."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from .model import GPT
from .ring import RingAttention


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        device: Where its tensors live.
        rank: Its number.
        size: How many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Returns once every process is here."""
        if self.size > 1:
            dist.barrier()


def pick_device(name: str | None) -> torch.device:
    """A device by its name; None: the GPU if there is one.

    Raises:
        ValueError: No device of that name here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be one of cpu, cuda, cuda:N; got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is not here: {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be one of cpu, cuda, cuda:N; got {name!r}")
    return device


@contextmanager
def world(device_name: str | None = None) -> Iterator[World]:
    """The process group that torchrun's variables tell of, or this process alone."""
    device = pick_device(device_name)
    if "RANK" not in os.environ:
        yield World(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


Parallel = Literal["ddp", "fsdp", "context"]


def spread(model: GPT, where: World, how: Parallel) -> nn.Module:
    """The model over all processes.

    Args:
        model: On its device.
        where: This process.
        how: ``"ddp"``: a copy each, fed different sequences. ``"fsdp"``: a share of every tensor
            each (FSDP2). ``"context"``: a copy each, fed a slice of every sequence, with ring
            attention between them.

    Raises:
        ValueError: A model that cannot be spread so.
    """
    if where.size == 1:
        return model
    if how == "fsdp":
        for block in model.h:
            fully_shard(block)
        fully_shard(model)
        return model
    if how == "context":
        _cut_sequences(model, where)
    with (
        warnings.catch_warnings()
    ):  # torch 2.13 renames an argument that 2.11 knows by the old name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def _cut_sequences(model: GPT, where: World) -> None:
    """Has the model take this process's slice of each sequence."""
    config = model.config
    if config.block_size % where.size:
        raise ValueError(
            f"--block-size must be a multiple of {where.size} processes to be cut over them; "
            f"got {config.block_size}"
        )
    if config.window is not None:
        raise ValueError("GPTConfig: window must be None where sequences are cut over processes")
    ring = dist.new_group(list(range(where.size)))  # its messages pass beside the gradients'
    model.ops.flash_attention = RingAttention(model.ops.flash_attention, ring)
    model.begin = where.rank * config.block_size // where.size


def inner(model: nn.Module) -> GPT:
    """The model that ``spread`` was given."""
    return model.module if isinstance(model, DistributedDataParallel) else model  # type: ignore[return-value]


@contextmanager
def gradients_wait(model: nn.Module, wait: bool) -> Iterator[None]:
    """Inside the block gradients stay where they are: only the last micro-batch sends them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not wait)
        yield
    elif isinstance(model, DistributedDataParallel) and wait:
        with model.no_sync():
            yield
    else:
        yield
