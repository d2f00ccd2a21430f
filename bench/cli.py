"""``fastlm bench``: what the kernels cost."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fastlm.kernels import OPS

from . import compare as comparison
from . import on_gpu
from .against import against_peers, peers_table
from .contenders import has_flex, triton_peers, versions
from .files import add_outputs, check_files, check_ops, read_report, write
from .report import html
from .static import ALL_TARGETS, DEFAULT_TARGETS, TARGETS, static_report
from .table import static_table
from .timed_report import timed_html


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``fastlm bench``."""
    verbs = parser.add_subparsers(dest="bench_verb", metavar="VERB")
    parser.set_defaults(bench_command=_default)
    on_gpu.add_run(verbs.add_parser("run", help="time every op against its contenders; on a GPU"))
    on_gpu.add_train(
        verbs.add_parser(
            "train", help="time whole models, training and generating; on a GPU, or --device cpu"
        )
    )
    on_gpu.add_tune(
        verbs.add_parser("tune", help="try other tiles on this GPU and keep what is faster")
    )
    _add_static(
        verbs.add_parser(
            "static",
            help="machine code and modelled time of every kernel; needs no GPU",
            description="Compiles every kernel with no GPU, and prints what its machine code "
            "says. Nothing is timed.",
        )
    )
    against = verbs.add_parser("compare", help="compare two timed reports of one machine")
    against.add_argument("old", help="JSON file of bench run")
    against.add_argument("new", help="JSON file of bench run")
    against.add_argument(
        "--fail-above", metavar="PERCENT", help="exit 1 where a case is slower by more than this"
    )
    against.set_defaults(bench_command=_compare)
    render = verbs.add_parser("report", help="make the HTML page of a JSON report")
    render.add_argument("report", help="JSON file of bench run or bench static")
    render.add_argument("--html", metavar="FILE", required=True, help="where to write the page")
    render.set_defaults(bench_command=_report)
    peers = verbs.add_parser("peers", help="ours against peers, modelled; needs no GPU")
    peers.add_argument(
        "--op", action="append", metavar="NAME", help="an op's name; may be repeated (default: all)"
    )
    peers.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    peers.set_defaults(bench_command=_peers)
    gate = verbs.add_parser("snapshot", help="check the machine code against the committed figures")
    gate.add_argument("--update", action="store_true", help="write the figures instead")
    gate.set_defaults(bench_command=_snapshot)
    host = verbs.add_parser("host", help="memory kept, launches, calls on the CPU, import time")
    host.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    host.set_defaults(bench_command=_host)
    docs = verbs.add_parser("docs", help="write docs/benchmarks.md from committed results")
    docs.set_defaults(bench_command=_docs)
    verbs.add_parser("list", help="the ops, their sizes and dtypes").set_defaults(
        bench_command=_list
    )


def _add_static(parser: argparse.ArgumentParser) -> None:
    add_outputs(parser)
    parser.add_argument(
        "--target",
        action="append",
        metavar="SM",
        help=f"one of {', '.join(ALL_TARGETS)}, or all; may be repeated "
        f"(default: {' and '.join(DEFAULT_TARGETS)})",
    )
    parser.add_argument(
        "--sizes",
        choices=("one", "kinds", "bench", "all"),
        default="one",
        help="one typical size an op (default), one of each kind (head size, causal or not), "
        "all benchmark sizes, or the small test sizes too",
    )
    parser.add_argument(
        "--dtypes",
        choices=("one", "all"),
        default="one",
        help="bfloat16 where the op has it (default), or every dtype",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="peers' kernels as well: FlexAttention's, and Liger-Kernel's where installed",
    )
    parser.add_argument("--run", metavar="DIR", help="a training run to show on the page")
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="compilers at a time (default 2)"
    )
    parser.set_defaults(bench_command=_static)


def run(args: argparse.Namespace) -> int:
    """Runs ``fastlm bench`` and gives its exit code.

    Raises:
        ValueError: An unknown op or target, an unreadable report, or a run without metrics.
    """
    return args.bench_command(args)


def _default(args: argparse.Namespace) -> int:
    """No verb: the quick suite on a GPU, the static report elsewhere."""
    parser = argparse.ArgumentParser()
    verb = "run" if torch.cuda.is_available() else "static"
    (on_gpu.add_run if verb == "run" else _add_static)(parser)
    return run(parser.parse_args([]))


# --- verbs --------------------------------------------------------------------------------------


def _static(args: argparse.Namespace) -> int:
    targets = args.target or list(DEFAULT_TARGETS)
    if "all" in targets:
        targets = list(ALL_TARGETS)
    for target in targets:
        if target not in ALL_TARGETS:
            known = ", ".join(ALL_TARGETS)
            raise ValueError(f"bench: --target must be one of {known}; got {target!r}")
    check_ops(args.op)
    check_files(args.json, args.html)
    if args.processes < 1:
        raise ValueError(f"bench: --processes must be at least 1; got {args.processes}")
    training = _read_run(args.run) if args.run else None
    report = static_report(
        targets=targets,
        ops=args.op,
        sizes=args.sizes,
        dtypes=args.dtypes,
        processes=args.processes,
        peers=args.peers,
    )
    if training:
        report["training"] = training
    print(static_table(report))
    write(report, args.json, args.html, html)
    return 0


def _compare(args: argparse.Namespace) -> int:
    limit = None
    if args.fail_above is not None:
        try:
            limit = float(args.fail_above.removesuffix("%")) / 100
        except ValueError:
            raise ValueError(
                f"bench: --fail-above must be a percentage; got {args.fail_above!r}"
            ) from None
    rows = comparison.compare(read_report(args.old), read_report(args.new))
    print(comparison.comparison_table(rows))
    worse = [] if limit is None else comparison.regressions(rows, limit)
    for row in worse:
        print(f"REGRESSION {row['op']} {row['case']} {row['mode']} {row['contender']}")
    return int(bool(worse))


def _report(args: argparse.Namespace) -> int:
    check_files(args.html)
    report = read_report(args.report)
    Path(args.html).write_text(timed_html(report) if report["timed"] else html(report))
    return 0


def _peers(args: argparse.Namespace) -> int:
    check_ops(args.op)
    check_files(args.json)
    names = args.op or [name for name in OPS if triton_peers(name) or has_flex(name)]
    report = static_report(targets=TARGETS, ops=names, sizes="kinds", peers=True)
    print(peers_table(report))
    if args.json:
        env = report["environment"]
        figures = {
            "triton": env["triton"],
            "peers": {"torch": env["torch"], **versions()},
            "missing": report["missing_peers"],
            "targets": report["targets"],
            "rows": against_peers(report),
        }
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _snapshot(args: argparse.Namespace) -> int:
    from . import snapshot

    if args.update:
        snapshot.write(snapshot.take())
        print(f"wrote {snapshot.FILE}")
        return 0
    committed = snapshot.read()
    now, compiled = snapshot.changed(committed)
    worse = snapshot.regressions(committed, now)
    for text in worse:
        print(f"REGRESSION {text}")
    print(
        f"{len(worse) or 'no'} regressions against {snapshot.FILE.name}: "
        f"{len(now['rows'])} launches, {compiled} compiled, the rest unchanged"
    )
    return int(bool(worse))


def _host(args: argparse.Namespace) -> int:
    from .host import host_report, host_table

    check_files(args.json)
    report = host_report()
    print(host_table(report))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _docs(args: argparse.Namespace) -> int:
    from .docs import PAGE, write_page

    write_page()
    print(f"wrote {PAGE}")
    return 0


def _list(args: argparse.Namespace) -> int:
    for name, op in OPS.items():
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in op.dtypes)
        print(f"{name}  ({dtypes})")
        for size in op.bench_sizes:
            print("  " + " ".join(f"{k}={v}" for k, v in size.items()))
    return 0


# --- a training run -------------------------------------------------------------------------------


def _read_run(folder: str) -> dict[str, Any]:
    """The metrics of a training run: its folder's name and a record a step."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"bench: --run must be a run folder with metrics.jsonl; got {folder!r}")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a run that was killed leaves half a line at the end
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"bench: line {number} of {path} must hold a step; got {line[:60]!r}")
        records.append(record)
    if not records:
        raise ValueError(f"bench: --run must hold at least one step; {path} has none")
    return {"folder": folder, "records": records}
