"""The integer address code run for 64 lanes: sectors a request touches, and bank conflicts."""

import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence

from .control_flow import Code
from .cost import GLOBAL, SHARED, width
from .parse import Instruction

_LANES = range(64)
_MASK = 0xFFFFFFFF

Lanes = list[int] | None  # the low word in each of 64 lanes, or not known
_SPECIAL_REGISTERS = ("S2R", "S2UR", "CS2R")
_MODELLED = ("alu", "imad", "uniform", "control", "shuffle", "half")
_WITHOUT_RESULT = ("store", "shared store", "spill store", "off")


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _argument(operand: str, offset: int = 0) -> list[int]:
    """Stands for a kernel argument: pointers and unknown sizes, distinct multiples of 4096."""
    match = re.search(r"\]\[(0x[0-9a-f]+)\]", operand)
    place = (int(match[1], 16) + offset << 18) if match else 0
    return [(4096 + place) & _MASK] * 64


class _LaneRegisters:
    """Registers of 64 lanes of one block, as far as integer code is understood."""

    def __init__(self, block: int):
        self.block = block
        self.values: dict[str, Lanes] = {}

    def value(self, operand: str) -> Lanes:
        """What an operand holds."""
        operand, sign = operand.strip(), ""
        if operand[:1] in ("-", "~") and not operand.startswith("-0x"):
            sign, operand = operand[0], operand[1:]
        operand = re.sub(r"\.(64|U32|X\d+|H\d\S*)$", "", operand)
        found: Lanes = None
        if re.fullmatch(r"U?R\d+", operand):
            found = self.values.get(operand)
        elif re.fullmatch(r"-?0x[0-9a-f]+", operand):
            found = [int(operand, 16) & _MASK] * 64
        elif operand in ("RZ", "URZ", "SRZ"):
            found = [0] * 64
        elif operand.startswith("c["):
            found = _argument(operand)
        if found is None or not sign:
            return found
        return [(-x if sign == "-" else ~x) & _MASK for x in found]

    def address(self, operand: str) -> Lanes:
        """The sum of an address operand's terms."""
        terms = [self.value(term) for term in operand.split("+")]
        known = [term for term in terms if term is not None]
        if len(known) < len(terms):
            return None
        return [sum(words) & _MASK for words in zip(*known, strict=True)]

    def result(self, i: Instruction, operands: Sequence[str]) -> Lanes:
        """What an instruction computes from operands that follow its destination."""
        if i.base in _SPECIAL_REGISTERS:
            return self._special(i.operands)
        if i.base == "HFMA2" and list(operands[:2]) == ["-RZ", "RZ"]:  # loads a constant
            halves = struct.pack("<ee", float(operands[3]), float(operands[2]))
            return [struct.unpack("<I", halves)[0]] * 64
        if i.base in ("LDC", "LDCU", "ULDC"):
            return _argument(i.operands)
        if "X" in i.modifiers or not operands:  # the high word of a 64-bit sum
            return None
        values = [self.value(operand) for operand in operands]
        first = values[0]
        if i.base == "SHFL":
            if first is None or "IDX" not in i.modifiers:
                return None
            return [first[lane & 32] for lane in _LANES]
        if i.base in ("SEL", "USEL", "IMNMX", "VIMNMX", "MOV", "UMOV", "R2UR"):
            return first
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return _integer(i, operands, known)

    def _special(self, name: str) -> list[int]:
        if "SR_TID.X" in name:
            return list(_LANES)
        if "SR_LANEID" in name:
            return [lane & 31 for lane in _LANES]
        return [self.block if "SR_CTAID" in name else 0] * 64

    def execute(self, i: Instruction) -> None:
        """Runs one instruction."""
        writes_nothing = i.kind == "control" and i.base not in _SPECIAL_REGISTERS
        if i.kind in _WITHOUT_RESULT or "SETP" in i.base or writes_nothing:
            return
        operands = [x for x in i.operands.split(", ") if not re.fullmatch(r"!?U?P[0-9T]", x)]
        match = re.fullmatch(r"(U?R)(\d+)", operands[0]) if operands else None
        if match is None:
            return
        found = self.result(i, operands[1:]) if i.kind in _MODELLED else None
        if found is None and i.kind != "spill load":
            found = self._uniform(i, operands[1:])
        wide = 4 if "128" in i.modifiers else 2 if {"64", "WIDE"} & set(i.modifiers) else 1
        for word in range(1, wide):
            loaded = found is not None and "LDC" in i.base
            name = f"{match[1]}{int(match[2]) + word}"
            self.values[name] = _argument(i.operands, 4 * word) if loaded else None
        self.values[operands[0]] = found

    def _uniform(self, i: Instruction, operands: Sequence[str]) -> Lanes:
        """Equal inputs in all lanes give an equal output, though it is not known which."""
        inputs = [self.value(name) for name in re.findall(r"U?R\d+", " ".join(operands))]
        known = [words for words in inputs if words is not None]
        if len(known) < len(inputs) or any(len(set(words)) > 1 for words in known):
            return None
        return [hash((i.offset, *(words[0] for words in known))) % 997 * 4096] * 64


def _multiply_add(x: Sequence[int], modifiers: Sequence[str]) -> int:
    if "HI" in modifiers:
        return (_signed(x[0]) * _signed(x[1]) >> 32) + x[2]
    return x[0] * x[1] + x[2]


def _scaled_sum(x: Sequence[int], modifiers: Sequence[str]) -> int:
    if "HI" not in modifiers:
        return (x[0] << x[2] % 32) + x[1]
    word = _signed(x[0]) if "SX32" in modifiers else x[0]
    return (word >> (32 - x[-1] % 33)) + x[1]


def _shift(x: Sequence[int], modifiers: Sequence[str]) -> int:
    if "L" in modifiers:
        return x[0] << (x[1] & 31)
    return (_signed(x[2]) if "S32" in modifiers else x[2]) >> (x[1] & 31)


def _logic(values: Sequence[Sequence[int]], truth_table: int) -> list[int]:
    """Any logic function of three words, by its truth table."""

    def one(x: Sequence[int]) -> int:
        rows = [row for row in range(8) if truth_table >> row & 1]
        return sum(
            (x[0] if row & 4 else ~x[0])
            & (x[1] if row & 2 else ~x[1])
            & (x[2] if row & 1 else ~x[2])
            & _MASK
            for row in rows
        )

    return [one(x) for x in zip(*values, strict=True)]


_INTEGER = {
    "IMAD": _multiply_add,
    "IADD3": lambda x, modifiers: sum(x),
    "IADD": lambda x, modifiers: sum(x),
    "VIADD": lambda x, modifiers: sum(x),
    "LEA": _scaled_sum,
    "SHF": _shift,
    "SGXT": lambda x, modifiers: x[0] & ((1 << x[1]) - 1),
}


def _integer(i: Instruction, operands: Sequence[str], values: Sequence[Sequence[int]]) -> Lanes:
    """An integer instruction on values that are all known."""
    if i.base in ("LOP3", "ULOP3"):
        return _logic(values, int(operands[3], 16))
    compute = _INTEGER.get(i.base.removeprefix("U"))
    if compute is None or (compute is _shift and "U64" in i.modifiers):
        return None
    return [compute(words, i.modifiers) & _MASK for words in zip(*values, strict=True)]


def _addresses(instructions: Iterable[Instruction], block: int) -> dict[int, tuple[Lanes, Lanes]]:
    """Global and shared address in each lane, by offset of the instruction."""
    registers = _LaneRegisters(block)
    found: dict[int, tuple[Lanes, Lanes]] = {}
    for i in instructions:
        if i.kind in GLOBAL or i.kind in SHARED:
            brackets = re.findall(r"(desc)?\[([^\]]*)\]", i.operands)
            places = [inside for descriptor, inside in brackets if not descriptor]
            if places:
                of_global = registers.address(places[-1]) if i.kind in GLOBAL else None
                no_shared = i.kind in ("load", "store", "atomic")
                found[i.offset] = (of_global, None if no_shared else registers.address(places[0]))
        if i.kind == "mbarrier" and "ARRIVE" in i.modifiers:
            match = re.search(r", (R\d+)$", i.operands)
            if match:
                found[i.offset] = (None, registers.values.get(match[1]))
        registers.execute(i)
    return found


def lane_model(code: Code) -> None:
    """Sets ``varies``, ``replays`` and ``misses`` of memory accesses, and bytes of TMA copies."""
    straight = [i for i, _ in code.walk(None, 0, {})]
    on_path = {i.offset for i in straight}
    rest = [i for i in code.live if i.offset not in on_path]
    first, second = _addresses(straight, 0), _addresses(straight, 1)
    for part, addresses in ((straight, first), (rest, _addresses(rest, 0))):
        for i in part:
            announced = addresses.get(i.offset, (None, None))[1]
            if i.kind == "mbarrier" and announced and announced[0] <= 1 << 18:
                i.bytes = announced[0]  # what a TMA copy will bring
    in_l1: set[int] = set()
    for i in straight:
        of_global, of_shared = first.get(i.offset, (None, None))
        elsewhere, _ = second.get(i.offset, (None, None))
        if of_global and elsewhere:
            _sectors(i, of_global, elsewhere, in_l1)
        if of_shared and i.kind != "mbarrier":
            _banks(i, of_shared)


def _sectors(i: Instruction, lanes: list[int], elsewhere: list[int], in_l1: set[int]) -> None:
    """32-byte sectors that a request touches, and how many of them L1 lacks."""
    over_lanes = len(set(lanes)) > 1
    i.varies = int(over_lanes) + 2 * (lanes[0] != elsewhere[0])
    if not over_lanes:
        return
    size = width(i)
    sectors = {s for x in lanes[:32] for s in range(x // 32, (x + size - 1) // 32 + 1)}
    if i.kind != "atomic":
        i.replays = max(1.0, len(sectors) * 32 / i.bytes)
        i.misses = i.replays
    if i.kind == "load" or (i.kind == "copy" and "BYPASS" not in i.modifiers):
        if i.replays > 1:
            i.misses = len(sectors - in_l1) * 32 / i.bytes
        in_l1 |= sectors


def _banks(i: Instruction, lanes: list[int]) -> None:
    """Clocks of a shared-memory request whose lanes fall into the same banks."""
    matrix = i.base in ("LDSM", "STSM")
    size = 16 if matrix else max(4, width(i))
    active = i.bytes // 16 if matrix else 32
    together = 128 // size
    clocks = 0
    for start in range(0, active, together):
        words: dict[int, set[int]] = defaultdict(set)
        for address in lanes[start : start + together]:
            for word in range(0, size, 4):
                words[(address + word) // 4 % 32].add((address + word) // 4)
        clocks += max(map(len, words.values()), default=1)
    if i.kind != "copy" and i.bytes:
        i.replays = max(i.replays, clocks / max(1, i.bytes / 128))
