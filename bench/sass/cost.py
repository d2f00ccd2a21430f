"""What each instruction asks of each pipe of a streaming multiprocessor."""

import re

from .gpus import LAT


def table(spec):
    return {op: kind for kind, ops in spec.items() for op in ops.split()}


SIMPLE = table(
    {
        "fma": "FFMA FMUL FADD FSWZADD FFMA32I FMUL32I FADD32I",
        "fma2": "FFMA2 FMUL2 FADD2",
        "half": "HFMA2 HADD2 HMUL2",
        "xu": "MUFU I2F F2I F2F FRND POPC FLO BREV I2I",
        "fp64": "DADD DMUL DFMA DSETP",
        "imad": "IMAD IMAD32I IDP",
        "ctrl": "BRA BRX JMP EXIT RET CALL BSSY BSYNC NOP WARPSYNC YIELD NANOSLEEP "
        "BREAK KILL BAR DEPBAR LDGDEPBAR MEMBAR FENCE ERRBAR CCTL WARPGROUP ELECT ENDCOLLECTIVE ACQBULK PREEXIT LEPC USETMAXREG UTMACMDFLUSH CGAERRBAR "
        "UCGABAR_ARV UCGABAR_WAIT S2R S2UR CS2R CS2UR",
    }
)
MEM = table(
    {
        "ldg": "LDG LD",
        "stg": "STG ST",
        "ldgsts": "LDGSTS",
        "atom": "ATOM ATOMG RED REDG",
        "lds": "LDS LDSM ATOMS",
        "sts": "STS STSM",
        "ldl": "LDL",
        "stl": "STL",
        "shfl": "SHFL REDUX CREDUX",
    }
)
GLOBAL, MMA = ("ldg", "stg", "ldgsts", "atom"), {"mma", "hgmma", "utc"}
LISTED = [
    "MUFU",
    "UTMALDG",
    "UTMASTG",
    "UTMAREDG",
    "UBLKCP",
    "BAR",
    "DEPBAR",
    "LDGDEPBAR",
    "MEMBAR",
    "FENCE",
    "WARPGROUP",
    "SYNCS",
    "F2F",
    "F2I",
    "I2F",
    "F2FP",
    "I2FP",
    "LDTM",
    "STTM",
    "UTCBAR",
]
HEAVY = {"fma", "fma2", "half", "xu", "tma", "tmast", "tmem", "sts", "fp64", *GLOBAL, *MMA}
ESIZE = {"f16": 2, "f16a": 2, "tf32": 4, "fp8": 1, "fp8a": 1, "int8": 1, "fp4": 0.5, "fp64": 8}


def mma_shape(i):
    s = next((x for x in i.mods if re.fullmatch(r"\d{3,6}|\d+x\d+x\d+", x)), "16816")
    m, n, k = (
        map(int, s.split("x"))
        if "x" in s
        else (16, 8, int(s[3:]))
        if s.startswith("16")
        else (8, 8, int(s[2:]))
    )
    c = i.base[0]
    ty = {"D": "fp64", "I": "int8", "B": "int8", "Q": "fp8", "O": "fp4"}.get(
        c, "tf32" if "TF32" in i.mods else "f16"
    )
    return m, n, k, ty + ("a" if ty in ("f16", "fp8") and "F32" not in i.mods else "")


def width(i):
    return next(
        (
            w
            for t, w in (
                ("256", 32),
                ("128", 16),
                ("64", 8),
                ("U16", 2),
                ("S16", 2),
                ("U8", 1),
                ("S8", 1),
                ("16", 2),
            )
            if t in i.mods
        ),
        4,
    )


def classify(insns, g, spill=0):
    """kind, pipes (cycles per warp on one SMSP; cta=True: SM cycles, once per CTA) and extra latency; spill: 0 L1, 1 L2, 2 DRAM."""
    consts, per = {}, lambda n: 128 / n  # a 32-lane warp over n/4 lanes
    for i in insns:
        b, p = i.base, i.pipes
        p.clear()
        if b in ("UMOV", "MOV") and (m := re.match(r"(U?R\d+), (0x[0-9a-f]+|U?RZ)$", i.args)):
            consts[m[1]] = int(m[2], 16) if m[2][0] == "0" else 0
        if i.pred in ("@!PT", "@!UPT"):
            i.kind = "off"
        elif re.fullmatch(r"[HIQODB]G?MMA", b):
            m, n, k, i.dtype = mma_shape(i)
            wg = "GMMA" in b
            e = ESIZE[i.dtype]
            i.kind, i.macs = ("hgmma", m * n * k // 4) if wg else ("mma", m * n * k)
            p["tensor"] = i.macs / (g.tensor.get(i.dtype, 64) * (1 if wg else g.hmma) / 4)
            if wg:
                p["lsu"] = (
                    n * k * e + (m * k * e if re.match(r"R\d+, gdesc", i.args) else 0)
                ) / g.smem_bpc
                i.lat = LAT["hgmma"]
        elif re.match(
            r"UTC[HQIO]MMA", b
        ):  # tcgen05: shape lives in the instruction descriptor register
            m = re.search(r"idesc\[(UR\d+)\]", i.args)
            d = consts.get(m[1], 0) if m else 0
            n, mm = (d >> 17 & 63) * 8 or 128, (d >> 24 & 31) * 16 or 128
            i.dtype = {
                "H": "tf32" if (d >> 7 & 7) == 2 else "f16",
                "Q": "fp8",
                "I": "int8",
                "O": "fp4",
            }[b[3]]
            e = ESIZE[i.dtype]
            k = int(32 / e)
            i.macs, i.kind, i.cta, i.lat = (
                mm * n * k // (2 if "2CTA" in i.mods else 1),
                "utc",
                True,
                LAT["utc"],
            )
            p["tensor"] = i.macs / g.tensor.get(i.dtype, 1024)
            p["lsu"] = (n * k * e + (0 if i.args.startswith("tmem") else mm * k * e)) / g.smem_bpc
        elif b == "UTCBAR":
            i.kind, i.cta = "utcbar", True
        elif b.startswith(("UTMALDG", "UBLKCP")):
            i.kind, i.cta, i.lat = "tma", True, g.lat_l2
        elif b.startswith(("UTMASTG", "UTMAREDG")):
            i.kind, i.cta = "tmast", True
        elif b == "SYNCS":  # mbarrier; arrive.expect_tx carries the byte count of the TMA copy
            i.kind, i.cta = (
                ("trywait", False) if "TRYWAIT" in i.mods else ("syncs", "ARRIVE" in i.mods)
            )
            if i.bytes:
                p["l2"] = i.bytes / g.l2_bpc
                p["lsu"] = i.bytes / g.smem_bpc
        elif b in ("LDTM", "STTM"):
            i.kind, i.lat = "tmem", LAT["ldtm"]
            p["tmem"] = next((int(t[1:]) for t in i.mods if re.fullmatch(r"x\d+", t)), 1) * (
                0.5 if "16dp" in i.op else 1
            )
        elif b in MEM:
            i.kind = MEM[b]
            i.bytes = 0 if i.kind == "shfl" else width(i) * 32
            if b in ("LDSM", "STSM"):
                i.bytes = 128 * next((int(t) for t in i.mods[::-1] if t in "124"), 1)
            p["lsu"] = 4 * max(1, i.bytes / 128) * i.ways * (2 if "REDUX" in b else 1)
            i.lat = g.lat_l2 if i.kind in GLOBAL else LAT["shfl" if i.kind == "shfl" else "lds"]
            if i.kind in GLOBAL or spill and i.kind in ("ldl", "stl"):
                p["l2"] = 4 * i.bytes * i.miss / g.l2_bpc
        elif b in SIMPLE:
            k = i.kind = SIMPLE[b]
            if k in ("fma", "fma2"):
                p["fma"] = per(g.fp32) * (1 + (k == "fma2"))
            elif k == "half":
                p["fma"] = 2 * per(g.bf16 if "BF16" in i.op else g.f16)
            elif k == "imad":
                p["fma"] = per(g.fp32)
                p["imad"] = per(g.iadd)
            elif k == "xu":
                p["xu"] = per(g.xu)
                i.lat = LAT["xu"]
            elif k == "fp64":
                p["fp64"] = per(g.fp64)
                i.lat = 8
            else:
                i.lat = (
                    LAT["s2r"]
                    if b in ("S2R", "S2UR")
                    else LAT["fence"]
                    if b in ("MEMBAR", "FENCE")
                    else 0
                )
        elif b[0] == "U" or b in ("R2UR", "LDC", "VOTEU"):
            i.kind, i.lat = "uniform", LAT["conv"] * (b[0] != "U")
            p["udp"] = 2
        else:
            i.kind = "alu"
            p["alu"] = per(
                g.iadd if b in ("IADD3", "IADD", "LOP3", "LEA", "VIADD", "MOV") else g.alu
            )
