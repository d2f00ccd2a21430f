"""What the verbs of ``fastlm bench`` share: names that must be known, files read and written."""

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastlm.kernels import OPS


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Which ops, and where to write the report."""
    parser.add_argument(
        "--op", action="append", metavar="NAME", help="an op's name; may be repeated (default: all)"
    )
    parser.add_argument("--json", metavar="FILE", help="write every row as JSON")
    parser.add_argument("--html", metavar="FILE", help="write a page with charts")


def check_ops(names: Sequence[str] | None) -> None:
    """Raises where a name is no op's."""
    for name in names or ():
        if name not in OPS:
            raise ValueError(f"bench: --op must be one of {', '.join(OPS)}; got {name!r}")


def check_files(*files: str | None) -> None:
    """Fails before the work, not after it."""
    for file in files:
        if file and not Path(file).resolve().parent.is_dir():
            raise ValueError(f"bench: the folder of {file!r} must exist")


def write(
    report: dict[str, Any], to_json: str | None, to_html: str | None, render: Callable[..., str]
) -> None:
    """Writes a report where it was asked for."""
    if to_json:
        Path(to_json).write_text(json.dumps(report, indent=1, allow_nan=False))
    if to_html:
        Path(to_html).write_text(render(report))


_CSV = (
    *("op", "case", "mode", "cache", "contender", "status", "p50", "p20", "p80", "host"),
    *("gbs", "tflops", "roofline", "peak_bytes", "error", "error_eager", "note", "reason"),
)


def write_csv(report: dict[str, Any], file: str) -> None:
    """A timed report's rows; seconds, bytes, and rates a second."""
    with open(file, "w", newline="") as out:
        writer = csv.DictWriter(out, _CSV, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(report["rows"])


def read_report(file: str) -> dict[str, Any]:
    """A JSON report.

    Raises:
        ValueError: Not one.
    """
    try:
        report = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"bench: {file!r} must be a JSON report; {error}") from None
    if not isinstance(report, dict) or "timed" not in report or "rows" not in report:
        raise ValueError(f"bench: {file!r} must be a report of fastlm bench")
    return report
