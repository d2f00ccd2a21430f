"""Triton's own intermediate code (TTIR) as a tree, and what it says a kernel computes.

TTIR is what a kernel says before any choice of layout: what it reads here holds for every target.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_LOCATION = re.compile(r"\s+loc\((?:[^()]|\([^()]*\))*\)")
_RESULT = re.compile(r"^(%[\w$.#-]+)(?::(\d+))? = ")
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_FOR = re.compile(
    r"scf\.for (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+)"
    r"(?: iter_args\((.*?)\))?(?: -> .*?)?\s*(?::\s*\w+)? \{$"
)


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

    def nested(self) -> Iterator["Statement"]:
        """Every statement inside, in order."""
        for region in self.regions:
            yield from _walk(region)

    @property
    def type(self) -> str:
        """The type of the result, as written."""
        tail = self.text.rsplit(" : ", 1)[-1]
        return re.split(r" -> | to ", tail)[-1].strip()


@dataclass
class Function:
    """A kernel: its parameters with their types, and its statements."""

    parameters: dict[str, str]
    body: list[Statement]

    def walk(self) -> Iterator[Statement]:
        """Every statement, nested ones included, in order."""
        return _walk(self.body)

    def loops(self) -> list[Statement]:
        """Every loop, in order."""
        return [s for s in self.walk() if s.loop]


def _walk(body: list[Statement]) -> Iterator[Statement]:
    for statement in body:
        yield statement
        for region in statement.regions:
            yield from _walk(region)


class _Parser:
    """Reads a module line by line; ``open`` holds the regions that the line is nested in."""

    def __init__(self) -> None:
        self.function = Function({}, [])
        self.open: list[list[Statement]] = []

    def read(self, line: str) -> None:
        """Takes in one line, its location left out."""
        if line.startswith("tt.func"):
            self._open_function(line)
        elif not self.open or not line or line.startswith("#"):
            return
        elif line.startswith("^"):  # a block's label, to which branches jump
            self.open[-1].append(Statement([], re.split(r"[(:]", line)[0], [], line))
        elif line.startswith(("} else", "} do")):
            self.open.pop()
            self._open_region(self.open[-1][-1])
        elif line.startswith("}"):
            self.open.pop()
        else:
            self._statement(line)

    def _open_function(self, line: str) -> None:
        if "public" not in line:  # a helper that was not inlined: read, and left aside
            self.open.append([])
            return
        signature = line.split("attributes")[0]
        for name, kind in re.findall(r"(%[\w$.-]+): ([^,{)]+)", signature):
            self.function.parameters[name] = kind.strip()
        self.open.append(self.function.body)

    def _open_region(self, owner: Statement) -> None:
        owner.regions.append([])
        self.open.append(owner.regions[-1])

    def _statement(self, line: str) -> None:
        match = _RESULT.match(line)
        rest = line[match.end() :] if match else line
        results: list[str] = []
        if match:
            many = range(int(match[2])) if match[2] else None
            results = [match[1]] if many is None else [f"{match[1]}#{i}" for i in many]
        name = rest.split(" ", 1)[0].split("(")[0].strip('"')
        statement = Statement(results, name, _NAME.findall(rest), rest)
        if found := _FOR.match(rest):
            statement.loop = (found[1], found[2], found[3], found[4])
            statement.carried = re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", found[5] or "")
        self.open[-1].append(statement)
        if line.endswith("{"):
            self._open_region(statement)


def parse(text: str) -> Function:
    """The kernel of a TTIR module, in which every call is inlined."""
    parser = _Parser()
    for line in text.splitlines():
        parser.read(_LOCATION.sub("", line).strip())
    return parser.function


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

    An error function counts: it computes an exponential (libdevice's, CUDA 12.8).

    Args:
        layouts: The code with layouts (TTGIR).
    """
    tiles = vectors = 0
    for shape in re.findall(r"math\.(?:exp2?|erf) [^\n]*?: tensor<((?:\d+x)+)", layouts):
        sizes = [int(n) for n in shape.split("x")[:-1]]
        if len(sizes) > 1:
            tiles += math.prod(sizes)
        else:
            vectors += 1
    return tiles, vectors
