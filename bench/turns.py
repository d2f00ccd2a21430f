"""How often the loops of a kernel turn, from its scalar code and the numbers it is called with."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .ttir import Function, Statement


def trip_counts(
    kernel: Function,
    arguments: Sequence[tuple[str, Any]],
    programs: tuple[int, int, int],
    program: tuple[int, int, int],
) -> list[float | None]:
    """How often each loop's body runs in one program, loops in the order of the text.

    None where the count hangs on numbers that are not known. The innermost loop of a nest counts
    all its turns.

    Args:
        kernel: The intermediate code.
        arguments: Name and value of each parameter in order, None for what is not known. The
            code can show a parameter under another name, so their order counts; where descriptors
            stand for several parameters each, their names do.
        programs: The grid.
        program: The program's place in it.
    """
    values: dict[str, _Value] = {}
    by_name = dict(arguments)
    given = [value for _, value in arguments]
    if len(given) != len(kernel.parameters):
        given = [by_name.get(name.lstrip("%")) for name in kernel.parameters]
    for name, value in zip(kernel.parameters, given, strict=True):
        if isinstance(value, torch.Tensor):
            values[name] = _Pointer(value.flatten().tolist(), 0)
        elif isinstance(value, (bool, int)):
            values[name] = int(value)
    loops = kernel.loops()
    counts: dict[int, float | None] = {id(s): 0 for s in loops}
    _Evaluator(values, programs, program, counts).run(kernel.body)
    return [counts[id(s)] for s in loops]


@dataclass(frozen=True)
class _Pointer:
    """An address inside a table of integers."""

    table: list[int]
    offset: int


_Value = int | _Pointer


def _quotient(a: int, b: int) -> int:
    """Towards zero, as machines divide."""
    if b == 0:
        return 0
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": _quotient,
    "arith.divui": lambda a, b: a // b if b else 0,
    "arith.remsi": lambda a, b: a - b * _quotient(a, b),
    "arith.remui": lambda a, b: a % b if b else 0,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.minui": min,
    "arith.maxui": max,
    "arith.andi": lambda a, b: a & b,
    "arith.ori": lambda a, b: a | b,
    "arith.xori": lambda a, b: a ^ b,
    "arith.shli": lambda a, b: a << b,
    "arith.shrsi": lambda a, b: a >> b,
    "arith.shrui": lambda a, b: a >> b,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "slt": lambda a, b: a < b,
    "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b,
    "sge": lambda a, b: a >= b,
    "ult": lambda a, b: a < b,
    "ule": lambda a, b: a <= b,
    "ugt": lambda a, b: a > b,
    "uge": lambda a, b: a >= b,
}


def _from_table(s: Statement, given: Sequence[_Value | None]) -> _Value | None:
    """Address arithmetic and loads in a table of integers."""
    base = given[0]
    if not isinstance(base, _Pointer):
        return None
    if s.name == "tt.addptr":
        step = given[1]
        return _Pointer(base.table, base.offset + step) if isinstance(step, int) else None
    if len(given) > 1 and given[1] == 0:  # masked off
        return given[2] if len(given) > 2 else 0
    inside = 0 <= base.offset < len(base.table)
    return base.table[base.offset] if inside else None


_CASTS = ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast")


def _computed(s: Statement, numbers: list[int]) -> int | None:
    if s.name in _ARITHMETIC:
        return _ARITHMETIC[s.name](numbers[0], numbers[1])
    if s.name == "arith.cmpi":
        return int(_COMPARE[s.text.split()[1].rstrip(",")](numbers[0], numbers[1]))
    return numbers[0] if s.name in _CASTS else None


@dataclass
class _Evaluator:
    """Runs the scalar integer part of a kernel for one program."""

    values: dict[str, _Value]
    programs: tuple[int, int, int]
    program: tuple[int, int, int]
    counts: dict[int, float | None]

    def run(self, body: list[Statement]) -> list[_Value | None]:
        """Runs a region and gives what it yields."""
        at = 0
        while at < len(body):
            s = body[at]
            at += 1
            if s.name in ("scf.yield", "scf.condition", "tt.return"):
                return [self.values.get(o) for o in s.operands]
            if s.name in ("cf.br", "cf.cond_br"):
                at = self.jump(s, body)
            elif s.loop:
                self.loop(s)
            elif s.name == "scf.if":
                self.branch(s)
            elif s.name == "scf.while":
                self.repeat(s)
            elif s.results:
                self.set(s.results, [self.scalar(s)])
        return []

    def jump(self, s: Statement, body: list[Statement]) -> int:
        """Where a branch goes on; past an early return where its condition is not known."""
        labels = re.findall(r"\^\w+", s.text)
        taken = labels[0]
        if s.name == "cf.cond_br" and not self.values.get(s.operands[0]):
            taken = labels[1]
        return next((i for i, other in enumerate(body) if other.name == taken), len(body))

    def repeat(self, s: Statement) -> None:
        """A while loop: its first region gives the condition, its second the next values."""
        pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", s.text.split(" : ")[0])
        names = [inside for inside, _ in pairs]
        carried = [self.values.get(start) for _, start in pairs]
        for _ in range(1000):
            self.set(names, carried)
            condition, *given = self.run(s.regions[0]) or [None]
            if condition is None:
                break
            if not condition:
                self.set(s.results, given)
                return
            self.set(names, given)
            carried = self.run(s.regions[1])
        self.set(s.results, [None] * len(s.results))

    def set(self, names: list[str], found: Sequence[_Value | None]) -> None:
        """Gives names their values; those not known are forgotten."""
        for name, value in zip(names, found, strict=False):
            if value is None:
                self.values.pop(name, None)
            else:
                self.values[name] = value

    def scalar(self, s: Statement) -> _Value | None:
        """What a scalar integer statement gives, or None."""
        if s.name == "arith.constant":
            match = re.match(r"arith\.constant (?:(true|false)|(-?\d+) : i\d+)", s.text)
            if not match:
                return None
            return int(match[1] == "true") if match[1] else int(match[2])
        if s.name in ("tt.get_program_id", "tt.get_num_programs"):
            axis = "xyz".index(s.text.split()[1])
            return (self.program if s.name == "tt.get_program_id" else self.programs)[axis]
        given = [self.values.get(operand) for operand in s.operands]
        if s.name == "arith.select" and given[0] is not None:
            return given[1] if given[0] else given[2]
        if s.name in ("tt.addptr", "tt.load"):
            return _from_table(s, given)
        numbers = [g for g in given if isinstance(g, int)]
        if len(numbers) < len(given) or not given or "tensor<" in s.text:
            return None
        return _computed(s, numbers)

    def branch(self, s: Statement) -> None:
        """Runs the side that is taken; both, trusting neither, where that is not known."""
        chosen = self.values.get(s.operands[0])
        if chosen is None:
            for region in s.regions:
                self.run(region)
            self.set(s.results, [None] * len(s.results))
        else:
            index = 0 if chosen else 1
            region = s.regions[index] if index < len(s.regions) else []
            self.set(s.results, self.run(region) or [None] * len(s.results))

    def loop(self, s: Statement) -> None:
        """Counts a loop's turns; runs them only where loops inside hang on them."""
        assert s.loop is not None
        counter, *bounds = s.loop
        first, last, step = (self.values.get(b) for b in bounds)
        inner = any(x.loop for x in s.nested())
        carried = [self.values.get(start) for _, start in s.carried]
        known = isinstance(first, int) and isinstance(last, int) and isinstance(step, int)
        if not known or not step:
            self.counts[id(s)] = None
            for x in s.nested():
                if x.loop:
                    self.counts[id(x)] = None
            self.set(s.results, [None] * len(s.results))
            return
        turns = range(first, last, step)  # type: ignore[arg-type]
        if self.counts[id(s)] is not None:
            self.counts[id(s)] += len(turns)  # type: ignore[operator]
        if inner and len(turns) <= 4096:
            for value in turns:
                self.values[counter] = value
                self.set([inside for inside, _ in s.carried], carried)
                carried = self.run(s.regions[0])
            self.set(s.results, carried)
        else:
            self.set(s.results, [None] * len(s.results))
