"""The folder that a run leaves behind, and what a person sees of the run meanwhile.

A run folder holds ``model.safetensors`` and ``config.json`` (a Hugging Face folder), checkpoints to
go on from, ``run.json`` (settings and versions), ``metrics.jsonl`` (a record a line) and
``loss.svg``. A run can be killed at any instant.
"""

import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

import fastlm

from . import checkpoint
from .parallel import World
from .picture import line_chart

if TYPE_CHECKING:
    from .fit import FitConfig, Loop

Record = dict[str, Any]


class Run:
    """A run's folder.

    Args:
        folder: Where; made if it is not there.
        config: The settings, written to ``run.json``.
        facts: What else ``run.json`` tells.
        world: Only the main process writes.
    """

    def __init__(self, folder: Path, config: "FitConfig", facts: Record, world: World):
        self.folder, self.config, self.world = folder, config, world
        self.writer = None
        if not world.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"settings": dataclasses.asdict(config), **facts, **versions()}
        (folder / "run.json").write_text(json.dumps(settings, indent=1) + "\n")
        if config.tensorboard:
            self.writer = _tensorboard(folder)

    def forget_after(self, step: int) -> None:
        """Drops records of steps that will be taken again."""
        path = self.folder / "metrics.jsonl"
        if self.world.main and path.exists():
            kept = [json.dumps(r) + "\n" for r in read_metrics(self.folder) if r["step"] <= step]
            part = path.with_suffix(".part")
            part.write_text("".join(kept))
            part.replace(path)

    def log(self, record: Record) -> None:
        """Appends a record to ``metrics.jsonl``."""
        if not self.world.main:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.writer is not None:
            for name, value in record.items():
                if name != "step":
                    self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()  # a kill loses nothing logged

    def save(self, loop: "Loop") -> None:
        """Writes a checkpoint, the model at the top of the folder, and the picture."""
        folder = loop.save(self.folder)
        if self.world.main:
            checkpoint.publish(self.folder, folder)
            checkpoint.remove_old(self.folder, self.config.keep)
            draw(self.folder)
        self.world.wait()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the package tensorboard: pip install it") from None
    return SummaryWriter(str(folder))


def versions() -> Record:
    """What a run's figures depend on beside its settings."""
    return {
        "fastlm": fastlm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def read_metrics(folder: Path) -> list[Record]:
    """The records of a run; a last line that a kill cut short is left out."""
    records = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def draw(folder: Path) -> None:
    """Draws ``loss.svg`` from the metrics."""
    records = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    lines = {
        name: [(r["step"], r[key]) for r in records if key in r]
        for name, key in (("training", "loss"), ("held out", "val_loss"))
    }
    if any(lines.values()):
        title = f"Loss of {folder.name}"
        (folder / "loss.svg").write_text(line_chart(title, "step", "nats a token", lines))


# --- progress -----------------------------------------------------------------------------------


class Progress:
    """What a person sees: a line that rewrites itself on a terminal, a line a record elsewhere."""

    def __init__(self, steps: int, flops_a_token: int, world: World):
        self.steps, self.flops, self.main = steps, flops_a_token, world.main
        self.peak = peak_flops(world.device)
        self.live = sys.stdout.isatty()

    def show(self, record: Record) -> None:
        """Prints a record."""
        if not self.main:
            return
        left = (self.steps - record["step"]) * record["ms_per_step"] / 1000
        text = (
            f"step {record['step']}/{self.steps}  loss {record['loss']:.4f}  "
            f"lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"{record['ms_per_step']:.1f} ms/step"
        )
        if "mfu" in record:
            text += f"  MFU {100 * record['mfu']:.1f} %"
        text += f"  {_clock(left)} left"
        print(f"\r\033[K{text}" if self.live else text, end="" if self.live else "\n", flush=True)

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        if not self.main:
            return
        print(f"\r\033[K{text}" if self.live else text, flush=True)

    def mfu(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOPs as a share of what the device's data sheet promises, where that is known."""
        return {"mfu": tokens_per_second * self.flops / self.peak} if self.peak else {}


# Dense bfloat16 FLOP/s of the tensor cores, from NVIDIA's data sheets.
_PEAKS = {
    "B200": 2250e12, "B100": 1800e12, "H200": 989.4e12, "H100 PCIe": 756e12, "H100": 989.4e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A6000": 154.8e12, "A10": 125e12,
    "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its name; None where nobody wrote it down."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), None)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
