"""Basic blocks, natural loops, and the path through a kernel that is costed."""

import functools
import re
from collections import defaultdict
from collections.abc import Mapping

from .cost import HEAVY, TENSOR
from .parse import Instruction

# An instruction, and whether one elected thread issues it.
Path = list[tuple[Instruction, bool]]

_ENDS = ("BRA", "EXIT", "RET", "BRX", "CALL", "JMP")
_LEAVES = ("BRA", "EXIT", "RET", "BRX", "JMP")
_ELECTED = {"tcgen05", "tcgen05 commit", "tma load", "tma store"}


def _always(i: Instruction) -> bool:
    return not i.predicate and not re.match(r"!?U?P\d", i.operands)


class Code:
    """Basic blocks, successors and natural loops of one kernel.

    Attributes:
        instructions: All of them, in order.
        live: Those that control flow reaches.
        spans: First and one past the last instruction of each basic block.
        loops: Blocks of each loop that does work, by the block of its head.
    """

    def __init__(self, instructions: list[Instruction], labels: Mapping[str, int]):
        self.instructions = instructions
        self._index = {i.offset: n for n, i in enumerate(instructions)}
        self.spans = self._spans(labels)
        self._block_at = {first: k for k, (first, _) in enumerate(self.spans)}
        self._successors = [self._next(first, last, labels) for first, last in self.spans]
        order, reached = self._postorder()
        self._number = {v: n for n, v in enumerate(reversed(order))}
        self.live = [i for k in sorted(reached) for i in self.block(k)]
        self.loops = {
            h: body for h, body in self._natural_loops(order).items() if self._works(body)
        }
        self._ahead: dict[int, set[int]] = {}  # loops that forward edges lead to
        for v in order:
            onward = [w for w in self._successors[v] if self._number[w] > self._number[v]]
            own = {v} & set(self.loops)
            self._ahead[v] = own.union(*(self._ahead[w] for w in onward))

    def block(self, k: int) -> list[Instruction]:
        """Instructions of a basic block."""
        first, last = self.spans[k]
        return self.instructions[first:last]

    def _spans(self, labels: Mapping[str, int]) -> list[tuple[int, int]]:
        count = len(self.instructions)
        starts = {0} | {self._index[o] for o in labels.values() if o in self._index}
        for n, i in enumerate(self.instructions):
            if i.base in _ENDS and n + 1 < count:
                starts.add(n + 1)
        ordered = sorted(starts)
        return list(zip(ordered, [*ordered[1:], count], strict=True))

    def _next(self, first: int, last: int, labels: Mapping[str, int]) -> list[int]:
        """Blocks that may follow one."""
        end = self.instructions[last - 1]
        found = []
        if end.target in self._index:
            found.append(self._block_at[self._index[end.target]])
        if end.base == "BRX":  # a jump table: its labels, or all that nothing else jumps to
            named = [labels[x] for x in re.findall(r"\.L_x_\w+", end.operands)]
            targets = {i.target for i in self.instructions}
            orphans = [o for o in labels.values() if o not in targets and o in self._index]
            found += [self._block_at[self._index[o]] for o in named or orphans]
        falls = not _always(end) or end.base not in _LEAVES
        if falls and last < len(self.instructions):
            found.append(self._block_at[last])
        return found

    def _postorder(self) -> tuple[list[int], set[int]]:
        order: list[int] = []
        seen = {0}
        stack = [(0, iter(self._successors[0]))]
        while stack:
            for w in stack[-1][1]:
                if w not in seen:
                    seen.add(w)
                    stack.append((w, iter(self._successors[w])))
                    break
            else:
                order.append(stack.pop()[0])
        return order, seen

    def _dominators(self, order: list[int], before: Mapping[int, list[int]]) -> dict[int, int]:
        """Immediate dominators (Cooper, Harvey, Kennedy 2001)."""
        number = self._number
        dominator = {0: 0}

        def meet(a: int, b: int) -> int:
            while a != b:
                while number[a] > number[b]:
                    a = dominator[a]
                while number[b] > number[a]:
                    b = dominator[b]
            return a

        changed = True
        while changed:
            changed = False
            for v in list(reversed(order))[1:]:
                found = functools.reduce(meet, [p for p in before[v] if p in dominator])
                if dominator.get(v) != found:
                    dominator[v] = found
                    changed = True
        return dominator

    def _natural_loops(self, order: list[int]) -> dict[int, set[int]]:
        """Blocks of each loop, by the block of its head."""
        before: dict[int, list[int]] = defaultdict(list)
        for v in reversed(order):
            for w in self._successors[v]:
                before[w].append(v)
        dominator = self._dominators(order, before)
        loops: dict[int, set[int]] = {}
        for u in reversed(order):
            for head in self._successors[u]:
                x = u
                while x not in (head, dominator[x]):
                    x = dominator[x]
                if x != head:  # the head does not dominate u: not a back edge
                    continue
                body = loops.setdefault(head, {head})
                todo = [u]
                while todo:
                    y = todo.pop()
                    if y not in body:
                        body.add(y)
                        todo += before[y]
        return loops

    def _works(self, body: set[int]) -> bool:
        """Whether a loop does more than wait for a lock."""
        kinds = [i.kind for k in body for i in self.block(k)]
        return len(kinds) > 40 or (bool(HEAVY & set(kinds)) and "atomic" not in kinds)

    def walk(self, body: set[int] | None, start: int, skip: Mapping[int, set[int]]) -> Path:
        """The fall-through path through a loop's body, or past all loops.

        Args:
            body: The loop's blocks; None walks the straight code.
            start: The first block.
            skip: Loops to leave out, by their heads.
        """
        return _Walk(self, body, start, skip).path


class _Walk:
    """One walk: from block to block until it leaves its region or returns to where it was."""

    def __init__(self, code: Code, body: set[int] | None, start: int, skip: Mapping[int, set[int]]):
        self.code, self.body, self.start, self.skip = code, body, start, skip
        self.path: Path = []
        self.seen: set[int] = set()
        self.elected_until = -1
        outer = (body or set()) - set().union(*skip.values())
        self.own_product = any(i.kind in TENSOR for k in outer for i in code.block(k))
        k: int | None = start
        while k is not None and k not in self.seen:
            self.seen.add(k)
            if k in skip and (body is None or k != start):
                k = self._past(k)
            else:
                k = self._through(k)

    def _inside(self, k: int | None) -> bool:
        return k is not None and (self.body is None or k in self.body)

    def _past(self, head: int) -> int | None:
        """The first block after a loop that is left out."""
        loop = self.skip[head]
        exits = [
            w
            for x in loop
            for w in self.code._successors[x]
            if w not in loop and w not in self.seen
        ]
        return min(exits, key=lambda w: self.code.spans[w][0]) if exits else None

    def _through(self, k: int) -> int | None:
        """Takes a block in, and gives the one to go on with."""
        code = self.code
        _, last = code.spans[k]
        instructions = code.block(k)
        self.path += [(i, i.offset < self.elected_until) for i in instructions]
        end = instructions[-1]
        following = code._block_at.get(last)
        target = code._block_at.get(code._index.get(end.target, -1))
        if end.base in ("EXIT", "RET") and not end.predicate:
            return None
        if end.base in ("BRA", "JMP") and target is not None:
            if self._jumps(end, following, target):
                return target if self._inside(target) else None
            between = {i.kind for i in code.instructions[last : code._index[end.target]]}
            stores = between & {"store", "tma store"} and not between & TENSOR
            if self.body and self.own_product and self._inside(target) and stores:
                return target  # the epilogue of a persistent loop
            near = end.offset < end.target < end.offset + 6400
            if near and between & _ELECTED:
                self.elected_until = max(self.elected_until, end.target)
        return following if self._inside(following) else None

    def _jumps(self, end: Instruction, following: int | None, target: int) -> bool:
        """Whether the path takes a branch rather than fall through it."""
        if _always(end) or not self._inside(following):
            return True
        if self.body is not None or following is None or end.target <= end.offset:
            return False
        code = self.code
        return code._ahead[target] - self.seen > code._ahead[following] - self.seen
