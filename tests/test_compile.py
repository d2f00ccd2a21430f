"""Every kernel that the ops launch, compiled for every target with no GPU, and its machine code."""

import importlib
import pkgutil
from collections import defaultdict

import pytest
import torch
from triton.runtime.jit import JITFunction

import fastlm.kernels
from fastlm.bench.cases import Case, cases_of, hollow
from fastlm.bench.compile import Failure, compile_all
from fastlm.bench.rules import refusals
from fastlm.kernels import OPS

TARGETS = [80, 90, 100, 120]


def every_case(target: int) -> list[Case]:
    """Each op forward and backward: all sizes, each wanted gradient alone, and a shifted view."""
    found = []
    for op in OPS.values():
        found += cases_of(op, target, sizes=[*op.sizes, *op.bench_sizes], dtypes=op.dtypes)
        half, size = op.dtypes[-1:], op.bench_sizes[:1]
        found += cases_of(op, target, sizes=size, dtypes=half, special="unaligned")
        inputs = hollow(op, op.dtypes[-1], op.bench_sizes[0])
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                found += cases_of(op, target, sizes=size, dtypes=half, special=f"only {name}")
    return found


def defined_kernels() -> set[JITFunction]:
    """Every @triton.jit function of the package."""
    found = set()
    for module in pkgutil.walk_packages(fastlm.kernels.__path__, "fastlm.kernels."):
        names = vars(importlib.import_module(module.name)).values()
        found |= {v for v in names if isinstance(v, JITFunction) and v.__module__ == module.name}
    return found


def reachable(kernels: set[JITFunction]) -> set[JITFunction]:
    """The kernels and every jit function that they call."""
    found, new = set(kernels), set(kernels)
    while new:
        called = set()
        for kernel in new:
            names = kernel.fn.__code__.co_names
            called |= {kernel.fn.__globals__.get(name) for name in names}
        new = {c for c in called if isinstance(c, JITFunction)} - found
        found |= new
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_kernels_keep_the_rules(target):
    cases = every_case(target)
    grids = defaultdict(set)
    for case in cases:
        grids[case.launch.kernel].add(case.launch.grid)
    by_key = {case.launch.key(): case for case in reversed(cases)}
    compiled = compile_all([(case.launch, target) for case in by_key.values()])
    wrong = defaultdict(list)
    for case, result in zip(by_key.values(), compiled, strict=True):
        if isinstance(result, Failure):
            said = [result.message]
        else:
            result.one_program = grids[case.launch.kernel] == {(1, 1, 1)}
            result.main_path = not case.special and case.size in OPS[case.op].bench_sizes
            said = refusals(result)
        for text in said:
            wrong[f"{case.launch.name}: {text}"].append(f"{case.op} {case.label}")
    assert not wrong, "\n".join(
        f"{text}\n    {len(calls)} launches, the first of {calls[0]}"
        for text, calls in wrong.items()
    )

    assert reachable({case.launch.kernel for case in cases}) == defined_kernels()
    for op in OPS:
        launches = [case.launch for case in cases if case.op == op]
        assert any(is_one(launch) for launch in launches), f"{op}: no argument is ever 1"
        assert any(odd_size(launch) for launch in launches), f"{op}: no size is off 16"
        assert any(off_alignment(launch) for launch in launches), f"{op}: no pointer is off 16"


def is_one(launch) -> bool:
    """Whether an argument that is not a constexpr was specialised to the constant 1."""
    return any(
        value == 1 and not launch.kernel.params[path[0]].is_constexpr
        for path, value in launch.constexprs.items()
        if value is not None
    )


def _facts(launch, kind):
    for i, found in enumerate(launch.signature.values()):
        if kind(found):
            yield launch.attrs.get((i,))


def odd_size(launch) -> bool:
    """Whether an integer argument is not known to be divisible by 16."""
    return not all(_facts(launch, lambda kind: kind in ("i32", "i64")))


def off_alignment(launch) -> bool:
    """Whether a pointer is not known to be divisible by 16."""
    return not all(_facts(launch, lambda kind: kind.startswith("*")))
