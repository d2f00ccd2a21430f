"""What needs no GPU to be measured: memory kept for the backward, launches, calls, imports."""

import inspect
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.kernels import OPS, AdamW, Op, backend

from .capture import capture_launches
from .cases import CPU, cases_of, hollow, hollow_results, untouched_memory
from .contenders import eager_of
from .model_contenders import transformers_class, transformers_loss
from .table import columns, digits, human


def saved_bytes(call: Callable[..., Any], inputs: dict[str, Any]) -> int:
    """Bytes that the forward keeps for the backward, beyond its inputs and its results.

    Counted exactly, by saved-tensor hooks: each storage once.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = call(**inputs)
    there = [t for t in pytree.tree_leaves((inputs, results)) if isinstance(t, Tensor)]
    for tensor in there:
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(kept.values())


def _typical(op: Op) -> tuple[torch.dtype, Any]:
    dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
    return dtype, op.bench_sizes[len(op.bench_sizes) // 2]


def memory_row(op: Op) -> dict[str, Any]:
    """Bytes kept for the backward, fused and eager, at a typical size; nothing is computed.

    Eager is the reference as PyTorch runs it on CPU tensors, whose choice of kernel and of
    statistics' dtype can differ from CUDA's.
    """
    dtype, size = _typical(op)
    with untouched_memory(), capture_launches(90):
        fused = saved_bytes(op.fused, hollow(op, dtype, size))
    with untouched_memory(), hollow_results():
        eager = saved_bytes(op.reference, hollow(op, dtype, size))
    cases = cases_of(op, 90, sizes=[size], dtypes=[dtype])
    return {
        "op": op.name,
        "case": cases[0].label if cases else "",
        "saved": fused,
        "saved_eager": eager,
        "launches_forward": sum(not case.backward for case in cases),
        "launches_backward": sum(case.backward for case in cases),
    }


def _positional(op: Op, inputs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Inputs as a caller writes them: by place where the op takes them so."""
    by_name = inspect.Parameter.KEYWORD_ONLY
    kinds = {name: p.kind for name, p in inspect.signature(op.fused).parameters.items()}
    places = list(itertools.takewhile(lambda name: name in inputs, kinds))
    first = [name for name in places if kinds[name] is not by_name]
    return [inputs[n] for n in first], {n: v for n, v in inputs.items() if n not in first}


def call_row(op: Op, seconds: float = 1.0, rounds: int = 15) -> dict[str, Any]:
    """Microseconds of a CPU call at the op's smallest size, fused and PyTorch's own, in turns."""
    dtype = torch.float32 if torch.float32 in op.dtypes else op.dtypes[0]
    inputs = op.example(dtype, CPU, **op.sizes[0])
    given = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    args, kwargs = _positional(op, given)
    best = {"fused": float("inf"), "eager": float("inf")}
    calls = 1  # a round; as many as fit once a call's time is known
    for _ in range(1 + rounds):
        for name, function in (("fused", op.fused), ("eager", eager_of(op))):
            started = time.perf_counter()
            for _ in range(calls):
                function(*args, **kwargs)
            best[name] = min(best[name], (time.perf_counter() - started) / calls)
        calls = max(1, int(seconds / rounds / 2 / max(best.values())))
    return {
        "op": op.name,
        "fused_us": round(best["fused"] * 1e6, 2),
        "eager_us": round(best["eager"] * 1e6, 2),
        "over_us": round((best["fused"] - best["eager"]) * 1e6, 2),
    }


class _Operators(TorchDispatchMode):
    """Counts the operators that compute something: no views, no fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Counts one operator and runs it."""
        name = func._schema.name
        if name.startswith("fastlm::"):
            self.ours += 1
        elif not func.is_view and "empty" not in name and name != "aten::detach":
            self.others += 1
        return func(*args, **(kwargs or {}))


def step_row(preset: str) -> dict[str, Any]:
    """Kernel launches and operators of one training step of a model, whatever its batch.

    Launches of ours are counted as host code makes them. PyTorch's operators are counted where the
    step calls them; on a GPU most are a launch, some are several.
    """
    from fastlm.lm import GPT, GPTConfig

    ids = torch.zeros(1, 16, dtype=torch.long)

    def step(kind: Any) -> _Operators:
        torch.manual_seed(0)
        model = GPT(GPTConfig.preset(preset))
        optimizer = kind(model.parameters(), fused=True)
        with _Operators() as operators:
            _, loss = model(ids, ids)
            loss.backward()
            optimizer.step()
        return operators

    with untouched_memory(), capture_launches(90) as capture:
        fused = step(AdamW)
    with backend("torch"):
        eager = step(torch.optim.AdamW)
    return {
        "model": preset,
        "launches": len(capture.launches),
        "other_operators": fused.others,
        "eager_operators": eager.others,
    }


def model_memory_row(preset: str, tokens: int = 1024) -> dict[str, Any]:
    """Bytes a token that a bfloat16 model keeps for its backward, parameters apart; counted.

    By our kernels, by their eager references, and by the same model of ``transformers``: None
    where that is not installed or has none.
    """
    from fastlm.lm import GPT, GPTConfig
    from fastlm.lm.hf_layout import to_fields

    config = GPTConfig.preset(preset)
    ids = torch.zeros(1, tokens, dtype=torch.long)

    def kept(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> int:
        own = [*model.parameters(), *model.buffers()]
        inputs = {"ids": ids, "targets": ids, "own": own}
        return saved_bytes(lambda ids, targets, own: loss(ids, targets), inputs) // tokens

    def ours(ops: Any) -> int:
        model = GPT(config, ops=ops).bfloat16()
        return kept(model, lambda ids, targets: model(ids, targets)[1])

    def theirs() -> int | None:
        try:
            kind = transformers_class(config)
        except NotImplementedError:
            return None
        model = kind(kind.config_class.from_dict(to_fields(config))).bfloat16().train()
        return kept(model, lambda ids, targets: transformers_loss(model, ids, targets))

    with untouched_memory(), hollow_results():
        with capture_launches(90):
            fused = ours("fused")
        found = {"fused": fused, "eager": ours("eager"), "transformers": theirs()}
    return {"model": preset, "tokens": tokens, **found}


def import_seconds(tries: int = 3) -> float:
    """Seconds of ``import fastlm.kernels`` after torch and triton, the best of several."""
    code = (
        "import sys, time, torch, triton; t = time.perf_counter(); import fastlm.kernels; "
        "print(time.perf_counter() - t)"
    )
    found = []
    variables = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # an installed package has bytecode
    for _ in range(tries):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, check=True, cwd="/", env=variables,
        )  # fmt: skip
        found.append(float(done.stdout))
    return min(found)


def host_report() -> dict[str, Any]:
    """All of it, for every op."""
    drop_ins = [op for op in OPS.values() if getattr(op.fused, "dispatch", None) is not None]
    return {
        "memory": [memory_row(op) for op in OPS.values()],
        "models": [model_memory_row(preset) for preset in ("gpt2", "smollm2-135m")],
        "steps": [step_row(preset) for preset in ("tiny", "gpt2", "smollm2-135m")],
        "calls": [call_row(op) for op in drop_ins],
        "import_seconds": round(import_seconds(), 3),
    }


MODELS = ("fused", "eager", "transformers")


def in_bytes(count: int | None) -> str:
    """With its unit."""
    return "not counted" if count is None else human(count) + "B"


def host_table(report: dict[str, Any]) -> str:
    """The report as text."""
    header = ("op", "inputs", "kept", "kept by eager", "launches", "backward")
    memory = [header] + [
        (
            row["op"],
            row["case"],
            human(row["saved"]) + "B",
            human(row["saved_eager"]) + "B",
            str(row["launches_forward"]),
            str(row["launches_backward"]),
        )
        for row in report["memory"]
    ]
    models = [("model", "tokens", *MODELS)] + [
        (row["model"], str(row["tokens"]), *(in_bytes(row[k]) for k in MODELS))
        for row in report["models"]
    ]
    calls = [("op", "fused us", "PyTorch us", "over us")] + [
        (row["op"], *(digits(row[k]) for k in ("fused_us", "eager_us")), f"{row['over_us']:+.2f}")
        for row in report["calls"]
    ]
    steps = [("model", "our launches", "PyTorch operators beside", "PyTorch alone")] + [
        (row["model"], *(str(row[k]) for k in ("launches", "other_operators", "eager_operators")))
        for row in report["steps"]
    ]
    return "\n".join(
        [
            "Kept for the backward beyond inputs and results, and kernel launches (counted):",
            *columns(memory, right=(2, 3, 4, 5)),
            "",
            "Kept for the backward by a bfloat16 model, a token (counted):",
            *columns(models, right=(1, 2, 3, 4)),
            "",
            "A training step (counted):",
            *columns(steps, right=(1, 2, 3)),
            "",
            "A call on the CPU, smallest size (measured on this machine):",
            *columns(calls, right=(1, 2, 3)),
            "",
            f"import fastlm.kernels after torch and triton: {report['import_seconds']} s",
        ]
    )
