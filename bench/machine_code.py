"""Facts read off compiled kernels: registers, spills, memory, instructions."""

import bisect
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from triton.runtime.cache import get_cache_manager

from .sass import GPUS, occupancy
from .sass.parse import elf_info, sections, tool

_FORMAT = 1  # of the cached facts
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
_ACCESS = re.compile(r"^(LDG|STG|LDGSTS|LD|ST|RED|REDG|ATOM|ATOMG)\b")
_TENSOR = re.compile(r"^(HMMA|HGMMA|UTC[HQIO]MMA|IMMA|IGMMA|QMMA|QGMMA|OMMA|DMMA)\b")
_DOUBLE = re.compile(r"^(D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w*64H|[FI]2[FI]\S*F64)")
_WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "16": 16, "U8": 8, "S8": 8}


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of one kernel says.

    Attributes:
        registers: A thread.
        stack: Bytes a thread.
        shared: Bytes a block.
        tensor_memory: Columns a block (sm_100).
        warps: A block.
        opcodes: How often each instruction occurs, modifiers included.
    """

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    warps: int
    opcodes: dict[str, int]

    def count(self, pattern: str) -> int:
        """Instructions whose name starts with a match of ``pattern``."""
        compiled = re.compile(pattern)
        return sum(n for name, n in self.opcodes.items() if compiled.match(name))

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.count(r"(LDL|STL)\b")

    @property
    def instructions(self) -> int:
        """All of them, padding left out."""
        return sum(n for name, n in self.opcodes.items() if name != "NOP")

    @property
    def tensor(self) -> dict[str, int]:
        """Tensor-core instructions by class."""
        found: Counter[str] = Counter()
        for name, n in self.opcodes.items():
            if match := _TENSOR.match(name):
                found[match[1]] += n
        return dict(found)

    @property
    def double(self) -> int:
        """Instructions in float64."""
        return sum(n for name, n in self.opcodes.items() if _DOUBLE.match(name))

    @property
    def barriers(self) -> int:
        """Points where the warps of a block wait for each other."""
        return self.count(r"BAR\b")

    @property
    def accesses(self) -> dict[str, dict[int, int]]:
        """Of global memory: ``{"load" | "store" | "copy" | "tma": {bits a lane: how often}}``."""
        found: dict[str, Counter[int]] = {"load": Counter(), "store": Counter(), "copy": Counter()}
        kinds = {"LDG": "load", "LD": "load", "LDGSTS": "copy"}
        for name, n in self.opcodes.items():
            if match := _ACCESS.match(name):
                parts = name.split(".")[1:]
                bits = next((_WIDTHS[p] for p in parts if p in _WIDTHS), 32)
                found[kinds.get(match[1], "store")][bits] += n
        if bulk := self.count(r"(UTMALDG|UTMASTG|UTMAREDG|UBLKCP)\b"):
            found["tma"] = Counter({0: bulk})
        return {kind: dict(widths) for kind, widths in found.items() if widths}

    def occupancy(self, arch: int) -> tuple[int, float, str]:
        """Blocks a multiprocessor, the share of its threads they fill, and what limits them."""
        gpu = GPUS[arch]
        blocks, limiter = occupancy(
            gpu, self.registers, self.shared, self.warps, self.tensor_memory
        )
        return blocks, blocks * self.warps * 32 / gpu.threads, limiter


def _code_sections(cubin: bytes) -> bytes:
    """The machine code of a cubin: the bytes of its .text sections."""
    return b"".join(
        cubin[offset : offset + size]
        for name, offset, size in sections(cubin)
        if name.startswith(".text.")
    )


def _opcodes(cubins: Sequence[bytes], arch: int) -> list[dict[str, int]]:
    """The instructions of each cubin. One disassembler for all: starting it costs half a second."""
    starts, code = [], b""
    for cubin in cubins:
        starts.append(len(code))
        code += _code_sections(cubin)
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(code)
        file.flush()
        name = f"SM{arch}{'a' if arch >= 90 else ''}"
        text = subprocess.run(
            [tool("nvdisasm"), "-b", name, file.name], capture_output=True, text=True, check=True
        ).stdout
    counts: list[Counter[str]] = [Counter() for _ in cubins]
    for match in _INSTRUCTION.finditer(text):
        counts[bisect.bisect_right(starts, int(match[1], 16)) - 1][match[2]] += 1
    return [dict(count) for count in counts]


def read(compiled: Sequence[Any]) -> list[MachineCode]:
    """The facts of compiled kernels, kept beside them in Triton's cache."""
    facts: dict[str, MachineCode] = {}
    missing: dict[int, dict[str, Any]] = {}
    for kernel in compiled:
        kept = get_cache_manager(kernel.hash).get_file("fastlm.json")
        if kept is not None:
            with open(kept) as file:
                read_back = json.load(file)
            if read_back.pop("format") == _FORMAT:
                facts[kernel.hash] = MachineCode(**read_back)
                continue
        missing.setdefault(kernel.metadata.target.arch, {})[kernel.hash] = kernel
    for arch, kernels in missing.items():
        counts = _opcodes([k.asm["cubin"] for k in kernels.values()], arch)
        for (key, kernel), opcodes in zip(kernels.items(), counts, strict=True):
            info = elf_info(kernel.asm["cubin"])
            facts[key] = MachineCode(
                registers=info.registers,
                stack=info.stack,
                shared=kernel.metadata.shared,
                tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
                warps=info.threads // 32 or kernel.metadata.num_warps,
                opcodes=opcodes,
            )
            text = json.dumps({"format": _FORMAT, **asdict(facts[key])})
            get_cache_manager(key).put(text, "fastlm.json", binary=False)
    return [facts[kernel.hash] for kernel in compiled]
