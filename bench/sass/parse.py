"""A cubin as instructions with their control bits, and what its ELF sections say."""

import bisect
import functools
import importlib.util
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s+/\* 0x[0-9a-f]{16} \*/")
_CONTROL = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_BRANCHES = ("BRA", "BSSY", "JMP", "WARPSYNC")
_PARTS = re.compile(r"(@!?U?P\w+ )?\s*(\S+)\s*(.*)")


@dataclass
class Instruction:
    """One machine instruction, as disassembled and then as costed.

    Attributes:
        offset: In the code, bytes.
        predicate: Such as ``"@!P0"``, or empty.
        opcode: With its modifiers.
        operands: As written.
        stall: Clocks before the warp's next instruction may issue.
        write_barrier: The scoreboard that its result releases; 7 is none.
        read_barrier: The scoreboard that reading its operands releases; 7 is none.
        waits: Mask of scoreboards that it waits for.
        target: Offset that it branches to, or -1.
        kind: What class of cost it has.
        pipes: Clocks of each pipe of a sub-partition, a warp.
        bytes: That it moves, a warp.
        macs: Multiply-adds, a warp.
        dtype: Kind of its tensor operands.
        once_a_block: Whether one thread issues it for the block; ``pipes`` are then the
            multiprocessor's.
        latency: Clocks until its result is there, on top of the pipes.
        varies: Bit 0: its address varies over lanes. Bit 1: over blocks.
        replays: Times that a memory request repeats, for sectors or bank conflicts.
        misses: Share of its bytes that L2 serves.
    """

    offset: int
    predicate: str
    opcode: str
    operands: str
    stall: int
    write_barrier: int
    read_barrier: int
    waits: int
    target: int = -1
    kind: str = ""
    pipes: dict[str, float] = field(default_factory=dict)
    bytes: int = 0
    macs: int = 0
    dtype: str = ""
    once_a_block: bool = False
    latency: int = 0
    varies: int = 3
    replays: float = 1.0
    misses: float = 1.0

    def __post_init__(self) -> None:
        self.base, *self.modifiers = self.opcode.split(".")


# Instructions in order, and the offset of each label.
Disassembly = tuple[list[Instruction], dict[str, int]]


@functools.cache
def tool(name: str) -> str:
    """Path of ``nvdisasm`` or alike, which the triton wheel ships.

    Raises:
        FileNotFoundError: Neither triton nor the CUDA toolkit has it.
    """
    spec = importlib.util.find_spec("triton")
    if spec and spec.submodule_search_locations:
        shipped = os.path.join(spec.submodule_search_locations[0], "backends/nvidia/bin", name)
        if os.path.exists(shipped):
            return shipped
    found = shutil.which(name)
    if not found:
        raise FileNotFoundError(f"{name} not found: the triton wheel and the CUDA toolkit hold it")
    return found


def disassemble(cubin: bytes) -> Disassembly:
    """The first kernel's instructions, and the offset of each label.

    Raises:
        ValueError: Not a cubin.
    """
    text = _nvdisasm(cubin, ".cubin", "-c")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: re.Match[str] | None = None
    for line in text.split("\n"):
        if instructions and re.match(r"\s*\.section\s+\.text\.", line):
            break
        if match := _LINE.match(line):
            pending = match
        elif match := re.match(r"(\.L_x_\w+):", line):
            labels[match[1]] = instructions[-1].offset + 16 if instructions else 0
        elif pending and (match := _CONTROL.search(line)):
            instructions.append(_instruction(int(pending[1], 16), pending[2], int(match[1], 16)))
            pending = None
    if not instructions:
        raise ValueError("sass: nvdisasm produced no code; is this a cubin?")
    for i in instructions:
        if match := re.search(r"`\((\.L_x_\w+)\)", i.operands):
            i.target = labels.get(match[1], -1)
    return instructions, labels


def disassemble_all(cubins: Sequence[bytes], arch: int, *, named: bool = True) -> list[Disassembly]:
    """As ``disassemble``, of several cubins of one capability.

    Starting the disassembler costs half a second, so their bare code goes through it as one. It
    then knows no names: a cubin that calls a subroutine or jumps by a table goes through alone.

    Args:
        cubins: Of kernels.
        arch: Their capability.
        named: Whether calls and tables need the places they lead to; instructions alone do not.
    """
    starts, code = [], b""
    for cubin in cubins:
        starts.append(len(code))
        code += machine_code(cubin)
    text = _nvdisasm(code, ".bin", "-b", f"SM{arch}{'a' if arch >= 90 else ''}")
    parts: list[list[Instruction]] = [[] for _ in cubins]
    pending: re.Match[str] | None = None
    for line in text.split("\n"):
        if match := _LINE.match(line):
            pending = match
        elif pending and (match := _CONTROL.search(line)):
            at = int(pending[1], 16)
            which = bisect.bisect_right(starts, at) - 1
            i = _instruction(at - starts[which], pending[2], int(match[1], 16))
            if i.base in _BRANCHES and (match := re.search(r"\b0x[0-9a-f]+$", i.operands)):
                i.target = int(match[0], 16) - starts[which]
            parts[which].append(i)
            pending = None
    found = []
    for cubin, instructions in zip(cubins, parts, strict=True):
        if not instructions or (named and any(i.base in ("BRX", "CALL") for i in instructions)):
            found.append(disassemble(cubin))
        else:
            targets = sorted({i.target for i in instructions} - {-1})
            found.append((instructions, {f".L_x_{n}": at for n, at in enumerate(targets)}))
    return found


def _nvdisasm(code: bytes, suffix: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(code)
        file.flush()
        return subprocess.run(
            [tool("nvdisasm"), *options, "-hex", file.name], capture_output=True, text=True
        ).stdout


def _instruction(offset: int, text: str, high_word: int) -> Instruction:
    control = high_word >> 41  # bits 105 to 121 of the 128-bit instruction
    parts = _PARTS.match(text)
    assert parts is not None
    return Instruction(
        offset=offset,
        predicate=(parts[1] or "").strip(),
        opcode=parts[2],
        operands=parts[3].replace(".reuse", ""),
        stall=control & 15,
        write_barrier=control >> 5 & 7,
        read_barrier=control >> 8 & 7,
        waits=control >> 11 & 63,
    )


@dataclass
class ElfInfo:
    """What a cubin's sections say of its kernel; bytes and threads a block, stack a thread."""

    name: str = "?"
    registers: int = 0
    shared: int = 0
    stack: int = 0
    threads: int = 0


# Attributes of .nv.info sections.
_THREADS, _REGISTERS, _STACKS = 0x10, 0x2F, (0x11, 0x12)


def machine_code(cubin: bytes) -> bytes:
    """The bytes of a cubin's code: it has one kernel."""
    code = (cubin[o : o + n] for name, o, n in sections(cubin) if name.startswith(".text."))
    return next(code, b"")


def sections(cubin: bytes) -> list[tuple[str, int, int]]:
    """Name, offset and size of each ELF section."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names = struct.unpack_from("<HH", cubin, 0x3C)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + 64 * k) for k in range(count)]
    found = []
    for header in headers:
        name = cubin[headers[names][4] + header[0] :].split(b"\0", 1)[0].decode()
        found.append((name, header[4], header[5]))
    return found


def elf_info(cubin: bytes) -> ElfInfo:
    """Name, registers, static shared memory, stack and threads, from the ELF sections."""
    info = ElfInfo()
    for name, offset, size in sections(cubin):
        if name.startswith(".text.") and info.name == "?":
            info.name = name.removeprefix(".text.")
        if name.startswith(".nv.shared.") and "reserved" not in name:
            info.shared += size
        if name.startswith(".nv.info"):
            _read_attributes(cubin, offset, offset + size, info)
    return info


def _read_attributes(cubin: bytes, at: int, end: int, info: ElfInfo) -> None:
    while at + 4 <= end:
        layout, attribute, size = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if layout != 4:  # its value is in place of the size
            continue
        words = struct.unpack_from(f"<{size // 4}I", cubin, at)
        at += size
        if attribute == _THREADS:
            info.threads = math.prod(words[:3])
        elif attribute == _REGISTERS:
            info.registers = max(info.registers, words[1])
        elif attribute in _STACKS:
            info.stack = max(info.stack, words[1])
