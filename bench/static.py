"""The static report: every kernel's machine code and modelled time, on a machine with no GPU."""

import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

import fastlm
from fastlm.kernels import OPS

from .capture import as_target
from .cases import Case, cases_of
from .compile import Failure, compile_all
from .fingerprint import fingerprint
from .model import ASSUMPTIONS, model, part, roofline
from .peers import peer_cases
from .rules import EXCUSES, Compiled, accepted, refusals
from .sass import GPUS

NOTHING_TIMED = (
    "NOTHING WAS TIMED: no CUDA device was used. Figures below are compiler facts and a model."
)
DEFAULT_TARGETS = ("sm_90", "sm_100")  # a demonstration's: about a minute on two cores
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")  # one of each kind: what regressions are held to
_PEERS_ASSUME = (
    "a peer's own kernels alone count: sums that it leaves to PyTorch are left out",
    "five places stand for each axis of a grid: FlexAttention's backward, two kinds of program "
    "along one axis, comes out some 3 % too fast",
)
ALL_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def _sizes(op_name: str, which: str) -> Sequence[Any]:
    op = OPS[op_name]
    if which == "one":
        return [op.bench_sizes[len(op.bench_sizes) // 2]]
    if which == "kinds":
        kinds: dict[Any, list[Any]] = {}
        for size in op.bench_sizes:
            flags = {k: v for k, v in size.items() if isinstance(v, bool) or k == "D"}
            kinds.setdefault(tuple(flags.items()), []).append(size)
        return [alike[len(alike) // 2] for alike in kinds.values()]
    return op.bench_sizes if which == "bench" else [*op.sizes, *op.bench_sizes]


def _dtypes(op_name: str, which: str) -> Sequence[torch.dtype]:
    dtypes = OPS[op_name].dtypes
    if which == "all":
        return dtypes
    return [torch.bfloat16 if torch.bfloat16 in dtypes else dtypes[0]]


def environment() -> dict[str, Any]:
    """Versions and the commit that a report is of."""
    root = Path(__file__).resolve().parent
    commit = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return {
        "fastlm": fastlm.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _row(case: Case, arch: int, result: Compiled | Failure) -> dict[str, Any]:
    """One row of the report: a launch on a target."""
    launch = case.launch
    constexprs = {p.name for p in launch.kernel.params if p.is_constexpr}
    flags = {name: value for name, value in launch.meta.items() if name in constexprs}
    row: dict[str, Any] = {
        "op": case.op,
        "contender": case.contender,
        "case": case.label,
        "size": {k: str(v).removeprefix("torch.") for k, v in case.size.items()},
        "dtype": str(case.dtype).removeprefix("torch."),
        "pass": "backward" if case.backward else "forward",
        "kernel": launch.name,
        "variant": {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flags.items()
        },
        "options": launch.options,
        "grid": launch.grid,
        "fingerprint": fingerprint(launch, arch),
        "target": f"sm_{arch}",
    }
    if isinstance(result, Failure):
        return {**row, "error": result.message}
    code = result.code
    blocks, share, limiter = code.occupancy(arch)
    row |= {
        "registers": code.registers,
        "spills": code.spills,
        "stack": code.stack,
        "shared": code.shared,
        "tensor_memory": code.tensor_memory,
        "warps": code.warps,
        "blocks_per_sm": blocks,
        "occupancy": round(share, 3),
        "occupancy_limiter": limiter,
        "instructions": code.instructions,
        "tensor": code.tensor,
        "accesses": code.accesses,
        "float64": code.double,
        "barriers": code.barriers,
        "refusals": [],
        "accepted": [],
    }
    for text in refusals(result) if case.contender == "fused" else ():
        known = accepted(launch.name, case.label, text)
        if known is None:
            row["refusals"].append(text)
        else:
            row["accepted"].append(f"{known[1]}: {EXCUSES[known]}")
    if result.report is not None:
        modelled = asdict(model(launch, result.ttir, result.report))
        row["modelled"] = modelled
    return row


def _part(arch: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The part that stands for a target, and FLOPs a second of the products that the rows use."""
    work = 10**15
    peaks = {"half precision": work / roofline(arch, (0, work), half=True) * 1e6}
    if any(_float8(row) for row in rows if as_target(row["target"]).arch == arch):
        rates = GPUS[arch].tensor
        peaks["float8"] = peaks["half precision"] * rates["fp8"] / rates["f16"]
    return {**part(arch), "peak_flops": peaks}


def _float8(row: dict[str, Any]) -> bool:
    """Whether tensor cores multiply float8 in a row's kernel: QMMA, QGMMA, UTCQMMA."""
    return any("Q" in name for name in row.get("tensor", ()))


def _roofline(arch: int, work: tuple[int, int], members: Sequence[dict[str, Any]]) -> float:
    """Microseconds of a call at the part's peak, at that of float8 where its products are."""
    bytes_, flops = work
    half = members[0]["dtype"] in ("float16", "bfloat16")
    if any(_float8(member) for member in members):
        rates = GPUS[arch].tensor
        flops = flops * rates["f16"] // rates["fp8"]  # so many in half precision take as long
    return roofline(arch, (bytes_, flops), half)


def _calls(
    rows: Iterable[dict[str, Any]], works: dict[Any, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Rows of one call and pass added up, beside the least bytes and FLOPs of the call."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("op", "case", "contender", "pass", "target"))
        groups.setdefault(key, []).append(row)
    calls = []
    for (op, case, contender, direction, target), members in groups.items():
        if any("modelled" not in m for m in members):
            continue
        microseconds = [
            round(sum(m["modelled"]["microseconds"][k] for m in members), 2) for k in range(3)
        ]
        call = {
            "op": op,
            "case": case,
            "contender": contender,
            "size": members[0]["size"],
            "pass": direction,
            "target": target,
            "launches": len(members),
            "microseconds": microseconds,
            "bytes": round(sum(m["modelled"]["bytes"] for m in members)),
            "flops": round(sum(m["modelled"]["flops"] for m in members)),
        }
        call["guessed"] = any(m["modelled"]["guessed"] for m in members)
        if direction == "forward" and not call["guessed"]:
            # A tensor kernel's model has no DRAM in it: its operands are taken to come from L2.
            slowest = works[op, case][0] / GPUS[as_target(target).arch].dram_gbs / 1e3
            microseconds = [max(t, round(slowest, 2)) for t in microseconds]
            call["microseconds"] = microseconds
            least_bytes, flops = works[op, case]
            bound = _roofline(as_target(target).arch, (least_bytes, flops), members)
            call |= {
                "least_bytes": least_bytes,
                "work_flops": flops,
                "roofline_microseconds": round(bound, 2),
                "roofline_share": round(bound / microseconds[1], 3) if microseconds[1] else None,
            }
        calls.append(call)
    return calls


Job = tuple[Case, int]  # a launch, and the capability that it is compiled for


def gather(
    targets: Sequence[str],
    ops: Sequence[str],
    *,
    sizes: str = "one",
    dtypes: str = "one",
) -> list[Job]:
    """Every launch that the ops make on the targets; arguments as those of ``static_report``."""
    return [
        (case, as_target(target).arch)
        for target in targets
        for name in ops
        for case in cases_of(
            OPS[name], target, sizes=_sizes(name, sizes), dtypes=_dtypes(name, dtypes)
        )
    ]


def gather_peers(
    targets: Sequence[str], ops: Sequence[str], *, sizes: str, dtypes: str
) -> tuple[list[Job], dict[str, str]]:
    """Every launch that installed peers make for the same calls, and why others are missing."""
    jobs: list[Job] = []
    missing: dict[str, str] = {}
    for target in targets:
        for name in ops:
            found, why = peer_cases(OPS[name], target, _sizes(name, sizes), _dtypes(name, dtypes))
            jobs += [(case, as_target(target).arch) for case in found]
            missing |= why
    return jobs, missing


def compiled_rows(
    jobs: Sequence[Job], processes: int, only: Sequence[Job] | None = None
) -> list[dict[str, Any]]:
    """A row for each launch.

    Args:
        jobs: All launches that there are: what a kernel is excused from hangs on all of them.
        processes: That compile at a time.
        only: Those to compile; all by default.
    """
    chosen = jobs if only is None else only
    grids: dict[Any, set[Any]] = {}
    for case, _ in jobs:
        grids.setdefault(case.launch.kernel, set()).add(case.launch.grid)
    unique = {(case.launch.key(), arch): (case.launch, arch) for case, arch in chosen}
    results = dict(
        zip(
            unique,
            compile_all(list(unique.values()), processes=processes, modelled=True),
            strict=True,
        )
    )
    rows = []
    for case, arch in chosen:
        result = results[case.launch.key(), arch]
        if isinstance(result, Compiled) and case.contender == "fused":
            result.one_program = grids[case.launch.kernel] == {(1, 1, 1)}
            result.main_path = case.size in OPS[case.op].bench_sizes
        rows.append(_row(case, arch, result))
    return rows


def static_report(
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    ops: Sequence[str] | None = None,
    sizes: str = "one",
    dtypes: str = "one",
    processes: int = 2,
    peers: bool = False,
) -> dict[str, Any]:
    """Compiles what the ops launch and reads the machine code. Nothing runs.

    Args:
        targets: Such as ``"sm_90"``.
        ops: Names in ``fastlm.kernels.OPS``; all by default.
        sizes: ``"one"`` typical size an op, or one for each of its ``"kinds"`` (head size, flags
            such as causal), the ``"bench"`` sizes, or ``"all"``, small ones included.
        dtypes: ``"one"``, bfloat16 where the op has it, or ``"all"``.
        processes: That compile at a time.
        peers: Also what installed peers launch for the same calls.

    Returns:
        ``rows``, a launch each; ``calls``, forward or backward each; ``environment``, ``parts``,
        ``assumptions``, ``seconds`` spent; ``timed`` is False. Ready for JSON.
    """
    started = time.perf_counter()
    names = list(OPS) if ops is None else list(ops)
    jobs = gather(targets, names, sizes=sizes, dtypes=dtypes)
    missing: dict[str, str] = {}
    if peers:
        theirs, missing = gather_peers(targets, names, sizes=sizes, dtypes=dtypes)
        jobs += theirs
    works = {(case.op, case.label): case.work for case, _ in jobs}
    rows = compiled_rows(jobs, processes)
    return {
        "schema": 1,
        "timed": False,
        "notice": NOTHING_TIMED,
        "environment": environment(),
        "command": " ".join(["fastlm", *sys.argv[1:]]),
        "targets": list(targets),
        "parts": {target: _part(as_target(target).arch, rows) for target in targets},
        "missing_peers": missing,
        "assumptions": [*ASSUMPTIONS, *(_PEERS_ASSUME if peers else ())],
        "seconds": round(time.perf_counter() - started, 1),
        "distinct_kernels": len({(case.launch.key(), arch) for case, arch in jobs}),
        "calls": _calls(rows, works),
        "rows": rows,
    }
