"""Several processes under torchrun: who is who, and models spread over them by PyTorch's means."""

import os
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


def spread(model: GPT, where: World, how: Literal["ddp", "fsdp"]) -> nn.Module:
    """The model over all processes: a copy each (DDP), or a share of every tensor each (FSDP2)."""
    if where.size == 1:
        return model
    if how == "ddp":
        return DistributedDataParallel(model)
    for block in model.h:
        fully_shard(block)
    return fully_shard(model)


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
