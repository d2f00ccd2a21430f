"""What each instruction asks of each pipe of a streaming multiprocessor."""

import re
from collections.abc import Iterable

from .gpus import LATENCY, Gpu
from .parse import Instruction


def _table(spec: dict[str, str]) -> dict[str, str]:
    return {opcode: kind for kind, opcodes in spec.items() for opcode in opcodes.split()}


_ARITHMETIC = _table(
    {
        "fma": "FFMA FMUL FADD FSWZADD FFMA32I FMUL32I FADD32I",
        "fma2": "FFMA2 FMUL2 FADD2",
        "half": "HFMA2 HADD2 HMUL2",
        "special": "MUFU I2F F2I F2F FRND POPC FLO BREV I2I",
        "float64": "DADD DMUL DFMA DSETP",
        "imad": "IMAD IMAD32I IDP",
        "control": "BRA BRX JMP EXIT RET CALL BSSY BSYNC NOP WARPSYNC YIELD NANOSLEEP BREAK KILL "
        "BAR DEPBAR LDGDEPBAR MEMBAR FENCE ERRBAR CCTL WARPGROUP ELECT ENDCOLLECTIVE ACQBULK "
        "PREEXIT LEPC USETMAXREG UTMACMDFLUSH CGAERRBAR UCGABAR_ARV UCGABAR_WAIT S2R S2UR CS2R "
        "CS2UR",
    }
)
MEMORY = _table(
    {
        "load": "LDG LD",
        "store": "STG ST",
        "copy": "LDGSTS",
        "atomic": "ATOM ATOMG RED REDG",
        "shared load": "LDS LDSM ATOMS",
        "shared store": "STS STSM",
        "spill load": "LDL",
        "spill store": "STL",
        "shuffle": "SHFL REDUX CREDUX",
    }
)
GLOBAL = ("load", "store", "copy", "atomic")
SHARED = ("shared load", "shared store")
SPILLS = ("spill load", "spill store")
TENSOR = {"mma", "wgmma", "tcgen05"}

# A loop with one of these does work; others are spin locks and address arithmetic.
HEAVY = {
    "fma",
    "fma2",
    "half",
    "special",
    "tma load",
    "tma store",
    "tensor memory",
    "shared store",
    "float64",
    *GLOBAL,
    *TENSOR,
}

# Worth counting by their full names in a report.
LISTED = (
    "MUFU", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "BAR", "DEPBAR", "LDGDEPBAR", "MEMBAR",
    "FENCE", "WARPGROUP", "SYNCS", "F2F", "F2I", "I2F", "F2FP", "I2FP", "LDTM", "STTM", "UTCBAR",
)  # fmt: skip

_ITEMSIZE = {
    "f16": 2.0,
    "f16a": 2.0,
    "tf32": 4.0,
    "fp8": 1.0,
    "fp8a": 1.0,
    "int8": 1.0,
    "fp4": 0.5,
    "fp64": 8.0,
}
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1, "16": 2}
_ASYNCHRONOUS = ("UTCBAR", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "SYNCS")
_FAST_INTEGERS = ("IADD3", "IADD", "LOP3", "LEA", "VIADD", "MOV")


def width(i: Instruction) -> int:
    """Bytes a lane that a memory access moves."""
    return next((size for name, size in _WIDTHS.items() if name in i.modifiers), 4)


def _mma_shape(i: Instruction) -> tuple[int, int, int, str]:
    """M, N, K and the kind of operand of a tensor-core instruction."""
    shape = next((x for x in i.modifiers if re.fullmatch(r"\d{3,6}|\d+x\d+x\d+", x)), "16816")
    if "x" in shape:
        m, n, k = map(int, shape.split("x"))
    elif shape.startswith("16"):
        m, n, k = 16, 8, int(shape[3:])
    else:
        m, n, k = 8, 8, int(shape[2:])
    named = {"D": "fp64", "I": "int8", "B": "int8", "Q": "fp8", "O": "fp4"}
    kind = named.get(i.base[0], "tf32" if "TF32" in i.modifiers else "f16")
    half_sums = kind in ("f16", "fp8") and "F32" not in i.modifiers
    return m, n, k, kind + ("a" if half_sums else "")


def classify(instructions: Iterable[Instruction], gpu: Gpu, spill_level: int = 0) -> None:
    """Sets kind, pipes, bytes, multiply-adds and latency of each instruction.

    Args:
        instructions: In order.
        gpu: The part.
        spill_level: Where spilled registers live: 0 in L1, 1 in L2, 2 in DRAM.
    """
    constants: dict[str, int] = {}
    for i in instructions:
        i.pipes.clear()
        match = re.match(r"(U?R\d+), (0x[0-9a-f]+|U?RZ)$", i.operands)
        if i.base in ("UMOV", "MOV") and match:
            constants[match[1]] = int(match[2], 16) if match[2].startswith("0") else 0
        if i.predicate in ("@!PT", "@!UPT"):
            i.kind = "off"
        elif re.match(r"UTC[HQIO]MMA", i.base):
            _fifth_generation(i, gpu, constants)
        elif i.base in MEMORY:
            _memory(i, gpu, spill_level)
        else:
            _compute(i, gpu)


def _compute(i: Instruction, gpu: Gpu) -> None:
    """Everything but memory accesses and tcgen05."""
    if re.fullmatch(r"[HIQODB]G?MMA", i.base):
        _tensor(i, gpu)
    elif i.base.startswith(_ASYNCHRONOUS):
        _asynchronous(i, gpu)
    elif i.base in ("LDTM", "STTM"):
        i.kind, i.latency = "tensor memory", LATENCY["tensor memory"]
        columns = next((int(x[1:]) for x in i.modifiers if re.fullmatch(r"x\d+", x)), 1)
        i.pipes["tmem"] = columns * (0.5 if "16dp" in i.opcode else 1)
    elif i.base in _ARITHMETIC:
        _arithmetic(i, gpu)
    elif i.base.startswith("U") or i.base in ("R2UR", "LDC", "VOTEU"):
        i.kind = "uniform"
        i.latency = 0 if i.base.startswith("U") else LATENCY["to uniform"]
        i.pipes["uniform"] = 2
    else:
        i.kind = "alu"
        i.pipes["alu"] = _warp(gpu.integer_add if i.base in _FAST_INTEGERS else gpu.logic)


def _warp(rate: float) -> float:
    """Clocks of a sub-partition for a warp, at a multiprocessor's results a clock."""
    return 128 / rate


def _tensor(i: Instruction, gpu: Gpu) -> None:
    """mma.sync, and wgmma, whose operands come from shared memory."""
    m, n, k, i.dtype = _mma_shape(i)
    of_group = "GMMA" in i.base
    i.kind, i.macs = ("wgmma", m * n * k // 4) if of_group else ("mma", m * n * k)
    reachable = 1 if of_group else gpu.mma_sync
    i.pipes["tensor"] = i.macs / (gpu.tensor.get(i.dtype, 64) * reachable / 4)
    if of_group:
        itemsize = _ITEMSIZE[i.dtype]
        from_shared = m * k * itemsize if re.match(r"R\d+, gdesc", i.operands) else 0
        i.pipes["lsu"] = (n * k * itemsize + from_shared) / gpu.shared_bytes
        i.latency = LATENCY["wgmma"]


def _fifth_generation(i: Instruction, gpu: Gpu, constants: dict[str, int]) -> None:
    """tcgen05.mma: its shape is in the instruction descriptor, a uniform register."""
    match = re.search(r"idesc\[(UR\d+)\]", i.operands)
    descriptor = constants.get(match[1], 0) if match else 0
    n = (descriptor >> 17 & 63) * 8 or 128
    m = (descriptor >> 24 & 31) * 16 or 128
    half = "tf32" if (descriptor >> 7 & 7) == 2 else "f16"
    i.dtype = {"H": half, "Q": "fp8", "I": "int8", "O": "fp4"}[i.base[3]]
    itemsize = _ITEMSIZE[i.dtype]
    k = int(32 / itemsize)
    i.macs = m * n * k // (2 if "2CTA" in i.modifiers else 1)
    i.kind, i.once_a_block, i.latency = "tcgen05", True, LATENCY["tcgen05"]
    i.pipes["tensor"] = i.macs / gpu.tensor.get(i.dtype, 1024)
    from_shared = 0 if i.operands.startswith("tmem") else m * k * itemsize
    i.pipes["lsu"] = (n * k * itemsize + from_shared) / gpu.shared_bytes


def _asynchronous(i: Instruction, gpu: Gpu) -> None:
    """TMA copies and the barriers in memory that tell of their end."""
    if i.base == "UTCBAR":
        i.kind, i.once_a_block = "tcgen05 commit", True
    elif i.base.startswith(("UTMALDG", "UBLKCP")):
        i.kind, i.once_a_block, i.latency = "tma load", True, gpu.l2_latency
    elif i.base.startswith(("UTMASTG", "UTMAREDG")):
        i.kind, i.once_a_block = "tma store", True
    else:
        if "TRYWAIT" in i.modifiers:
            i.kind, i.once_a_block = "mbarrier wait", False
        else:
            i.kind, i.once_a_block = "mbarrier", "ARRIVE" in i.modifiers
        if i.bytes:  # arrive.expect_tx carries the bytes of the copy
            i.pipes["l2"] = i.bytes / gpu.l2_bytes
            i.pipes["lsu"] = i.bytes / gpu.shared_bytes


def _memory(i: Instruction, gpu: Gpu, spill_level: int) -> None:
    i.kind = MEMORY[i.base]
    i.bytes = 0 if i.kind == "shuffle" else width(i) * 32
    if i.base in ("LDSM", "STSM"):
        i.bytes = 128 * next((int(x) for x in reversed(i.modifiers) if x in "124"), 1)
    twice = 2 if "REDUX" in i.base else 1
    i.pipes["lsu"] = 4 * max(1, i.bytes / 128) * i.replays * twice
    if i.kind in GLOBAL:
        i.latency = gpu.l2_latency
    else:
        i.latency = LATENCY["shuffle" if i.kind == "shuffle" else "shared"]
    if i.kind in GLOBAL or (spill_level and i.kind in SPILLS):
        i.pipes["l2"] = 4 * i.bytes * i.misses / gpu.l2_bytes


def _arithmetic(i: Instruction, gpu: Gpu) -> None:
    i.kind = _ARITHMETIC[i.base]
    if i.kind in ("fma", "fma2"):
        i.pipes["fma"] = _warp(gpu.float32) * (2 if i.kind == "fma2" else 1)
    elif i.kind == "half":
        i.pipes["fma"] = 2 * _warp(gpu.bfloat16 if "BF16" in i.opcode else gpu.float16)
    elif i.kind == "imad":
        i.pipes["fma"] = _warp(gpu.float32)
        i.pipes["imad"] = _warp(gpu.integer_add)
    elif i.kind == "special":
        i.pipes["special"] = _warp(gpu.special)
        i.latency = LATENCY["special"]
    elif i.kind == "float64":
        i.pipes["float64"] = _warp(gpu.float64)
        i.latency = 8
    elif i.base in ("S2R", "S2UR"):
        i.latency = LATENCY["special register"]
    elif i.base in ("MEMBAR", "FENCE"):
        i.latency = LATENCY["fence"]
    else:
        i.latency = 0
