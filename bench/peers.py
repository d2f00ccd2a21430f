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


def peer_cases(
    op: Op, target: str, sizes: Sequence[Mapping[str, Any]], dtypes: Iterable[torch.dtype]
) -> list[Case]:
    """Launches of every installed peer of an op that is written in Triton."""
    found = []
    for name, call in triton_peers(op.name).items():
        cases = cases_of(op, target, sizes=sizes, dtypes=dtypes, contender=name, call=call)
        found += [dataclasses.replace(c, launch=_on_a_gpu(c.launch)) for c in cases]
    return found


def _on_a_gpu(launch: Launch) -> Launch:
    """The launch that Liger-Kernel's host code makes on a GPU.

    It divides rows by the multiprocessors of a CUDA tensor's device, and takes 1 for others.
    """
    names = launch.kernel.arg_names
    if "rows_per_program" not in names or launch.grid is None:
        return launch
    path = (names.index("rows_per_program"),)
    _, multiprocessors = LIMITS[launch.target.arch]
    rows = math.ceil(launch.meta["rows_per_program"] * launch.grid[0] / multiprocessors)
    return dataclasses.replace(
        launch,
        constexprs={**launch.constexprs, path: rows},
        grid=(multiprocessors, 1, 1),
        arguments={**launch.arguments, "rows_per_program": rows},
    )
