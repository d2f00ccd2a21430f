"""A cubin as instructions with their control bits, labels, and what its ELF sections say."""

import importlib.util
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field


@dataclass
class Insn:
    off: int
    pred: str
    op: str
    args: str
    stall: int
    wb: int
    rb: int
    wait: int
    target: int = -1
    kind: str = ""
    pipes: dict = field(default_factory=dict)
    bytes: int = 0
    macs: int = 0
    dtype: str = ""
    cta: bool = False
    lat: int = 0
    taint: int = 3
    ways: float = 1.0
    miss: float = 1.0  # ways: L1/bank replays, miss: L2 sectors

    def __post_init__(self):
        self.base, *self.mods = self.op.split(".")


def tool(name):
    spec, p = importlib.util.find_spec("triton"), os.environ.get("SASSCOST_" + name.upper())
    if not p and spec and spec.submodule_search_locations:
        p = os.path.join(spec.submodule_search_locations[0], "backends/nvidia/bin", name)
    p = p if p and os.path.exists(p) else shutil.which(name)
    if not p:
        raise FileNotFoundError(f"{name} not found: install triton or set SASSCOST_{name.upper()}")
    return p


def disassemble(cubin: bytes):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        txt = subprocess.run(
            [tool("nvdisasm"), "-c", "-hex", f.name], capture_output=True, text=True
        ).stdout
    out, labels, cur = [], {}, None
    for ln in txt.split("\n"):
        if out and re.match(r"\s*\.section\s+\.text\.", ln):
            break  # first kernel only
        if m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s+/\* 0x[0-9a-f]{16} \*/", ln):
            cur = m
        elif m := re.match(r"(\.L_x_\w+):", ln):
            labels[m[1]] = out[-1].off + 16 if out else 0
        elif cur and (m := re.search(r"/\* 0x([0-9a-f]{16}) \*/", ln)):
            c = int(m[1], 16) >> 41  # control field = bits 105..121 of the 128-bit instruction
            t = re.match(r"(@!?U?P\w+ )?\s*(\S+)\s*(.*)", cur[2])
            out.append(
                Insn(
                    int(cur[1], 16),
                    (t[1] or "").strip(),
                    t[2],
                    t[3].replace(".reuse", ""),
                    c & 15,
                    c >> 5 & 7,
                    c >> 8 & 7,
                    c >> 11 & 63,
                )
            )
            cur = None
    if not out:
        raise ValueError("nvdisasm produced no code: is this a cubin?")
    for i in out:
        if m := re.search(r"`\((\.L_x_\w+)\)", i.args):
            i.target = labels.get(m[1], -1)
    return out, labels


def elf_info(cubin: bytes):
    """kernel name, registers, static smem, stack and threads from the ELF sections (.nv.info attributes)."""
    (shoff,) = struct.unpack_from("<Q", cubin, 0x28)
    n, strx = struct.unpack_from("<HH", cubin, 0x3C)
    sh = [struct.unpack_from("<IIQQQQIIQQ", cubin, shoff + 64 * k) for k in range(n)]
    r = {"name": "?", "regs": 0, "smem": 0, "stack": 0, "threads": 0}
    for s in sh:
        nm = cubin[sh[strx][4] + s[0] :].split(b"\0", 1)[0].decode()
        if nm.startswith(".text.") and r["name"] == "?":
            r["name"] = nm[6:]
        if nm.startswith(".nv.shared.") and "reserved" not in nm:
            r["smem"] += s[5]
        p, end = (s[4], s[4] + s[5]) if nm.startswith(".nv.info") else (0, 0)
        while p + 4 <= end:
            fmt, attr, val = struct.unpack_from("<BBH", cubin, p)
            p += 4
            if fmt != 4:
                continue
            w = struct.unpack_from(f"<{val // 4}I", cubin, p)
            p += val
            if attr == 0x10:
                r["threads"] = math.prod(w[:3])  # REQNTID
            if attr == 0x2F:
                r["regs"] = max(r["regs"], w[1])  # REGCOUNT
            if attr in (0x11, 0x12):
                r["stack"] = max(r["stack"], w[1])  # FRAME_SIZE / MIN_STACK_SIZE
    return r
