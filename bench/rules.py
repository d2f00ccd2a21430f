"""What the compiled code of a kernel must never show: each rule refuses in one sentence."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import triton

from .addresses import narrow_products
from .capture import LIMITS, Launch
from .machine_code import MachineCode
from .sass import Report
from .ttir import Function, dots, exponentials, memory_tiles, parse

_HALF = ("f16", "bf16")


@dataclass
class Compiled:
    """One compiled launch: what it was asked to do, and what became of it.

    Attributes:
        launch: The launch.
        arch: Compute capability that it was compiled for, such as 90.
        ttir: Triton's intermediate code.
        ttgir: The same with layouts chosen.
        code: The machine code.
        report: What the cost model says of it, if it was asked or registers spill.
        one_program: Whether every launch of the kernel is of a single program.
        main_path: Whether the inputs are of a size and alignment that the kernel is built for.
    """

    launch: Launch
    arch: int
    ttir: str
    ttgir: str
    code: MachineCode
    report: Report | None = None
    one_program: bool = False
    main_path: bool = False

    @cached_property
    def kernel(self) -> Function:
        """The intermediate code, parsed."""
        return parse(self.ttir)

    @property
    def threads(self) -> int:
        """Threads of a block, as the launch asked for them."""
        return 32 * self.launch.options.get("num_warps", 4)


# Bytes of stack a thread that spilled registers may take: outside loops on the main path, and
# anywhere off it, where masks and narrow loads cost registers but nobody counts microseconds.
_STACK_OUTSIDE_LOOPS, _STACK_OFF_MAIN_PATH = 128, 1024


def spills(c: Compiled) -> Iterator[str]:
    """On the main path no loop spills; before and after loops a few registers may."""
    if not c.code.spills:
        return
    hot = c.report.hot_loop() if c.report is not None else None
    where = f"{c.code.spills} instructions spill registers, {c.code.stack} bytes of stack"
    if c.main_path and (hot is None or hot.spill_bytes):
        yield where + (", in the hot loop" if hot else "")
    elif c.code.stack > (_STACK_OUTSIDE_LOOPS if c.main_path else _STACK_OFF_MAIN_PATH):
        yield where


def collapsed(c: Compiled) -> Iterator[str]:
    """Where ptxas gives up it leaves 32 registers and puts the rest on the stack (sm_80)."""
    if c.code.registers <= 32 and c.code.stack >= 256:
        yield f"ptxas collapsed: {c.code.registers} registers and {c.code.stack} bytes of stack"


def too_large(c: Compiled) -> Iterator[str]:
    """Shared and tensor memory must fit the part; the compiler does not check."""
    limit, _ = LIMITS[c.arch]
    if c.code.shared > limit:
        yield f"{c.code.shared} bytes of shared memory, over the {limit} of sm_{c.arch}"
    if c.code.tensor_memory > 512:
        yield f"{c.code.tensor_memory} columns of tensor memory, over 512"


def float64(c: Compiled) -> Iterator[str]:
    """Float64 runs at 1/64 of the rate or worse; only one-program kernels may use it."""
    if c.code.double and not c.one_program:
        yield f"{c.code.double} float64 instructions in a kernel of many programs"


def tensor_cores(c: Compiled) -> Iterator[str]:
    """A product of half-precision tiles runs on the tensor cores, on the newest class that fits."""
    products = [d for d in dots(c.kernel) if d[3] in _HALF]
    if not products:
        return
    if not c.code.tensor:
        yield f"{len(products)} half-precision products, and no tensor-core instruction"
    newest = {90: "HGMMA", 100: "UTCHMMA"}.get(c.arch)
    full = [d for d in products if d[0] >= (64 if c.arch == 90 else 128) and d[1] >= 16]
    if newest and full and c.code.tensor and newest not in c.code.tensor and c.threads >= 128:
        yield f"a product of {full[0][:3]} without {newest}: {c.code.tensor}"


def serialised(c: Compiled) -> Iterator[str]:
    """Each WGMMA that waits for the one before it costs the overlap (ptxas C7510 to C7512)."""
    products = c.ttgir.count("ttng.warp_group_dot ")
    groups = c.code.count("WARPGROUP")
    if products and groups > max(12, 4 * products):
        yield f"{groups} WARPGROUP instructions for {products} products: WGMMA is serialised"


def duplicated_exponentials(c: Compiled) -> Iterator[str]:
    """A layout that repeats a tile over warps computes each exponential more than once."""
    if not c.main_path:
        return
    tiles, vectors = exponentials(c.ttgir)
    expected = tiles / c.threads
    found = c.code.count(r"MUFU\.EX2\b")
    if tiles and found > 1.5 * expected + 8 * vectors:  # a vector of rows repeats within a warp
        yield f"{found} exponentials a thread where the tiles need {expected:.0f}"


def narrow_access(c: Compiled) -> Iterator[str]:
    """On the main path, tiles of 16 bytes a thread or more move in accesses of 64 bits or more."""
    if not c.main_path:
        return
    for kind, instructions in (("load", ("load", "copy")), ("store", ("store",))):
        bits = [n * width for k, n, width in memory_tiles(c.kernel) if k == kind]
        if sum(b for b in bits if b >= 128 * c.threads) <= sum(bits) / 2:
            continue
        widths: Counter[int] = Counter()
        for name in instructions:
            widths.update(c.code.accesses.get(name, {}))
        wide = sum(w * n for w, n in widths.items() if w >= 64)
        if 2 * wide < sum(w * n for w, n in widths.items()):
            yield f"most {kind}s are narrow: {dict(widths)} (bits: how often)"


def narrow_addresses(c: Compiled) -> Iterator[str]:
    """An index times a stride needs 64 bits."""
    for product in narrow_products(c.kernel):
        yield f"the address product {product} is computed in 32 bits"


RULES = (
    spills,
    collapsed,
    too_large,
    float64,
    tensor_cores,
    serialised,
    duplicated_exponentials,
    narrow_access,
    narrow_addresses,
)


def refusals(compiled: Compiled) -> list[str]:
    """Everything that is wrong with one compiled launch; empty if nothing is."""
    return [f"{rule.__name__}: {text}" for rule in RULES for text in rule(compiled)]


# Refusals that are known and accepted, on every target: kernel, rule and words of the case.
ACCEPTED = {
    ("prepare_kernel", "float64", ""): "bias corrections in float64, a lane a tensor",
    ("momentum_kernel", "narrow_access", "bfloat16"): "the masked end counts like the loop",
}
# what other versions make of tiles that were chosen with Triton 3.7
_ACCEPTED_ELSEWHERE: dict[str, dict[tuple[str, str, str], str]] = {
    "3.6": {
        ("dkdv_kernel", "serialised", "H_kv=4 D=128"): "Triton 3.6: slower there, not wrong",
        ("dkdv_kernel", "narrow_access", "lengths"): "Triton 3.6: slower there, not wrong",
    },
    "3.8": {("_tile_kernel", "spills", "M=64"): "Triton 3.8: slower there, not wrong"},
    "3.9": {("_tile_kernel", "spills", "M=64"): "Triton 3.9: slower there, not wrong"},
}
EXCUSES = ACCEPTED | _ACCEPTED_ELSEWHERE.get(triton.__version__[:3], {})


def accepted(kernel: str, case: str, refusal: str) -> tuple[str, str, str] | None:
    """The entry of ``EXCUSES`` that excuses a refusal of a kernel in this case, if one does."""
    rule = refusal.split(":")[0]
    return next((k for k in EXCUSES if k[:2] == (kernel, rule) and k[2] in case), None)


def excuses(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What rows of a report were accepted for, a line a kernel and reason, with where it was."""
    where: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for row in rows:
        for reason in row.get("accepted", ()):
            ops, targets = where.setdefault((row["kernel"], reason), ({}, {}))
            ops[row["op"]] = targets[row["target"]] = None
    return [
        f"{kernel}: {reason} ({', '.join(ops)}; {', '.join(targets)})"
        for (kernel, reason), (ops, targets) in where.items()
    ]
