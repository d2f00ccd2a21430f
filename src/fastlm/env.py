"""``fastlm env``: versions, the GPU, and which code each op runs here."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import time
from typing import Any

import torch
import triton

import fastlm
from fastlm.bench import check
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


def _check(name: str, dtype: torch.dtype, size: Any, device: torch.device) -> str:
    """Why an op's kernel differs from its reference at one size, or nothing."""
    op = OPS[name]
    torch.manual_seed(0)
    inputs = op.example(dtype, device, **size)
    exact = check.outcome(op.reference, check.copies(inputs, torch.float64))
    eager = check.outcome(op.reference, check.copies(inputs))
    got = check.outcome(op.fused, check.copies(inputs))
    return check.judge(got, eager, exact, dtype).wrong


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
                "passed": not wrong,
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
    tests = selftest() if args.selftest else []
    if args.json:
        print(json.dumps({**found, "selftest": tests} if args.selftest else found, indent=1))
    else:
        print("\n".join([*_fact_lines(found), *_test_lines(tests)]))
    return int(any(not test["passed"] for test in tests))


def _fact_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{name:14s} {found[name] or 'none (CPU build)'}"
        for name in ("fastlm", "python", "platform", "torch", "triton", "cuda")
    ]
    gpus = [
        f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
        f"{gpu['multiprocessors']} multiprocessors"
        for gpu in found["gpus"]
    ]
    lines += [f"{'gpu':14s} {gpu}" for gpu in gpus or ["none"]]
    lines += [f"{name:14s} {v or 'not installed'}" for name, v in found["packages"].items()]
    lines += [f"{name}={value}" for name, value in found["settings"].items()]
    return [*lines, "", *found["ops"].values()]


def _test_lines(tests: list[dict[str, Any]]) -> list[str]:
    lines = [""] if tests else []
    for test in tests:
        verdict = "ok    " if test["passed"] else "FAILED"
        where = f"{test['op']} on the {test['device']}, {test['dtype']}, {test['seconds']} s"
        lines.append(f"{verdict} {where}: {test['detail']}")
    return lines
