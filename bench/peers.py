"""What installed peers launch for the same calls, through their own host code."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fastlm.kernels import Op

from .capture import LIMITS, Launch
from .cases import Case, cases_of, hollow
from .contenders import flex_by, has_flex, triton_peers
from .flex import flex_launches
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
    for name, builder in _builders(op, target).items():
        for dtype in dtypes:
            for size in sizes:
                try:
                    found += builder(dtype, size)
                except Exception as error:  # what a peer does not take must not end the report
                    missing[f"{op.name} by {name}"] = in_a_line(error)
    return found, missing


Builder = Callable[[torch.dtype, Mapping[str, Any]], list[Case]]


def _builders(op: Op, target: str) -> dict[str, Builder]:
    """What makes the cases of each peer of an op."""

    def of(name: str, call: Callable[..., Any]) -> Builder:
        def build(dtype: torch.dtype, size: Mapping[str, Any]) -> list[Case]:
            cases = cases_of(op, target, sizes=[size], dtypes=[dtype], contender=name, call=call)
            return [dataclasses.replace(c, launch=_on_a_gpu(c.launch)) for c in cases]

        return build

    found = {name: of(name, call) for name, call in triton_peers(op.name).items()}
    if has_flex(op.name):
        found["flex"] = lambda dtype, size: _flex_cases(op, target, dtype, size)
    return found


def _flex_cases(op: Op, target: str, dtype: torch.dtype, size: Mapping[str, Any]) -> list[Case]:
    """FlexAttention's launches for a call of the op: it has no host code to run but Inductor's."""
    inputs = hollow(op, dtype, size)
    passes: list[list[Launch]] = []

    def compiled(query: torch.Tensor, *rest: torch.Tensor, **options: Any) -> torch.Tensor:
        passes.extend(flex_launches(target, query, *rest, **options))
        return query  # as the output is shaped

    flex_by(compiled)(**inputs)
    return [
        Case(op.name, dtype, size, "", bool(i), launch, op.work(**inputs), "flex")
        for i, launches in enumerate(passes)
        for launch in launches
    ]


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
