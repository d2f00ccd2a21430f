"""The integer address code run for 64 lanes: sectors a request touches, and bank conflicts."""

import collections
import re
import struct

from .cost import GLOBAL, width

M32, sx = 0xFFFFFFFF, lambda v: v - (1 << 32) if v >> 31 else v


def addresses(insns, cta):
    """{offset: (global addresses, shared addresses)} as lists of 64 low words, None where not computable."""
    L, R, out = range(64), {}, {}

    def param(t, d=0):  # pointers and unknown sizes: distinct multiples of 4096
        m = re.search(r"\]\[(0x[0-9a-f]+)\]", t)
        return [4096 + (int(m[1], 16) + d << 18 if m else 0) & M32] * 64

    def val(t):
        t, neg = t.strip(), False
        if t[:1] in "-~" and not t.startswith("-0x"):
            neg, t = t[0], t[1:]
        t = re.sub(r"\.(64|U32|X\d+|H\d\S*)$", "", t)
        v = (
            R.get(t)
            if re.fullmatch(r"U?R\d+", t)
            else [int(t, 16) & M32] * 64
            if re.fullmatch(r"-?0x[0-9a-f]+", t)
            else [0] * 64
            if t in ("RZ", "URZ", "SRZ")
            else param(t)
            if t.startswith("c[")
            else None
        )
        return v if v is None or not neg else [(-x if neg == "-" else ~x) & M32 for x in v]

    def addr(t):
        vs = [val(x) for x in t.split("+")]
        return None if None in vs else [sum(x) & M32 for x in zip(*vs)]

    def ev(b, m, a, args):
        if b in ("S2R", "S2UR", "CS2R"):
            return (
                list(L)
                if "SR_TID.X" in args
                else [x & 31 for x in L]
                if "SR_LANEID" in args
                else [cta * ("SR_CTAID" in args)] * 64
            )
        if b == "HFMA2" and a[:2] == ["-RZ", "RZ"]:
            return [
                struct.unpack("<I", struct.pack("<ee", float(a[3]), float(a[2])))[0]
            ] * 64  # constant
        if b in ("LDC", "LDCU", "ULDC"):
            return param(args)
        if "X" in m or len(a) < 1:
            return None
        v = [val(x) for x in a]
        if b == "SHFL":
            return [v[0][x & 32] for x in L] if v[0] and "IDX" in m else None
        if b in ("SEL", "USEL", "IMNMX", "VIMNMX", "MOV", "UMOV", "R2UR"):
            return v[0]
        if None in v:
            return None
        z = list(zip(*v))
        if b in ("IMAD", "UIMAD"):
            return [
                ((sx(x[0]) * sx(x[1]) >> 32) + x[2] if "HI" in m else x[0] * x[1] + x[2]) & M32
                for x in z
            ]
        if b in ("IADD3", "UIADD3", "IADD", "VIADD", "UIADD"):
            return [sum(x) & M32 for x in z]
        if b in ("LEA", "ULEA"):
            return [
                (
                    (
                        (sx(x[0]) if "SX32" in m else x[0]) >> (32 - x[-1] % 33)
                        if "HI" in m
                        else x[0] << x[2] % 32
                    )
                    + x[1]
                )
                & M32
                for x in z
            ]
        if b in ("SHF", "USHF") and "U64" not in m:
            return [
                (
                    x[0] << (x[1] & 31)
                    if "L" in m
                    else (sx(x[2]) if "S32" in m else x[2]) >> (x[1] & 31)
                )
                & M32
                for x in z
            ]
        if b in ("SGXT", "USGXT"):
            return [x[0] & ((1 << x[1]) - 1) for x in z]
        if b in ("LOP3", "ULOP3"):
            f, pick = int(a[3], 16), lambda v, on: v if on else ~v
            return [
                sum(
                    pick(x[0], k & 4) & pick(x[1], k & 2) & pick(x[2], k & 1) & M32
                    for k in range(8)
                    if f >> k & 1
                )
                for x in z
            ]
        return None

    for i in insns:
        if i.kind in GLOBAL or i.kind in ("lds", "sts"):
            br = [x for d, x in re.findall(r"(desc)?\[([^\]]*)\]", i.args) if not d]
            if br:
                out[i.off] = (
                    addr(br[-1]) if i.kind in GLOBAL else None,
                    addr(br[0]) if i.kind not in ("ldg", "stg", "atom") else None,
                )
        if i.kind == "syncs" and "ARRIVE" in i.mods and (m := re.search(r", (R\d+)$", i.args)):
            out[i.off] = (None, R.get(m[1]))
        if (
            i.kind in ("stg", "sts", "stl", "off")
            or "SETP" in i.base
            or i.kind == "ctrl"
            and i.base not in ("S2R", "S2UR", "CS2R")
        ):
            continue
        a = [x for x in i.args.split(", ") if not re.fullmatch(r"!?U?P[0-9T]", x)]
        if a and re.fullmatch(r"U?R\d+", a[0]):
            n = 4 if "128" in i.mods else 2 if {"64", "WIDE"} & set(i.mods) else 1
            u, k = re.match(r"(U?R)(\d+)", a[0]).groups()
            v = (
                ev(i.base, i.mods, a[1:], i.args)
                if i.kind in ("alu", "imad", "uniform", "ctrl", "shfl", "half")
                else None
            )
            if (
                v is None
            ):  # not modelled, but equal inputs in all lanes give an (unknown) equal output
                q = [val(x) for x in re.findall(r"U?R\d+", " ".join(a[1:]))]
                if i.kind != "ldl" and None not in q and all(len(set(x)) == 1 for x in q):
                    v = [hash((i.off, *[x[0] for x in q])) % 997 * 4096] * 64
            for d in range(1, n):
                R[f"{u}{int(k) + d}"] = param(i.args, 4 * d) if v and "LDC" in i.base else None
            R[a[0]] = v
    return out


def lane_model(code):
    """set taint (bit 0: address varies over lanes, bit 1: over CTAs), ways (request replays / bank conflicts) and miss (L2 sectors)."""
    insns = [i for i, _ in code.walk(None, 0, {})]
    on = {i.off for i in insns}
    rest = [i for i in code.live if i.off not in on]
    a0, a1, l1 = addresses(insns, 0), addresses(insns, 1), set()
    for p, a in ((insns, a0), (rest, addresses(rest, 0))):
        for i in p:  # bytes announced to an mbarrier = size of the TMA copy
            if i.kind == "syncs" and (n := a.get(i.off, (0, 0))[1]) and n[0] <= 1 << 18:
                i.bytes = n[0]
    for i in insns:
        (ga, sa), (gb, _) = a0.get(i.off, (None, None)), a1.get(i.off, (None, None))
        w = width(i)
        if ga and gb:
            i.taint = (len(set(ga)) > 1) + 2 * (ga[0] != gb[0])
            if len(set(ga)) > 1:
                sect = {s for x in ga[:32] for s in range(x // 32, (x + w - 1) // 32 + 1)}
                if i.kind != "atom":
                    i.ways = max(1.0, len(sect) * 32 / i.bytes)
                    i.miss = i.ways
                if (
                    i.kind == "ldg" or i.kind == "ldgsts" and "BYPASS" not in i.mods
                ):  # cached in L1: only new sectors reach L2
                    if i.ways > 1:
                        i.miss = len(sect - l1) * 32 / i.bytes
                    l1 |= sect
        if sa and i.kind != "syncs":
            ld = i.base in ("LDSM", "STSM")
            w = 16 if ld else max(4, w)
            lanes = i.bytes // 16 if ld else 32
            g = 128 // w
            cyc = 0
            for s in range(0, lanes, g):
                bank = collections.defaultdict(set)
                for x in sa[s : s + g]:
                    for k in range(0, w, 4):
                        bank[(x + k) // 4 % 32].add((x + k) // 4)
                cyc += max(map(len, bank.values()), default=1)
            if i.kind != "ldgsts" and i.bytes:
                i.ways = max(i.ways, cyc / max(1, i.bytes / 128))
