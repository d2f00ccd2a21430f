"""Every kernel that the ops launch, compiled for every target with no GPU, and its machine code."""

import functools
import importlib
import os
import pkgutil
from collections import defaultdict

import pytest
import torch
from triton.runtime.jit import JITFunction

import fastlm.kernels
from fastlm.bench.cases import Case, cases_of, hollow
from fastlm.bench.compile import Failure, compile_all
from fastlm.bench.rules import ACCEPTED, accepted, refusals
from fastlm.kernels import OPS

TARGETS = [80, 90, 100, 120]

EVERYTHING = os.environ.get("FASTLM_COMPILE") == "all"  # every variant on every target: minutes


def every_case(target: int) -> list[Case]:
    """Each op forward and backward: all sizes, each wanted gradient alone, and a shifted view."""
    found = []
    for op in OPS.values():
        half, typical = op.dtypes[-1:], op.bench_sizes[len(op.bench_sizes) // 2 :][:1]
        found += cases_of(op, target, sizes=op.sizes, dtypes=op.dtypes)
        bench_dtypes = op.dtypes if EVERYTHING else half
        found += cases_of(op, target, sizes=op.bench_sizes, dtypes=bench_dtypes)
        found += cases_of(op, target, sizes=typical, dtypes=half, special="unaligned")
        for name, value in hollow(op, op.dtypes[-1], op.sizes[0]).items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                found += cases_of(op, target, sizes=typical, dtypes=half, special=f"only {name}")
    return found


def on_main_path(case: Case) -> bool:
    """Whether the inputs are of a size, dtype and alignment that the op is built for."""
    return not case.special and case.size in OPS[case.op].bench_sizes


@functools.cache
def captured() -> dict[int, list[Case]]:
    """One case for each distinct machine code, by target, those on the main path first."""
    found = {}
    for target in TARGETS:
        cases = sorted(every_case(target), key=lambda case: not on_main_path(case))
        found[target] = list({case.launch.key(): case for case in reversed(cases)}.values())[::-1]
    return found


def tile_of(case: Case, target: int) -> tuple:
    """The kernel with its block sizes, on a target; of the main path.

    A ragged batch is another kernel: what it loads, an even one has as arguments, in no register.
    """
    sizes = {
        name: value
        for name, value in case.launch.meta.items()
        if isinstance(value, int) and not isinstance(value, bool) and name.isupper()
    }
    even = case.launch.meta.get("cu_seqlens_q", False) is None
    return (target, case.launch.kernel, even, str(sorted(sizes.items())))


def features(case: Case) -> set[tuple]:
    """What is particular about a launch: flags, absent arguments, dtype, specialisations."""
    launch = case.launch
    found = {(launch.kernel, "dtype", case.dtype)}
    found |= {
        (launch.kernel, name, value)
        for name, value in launch.meta.items()
        if value is None or isinstance(value, bool)
    }
    for kind in (is_one, odd_size, off_alignment):
        if kind(launch):
            found.add((launch.kernel, kind.__name__))
    return found


@functools.cache
def chosen() -> dict[int, list[Case]]:
    """What to compile, at the price of seconds.

    Each kernel and tile of the main path for each target; and so many of the rest, spread over the
    targets, that every feature of every kernel is compiled for one of them.
    """
    if EVERYTHING:
        return captured()
    found: dict[int, list[Case]] = {target: [] for target in TARGETS}
    tiles, seen = set(), set()
    for target, cases in captured().items():
        for case in cases:
            if on_main_path(case) and tile_of(case, target) not in tiles:
                tiles.add(tile_of(case, target))
                seen |= features(case)
                found[target].append(case)
    todo = [
        (target, case, features(case)) for target, cases in captured().items() for case in cases
    ]
    while todo:
        todo = [(target, case, new - seen) for target, case, new in todo if new - seen]
        if todo:  # the most that is new, and of those the target with the least to do
            most = max(len(new) for *_, new in todo)
            best = [job for job in todo if len(job[2]) == most]
            target, case, new = min(best, key=lambda job: len(found[job[0]]))
            seen |= new
            found[target].append(case)
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


@pytest.mark.timeout(3600 if EVERYTHING else 600)
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_kernels_keep_the_rules(target):
    grids = defaultdict(set)
    for case in captured()[target]:
        grids[case.launch.kernel].add(case.launch.grid)
    cases = chosen()[target]
    compiled = compile_all([(case.launch, target) for case in cases])
    wrong, excused = defaultdict(list), set()
    for case, result in zip(cases, compiled, strict=True):
        if isinstance(result, Failure):
            said = [result.message]
        else:
            result.one_program = grids[case.launch.kernel] == {(1, 1, 1)}
            result.main_path = on_main_path(case)
            said = refusals(result)
        for text in said:
            known = accepted(case.launch.name, case.label, text)
            excused.add(known)
            if known is None:
                wrong[f"{case.launch.name}: {text}"].append(f"{case.op} {case.label}")
    assert not wrong, "\n".join(
        f"{text}\n    {len(calls)} launches, the first of {calls[0]}"
        for text, calls in wrong.items()
    )
    names = {case.launch.name for case in cases}
    stale = {key for key in ACCEPTED if key[0] in names} - excused
    assert not stale, "accepted, but no longer so"


def test_every_kernel_is_compiled():
    launched = {case.launch.kernel for cases in chosen().values() for case in cases}
    assert reachable(launched) == defined_kernels()


@pytest.mark.parametrize("op", OPS)
def test_the_special_launches_are_among_them(op):
    launches = [c.launch for cases in captured().values() for c in cases if c.op == op]
    assert any(is_one(launch) for launch in launches), "no argument is ever 1"
    assert any(odd_size(launch) for launch in launches), "no size is off 16"
    assert any(off_alignment(launch) for launch in launches), "no pointer is off 16"


def is_one(launch) -> bool:
    """Whether an argument that is not a constexpr was specialised to the constant 1."""
    return any(
        value == 1 and not launch.kernel.params[path[0]].is_constexpr
        for path, value in launch.constexprs.items()
        if value is not None
    )


def _facts(launch, *kinds):
    """What is known of each argument of these types; tuples are opened."""

    def walk(kind, path):
        if isinstance(kind, tuple):
            for i, part in enumerate(kind):
                yield from walk(part, (*path, i))
        elif kind.startswith(kinds):
            yield launch.attrs.get(path)

    for i, kind in enumerate(launch.signature.values()):
        yield from walk(kind, (i,))


def odd_size(launch) -> bool:
    """Whether an integer argument is not known to be divisible by 16."""
    return not all(_facts(launch, "i32", "i64"))


def off_alignment(launch) -> bool:
    """Whether a pointer is not known to be divisible by 16, an argument or one in a table."""
    return launch.meta.get("ALIGNED") is False or not all(_facts(launch, "*"))
