"""A training step and the generation of text by whole models, fused against PyTorch.

Contenders are the same model with the same parameters: ``fused`` kernels and optimizer;
``eager``, its own op for each and its own fused AdamW; ``compiled``, that through Inductor.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import AdamW, backend

from .suite import Bench, Peaks, measured_peaks, noise_flags, timed_report, times_of
from .table import in_a_line
from .timing import Call, measure

QUICK = ("gpt2",)
FULL = ("gpt2", "gpt2-medium", "smollm2-135m")
CONTENDERS = ("fused", "eager", "compiled")


@dataclass(frozen=True)
class Workload:
    """A model and what it is fed.

    Attributes:
        preset: Of ``fastlm.lm.PRESETS``.
        batch: Sequences.
        length: Tokens each; in generation those of the prompt.
        dtype: That it computes in; parameters of a training step are float32.
    """

    preset: str
    batch: int
    length: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def label(self) -> str:
        """In words: ``gpt2 bfloat16 B=8 T=1024``."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.preset} {dtype} B={self.batch} T={self.length}"


def workloads(suite: str, batch: int = 8, length: int = 1024) -> list[Workload]:
    """The models of a suite: ``quick`` or ``full``."""
    return [Workload(name, batch, length) for name in (QUICK if suite == "quick" else FULL)]


def _model(work: Workload, contender: str, device: Bench) -> Any:
    """The model with the parameters that every contender has."""
    from fastlm.lm import GPT, GPTConfig

    torch.manual_seed(0)
    most = max(work.length + NEW, GPTConfig.preset(work.preset).block_size)
    config = GPTConfig.preset(work.preset, block_size=most, dropout=0.0)
    model = GPT(config, ops="eager" if contender == "exact" else "fused")
    return model.to(device.place)


def _by(contender: str) -> AbstractContextManager[Any]:
    """PyTorch's own op for each call of a contender but ``fused``."""
    return nullcontext() if contender == "fused" else backend("torch")


@contextmanager
def _precision(work: Workload, device: Bench) -> Iterator[None]:
    if work.dtype == torch.float32:
        yield
    else:
        with torch.autocast(device.place.type, dtype=work.dtype):
            yield


def _tokens(model: Any, work: Workload, device: Bench, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (work.batch, length)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    return ids.to(device.place)


# --- training -----------------------------------------------------------------------------------


def training_step(work: Workload, contender: str, device: Bench) -> tuple[Any, Call]:
    """A model, and a call that trains it for a step: forward, backward, optimizer."""
    model = _model(work, contender, device)
    ids = _tokens(model, work, device, work.length + 1)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    kind: Any = AdamW if contender == "fused" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    run = torch.compile(model, dynamic=False) if contender == "compiled" else model

    def step() -> None:
        with _by(contender):
            with _precision(work, device):
                _, loss = run(inputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return model, step


_CHECKED = (1, 64)  # sequences and tokens of the check, which also runs in float64


def gradients(work: Workload, contender: str, device: Bench, exact: bool = False) -> Tensor:
    """The loss and all gradients of one batch as one float64 vector.

    Args:
        work: The model.
        contender: Whose kernels.
        device: Where to run.
        exact: In float64, eager.
    """
    model = _model(work, "exact" if exact else contender, device)
    if exact:
        model = model.double()
    small = Workload(work.preset, *_CHECKED, torch.float32 if exact else work.dtype)
    ids = _tokens(model, small, device, small.length + 1)
    with _by("exact" if exact else contender):
        with _precision(small, device):
            _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
    found = [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return torch.cat([loss.detach().double().reshape(1), *(g.double().flatten() for g in found)])


def _distance(got: Tensor, exact: Tensor) -> float:
    if got.shape != exact.shape:
        return float("inf")
    return ((got - exact).norm() / exact.norm()).item()


# --- generation ---------------------------------------------------------------------------------


NEW = 64  # tokens that each sequence grows by


def generation(work: Workload, contender: str, device: Bench) -> tuple[Any, Call]:
    """A model, and a call that continues each prompt by ``NEW`` tokens, the likeliest each."""
    model = _model(work, contender, device).to(work.dtype).eval()
    prompts = _tokens(model, work, device, work.length)

    def grow() -> list[Tensor]:
        with _by(contender):
            return model.generate(prompts, NEW, temperature=0.0)

    return model, grow


def cached_logits(work: Workload, contender: str, device: Bench) -> Tensor:
    """The logits of one token behind a cache that holds all tokens before it."""
    from fastlm.lm import KVCache

    model = _model(work, contender, device).to(work.dtype).eval()
    ids = _tokens(model, work, device, work.length + 1)
    cache = KVCache(model.config, work.batch, work.length + 1, device.place, work.dtype)
    with torch.no_grad(), _by(contender):
        model(ids[:, :-1], cache=cache)
        return model(ids[:, -1:], cache=cache)[0]


def last_logits(work: Workload, device: Bench) -> Tensor:
    """What ``cached_logits`` should be: the same token's logits in float64, without a cache."""
    model = _model(work, "exact", device).double().eval()
    ids = _tokens(model, work, device, work.length + 1)
    with torch.no_grad(), _by("exact"):
        return model.lm_head(model.hidden(ids)[:, -1:])


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
        "case": work.label + ("" if training else f" and {NEW} new"),
        "size": {"B": str(work.batch), "T": str(work.length)},
        "dtype": str(work.dtype).removeprefix("torch."),
        "mode": mode,
        "cache": "warm",
    }
    rows, calls, models = {}, {}, {}
    errors: dict[str, float] = {}
    exact = gradients(work, "eager", device, exact=True) if training else last_logits(work, device)
    for name in wanted:
        if name == "compiled" and not training:
            continue  # generation has its own graphs
        try:
            look = gradients if training else cached_logits
            errors[name] = _distance(look(work, name, device).double(), exact)
            models[name], calls[name] = (training_step if training else generation)(
                work, name, device
            )
            calls[name]()
            device.synchronize()
        except Exception as error:  # a contender that fails must not end the run
            failed = {"status": "failed", "reason": in_a_line(error)}
            rows[name] = {**base, "contender": name, **failed}
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
            tokens = work.batch * (work.length if training else NEW)
            row["tokens_per_second"] = tokens / timing.median
            if training:
                flops = models[name].flops_per_token(work.length) * tokens
                row["tflops"] = flops / timing.median / 1e12
                row["roofline"] = flops / timing.median / peaks.flops[row["dtype"]]
        rows[name] = row
    return list(rows.values())


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
    peaks = measured_peaks(device)
    rows: list[dict[str, Any]] = []
    share = budget / max(1, len(works) * len(modes))
    for work in works:
        for mode in modes:
            progress(f"{work.label} {mode}")
            rows += _rows(work, mode, device, peaks, share, wanted or CONTENDERS)
    return timed_report(device, peaks, rows, started)
