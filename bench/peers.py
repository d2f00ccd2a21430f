"""What installed peers launch for the same calls, through their own host code."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fastlm.kernels import Op

from .capture import LIMITS, Launch
from .cases import Case, cases_of
from .contenders import triton_peers
from .table import in_a_line


def peer_cases(
    op: Op, target: str, sizes: Sequence[Mapping[str, Any]], dtypes: Iterable[torch.dtype]
) -> tuple[list[Case], dict[str, str]]:
    """Launches of every installed peer of an op that is written in Triton.

    Returns:
        The launches, and why others are missing, by peer and size.
    """
    found: list[Case] = []
    missing = {}
    for name, call in triton_peers(op.name).items():
        for dtype in dtypes:
            for size in sizes:
                try:
                    cases = cases_of(
                        op, target, sizes=[size], dtypes=[dtype], contender=name, call=call
                    )
                except Exception as error:  # what a peer does not take must not end the report
                    missing[f"{op.name} by {name}"] = in_a_line(error)
                else:
                    found += [dataclasses.replace(c, launch=_on_a_gpu(c.launch)) for c in cases]
    return found, missing


def _on_a_gpu(launch: Launch) -> Launch:
    """The launch that Liger-Kernel's host code makes on a GPU.

    It divides rows by the multiprocessors of a CUDA tensor's device, and takes 1 for others.
    """
    names = launch.kernel.arg_names
    if "rows_per_program" not in names or launch.grid is None:
        return launch
    path = (names.index("rows_per_program"),)
    _, multiprocessors = LIMITS[launch.target.arch]
    given = launch.arguments.get("rows_per_program", launch.constexprs.get(path))
    assert isinstance(given, int)
    rows = math.ceil(given * launch.grid[0] / multiprocessors)
    constexprs = dict(launch.constexprs)
    if path in constexprs:
        constexprs[path] = rows
    return dataclasses.replace(
        launch,
        constexprs=constexprs,
        grid=(multiprocessors, 1, 1),
        arguments={**launch.arguments, "rows_per_program": rows},
    )
