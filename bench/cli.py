"""``fastlm bench``: what the kernels cost."""

import argparse
import json
from pathlib import Path

from fastlm.kernels import OPS

from .report import html
from .static import ALL_TARGETS, TARGETS, static_report
from .table import static_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``fastlm bench``."""
    parser.set_defaults(verb="static", target=None, op=None, sizes="bench", dtypes="one")
    parser.set_defaults(json=None, html=None, run=None, processes=2)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    static = verbs.add_parser(
        "static",
        help="machine code and modelled time of every kernel; needs no GPU",
        description="Compiles every kernel with no GPU, and prints what its machine code says. "
        "Nothing is timed.",
    )
    static.add_argument(
        "--target",
        action="append",
        metavar="SM",
        help=f"one of {', '.join(ALL_TARGETS)}, or all; may be repeated (default: {', '.join(TARGETS)})",
    )
    static.add_argument(
        "--op", action="append", metavar="NAME", help="an op's name; may be repeated (default: all)"
    )
    static.add_argument(
        "--sizes",
        choices=("one", "bench", "all"),
        default="bench",
        help="one typical size an op, the benchmark sizes (default), or the small test sizes too",
    )
    static.add_argument(
        "--dtypes",
        choices=("one", "all"),
        default="one",
        help="bfloat16 where the op has it (default), or every dtype",
    )
    static.add_argument("--json", metavar="FILE", help="write every row as JSON")
    static.add_argument("--html", metavar="FILE", help="write a page with charts")
    static.add_argument("--run", metavar="DIR", help="a training run to show on the page")
    static.add_argument(
        "--processes", type=int, default=2, metavar="N", help="compilers at a time (default 2)"
    )
    verbs.add_parser("list", help="the ops, their sizes and dtypes")


def _list() -> int:
    for name, op in OPS.items():
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in op.dtypes)
        print(f"{name}  ({dtypes})")
        for size in op.bench_sizes:
            print("  " + " ".join(f"{k}={v}" for k, v in size.items()))
    return 0


def _read_run(folder: str) -> dict:
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
            raise ValueError(
                f"bench: --run: line {number} of {path} must hold a step; got {line[:80]!r}"
            )
        records.append(record)
    if not records:
        raise ValueError(f"bench: --run must hold at least one step; {path} is empty")
    return {"folder": folder, "records": records}


def run(args: argparse.Namespace) -> int:
    """Runs ``fastlm bench`` and gives its exit code.

    Raises:
        ValueError: An unknown op or target, or a run folder without metrics.
    """
    if args.verb == "list":
        return _list()
    targets = list(TARGETS) if not args.target else args.target
    if "all" in targets:
        targets = list(ALL_TARGETS)
    for target in targets:
        if target not in ALL_TARGETS:
            raise ValueError(
                f"bench: --target must be one of {', '.join(ALL_TARGETS)}; got {target!r}"
            )
    for name in args.op or ():
        if name not in OPS:
            raise ValueError(f"bench: --op must be one of {', '.join(OPS)}; got {name!r}")
    if args.processes < 1:
        raise ValueError(f"bench: --processes must be at least 1; got {args.processes}")
    training = _read_run(args.run) if args.run else None
    for file in (args.json, args.html):
        if file and not Path(file).resolve().parent.is_dir():
            raise ValueError(f"bench: the folder of {file!r} must exist")
    report = static_report(
        targets=targets, ops=args.op, sizes=args.sizes, dtypes=args.dtypes, processes=args.processes
    )
    if training:
        report["training"] = training
    print(static_table(report))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    if args.html:
        Path(args.html).write_text(html(report))
    return 0
