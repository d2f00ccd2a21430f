"""A training step and the generation of text by whole models, fused against PyTorch and peers.

Contenders hold the same parameters: ``fused`` kernels and optimizer; ``eager``, PyTorch's own op
for each and its own fused AdamW; ``compiled``, that through Inductor; ``transformers``' model; and
nanoGPT's, from a clone of it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import backend

from .model_contenders import GREEDY, Contender, Draw, Ours, contender
from .suite import Bench, Peaks, measured_peaks, noise_flags, timed_report, times_of
from .table import in_a_line
from .timing import Call, measure

QUICK = ("gpt2",)
FULL = ("gpt2", "gpt2-medium", "smollm2-135m")
CONTENDERS = ("fused", "eager", "compiled", "transformers")


@dataclass(frozen=True)
class Workload:
    """A model and what it is fed.

    Attributes:
        preset: Of ``fastlm.lm.PRESETS``.
        batch: Sequences.
        length: Tokens each; in generation those of the prompt.
        dtype: That it computes in; parameters of a training step are float32.
        new: Tokens that generation adds to each.
        draw: How it chooses them.
        changes: Fields of the preset's config in place of its own.
        nanogpt: A clone of nanoGPT, for the contender of that name.
    """

    preset: str
    batch: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    new: int = 64
    draw: Draw = GREEDY
    changes: Mapping[str, Any] = field(default_factory=dict)
    nanogpt: Path | None = None

    @property
    def label(self) -> str:
        """In words: ``gpt2 bfloat16 B=8 T=1024``."""
        dtype = str(self.dtype).removeprefix("torch.")
        changes = "".join(f" {name}={value}" for name, value in self.changes.items())
        return f"{self.preset}{changes} {dtype} B={self.batch} T={self.length}"

    @property
    def growth(self) -> str:
        """What generation does, in words."""
        if not self.draw.temperature:
            return f"{self.label} and {self.new} new"
        settings = [f"temperature={self.draw.temperature:g}"]
        settings += [f"top_k={self.draw.top_k}"] * bool(self.draw.top_k)
        return f"{self.label} and {self.new} new, {' '.join(settings)}"

    def config(self) -> Any:
        """The model's; its ``block_size`` holds prompt and new tokens unless ``changes`` say it."""
        from fastlm.lm import GPTConfig

        changes = {"dropout": 0.0, **self.changes}
        if "block_size" not in changes:
            own = GPTConfig.preset(self.preset).block_size
            changes["block_size"] = max(self.length + self.new, own)
        return GPTConfig.preset(self.preset, **changes)


def _model(work: Workload, name: str, device: Bench, dtype: torch.dtype) -> Contender:
    """A contender with the parameters that all have, made in float32."""
    from fastlm.lm import GPT

    torch.manual_seed(0)
    model = GPT(work.config(), ops="fused").to(device.place, dtype)
    return contender(name, model, work.nanogpt)


def _exact(work: Workload, device: Bench) -> Ours:
    """What all should compute: the reference in float64."""
    from fastlm.lm import GPT

    torch.manual_seed(0)
    return Ours(GPT(work.config(), ops="eager").to(device.place).double(), fused=False)


def _by(name: str) -> AbstractContextManager[Any]:
    """PyTorch's own op for each call of a contender but ``fused``."""
    return nullcontext() if name == "fused" else backend("torch")


@contextmanager
def _precision(work: Workload, device: Bench) -> Iterator[None]:
    if work.dtype == torch.float32:
        yield
    else:
        with torch.autocast(device.place.type, dtype=work.dtype):
            yield


def _tokens(work: Workload, batch: int, length: int, device: Bench) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, work.config().vocab_size, (batch, length), generator=generator)
    return ids.to(device.place)


# --- training -----------------------------------------------------------------------------------


def training_step(work: Workload, name: str, device: Bench) -> Call:
    """A call that trains a model for a step: forward, backward, optimizer."""
    model = _model(work, name, device, torch.float32)
    ids = _tokens(work, work.batch, work.length + 1, device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    optimizer = model.optimizer()

    def step() -> None:
        with _by(name):
            with _precision(work, device):
                loss = model.loss(inputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


_CHECKED = 64  # tokens of the sequence of the check, which also runs in float64


def gradients(work: Workload, name: str, device: Bench) -> Tensor:
    """The loss and all gradients of one sequence as one float64 vector; "exact": the reference."""
    exact = name == "exact"
    model = _exact(work, device) if exact else _model(work, name, device, torch.float32)
    ids = _tokens(work, 1, min(_CHECKED, work.config().block_size) + 1, device)
    with _by(name):
        with nullcontext() if exact else _precision(work, device):
            loss = model.loss(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
    found = [g.double().flatten() for _, g in sorted(model.gradients().items())]
    return torch.cat([loss.detach().double().reshape(1), *found])


def _distance(got: Tensor, exact: Tensor) -> float:
    if got.shape != exact.shape:
        return float("inf")
    return ((got - exact).norm() / exact.norm()).item()


# --- generation ---------------------------------------------------------------------------------


def generation(work: Workload, name: str, device: Bench) -> Call:
    """A call that continues each prompt by ``work.new`` tokens."""
    model = _model(work, name, device, work.dtype)
    model.module.eval()
    prompts = _tokens(work, work.batch, work.length, device)

    def grow() -> Any:
        with torch.no_grad(), _by(name):
            return model.grow(prompts, work.new, work.draw)

    return grow


def last_logits(work: Workload, name: str, device: Bench) -> Tensor:
    """The logits of one token as generation computes them; "exact": in float64, with no cache."""
    ids = _tokens(work, work.batch, min(work.length + 1, work.config().block_size), device)
    with torch.no_grad(), _by(name):
        if name == "exact":
            exact = _exact(work, device).module.eval()
            return exact.lm_head(exact.hidden(ids)[:, -1:])
        model = _model(work, name, device, work.dtype)
        model.module.eval()
        return model.last_logits(ids)


# --- a run --------------------------------------------------------------------------------------


def _rows(
    work: Workload,
    mode: str,
    device: Bench,
    peaks: Peaks,
    budget: float,
    wanted: Sequence[str],
) -> list[dict[str, Any]]:
    """A row for each contender of one workload, ``mode`` ``"train"`` or ``"decode"``."""
    training = mode == "train"
    base = {
        "op": f"{work.preset} {'training step' if training else 'generation'}",
        "case": work.label if training else work.growth,
        "size": {"B": str(work.batch), "T": str(work.length)},
        "dtype": str(work.dtype).removeprefix("torch."),
        "mode": mode,
        "cache": "warm",
    }
    rows, calls = {}, {}
    errors: dict[str, float] = {}
    look, build = (gradients, training_step) if training else (last_logits, generation)
    exact = look(work, "exact", device)
    for name in wanted:
        if name.endswith("compiled") and not training:
            continue  # generation has its own graphs
        try:
            errors[name] = _distance(look(work, name, device).double(), exact)
            calls[name] = build(work, name, device)
            calls[name]()
            device.synchronize()
        except Exception as error:  # a contender that fails must not end the run
            reason, missing = in_a_line(error), isinstance(error, NotImplementedError)
            why = reason.partition(": ")[2] if missing else reason
            status = "skipped" if missing else "failed"
            rows[name] = {**base, "contender": name, "status": status, "reason": why}
            calls.pop(name, None)
    before = device.clocks()
    timings = measure(calls, device, cold=False, budget=budget) if calls else {}
    throttled = before.throttled or device.clocks().throttled
    for name, timing in timings.items():
        row = {**base, "contender": name, **_judged(name, errors, work.dtype)}
        if row["status"] == "ok":
            row |= times_of(timing)
            row |= {"peak_bytes": device.peak_bytes(calls[name])}
            row["flags"] = noise_flags(timing, throttled)
            tokens = work.batch * (work.length if training else work.new)
            row["tokens_per_second"] = tokens / timing.median
            if training:
                flops = _flops_per_token(work) * tokens
                row["tflops"] = flops / timing.median / 1e12
                row["roofline"] = flops / timing.median / peaks.flops[row["dtype"]]
        rows[name] = row
    return list(rows.values())


def _flops_per_token(work: Workload) -> int:
    from fastlm.lm import GPT

    with torch.device("meta"):
        return GPT(work.config()).flops_per_token(work.length)


def _judged(name: str, errors: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
    """Right is no further from float64 than twice PyTorch in the same dtype, and rounding."""
    error, peer = errors[name], errors.get("eager")
    row: dict[str, Any] = {"status": "ok", "reason": "", "error": error, "error_eager": peer}
    rounding = 16 * torch.finfo(dtype).eps
    if peer is not None and not error <= 2 * peer + rounding:
        allowed = f"{2 * peer + rounding:.2g}"
        row |= {"status": "wrong", "reason": f"off by {error:.2g} of the norm, not {allowed}"}
    return row


def run_models(
    works: Sequence[Workload],
    device: Bench,
    *,
    modes: Sequence[str] = ("train", "decode"),
    wanted: Sequence[str] | None = None,
    budget: float = 60.0,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times whole steps, and gives a report as ``run_suite`` does.

    Args:
        works: Models and what they are fed.
        device: Where to run.
        modes: ``"train"`` and ``"decode"``.
        wanted: Contenders.
        budget: Seconds for all of the timing.
        progress: Told of each workload before it runs.
    """
    started = time.perf_counter()
    peaks = measured_peaks(device, {work.dtype for work in works})
    rows: list[dict[str, Any]] = []
    share = budget / max(1, len(works) * len(modes))
    for work in works:
        for mode in modes:
            progress(f"{work.label} {mode}")
            rows += _rows(work, mode, device, peaks, share, wanted or CONTENDERS)
    return timed_report(device, peaks, rows, started)
