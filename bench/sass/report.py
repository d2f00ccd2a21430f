"""The modelled report of one kernel: loops, bounds, traffic, warnings; its time on a grid; its gate."""

import collections
import functools
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from .control_flow import Code
from .cost import GLOBAL, LISTED, MEM, MMA, classify, width
from .gpus import ASSUMPTIONS, GPUS, LAT, Gpu
from .lanes import lane_model
from .parse import disassemble, elf_info
from .simulate import simulate


@dataclass
class LoopReport:
    name: str
    start: int
    end: int
    depth: int
    insns: int
    stall_sum: int
    demand: dict
    bottleneck: str
    macs_cta: int
    dtype: str
    utilisation: list
    cycles: list
    tflops: list  # three bounds each: [overlap, simulated, serial]; tflops capped by `ceil`
    spill_bytes: int
    load_bytes: int
    store_bytes: int
    useful_bytes: int
    tma_ops: int
    step: str
    notes: list


@dataclass
class Report:
    modelled: bool
    kernel: str
    gpu: str
    arch: int
    num_warps: int
    regs: int
    stack_bytes: int
    spill_insns: int
    shared_bytes: int
    ctas_per_sm: int
    occupancy: float
    limiter: str
    insns: int
    mix: dict
    forms: dict
    loops: list
    hot: str
    straight_cycles: list
    bytes_cta: list
    bytes_per_global_access: float
    streaming: dict
    warnings: list
    assumptions: list

    def hot_loop(self):
        return next((l for l in self.loops if l.name == self.hot), None)


def occupancy(g, regs, shared, warps, tmem):
    per_smsp = (
        g.regs // 4 // (math.ceil(max(regs, 1) / 8) * 256)
    )  # warps per SMSP the register file holds
    lim = {
        "registers": per_smsp // (warps // 4) if warps >= 4 else per_smsp * 4 // warps,
        "shared memory": g.smem_kb * 1024 // (shared + 1024),
        "threads": g.threads // (32 * warps),
        "CTA slots": g.ctas,
        "tensor memory": 512 // tmem if tmem else 99,
    }
    who = min(lim, key=lim.get)
    return max(0, lim[who]), who


def demand_of(path, warps):
    """cycles one CTA-iteration needs on one SMSP, by pipe."""
    d = collections.Counter()
    for i, elected in path:
        if i.kind == "off":
            continue
        f = 1.0 if i.cta or elected else warps / 4
        d["issue"] += f
        for p, c in i.pipes.items():
            d[p] += c * f
    return d


def traffic(path, kinds, warps, shared=False, useful=False):
    """bytes one CTA moves (or uses); shared=True: only loads whose address is the same for all CTAs (L2 hits after the first)."""
    return int(
        sum(
            (32 if not i.taint & 1 else i.bytes * (1 if useful else i.miss) * warps)
            for i, _ in path
            if i.kind in kinds and (i.kind in ("stg", "atom") or bool(i.taint & 2) != shared)
        )
    )


def induction(path):
    """'reg += step, bound' of the loop counter when it is visible in the SASS."""
    for i, _ in reversed(path):
        if i.base in ("ISETP", "UISETP") and (
            m := re.match(r"U?P\d, U?PT, (U?R\d+), (\S+),", i.args)
        ):
            for x in (m[1], m[2]):
                for j, _ in path:
                    s = re.match(r"(U?R\d+), (?:U?PT, U?PT, )?(U?R\d+), (-?0x[0-9a-f]+)", j.args)
                    if s and "IADD" in j.base and s[1] == s[2] == x:
                        return f"{x} += {s[3]}, bound {m[2] if x == m[1] else m[1]}"
    return ""


def loop_report(g, name, demand, n_cta, macs, dts, sim, chain, fmacs=0, **kw):
    d = {p: round(c * n_cta, 1) for p, c in demand.items()}
    busy = max(d.values(), default=0)
    if not macs and fmacs:
        macs, dts = fmacs, ["fp32"]
    rate = max((g.fp32 if t == "fp32" else g.tensor.get(t, 1) for t in dts), default=0)
    ideal = macs * n_cta / rate if rate else 0
    sim = max(sim, busy)
    cyc = [max(busy, chain), sim, max(sim, sum(c for p, c in d.items() if p != "issue"))]
    ceil, peak = (
        min((g.ceil.get(t, g.ceil[""]) for t in dts), default=1),
        rate * 2 * g.sms * g.mhz / 1e6,
    )
    ut = [round(ideal / t, 3) if t else 0 for t in cyc]
    tf = [round(peak * (u * ceil if ceil > 1 else min(u, ceil)), 1) for u in ut] if rate else []
    return LoopReport(
        name,
        demand=d,
        bottleneck=max(d, key=d.get) if d else "-",
        macs_cta=macs,
        dtype="/".join(sorted(dts)),
        utilisation=ut,
        cycles=[round(c, 1) for c in cyc],
        tflops=tf,
        **kw,
    )


def analyse(
    cubin: bytes,
    arch: int,
    num_warps: int = 0,
    shared_bytes: int = -1,
    num_stages: int = 2,
    tmem_cols: int = 0,
    gpu: Gpu = None,
) -> Report:
    (insns, labels), g, info, warn = disassemble(cubin), gpu or GPUS[arch], elf_info(cubin), []
    warps = info["threads"] // 32 or num_warps or 4
    sm = struct.unpack_from("<I", cubin, 0x30)[0] >> (8 if cubin[8] > 7 else 0) & 255
    if shared_bytes < 0:
        shared_bytes = info["smem"]
        warn.append(
            "dynamic shared memory unknown (pass --shared/--meta): occupancy is an upper bound"
        )
    classify(insns, g)
    code = Code(insns, labels)
    live, real = code.live, code.real
    lane_model(code)
    occ, lim = occupancy(g, info["regs"], shared_bytes, warps, tmem_cols)
    n_cta = max(1, occ)
    foot = info["stack"] * 32 * warps * n_cta
    level = (foot > 131072) + (foot * g.sms > g.l2_mb << 20)  # where spilled registers live
    classify(live, g, level)  # again, now with coalescing, bank-conflict and spill factors
    warn += [f"does not fit on the SM: limited by {lim}"] * (not occ) + [
        f"compiled for sm_{sm}, modelled as {g.name}"
    ] * (sm != arch)
    out, tensor = [], any(i.macs for i in live)
    ws = tensor and any(i.base in ("USETMAXREG", "BRX") for i in live)
    for n, h in enumerate(sorted(real, key=lambda x: code.bb[x][0])):
        body = real[h]
        inner = {x: real[x] for x in real if real[x] < body}
        path = code.walk(body, h, inner)
        wp = warps
        if ws:  # warp-specialised: infer how many warps run this partition
            cnt = [
                int(m[1], 16) // 32
                for i, _ in path
                if i.base == "BAR" and (m := re.search(r", (0x[0-9a-f]+)", i.args))
            ]
            wp = min(cnt) if cnt else 1 if any(i.kind in ("utc", "tma") for i, _ in path) else 4
        ffma, work = (
            [1 + (i.base == "FFMA2") for i, _ in path if i.base in ("FFMA", "FFMA2")],
            len(path) * n_cta * wp,
        )
        dot = len(ffma) >= max(64, 0.6 * len(path))  # heuristic: a matrix product on the FP32 pipe
        stall, notes = sum(max(1, i.stall) for i, _ in path), []
        sim = simulate(
            path,
            math.ceil(n_cta * min(1, wp / 4)),
            max(1, wp // 4),
            6 if work < 24000 else 4 if work < 4e5 else 2,
            g.lat_l2 if tensor or dot else g.lat_dram,
            num_stages,
            ws,
        )[0]
        spill = sum(i.bytes for i, _ in path if i.kind in ("ldl", "stl")) * wp
        kinds = {i.kind for i, _ in path}
        if spill:
            notes.append(f"register spills inside the loop: {spill} B per CTA-iteration")
        if kinds & MMA and "ldg" in kinds and not kinds & {"ldgsts", "tma"}:
            notes.append("synchronous global loads feed the tensor loop (not pipelined)")
        if g.cc in (90, 100) and "mma" in kinds:
            notes.append(f"warp-level MMA: capped at {g.hmma:.0%} of the {g.name} tensor peak")
        macs, dts = (
            int(sum(i.macs * (1 if i.cta else wp) for i, _ in path)),
            {i.dtype for i, _ in path if i.macs},
        )
        load = traffic(path, ("ldg", "ldgsts"), wp) + sum(
            i.bytes for i, _ in path if i.kind == "syncs"
        )
        out.append(
            loop_report(
                g,
                f"L{n}",
                demand_of(path, wp),
                n_cta,
                macs,
                dts,
                sim,
                stall * min(1, wp / 4),
                fmacs=sum(ffma) * 32 * wp * dot,
                start=insns[code.bb[h][0]].off,
                end=max(code.block(k)[-1].off for k in body),
                depth=sum(body < b for b in real.values()),
                insns=len(path),
                stall_sum=stall,
                spill_bytes=spill,
                load_bytes=load,
                store_bytes=traffic(path, ("stg", "atom"), wp),
                useful_bytes=traffic(path, GLOBAL, wp, useful=True),
                tma_ops=sum(i.kind == "tma" for i, _ in path),
                step=induction(path),
                notes=notes,
            )
        )
        if out[-1].dtype == "fp32":
            notes.append("dot product on FP32 FMA units: no tensor cores (ieee precision?)")
    leaf = [
        l
        for l in out
        if l.macs_cta or not any(x is not l and l.start <= x.start and x.end <= l.end for x in out)
    ]
    if ws and len(leaf) > 1:  # concurrent partitions: demands add up, trip counts assumed equal
        tot = functools.reduce(
            lambda a, l: a + collections.Counter(l.demand), leaf, collections.Counter()
        )
        add = lambda f: sum(getattr(l, f) for l in leaf)
        out.append(
            loop_report(
                g,
                "WS",
                {p: c / n_cta for p, c in tot.items()},
                n_cta,
                add("macs_cta"),
                {t for l in leaf for t in l.dtype.split("/") if t},
                max(l.cycles[1] for l in leaf),
                0,
                start=0,
                end=0,
                depth=0,
                stall_sum=0,
                step="",
                notes=["warp-specialised: hand-offs not modelled, 10-55 % optimistic"],
                **{
                    f: add(f)
                    for f in (
                        "insns",
                        "spill_bytes",
                        "load_bytes",
                        "store_bytes",
                        "useful_bytes",
                        "tma_ops",
                    )
                },
            )
        )
    sp = code.walk(None, 0, real)
    sd = demand_of(sp, warps)
    straight = simulate(
        sp, math.ceil(n_cta * min(1, warps / 4)), max(1, warps // 4), 1, g.lat_dram, 1, ws
    )[1]
    lo = max(sd.values(), default=0) * n_cta
    hi = sum(c for p, c in sd.items() if p != "issue") * n_cta
    spilled = sum(i.bytes for i, _ in sp if i.kind in ("ldl", "stl")) * warps
    ld, st, ld_l2 = (
        traffic(sp, ("ldg", "ldgsts"), warps),
        traffic(sp, ("stg", "atom"), warps),
        traffic(sp, ("ldg", "ldgsts"), warps, True),
    )
    hot = max(out, key=lambda l: (l.macs_cta > 0, l.name == "WS", l.cycles[1])) if out else None
    stream = {}
    if not tensor and (
        hot is None or hot.dtype != "fp32"
    ):  # memory-bound kernel: DRAM share per SM against latency and Little's law
        a, b, t = (
            (hot.load_bytes, hot.store_bytes, hot.cycles)
            if hot
            else (ld, st, [lo, straight + LAT["launch"], hi + straight])
        )
        sb = (hot.spill_bytes if hot else spilled) * (level == 2)
        use = hot.useful_bytes if hot else traffic(sp, GLOBAL, warps, useful=True)
        bpc = g.dram_gbs * 1e3 / g.mhz / g.sms
        mem = (a + b + sb) * n_cta / bpc / g.dram_eff

        def gbs(x):
            return round(use * n_cta / x * g.sms * g.mhz / 1e3) if x else 0

        stream = {
            "bytes_per_cta": a + b,
            "useful_bytes_per_cta": use,
            "load": a,
            "store": b,
            "spill_to_dram": sb,
            "bytes_in_flight_sm": a * n_cta,
            "littles_law_need": int(bpc * g.lat_dram),
            "gbs": [gbs(max(mem * g.dram_eff, t[0])), gbs(max(mem, t[1])), gbs(mem + t[1])],
            "dram_peak": g.dram_gbs,
            "bound": "DRAM" if mem >= t[1] else "latency/issue",
        }
    mix = collections.Counter(i.kind for i in live if i.kind != "off")
    forms = collections.Counter()
    for i in live:
        if i.kind in MEM.values() and i.kind != "shfl":
            forms[
                f"{i.base}." + (f"x{i.bytes // 128}" if "SM" in i.base else str(width(i) * 8))
            ] += 1
        elif i.kind in MMA or i.base in LISTED:
            forms[i.op + (f"[{i.macs} MAC]" if i.kind == "utc" else "")] += 1
    acc = [i.bytes / i.ways for i in live if i.kind in GLOBAL[:3] and i.taint & 1]
    per_acc = round(sum(acc) / len(acc), 1) if acc else 0

    def sick(kinds, f, txt):
        return (lambda v: warn.append(f"{len(v)} {txt}") if v else None)(
            [i for i in live if i.kind in kinds and f(i)]
        )

    sick(
        ("ldl", "stl"),
        lambda i: 1,
        f"local-memory (spill) instructions, {info['stack']} B stack per thread, spills live in {('L1', 'L2', 'DRAM')[level]}",
    )
    sick(
        GLOBAL,
        lambda i: i.kind != "atom" and i.taint & 1 and i.bytes <= 64,
        "narrow (<= 2 B per lane) global accesses: missing divisibility or contiguity hint?",
    )
    sick(
        GLOBAL,
        lambda i: i.ways >= 3 and i.bytes > 64,
        "uncoalesced global accesses (each warp request touches >= 3x the ideal 32-byte sectors)",
    )
    sick(
        ("lds", "sts"), lambda i: i.ways >= 2, "shared-memory accesses with >= 2-way bank conflicts"
    )
    sick(("fp64",), lambda i: 1, "FP64 instructions")
    sick(
        ("ctrl",),
        lambda i: i.base == "CALL" and "$" in i.args and "guardrail" not in i.args,
        "subroutine calls (slow division/sqrt?), bodies not costed",
    )
    warn += [f"{l.name}: {x}" for l in out for x in l.notes]
    return Report(
        True,
        info["name"],
        g.name,
        arch,
        warps,
        info["regs"],
        info["stack"],
        mix["ldl"] + mix["stl"],
        shared_bytes,
        occ,
        round(occ * warps * 32 / g.threads, 3),
        lim,
        len(live),
        dict(mix),
        dict(forms),
        out,
        hot.name if hot else "",
        [round(lo), round(max(lo, straight)), round(max(lo, hi, straight))],
        [ld, st, ld_l2],
        per_acc,
        stream,
        warn,
        ASSUMPTIONS,
    )


def predict(
    report: Report,
    grid: float,
    trips: float | Mapping[str, float] = 0,
    launch_us: float = 5.0,
    gpu: Gpu | None = None,
) -> list[float]:
    """Modelled kernel time in microseconds: [overlap, simulated, serial].

    Args:
        report: Of the kernel.
        grid: Blocks of the launch.
        trips: Turns of the hot loop in each block, or turns of every loop by its name.
        launch_us: Added for the launch.
        gpu: Default: the one that the report is of.
    """
    gpu = gpu or GPUS[report.arch]
    resident = max(1, report.ctas_per_sm)
    turns = dict(trips) if isinstance(trips, Mapping) else {report.hot: trips}
    loops = [loop for loop in report.loops if turns.get(loop.name)]
    memory = 0.0
    if report.streaming:
        memory = traffic_bytes(report, grid, turns) / gpu.dram_gbs / 1e3 / gpu.dram_eff
    times = []
    for k in range(3):
        cycles = report.straight_cycles[k] + LAT["launch"] * (k > 0)
        cycles += sum(loop.cycles[k] * turns[loop.name] for loop in loops)
        hot = next((loop for loop in loops if loop.name == report.hot and loop.macs_cta), None)
        ceiling = gpu.ceil.get(hot.dtype, gpu.ceil[""]) if hot else 1
        if hot and ceiling < 1 and hot.utilisation[k] > ceiling:
            cycles *= hot.utilisation[k] / ceiling
        waves = max(1.0, grid / (gpu.sms * resident))
        busy = waves * cycles / gpu.mhz / max(1, ceiling)
        bound = (max(busy, memory * gpu.dram_eff), max(busy, memory), busy + memory)[k]
        times.append(round(launch_us + bound, 2))
    return times


def traffic_bytes(report: Report, grid: float, turns: Mapping[str, float]) -> float:
    """Bytes of global memory that a launch reads and writes, what every block shares counted once."""
    spilled = report.streaming.get("spill_to_dram", 0)
    hot = report.hot_loop()
    block = sum(report.bytes_cta[:2]) + (0 if hot else spilled)
    for loop in report.loops:
        extra = spilled if loop.name == report.hot else 0
        block += (loop.load_bytes + loop.store_bytes + extra) * turns.get(loop.name, 0)
    return block * grid + report.bytes_cta[2]


def gate(new, old, tol):  # regressions of report `new` against an earlier report's json
    bad = [
        f"{k}: {old[k]} -> {getattr(new, k)}"
        for k in ("spill_insns", "stack_bytes")
        if getattr(new, k) > old[k]
    ]

    def kinds(ws):
        return {re.sub(r"[\d.]+", "#", w.split(", spills live")[0]) for w in ws}

    bad += [f"new warning: {w}" for w in sorted(kinds(new.warnings) - kinds(old["warnings"]))]
    if new.bytes_per_global_access < old["bytes_per_global_access"] * 0.75:
        bad.append(
            f"bytes per global warp access (vector width, coalescing): {old['bytes_per_global_access']} -> {new.bytes_per_global_access}"
        )
    h, o = new.hot_loop(), next((l for l in old["loops"] if l["name"] == old["hot"]), None)
    if h and o:
        if h.dtype != o["dtype"]:
            bad.append(f"hot loop arithmetic: {o['dtype'] or 'none'} -> {h.dtype or 'none'}")
        for k, nm in enumerate(("overlap", "simulated")):
            a, b = (
                c / (m * n if m else 1)
                for c, m, n in (
                    (o["cycles"][k], o["macs_cta"], old["ctas_per_sm"]),
                    (h.cycles[k], h.macs_cta, new.ctas_per_sm),
                )
            )
            if b > a * (1 + tol):
                bad.append(f"hot loop {nm} cycles per unit work: {a:.4g} -> {b:.4g}")
    if (
        new.streaming
        and old["streaming"]
        and new.streaming["gbs"][2] < old["streaming"]["gbs"][2] * (1 - tol)
    ):
        bad.append(
            f"modelled GB/s without overlap: {old['streaming']['gbs'][2]} -> {new.streaming['gbs'][2]}"
        )
    return bad
