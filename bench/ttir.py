"""Triton's own intermediate code (TTIR) as a tree: loop counts, addresses, products, exponentials.

TTIR is what a kernel says before any choice of layout: what it reads here holds for every target.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_LOCATION = re.compile(r"\s+loc\((?:[^()]|\([^()]*\))*\)")
_RESULT = re.compile(r"^(%[\w$.#-]+)(?::(\d+))? = ")
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_FOR = re.compile(
    r"scf\.for (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+)(?: iter_args\((.*?)\))?(?: -> .*?)?\s*(?::\s*(\w+))? \{$"
)
_SHAPE = re.compile(r"tensor<((?:\d+x)+)(.*?)>+$")


@dataclass
class Statement:
    """One operation: its results, name, operands, type as written, and nested regions."""

    results: list[str]
    name: str
    operands: list[str]
    text: str
    regions: list[list["Statement"]] = field(default_factory=list)
    loop: tuple[str, str, str, str] | None = None  # induction variable, from, to, step
    carried: list[tuple[str, str]] = field(default_factory=list)  # (inside, at the start)

    @property
    def type(self) -> str:
        """The type of the result, as written."""
        tail = self.text.rsplit(" : ", 1)[-1]
        return re.split(r" -> | to ", tail)[-1].strip()

    def elements(self) -> int:
        """Elements of the result; 1 of a scalar."""
        match = _SHAPE.search(self.type)
        return math.prod(map(int, match[1].split("x")[:-1])) if match else 1


@dataclass
class Function:
    """A kernel: its parameters with their types, and its statements."""

    parameters: dict[str, str]
    body: list[Statement]

    def walk(self) -> Iterator[Statement]:
        """Every statement, nested ones included, in order."""
        yield from _walk(self.body)


def _walk(body: list[Statement]) -> Iterator[Statement]:
    for statement in body:
        yield statement
        for region in statement.regions:
            yield from _walk(region)


def _split(results: str, count: str | None) -> list[str]:
    return [f"{results}#{i}" for i in range(int(count))] if count else [results]


def parse(text: str) -> Function:
    """The kernel of a TTIR module, in which every call is inlined."""
    parameters: dict[str, str] = {}
    root: list[Statement] = []
    stack: list[list[Statement]] = []
    for raw in text.splitlines():
        line = _LOCATION.sub("", raw).strip()
        if line.startswith("tt.func"):
            if "public" not in line:
                stack.append([])  # a helper that was not inlined: read, and left aside
                continue
            for name, kind in re.findall(r"(%[\w$.-]+): ([^,{)]+)", line.split("attributes")[0]):
                parameters[name] = kind.strip()
            stack.append(root)
        elif not stack or not line or line.startswith("#"):
            continue
        elif line.startswith("} else") or line.startswith("} do"):
            stack.pop()
            owner = stack[-1][-1]
            owner.regions.append([])
            stack.append(owner.regions[-1])
        elif line.startswith("}"):
            stack.pop()
        elif line.startswith("^"):
            continue
        else:
            match = _RESULT.match(line)
            rest = line[match.end() :] if match else line
            name = rest.split(" ", 1)[0].split("(")[0]
            statement = Statement(
                _split(match[1], match[2]) if match else [],
                name.strip('"'),
                _NAME.findall(rest),
                rest,
            )
            stack[-1].append(statement)
            if line.endswith("{"):
                statement.regions.append([])
                stack.append(statement.regions[-1])
            if found := _FOR.match(rest):
                statement.loop = (found[1], found[2], found[3], found[4])
                pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", found[5] or "")
                statement.carried = [(inside, start) for inside, start in pairs]
    return Function(parameters, root)


# --- addresses ----------------------------------------------------------------------------------

_INDEX_SOURCES = ("tt.get_program_id", "tt.load")
_PASSES_ON = (
    "arith.addi", "arith.subi", "arith.muli", "arith.divsi", "arith.remsi", "arith.extsi",
    "arith.extui", "arith.trunci", "arith.select", "arith.minsi", "arith.maxsi", "arith.shli",
    "arith.divui", "arith.remui", "arith.andi", "arith.ori", "arith.xori", "tt.splat",
    "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.index_cast",
)  # fmt: skip


def narrow_products(kernel: Function) -> list[str]:
    """Products in 32 bits of an index with a kernel argument that reach an address.

    An index is a program's number, a loop's counter, or a number that was read from memory, with
    anything added to it. Such a product passes 2^31 on tensors that a large GPU holds.
    """
    kinds: dict[str, str] = {}  # "argument" or "index"; constants and ranges are neither
    for name, kind in kernel.parameters.items():
        if re.fullmatch(r"i\d+", kind):
            kinds[name] = "argument"
    users: dict[str, list[Statement]] = {}
    for _ in range(3):  # loops carry kinds round
        for s in kernel.walk():
            if s.loop:
                kinds[s.loop[0]] = "index"
                last = s.regions[0][-1] if s.regions and s.regions[0] else None
                yielded = last.operands if last and last.name == "scf.yield" else []
                for i, (inside, start) in enumerate(s.carried):
                    both = [kinds.get(start), kinds.get(yielded[i]) if i < len(yielded) else None]
                    merged = "index" if "index" in both else next(filter(None, both), None)
                    if merged:
                        kinds[inside] = merged
                        if i < len(s.results):
                            kinds[s.results[i]] = merged
            elif s.name in _INDEX_SOURCES:
                for result in s.results:
                    kinds[result] = "index"
            elif s.name in _PASSES_ON:
                found = [kinds.get(o) for o in s.operands]
                merged = "index" if "index" in found else "argument" if "argument" in found else ""
                if merged:
                    for result in s.results:
                        kinds[result] = merged
    for s in kernel.walk():
        for operand in s.operands:
            users.setdefault(operand, []).append(s)

    def reaches_address(name: str, seen: set[str]) -> bool:
        for user in users.get(name, ()):
            if user.name == "tt.addptr" and name in user.operands[1:]:
                return True
            if user.name in _PASSES_ON:
                for result in user.results:
                    if result not in seen:
                        seen.add(result)
                        if reaches_address(result, seen):
                            return True
        return False

    bad = []
    for s in kernel.walk():
        if s.name != "arith.muli" or not re.search(r"\bi32\b|xi32>", s.type):
            continue
        found = sorted(kinds.get(o, "") for o in s.operands[:2])
        if found in (["argument", "index"], ["index", "index"]) and reaches_address(
            s.results[0], set()
        ):
            bad.append(" * ".join(o.lstrip("%") for o in s.operands[:2]))
    return bad


# --- what a kernel computes ---------------------------------------------------------------------


def dots(kernel: Function) -> list[tuple[int, int, int, str]]:
    """Each matrix product as (M, N, K, type of its inputs)."""
    found = []
    for s in kernel.walk():
        if s.name == "tt.dot":
            shapes = re.findall(r"tensor<(\d+)x(\d+)x([a-z]\w*)", s.text)
            (m, k, kind), (_, n, _) = shapes[0], shapes[1]
            found.append((int(m), int(n), int(k), kind))
    return found


def memory_tiles(kernel: Function) -> list[tuple[str, int, int]]:
    """Each load and store of a tile as ("load" or "store", elements, bits of an element)."""
    found = []
    for s in kernel.walk():
        if s.name in ("tt.load", "tt.store"):
            match = re.search(r"tensor<((?:\d+x)+)!tt\.ptr<([a-z]+)(\d+)", s.text)
            if match:
                elements = math.prod(map(int, match[1].split("x")[:-1]))
                found.append((s.name.removeprefix("tt."), elements, int(match[3])))
    return found


def exponentials(layouts: str) -> tuple[int, int]:
    """Elements of all tiles that are exponentiated, and how many rows' worth of vectors are.

    Args:
        layouts: The code with layouts (TTGIR).
    """
    tiles = vectors = 0
    for shape in re.findall(r"math\.exp2? [^\n]*?: tensor<((?:\d+x)+)", layouts):
        sizes = [int(n) for n in shape.split("x")[:-1]]
        if len(sizes) > 1:
            tiles += math.prod(sizes)
        else:
            vectors += 1
    return tiles, vectors


# --- loop counts --------------------------------------------------------------------------------


def trip_counts(
    kernel: Function,
    arguments: Mapping[str, Any],
    programs: tuple[int, int, int],
    program: tuple[int, int, int],
) -> list[float | None]:
    """How often each loop's body runs in one program, loops in the order of the text.

    None where the count hangs on numbers in memory. The innermost loop of a nest counts all its
    turns.
    """
    values: dict[str, int] = {}
    for name in kernel.parameters:
        value = arguments.get(name.lstrip("%"))
        if isinstance(value, (bool, int)):
            values[name] = int(value)
    loops = [s for s in kernel.walk() if s.loop]
    counts: dict[int, float | None] = {id(s): 0 for s in loops}
    _Evaluator(values, programs, program, counts).run(kernel.body)
    return [counts[id(s)] for s in loops]


_ARITHMETIC = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": lambda a, b: int(a / b) if b else 0,
    "arith.divui": lambda a, b: a // b if b else 0,
    "arith.remsi": lambda a, b: a - b * int(a / b) if b else 0,
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
_COMPARE = {
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


@dataclass
class _Evaluator:
    """Runs the scalar integer part of a kernel for one program."""

    values: dict[str, int]
    programs: tuple[int, int, int]
    program: tuple[int, int, int]
    counts: dict[int, float | None]

    def run(self, body: list[Statement]) -> list[int | None]:
        """Runs a region and gives what it yields."""
        for s in body:
            if s.name in ("scf.yield", "tt.return"):
                return [self.values.get(o) for o in s.operands]
            if s.loop:
                self.loop(s)
            elif s.name == "scf.if":
                self.branch(s)
            elif s.results:
                self.set(s.results, [self.scalar(s)])
        return []

    def set(self, names: list[str], found: list[int | None]) -> None:
        for name, value in zip(names, found, strict=False):
            if value is None:
                self.values.pop(name, None)
            else:
                self.values[name] = value

    def scalar(self, s: Statement) -> int | None:
        if s.name == "arith.constant":
            match = re.match(r"arith\.constant (?:(true|false)|(-?\d+) : i\d+)", s.text)
            if not match:
                return None
            return int(match[1] == "true") if match[1] else int(match[2])
        axis = {"x": 0, "y": 1, "z": 2}.get(s.text.split()[1]) if " " in s.text else None
        if s.name == "tt.get_program_id" and axis is not None:
            return self.program[axis]
        if s.name == "tt.get_num_programs" and axis is not None:
            return self.programs[axis]
        given = [self.values.get(o) for o in s.operands]
        if s.name == "arith.select" and given and given[0] is not None:
            return given[1] if given[0] else given[2]
        if None in given or not given or "tensor<" in s.text:
            return None
        numbers = [g for g in given if g is not None]
        if s.name in _ARITHMETIC:
            return _ARITHMETIC[s.name](*numbers)
        if s.name == "arith.cmpi":
            return int(_COMPARE[s.text.split()[1].rstrip(",")](*numbers))
        if s.name in ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast"):
            return numbers[0]
        return None

    def branch(self, s: Statement) -> None:
        chosen = self.values.get(s.operands[0])
        if chosen is None:  # not known: count both sides, trust neither
            for region in s.regions:
                self.run(region)
            self.set(s.results, [None] * len(s.results))
        else:
            index = 0 if chosen else 1
            region = s.regions[index] if index < len(s.regions) else []
            self.set(s.results, self.run(region) or [None] * len(s.results))

    def loop(self, s: Statement) -> None:
        assert s.loop is not None
        counter, *bounds = s.loop
        first, last, step = (self.values.get(b) for b in bounds)
        inner = any(x.loop for x in _walk(s.regions[0]))
        carried = [self.values.get(start) for _, start in s.carried]
        if first is None or last is None or not step:
            self.counts[id(s)] = None
            for x in _walk(s.regions[0]):
                if x.loop:
                    self.counts[id(x)] = None
            self.set(s.results, [None] * len(s.results))
            return
        turns = range(first, last, step)
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
