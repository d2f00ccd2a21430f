"""Basic blocks, natural loops, and the path through a kernel that is costed."""

import collections
import functools
import re

from .cost import HEAVY, MMA


class Code:
    """basic blocks, successors and natural loops of one kernel."""

    def __init__(s, insns, labels):
        s.insns = insns
        idx = s.idx = {i.off: n for n, i in enumerate(insns)}
        hit = {i.target for i in insns}
        orphans = [
            o for o in labels.values() if o not in hit and o in idx
        ]  # BRX jump-table entries
        lead = {0} | {idx[o] for o in labels.values() if o in idx}
        lead |= {
            n + 1
            for n, i in enumerate(insns)
            if i.base in ("BRA", "EXIT", "RET", "BRX", "CALL", "JMP") and n + 1 < len(insns)
        }
        lead = sorted(lead)
        s.bb = list(zip(lead, lead[1:] + [len(insns)]))
        s.of = {a: k for k, (a, _) in enumerate(s.bb)}
        s.succ = []
        for a, b in s.bb:
            t = insns[b - 1]
            n = [s.of[idx[t.target]]] if t.target in idx else []
            if t.base == "BRX":
                n += [
                    s.of[idx[o]]
                    for o in [labels[x] for x in re.findall(r"\.L_x_\w+", t.args)] or orphans
                ]
            if (not s.always(t) or t.base not in ("BRA", "EXIT", "RET", "BRX", "JMP")) and b < len(
                insns
            ):
                n.append(s.of[b])
            s.succ.append(n)
        s.find_loops()

    def always(s, t):
        return not t.pred and not re.match(r"!?U?P\d", t.args)

    def find_loops(s):
        order, seen, stack, pre = [], {0}, [(0, iter(s.succ[0]))], collections.defaultdict(list)
        while stack:
            for w in stack[-1][1]:
                if w not in seen:
                    seen.add(w)
                    stack.append((w, iter(s.succ[w])))
                    break
            else:
                order.append(stack.pop()[0])
        rpo = order[::-1]
        num = {v: n for n, v in enumerate(rpo)}
        idom, changed = {0: 0}, True
        for v in rpo:
            for w in s.succ[v]:
                pre[w].append(v)

        def meet(a, b):
            while a != b:
                while num[a] > num[b]:
                    a = idom[a]
                while num[b] > num[a]:
                    b = idom[b]
            return a

        while changed:
            changed = False
            for v in rpo[1:]:
                d = functools.reduce(meet, [p for p in pre[v] if p in idom])
                if idom.get(v) != d:
                    idom[v] = d
                    changed = True
        s.loops, s.live = {}, [i for k in sorted(seen) for i in s.block(k)]
        for u in rpo:
            for h in s.succ[u]:
                x = u
                while x != h and x != idom[x]:
                    x = idom[x]
                if x != h:
                    continue  # not a back edge: h does not dominate u
                body, todo = s.loops.setdefault(h, {h}), [u]
                while todo:
                    y = todo.pop()
                    if y not in body:
                        body.add(y)
                        todo += pre[y]
        s.real = {}
        for h, b in s.loops.items():  # worth a report: does real work and is not a spin lock
            kinds = [i.kind for k in b for i in s.block(k)]
            if len(kinds) > 40 or HEAVY & set(kinds) and "atom" not in kinds:
                s.real[h] = b
        s.reach = {}  # real loop headers reachable through forward edges
        for v in order:
            s.reach[v] = {v} & set(s.real) | set().union(
                *(s.reach[w] for w in s.succ[v] if num[w] > num[v])
            )

    def block(s, k):
        return s.insns[s.bb[k][0] : s.bb[k][1]]

    def walk(s, body, start, skip):
        """fall-through path as [(insn, elected-thread region)]; body=None: straight code with the loops in `skip` left out."""
        path, k, until, seen = [], start, -1, set()
        flat = body and any(
            i.kind in MMA for x in body - set().union(*skip.values()) for i in s.block(x)
        )
        while k is not None and k not in seen:
            seen.add(k)
            if k in skip and (body is None or k != start):
                outs = [w for x in skip[k] for w in s.succ[x] if w not in skip[k] and w not in seen]
                k = min(outs, key=lambda w: s.bb[w][0]) if outs else None
                continue
            ins = s.block(k)
            path += [(i, i.off < until) for i in ins]
            t = ins[-1]
            nxt, tgt = s.of.get(s.bb[k][1]), s.of.get(s.idx.get(t.target, -1))

            def ok(x):
                return x is not None and (body is None or x in body)

            if t.base in ("EXIT", "RET") and not t.pred:
                break
            if t.base in ("BRA", "JMP") and tgt is not None:
                more = (
                    body is None
                    and t.target > t.off
                    and nxt is not None
                    and s.reach[tgt] - seen > s.reach[nxt] - seen
                )
                if s.always(t) or not ok(nxt) or more:
                    k = tgt if ok(tgt) else None
                    continue
                kinds, near = (
                    {x.kind for x in s.insns[s.bb[k][1] : s.idx[t.target]]},
                    t.off < t.target < t.off + 6400,
                )
                if flat and ok(tgt) and kinds & {"stg", "tmast"} and not kinds & MMA:
                    k = tgt
                    continue  # epilogue of a persistent loop
                if near and kinds & {"utc", "utcbar", "tma", "tmast"}:
                    until = max(until, t.target)  # MMA/TMA issue: one elected thread
            k = nxt if ok(nxt) else None
        return path
