"""The training loop, one for pre-training and fine-tuning."""

import dataclasses
import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastlm import kernels

from . import checkpoint, hf
from .config import read_json
from .model import GPT
from .options import from_fields, option
from .parallel import World, gradients_wait, inner, spread
from .run import Progress, Record, Run

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class FitConfig:
    """How a model is trained, whatever the task."""

    steps: int = option(600, "optimizer steps")
    batch_size: int = option(12, "sequences a step, over all processes and micro-batches")
    micro_batch_size: int | None = option(None, "sequences at a time in each process (default all)")
    lr: float = option(1e-3, "highest learning rate")
    min_lr: float | None = option(None, "learning rate at the end (default lr / 10)")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = option(
        "cosine", "how the rate falls; wsd: constant, then linear over the last fifth"
    )
    warmup: int = option(50, "steps of linear warm-up")
    weight_decay: float = option(0.1, "of matrices and tables")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.99, "AdamW")
    grad_clip: float = option(1.0, "largest norm of all gradients; 0: none")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "of matrix products, by autocast"
    )
    ops: Literal["fused", "eager"] = option("fused", "kernels, or reference PyTorch")
    device: str | None = option(None, "cpu, cuda or cuda:N (default: the GPU if there is one)")
    parallel: Literal["ddp", "fsdp", "context"] = option(
        "ddp", "under torchrun, each process has a copy, a share (FSDP2), or a slice of sequences"
    )
    compile: bool = option(False, "torch.compile the blocks")
    checkpoint_activations: bool = option(False, "recompute blocks in the backward: less memory")
    seed: int = option(1337, "of weights, data order and dropout")
    save_every: int = option(200, "steps between checkpoints; the last step always makes one")
    keep: int = option(2, "checkpoints to keep")
    eval_every: int = option(100, "steps between evaluations; the last step always has one")
    log_every: int = option(10, "steps between lines of metrics")
    tensorboard: bool = option(False, "write TensorBoard events too (needs tensorboard)")

    def check(self, world_size: int) -> None:
        """Raises ValueError where the numbers make no run."""
        least = {"steps": 1, "batch_size": 1, "save_every": 1, "eval_every": 1, "log_every": 1}
        for name, low in (least | {"keep": 1, "warmup": 0, "lr": 0, "grad_clip": 0}).items():
            if getattr(self, name) < low:
                raise ValueError(f"{_flag(name)} must be at least {low}; got {getattr(self, name)}")
        rows = self.micro(world_size) * self.groups(world_size)
        if self.batch_size % rows:
            raise ValueError(
                f"--batch-size must be a multiple of {rows}, the sequences of a micro-batch in "
                f"{self.groups(world_size)} processes; got {self.batch_size}"
            )

    def groups(self, world_size: int) -> int:
        """How many processes have sequences of their own."""
        return 1 if self.parallel == "context" else world_size

    def micro(self, world_size: int) -> int:
        """Sequences of a micro-batch."""
        return self.micro_batch_size or max(1, self.batch_size // self.groups(world_size))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# What may change when a run goes on: nothing that the mathematics of its steps depends on, but
# their number.
_MAY_CHANGE = {
    "steps", "micro_batch_size", "device", "parallel", "compile", "checkpoint_activations", "ops",
    "save_every", "keep", "eval_every", "log_every", "tensorboard", "score",
}  # fmt: skip
Config = TypeVar("Config", bound=FitConfig)


def settings(kind: type[Config], out: Path, flags: dict[str, Any], resume: bool) -> Config:
    """A run's settings: the flags, over those of the run in ``out`` if that goes on.

    Raises:
        ValueError: A flag that a run may not change on the way.
    """
    if not resume:
        return from_fields(kind, flags)
    before = from_fields(kind, read_json(out / "run.json").get("settings", {}))
    for name, value in flags.items():
        if name not in _MAY_CHANGE and value != getattr(before, name):
            raise ValueError(
                f"{_flag(name)} must stay {getattr(before, name)} when a run goes on; got {value}"
            )
    return dataclasses.replace(before, **flags)


class Task(Protocol):
    """What the loop trains on."""

    def batches(self, step: int) -> Iterable[Batch]:
        """The micro-batches of a step for this process: a pure function of the step."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the losses of a micro-batch."""

    def count(self, batch: Batch) -> int:
        """How many losses that sum has."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures of held-out data, ``val_loss`` among them."""

    def state(self) -> checkpoint.Facts:
        """Plain data that a checkpoint keeps."""

    def restore(self, state: checkpoint.Facts) -> None:
        """Takes it back."""


def learning_rate(step: int, config: FitConfig) -> float:
    """The rate of a step, counted from 0."""
    high, low = config.lr, config.lr / 10 if config.min_lr is None else config.min_lr
    if step < config.warmup:
        return high * (step + 1) / (config.warmup + 1)
    done = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    done = min(1.0, done)
    match config.schedule:
        case "constant":
            return high
        case "linear":
            return high + (low - high) * done
        case "wsd":
            return high + (low - high) * max(0.0, (done - 0.8) / 0.2)
        case _:
            return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """AdamW with decay on matrices and tables alone; fused, clipping inside its step."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in wanted if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in wanted if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    shared: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2)}
    if config.ops == "eager":
        return torch.optim.AdamW(groups, **shared)
    return kernels.AdamW(groups, max_grad_norm=config.grad_clip or None, **shared)


def _mixed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for each step and process."""
    return (
        seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    ) % 2**63


class Loop:
    """Takes the steps of a run.

    A step depends on the weights, the optimizer's state and its number: on no generator's past.

    Args:
        model: The model, spread over the processes.
        config: Settings.
        task: What it learns.
        world: This process.
        save_model: Writes the model's files into a checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FitConfig,
        task: Task,
        world: World,
        save_model: checkpoint.Saver = hf.save,
    ):
        self.save_model = save_model
        self.model, self.config, self.task, self.world = model, config, task, world
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
        self.step = 0
        # The first step whose loss was not finite, or -1. On the device: asking would wait for it.
        self.broken_at = torch.full((), -1, device=world.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Products in ``dtype``."""
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.world.device.type, getattr(torch, self.config.dtype))

    def take_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; its mean loss and the norm of its gradients, on the device."""
        config, world = self.config, self.world
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        torch.manual_seed(_mixed(config.seed, self.step, world.rank))  # dropout's, of this step
        batches = list(self.task.batches(self.step))
        counts = torch.tensor(float(sum(map(self.task.count, batches))))
        count = world.total(counts.to(world.device)).clamp(min=1)
        total = torch.zeros((), device=world.device)
        for i, batch in enumerate(batches):
            moved = {k: v.to(world.device, non_blocking=True) for k, v in batch.items()}
            with gradients_wait(self.model, i + 1 < len(batches)):
                with self.autocast():
                    loss = self.task.loss(self.model, moved) / count
                self.scaler.scale(loss * world.size).backward()  # processes average gradients
            total += loss.detach()
        loss = world.total(total)
        broken = (self.broken_at < 0) & ~loss.isfinite()
        self.broken_at = torch.where(broken, self.step, self.broken_at)
        norm = self._update()
        self.step += 1
        return loss, norm

    def _update(self) -> Tensor:
        clip = self.config.grad_clip
        if isinstance(self.optimizer, kernels.AdamW):
            self.scaler.step(self.optimizer)
            norm = self.optimizer.last_grad_norm
        else:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip) if clip else None
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if norm is None:
            return torch.zeros(())
        return norm.full_tensor() if isinstance(norm, DTensor) else norm.detach()

    def check_finite(self) -> None:
        """Raises ArithmeticError where a loss was not finite, and names the step."""
        step = int(self.broken_at)
        if step >= 0:
            raise ArithmeticError(
                f"the loss of step {step + 1} is not finite; no checkpoint was written since. "
                "Try a lower --lr, --dtype float32, or --ops eager to see whether a kernel is at "
                "fault"
            )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The task's held-out figures."""
        self.model.eval()
        with self.autocast():
            found = self.task.evaluate(self.model)
        self.model.train()
        return found

    def save(self, folder: Path) -> Path:
        """Writes a checkpoint into a run folder; gives the checkpoint's."""
        facts = {"scaler": self.scaler.state_dict(), "task": self.task.state()}
        return checkpoint.write(
            folder, self.step, self.model, self.optimizer, facts, self.world, self.save_model
        )

    def restore(self, folder: Path, facts: checkpoint.Facts) -> None:
        """Goes on from a checkpoint; the model has its weights already."""
        checkpoint.read_optimizer(folder, self.model, self.optimizer, self.world)
        self.scaler.load_state_dict(facts["scaler"])
        self.task.restore(facts["task"])
        self.step = facts["step"]


def fit(loop: Loop, run: Run, tokens_a_step: int) -> Record:
    """Takes the steps that are left, with metrics, evaluations and checkpoints; the last figures.

    Raises:
        ArithmeticError: A loss was not finite.
    """
    config, world, model = loop.config, loop.world, inner(loop.model)
    flops = model.flops_per_token(model.config.block_size)
    progress = Progress(config.steps, flops, world)
    last: Record = {}

    def note(record: Record) -> None:
        run.log({"step": loop.step, **record})
        last.update({"step": loop.step, **record})

    clock = Clock()
    while loop.step < config.steps:
        rate = learning_rate(loop.step, config)
        loss, norm = loop.take_step()
        clock.steps += 1
        final = loop.step == config.steps
        if loop.step % config.log_every == 0 or final or loop.step == 1:
            loop.check_finite()
            speed = tokens_a_step / (clock.lap() / 1000)
            note(
                {"loss": loss.item(), "lr": rate, "grad_norm": norm.item()}
                | {"ms_per_step": clock.ms, "tokens_per_second": speed}
                | progress.mfu(speed / world.size)
            )
            progress.show(last)
        if loop.step % config.eval_every == 0 or final:
            loop.check_finite()
            found = loop.evaluate()
            note(found)
            figures = "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in found.items())
            progress.say(f"step {loop.step}/{config.steps}  {figures}")
            clock.restart()
        if loop.step % config.save_every == 0 or final:
            loop.check_finite()
            run.save(loop)
            clock.restart()
    return last


class Clock:
    """Milliseconds a step since the last lap; evaluations and checkpoints are left out."""

    def __init__(self) -> None:
        self.ms = 0.0
        self.restart()

    def restart(self) -> None:
        """Counts from here."""
        self.since, self.steps = time.perf_counter(), 0

    def lap(self) -> float:
        """Milliseconds a step of the lap that ends here. The caller has waited for the device."""
        if self.steps:
            self.ms = 1000 * (time.perf_counter() - self.since) / self.steps
        self.restart()
        return self.ms


def prepare(model: GPT, config: FitConfig, world: World) -> nn.Module:
    """The model on its device, with what the settings ask for, spread over the processes."""
    model.to(world.device)
    model.checkpoint_activations = config.checkpoint_activations
    if config.compile:
        for block in model.h:
            block.compile()
    return spread(model.train(), world, config.parallel)
