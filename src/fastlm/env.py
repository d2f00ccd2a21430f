"""``fastlm env``: versions, the GPU, and which code each op runs here."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from typing import Any

import torch
import triton

import fastlm
from fastlm.kernels import OPS, explain

_PEERS = ("liger-kernel", "flash-attn", "apex", "transformers", "safetensors", "numpy")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    """Facts of each CUDA device."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _paths() -> dict[str, str]:
    """What each op would run on this machine's tensors, and why."""
    device = _device()
    said = {}
    for name, op in OPS.items():
        if getattr(op.fused, "dispatch", None) is None:
            said[name] = f"{name} chooses for itself by the device of its tensors."
        else:
            said[name] = explain(op.fused, **op.example(op.dtypes[0], device, **op.sizes[0]))
    return said


def facts() -> dict[str, Any]:
    """Versions, devices, settings and the code path of each op."""
    return {
        "fastlm": fastlm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "gpus": _gpus(),
        "packages": {name: _version(name) for name in _PEERS},
        "settings": {
            name: os.environ[name]
            for name in (
                "FASTLM_BACKEND",
                "TRITON_INTERPRET",
                "TRITON_CACHE_DIR",
                "OMP_NUM_THREADS",
            )
            if name in os.environ
        },
        "ops": _paths(),
    }


# --- self-test ----------------------------------------------------------------------------------


def _tensors(value: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _as(inputs: Any, dtype: torch.dtype) -> Any:
    """A copy of the inputs, floating-point tensors in ``dtype``, gradients wanted alike."""

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        fresh = value.detach().clone()
        if fresh.is_floating_point():
            fresh = fresh.to(dtype)
        return fresh.requires_grad_(value.requires_grad)

    return torch.utils._pytree.tree_map(copy, inputs)


def _outcome(function: Any, inputs: Any) -> list[torch.Tensor]:
    """What a call gives, changes and sends back: results, inputs, gradients."""
    results = _tensors(function(**inputs))
    differentiable = [t for t in results if t.requires_grad]
    if differentiable:
        sum(t.double().square().sum() for t in differentiable).backward()  # type: ignore[union-attr]
    given = _tensors(inputs)
    gradients = [t.grad for t in given if t.grad is not None]
    return [t.detach().double() for t in (*results, *given, *gradients)]


def _check(name: str, dtype: torch.dtype, size: Any, device: torch.device) -> str | None:
    """Why an op's kernel differs from its reference at one size, or None."""
    op = OPS[name]
    torch.manual_seed(0)
    inputs = op.example(dtype, device, **size)
    exact = _outcome(op.reference, _as(inputs, torch.float64))
    eager = _outcome(op.reference, _as(inputs, dtype))
    fused = _outcome(op.fused, _as(inputs, dtype))
    ulps = 16 if dtype is torch.float32 else 2
    for i, (e, p, f) in enumerate(zip(exact, eager, fused, strict=True)):
        if e.numel() == 0:
            continue
        scale = torch.finfo(dtype).eps * e.abs().nan_to_num(0, 0, 0).max().item()
        bound = 2 * (p - e).abs().nan_to_num(0).max().item() + ulps * scale
        error = (f - e).abs().nan_to_num(0).max().item()
        if error > bound or not torch.equal(e.isnan(), f.isnan()):
            return f"result {i} is off by {error:.3g}, more than {bound:.3g}"
    return None


def selftest() -> list[dict[str, Any]]:
    """Runs each op's kernel small, forward and backward, against its reference in float64.

    On a GPU the kernels run compiled; elsewhere in Triton's interpreter.
    """
    device = _device()
    results = []
    for name, op in OPS.items():
        started = time.perf_counter()
        dtype, size = op.dtypes[0], op.sizes[min(1, len(op.sizes) - 1)]
        with contextlib.ExitStack() as stack:
            if device.type == "cpu":
                from fastlm.kernels._interpreter import interpreted

                stack.enter_context(interpreted())
            try:
                wrong = _check(name, dtype, size, device)
            except Exception as error:  # whatever breaks is the finding
                wrong = f"{type(error).__name__}: {error}"
        results.append(
            {
                "op": name,
                "passed": wrong is None,
                "detail": wrong or "agrees with its reference",
                "size": {k: str(v) for k, v in size.items()},
                "dtype": str(dtype).removeprefix("torch."),
                "device": "GPU" if device.type == "cuda" else "interpreter",
                "seconds": round(time.perf_counter() - started, 2),
            }
        )
    return results


# --- command line -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``fastlm env``."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--selftest", action="store_true", help="run each kernel small against its reference"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report and gives the exit code: 1 if a kernel disagrees with its reference."""
    found = facts()
    if args.selftest:
        found["selftest"] = selftest()
    failed = [r for r in found.get("selftest", ()) if not r["passed"]]
    if args.json:
        json.dump(found, sys.stdout, indent=1)
        print()
        return int(bool(failed))
    for name in ("fastlm", "python", "platform", "torch", "triton", "cuda"):
        print(f"{name:10s} {found[name] if found[name] is not None else 'none (CPU build)'}")
    for gpu in found["gpus"]:
        print(
            f"{'gpu':10s} {gpu['name']}, capability {gpu['capability']}, "
            f"{gpu['memory_gib']} GiB, {gpu['multiprocessors']} multiprocessors"
        )
    if not found["gpus"]:
        print(f"{'gpu':10s} none")
    for name, version in found["packages"].items():
        print(f"{name:14s} {version or 'not installed'}")
    for name, value in found["settings"].items():
        print(f"{name}={value}")
    print()
    for sentence in found["ops"].values():
        print(sentence)
    if args.selftest:
        print()
        for r in found["selftest"]:
            verdict = "ok    " if r["passed"] else "FAILED"
            where = f"{r['op']} on the {r['device']}, {r['dtype']}, {r['seconds']} s"
            print(f"{verdict} {where}: {r['detail']}")
    return int(bool(failed))
