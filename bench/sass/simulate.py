"""In-order issue of all resident warps of one SM sub-partition."""

import collections
import math
import re
import types

from .gpus import LAT

QUEUE = {
    "fma": 0,
    "alu": 0,
    "imad": 2,
    "xu": 8,
    "lsu": 40,
    "l2": 4000,
    "tensor": 0,
    "tmem": 40,
    "udp": 4,
    "fp64": 0,
}  # backlog (cycles) before issue blocks


def simulate(path, ctas, wpc, iters, lat_g, stages=2, ws=False):
    """ctas x wpc warps run `path` iters times on one SMSP -> (steady cycles per iteration, total cycles)."""
    tr = [x for x in path if x[0].kind != "off"]
    if not tr:
        return 0.0, 0.0

    def reg(n):
        return (re.search(r"\[(U?R\d+)", tr[n][0].args) or ["", ""])[1]

    def pick(kind):
        return [n for n, (i, _) in enumerate(tr) if i.kind == kind]

    commits, waits, ntma, pair = set(pick("utcbar")), pick("trywait"), len(pick("tma")), {}
    for w in waits:  # mbarrier wait <-> tcgen05 commit with the same register ...
        c = [x for x in commits if reg(x) == reg(w)]
        if c:
            pair[w] = max([x for x in c if x < w] or c)
            commits -= set(c)
    for c in sorted(commits):  # ... else the next unmatched wait in cyclic program order
        u = [w for w in waits if w not in pair]
        if u:
            pair[min(u, key=lambda w: (w - c) % len(tr))] = c
    free, slot, last, warps, end = dict.fromkeys(QUEUE, 0.0), 0.0, -1, [], [0.0] * iters
    for _ in range(ctas):
        st = {"commit": collections.defaultdict(list), "tma": [], "held": [], "utc": 0.0}
        for k in range(wpc):
            warps.append(
                types.SimpleNamespace(
                    pc=0,
                    it=0,
                    ready=0.0,
                    bars=[[] for _ in range(6)],
                    cp=0.0,
                    gm=[],
                    gcur=0.0,
                    cta=st,
                    lead=k == 0,
                    dep=None,
                    tw=0,
                    hold=False,
                )
            )

    def skip(w):
        while w.pc < len(tr) and tr[w.pc][1] and not w.lead:
            w.pc += 1

    def drain(q, n, e):  # wait until at most n of the outstanding groups q are pending
        q = sorted(q)
        return (max(e, q[len(q) - n - 1]), q[len(q) - n :]) if len(q) > n else (e, q)

    def dep(w):  # earliest issue allowed by the warp's own dependences
        i, e = tr[w.pc][0], w.ready
        for k in range(6):
            if i.wait >> k & 1 and w.bars[k]:
                e = max(e, *w.bars[k])
                w.bars[k] = []
        if i.base == "DEPBAR" and (m := re.match(r"SB(\d), (0x[0-9a-f]+)", i.args)):
            e, w.bars[int(m[1])] = drain(w.bars[int(m[1])], int(m[2], 16), e)
        elif i.base == "WARPGROUP" and "DEPBAR" in i.mods:
            e, w.gm = drain(w.gm, int(i.args.split(",")[-1], 16), e)
        elif i.kind == "trywait" and not ws:
            if w.pc in pair:
                c = pair[w.pc]
                need = w.it + (c < w.pc)
                if need > len(w.cta["commit"][c]):
                    return math.inf
                if need:
                    e = max(e, w.cta["commit"][c][need - 1])
            elif ntma:  # TMA prefetched stages-1 iterations ahead, FIFO
                n = w.tw - (stages - 1) * ntma if iters > 1 else w.tw
                if 0 <= n < len(w.cta["tma"]):
                    e = max(e, w.cta["tma"][n])
        return e

    live = len(list(map(skip, warps)))
    while live:
        best, w = math.inf, None
        for n, x in enumerate(warps):
            if x.pc < 0 or x.hold:
                continue
            if x.dep is None:
                x.dep = dep(x)
            if x.dep == math.inf:
                x.dep = None
                continue
            i = tr[x.pc][0]
            e = max(x.dep, slot)
            far = 9999 if i.kind in ("hgmma", "utc") else 0
            for p in i.pipes:
                e = max(e, free[p] - max(far, QUEUE[p]))
            if e < best or (e == best and n == last):
                best, w, bn = e, x, n
        if w is None:
            break  # unmatched mbarrier: no further progress can be modelled
        t = best
        i = tr[w.pc][0]
        done = read = t
        slot, last, w.dep = t + 1, bn, None
        if not i.cta or w.lead:
            for p, c in i.pipes.items():
                s = max(t, free[p])
                free[p] = s + c
                done = max(done, s + c)
                if p == "lsu" and i.kind != "utc":
                    read = max(read, s + c)
        fin = done + (lat_g if i.kind in ("ldg", "atom", "ldgsts") else i.lat)
        if i.kind == "ldgsts":
            w.cp = max(w.cp, fin)
        elif i.base == "LDGDEPBAR":
            w.bars[0].append(w.cp)
        elif i.kind == "hgmma":
            w.gcur = max(w.gcur, fin)
            if "gsb0" in i.args:
                w.gm.append(w.gcur)
        elif i.kind == "trywait":
            w.tw += w.pc not in pair
        elif w.lead and i.kind == "utc":
            w.cta["utc"] = fin
        elif w.lead and i.kind == "utcbar":
            w.cta["commit"][w.pc].append(max(t, w.cta["utc"]))
        elif w.lead and i.kind == "tma":
            w.cta["tma"].append(t + lat_g)
        if i.wb < 6:
            w.bars[i.wb].append(fin)
        if i.rb < 6:
            w.bars[i.rb].append(read + 8)  # operands read, result not needed
        w.ready = t + max(1, i.stall)
        w.pc += 1
        if i.base == "BAR" and "SYNC" in i.mods and not ws:
            held = w.cta["held"]
            held.append(w)
            w.hold = True
            if len(held) == wpc:
                for x in held:
                    x.ready, x.dep, x.hold = max(x.ready, t + LAT["bar"]), None, False
                held.clear()
        skip(w)
        if w.pc >= len(tr):
            end[w.it] = max(end[w.it], fin if iters == 1 and i.kind != "ctrl" else t)
            w.it += 1
            w.pc = 0
            skip(w)
            if w.it == iters:
                w.pc = -1
                live -= 1
    k = min(2, iters - 1)
    return ((end[-1] - end[k - 1]) / (iters - k) if k else end[-1]), end[-1]
