"""Address arithmetic in 32 bits, read off a kernel's intermediate code.

Such a product passes 2^31 on tensors that a large GPU holds, and no test of usual size sees it.
"""

import re

from .ttir import Function, Statement

_SOURCES = ("tt.get_program_id", "tt.load")
_PASSES_ON = (
    "arith.addi", "arith.subi", "arith.muli", "arith.divsi", "arith.divui", "arith.remsi",
    "arith.remui", "arith.extsi", "arith.extui", "arith.trunci", "arith.select", "arith.minsi",
    "arith.maxsi", "arith.shli", "arith.andi", "arith.ori", "arith.xori", "arith.index_cast",
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans",
)  # fmt: skip

# What a number is made from: a kernel argument, or an index, which is a program's number, a loop's
# counter or a number from memory, with anything added. Constants and ranges are neither.
_ARGUMENT, _INDEX = "argument", "index"


def narrow_products(kernel: Function) -> list[str]:
    """Products in 32 bits of an index with an argument or an index that reach an address."""
    kinds = _kinds(kernel)
    users: dict[str, list[Statement]] = {}
    for s in kernel.walk():
        for operand in s.operands:
            users.setdefault(operand, []).append(s)
    found = []
    for s in kernel.walk():
        if s.name != "arith.muli" or not re.search(r"\bi32\b|xi32>", s.type):
            continue
        made_from = {kinds.get(operand) for operand in s.operands[:2]}
        if _INDEX in made_from and None not in made_from and _reaches(s.results[0], users):
            found.append(" * ".join(operand.lstrip("%") for operand in s.operands[:2]))
    return found


def _kinds(kernel: Function) -> dict[str, str]:
    """What each integer is made from."""
    kinds = {
        name: _ARGUMENT for name, kind in kernel.parameters.items() if re.fullmatch(r"i\d+", kind)
    }
    before: dict[str, str] = {}
    while kinds != before:  # loops carry kinds round
        before = dict(kinds)
        for s in kernel.walk():
            if s.loop:
                _carry(s, kinds)
            elif s.name in _SOURCES:
                kinds.update(dict.fromkeys(s.results, _INDEX))
            elif s.name in _PASSES_ON:
                _merge(s.results, [kinds.get(operand) for operand in s.operands], kinds)
            elif s.name == "scf.if":
                _join(s, kinds)
    return kinds


def _merge(names: list[str], found: list[str | None], kinds: dict[str, str]) -> None:
    if _INDEX in found:
        kinds.update(dict.fromkeys(names, _INDEX))
    elif _ARGUMENT in found:
        kinds.update(dict.fromkeys(names, _ARGUMENT))


def _yielded(region: list[Statement]) -> list[str]:
    last = region[-1] if region else None
    return last.operands if last is not None and last.name == "scf.yield" else []


def _carry(s: Statement, kinds: dict[str, str]) -> None:
    """A loop's counter is an index; what it carries is made from its start and its turns."""
    assert s.loop is not None
    kinds[s.loop[0]] = _INDEX
    turned = _yielded(s.regions[0]) if s.regions else []
    for i, (inside, start) in enumerate(s.carried):
        again = kinds.get(turned[i]) if i < len(turned) else None
        _merge([inside, *s.results[i : i + 1]], [kinds.get(start), again], kinds)


def _join(s: Statement, kinds: dict[str, str]) -> None:
    """A branch gives what either side gives."""
    for region in s.regions:
        for result, operand in zip(s.results, _yielded(region), strict=False):
            _merge([result], [kinds.get(operand), kinds.get(result)], kinds)


def _reaches(name: str, users: dict[str, list[Statement]]) -> bool:
    """Whether a number becomes part of an address."""
    seen, todo = {name}, [name]
    while todo:
        current = todo.pop()
        for user in users.get(current, ()):
            if user.name == "tt.addptr" and current in user.operands[1:]:
                return True
            if user.name in _PASSES_ON:
                new = set(user.results) - seen
                seen |= new
                todo += new
    return False
