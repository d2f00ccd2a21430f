"""The verbs of ``fastlm bench`` that time something: run, train and tune."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastlm.kernels import OPS, _tuned

from . import tune as tuning
from . import whole_model
from .files import add_outputs, check_files, check_ops, read_report, write, write_csv
from .model_contenders import OURS, PEERS, Draw, nanogpt_file
from .on_cpu import CpuBench
from .static import environment
from .suite import Bench, CudaBench, parse_size, run_suite, settings, speed_ups
from .table import timed_table
from .timed_report import timed_html

_DTYPES = ("bfloat16", "float16", "float32")
ALL_MODELS = (*OURS, *PEERS)


def make_device() -> Bench | None:
    """The GPU, or None; tests put a simulated one in its place."""
    return CudaBench() if torch.cuda.is_available() else None


def _device() -> Bench | None:
    """The GPU; without one a line says that nothing is timed."""
    device = make_device()
    if device is None:
        print(
            "NOTHING WAS TIMED: no CUDA device. fastlm bench static works without one, and "
            "fastlm bench train with --device cpu."
        )
    return device


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def _add_dtypes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", action="append", choices=_DTYPES, help="may be repeated (default: bfloat16)"
    )


def _add_budget(parser: argparse.ArgumentParser, seconds: float) -> None:
    parser.add_argument(
        "--budget",
        type=float,
        default=seconds,
        metavar="SECONDS",
        help=f"for the timing (default {seconds:.0f})",
    )


def _check_budget(args: argparse.Namespace) -> None:
    if args.budget <= 0:
        raise ValueError(f"bench: --budget must be positive; got {args.budget}")


# --- run ----------------------------------------------------------------------------------------


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``fastlm bench run``."""
    add_outputs(parser)
    parser.add_argument("--csv", metavar="FILE", help="write every row as CSV")
    parser.add_argument(
        "--suite", choices=("quick", "full"), default="quick", help="quick: one size an op"
    )
    parser.add_argument(
        "--mode",
        action="append",
        choices=("forward", "backward", "full"),
        help="may be repeated (default: forward and full)",
    )
    _add_dtypes(parser)
    parser.add_argument(
        "--size",
        action="append",
        metavar="M=8192,N=4096",
        help="in place of the op's own sizes (see fastlm bench list); may be repeated",
    )
    parser.add_argument(
        "--cache",
        action="append",
        choices=("cold", "warm"),
        help="of the L2 cache; may be repeated (default: cold, and warm too in the full suite)",
    )
    parser.add_argument(
        "--contender",
        action="append",
        metavar="NAME",
        help="beside fused and eager; may be repeated (default: all that are installed)",
    )
    parser.add_argument(
        "--baseline", default="eager", metavar="NAME", help="of speed-ups (default eager)"
    )
    parser.add_argument(
        "--graph", action="store_true", help="time replays of CUDA graphs: no host code"
    )
    parser.add_argument("--check-only", action="store_true", help="check results, time nothing")
    parser.add_argument(
        "--isolate", action="store_true", help="a process an op, so that a crash ends that op alone"
    )
    parser.add_argument(
        "--lock-clocks", type=int, metavar="MHZ", help="by nvidia-smi, which needs its rights"
    )
    parser.add_argument(
        "--min-speedup",
        action="append",
        metavar="OP:RATIO",
        help="exit 1 where an op is not this much faster than the baseline; may be repeated",
    )
    _add_budget(parser, 100)
    parser.set_defaults(bench_command=run)


def run(args: argparse.Namespace) -> int:
    """Times ops, or only checks them."""
    check_ops(args.op)
    check_files(args.json, args.html, args.csv)
    _check_budget(args)
    least = _ratios(args.min_speedup or ())
    sizes = [parse_size(text) for text in args.size or ()]
    device = _device()
    if device is None:
        return 1
    cases = list(
        settings(
            args.suite,
            args.op,
            args.mode or ["forward", "full"],
            args.dtype or ["bfloat16"],
            sizes=sizes,
            caches=args.cache or (),
        )
    )
    with locked_clocks(args.lock_clocks):
        if args.isolate and len(args.op or OPS) > 1:
            report = isolated(args.op or list(OPS), _words(args))
        else:
            report = run_suite(
                cases,
                device,
                wanted=args.contender,
                budget=args.budget,
                progress=_progress,
                graph=args.graph,
                check_only=args.check_only,
            )
    report["baseline"] = args.baseline
    _progress("")
    print(timed_table(report))
    write(report, args.json, args.html, timed_html)
    if args.csv:
        write_csv(report, args.csv)
    slow = _too_slow(report, least)
    for line in slow:
        print(f"TOO SLOW {line}")
    wrong = [
        row
        for row in report["rows"]
        if row["contender"] == "fused" and row["status"] not in ("ok", "skipped")
    ]
    return int(bool(slow or wrong))


def _ratios(words: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in words:
        name, _, ratio = text.partition(":")
        try:
            found[name] = float(ratio)
        except ValueError:
            raise ValueError(
                f"bench: --min-speedup must be like softmax:1.0; got {text!r}"
            ) from None
        check_ops([name])
    return found


def _too_slow(report: dict[str, Any], least: dict[str, float]) -> list[str]:
    """Cases of the ops in ``least`` that miss it, and those ops without a case."""
    ratios = speed_ups(report["rows"], report["baseline"])
    found = [
        f"{' '.join(key)}: {ratio:.2f}x, not {least[key[0]]:g}x"
        for key, ratio in ratios.items()
        if ratio < least.get(key[0], 0.0)
    ]
    measured = {key[0] for key in ratios}
    return found + [f"{name}: not measured" for name in least if name not in measured]


@contextmanager
def locked_clocks(megahertz: int | None) -> Iterator[None]:
    """Holds the multiprocessors at one clock, and lets go of it whatever happens.

    Raises:
        ValueError: nvidia-smi would not.
    """
    if megahertz is None:
        yield
        return
    _nvidia_smi(f"--lock-gpu-clocks={megahertz},{megahertz}")
    try:
        yield
    finally:
        _nvidia_smi("--reset-gpu-clocks")


def _nvidia_smi(option: str) -> None:
    try:
        done = subprocess.run(["nvidia-smi", option], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"bench: --lock-clocks needs nvidia-smi; {error}") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or [f"exit {done.returncode}"]
        raise ValueError(f"bench: --lock-clocks was refused; nvidia-smi says {said[-1]}")


# --- a process an op ----------------------------------------------------------------------------


def _words(args: argparse.Namespace) -> list[str]:
    """The arguments that a process of one op is given too."""
    words = ["--suite", args.suite, "--budget", str(args.budget / len(args.op or OPS))]
    for name in ("mode", "dtype", "size", "cache", "contender"):
        for value in getattr(args, name) or ():
            words += [f"--{name}", value]
    return words + [f"--{n.replace('_', '-')}" for n in ("graph", "check_only") if getattr(args, n)]


def _process(op: str, words: Sequence[str], file: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastlm.bench", "run", "--op", op, "--json", file, *words]
    return subprocess.run(command, capture_output=True, text=True)


def isolated(
    ops: Sequence[str],
    words: Sequence[str],
    process: Callable[..., subprocess.CompletedProcess[str]] = _process,
) -> dict[str, Any]:
    """One report of many processes; where one dies its op has a row that says so.

    Args:
        ops: Names.
        words: Arguments of each process.
        process: Runs one.

    Raises:
        ValueError: No process gave a report.
    """
    reports, dead = [], []
    for n, op in enumerate(ops, 1):
        _progress(f"{n}/{len(ops)} {op}")
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "report.json")
            done = process(op, words, file)
            if Path(file).is_file():
                reports.append(read_report(file))
                continue
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        row = {"op": op, "case": "every case", "size": {}, "dtype": "", "mode": "", "cache": ""}
        reason = f"its process ended with {done.returncode}: {said[:200]}"
        dead.append({**row, "contender": "fused", "status": "failed", "reason": reason})
    if not reports:
        raise ValueError(f"bench: no op could be timed; {dead[-1]['reason']}")
    first = reports[0]
    first["rows"] = [row for report in reports for row in report["rows"]] + dead
    first["seconds"] = round(sum(report["seconds"] for report in reports), 1)
    first["command"] = " ".join(["fastlm", *sys.argv[1:]])
    return first


# --- train and tune -----------------------------------------------------------------------------


def add_train(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``fastlm bench train``."""
    parser.add_argument(
        "--suite", choices=("quick", "full"), default="quick", help="quick: GPT-2 alone"
    )
    parser.add_argument("--model", action="append", metavar="PRESET", help="may be repeated")
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="a field of the models' config in place of the preset's; may be repeated",
    )
    parser.add_argument(
        "--mode",
        action="append",
        choices=("train", "decode"),
        help="decode: generate; may be repeated (default: both)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences (default 8)")
    parser.add_argument("--length", type=int, default=1024, help="tokens each (default 1024)")
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="that decode adds to each (default 64)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of decode; 0: the likeliest (default)"
    )
    parser.add_argument("--top-k", type=int, default=0, help="of decode; 0: of all (default)")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the computation")
    parser.add_argument(
        "--contender",
        action="append",
        metavar="NAME",
        help=f"one of {', '.join(ALL_MODELS)}; may be repeated (default: all that are there)",
    )
    parser.add_argument(
        "--baseline", default="eager", metavar="NAME", help="of speed-ups (default eager)"
    )
    parser.add_argument(
        "--nanogpt", type=Path, metavar="DIR", help="a clone of nanoGPT, whose model.py is run"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default cuda)")
    parser.add_argument("--json", metavar="FILE", help="write every row as JSON")
    parser.add_argument("--html", metavar="FILE", help="write a page with charts")
    _add_budget(parser, 60)
    parser.set_defaults(bench_command=train)


def train(args: argparse.Namespace) -> int:
    """Times whole models."""
    from fastlm.lm import PRESETS, GPTConfig
    from fastlm.lm.options import from_words

    check_files(args.json, args.html)
    _check_budget(args)
    least = {"batch_size": 1, "length": 1, "new_tokens": 1, "temperature": 0, "top_k": 0}
    for name, low in least.items():
        if not getattr(args, name) >= low:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"bench: {flag} must be at least {low}; got {getattr(args, name)}")
    for name in args.model or ():
        if name not in PRESETS:
            raise ValueError(f"bench: --model must be one of {', '.join(PRESETS)}; got {name!r}")
    wanted = _models_wanted(args)
    changes = from_words(GPTConfig, args.set or (), "bench: --set")
    names = args.model or (whole_model.QUICK if args.suite == "quick" else whole_model.FULL)
    works = [
        whole_model.Workload(
            name, args.batch_size, args.length, getattr(torch, args.dtype), args.new_tokens,
            Draw(args.temperature, args.top_k), changes, args.nanogpt,
        )
        for name in names
    ]  # fmt: skip
    for work in works:
        work.config()  # raises now rather than after the measurement of the device
    device = CpuBench() if args.device == "cpu" else _device()
    if device is None:
        return 1
    modes = args.mode or ["train", "decode"]
    report = whole_model.run_models(
        works, device, modes=modes, wanted=wanted, budget=args.budget, progress=_progress
    )
    report["baseline"] = args.baseline
    _progress("")
    print(timed_table(report))
    write(report, args.json, args.html, timed_html)
    return int(any(r["contender"] == "fused" and r["status"] != "ok" for r in report["rows"]))


def _models_wanted(args: argparse.Namespace) -> list[str]:
    """Names of the contenders."""
    if args.nanogpt is not None:
        nanogpt_file(args.nanogpt)
    for name in args.contender or ():
        if name not in ALL_MODELS:
            known = ", ".join(ALL_MODELS)
            raise ValueError(f"bench: --contender must be one of {known}; got {name!r}")
    beside = ("nanogpt", "nanogpt compiled") if args.nanogpt is not None else ()
    wanted = args.contender or [*whole_model.CONTENDERS, *beside]
    if args.baseline not in wanted:
        raise ValueError(
            f"bench: --baseline must be one of the contenders, {', '.join(wanted)}; "
            f"got {args.baseline!r}"
        )
    return wanted


def add_tune(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``fastlm bench tune``."""
    parser.add_argument(
        "--op", action="append", metavar="NAME", help="an op's name; may be repeated (default: all)"
    )
    _add_dtypes(parser)
    parser.add_argument(
        "--size", action="append", metavar="M=8192,N=4096", help="in place of the op's own sizes"
    )
    parser.add_argument("--dry-run", action="store_true", help="measure, and keep nothing")
    _add_budget(parser, 300)
    parser.set_defaults(bench_command=tune)


def tune(args: argparse.Namespace) -> int:
    """Tries tiles, and keeps the faster ones in the user's cache."""
    check_ops(args.op)
    _check_budget(args)
    sizes = [parse_size(text) for text in args.size or ()]
    if not args.dry_run and _tuned.cache_file().is_file():
        _tuned.read_entries(_tuned.cache_file())  # raises now rather than after the work
    device = _device()
    if device is None:
        return 1
    cases = settings("full", args.op, ["full"], args.dtype or ["bfloat16"], sizes=sizes)
    found = list({(case.op.name, case.label): case for case in cases}.values())
    rows = tuning.tune(found, device, budget=args.budget, progress=_progress)
    _progress("")
    print(tuning.tune_table(rows))
    kept = tuning.winners(rows, environment()["commit"])
    if args.dry_run:
        print("Nothing is kept: --dry-run.")
    elif kept:
        file = _tuned.keep(device.name, kept)
        print(f"Kept in {file}; ops take them from the next import of fastlm.kernels on.")
    return 0
