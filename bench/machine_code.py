"""Facts read off compiled kernels: registers, spills, memory, instructions."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from triton.runtime.cache import get_cache_manager

from .sass import GPUS, occupancy
from .sass.parse import Disassembly, disassemble_all, elf_info

_FORMAT = 1  # of the cached facts
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


def disassembled(compiled: Sequence[Any], *, named: bool = True) -> dict[str, Disassembly]:
    """Compiled kernels' instructions by hash; arguments as those of ``disassemble_all``."""
    found: dict[str, Disassembly] = {}
    for arch in {kernel.metadata.target.arch for kernel in compiled}:
        chosen = {k.hash: k.asm["cubin"] for k in compiled if k.metadata.target.arch == arch}
        cubins = list(chosen.values())
        found |= zip(chosen, disassemble_all(cubins, arch, named=named), strict=True)
    return found


def _kept(kernel: Any) -> MachineCode | None:
    """The facts that Triton's cache holds of a kernel."""
    file_name = get_cache_manager(kernel.hash).get_file("fastlm.json")
    if file_name is None:
        return None
    with open(file_name) as file:
        kept = json.load(file)
    return MachineCode(**kept) if kept.pop("format") == _FORMAT else None


def read(compiled: Sequence[Any], code: dict[str, Disassembly] | None = None) -> list[MachineCode]:
    """The facts of compiled kernels, kept beside them in Triton's cache.

    Args:
        compiled: The kernels.
        code: From ``disassembled``, what is there already.
    """
    facts = {kernel.hash: kept for kernel in compiled if (kept := _kept(kernel))}
    missing = {kernel.hash: kernel for kernel in compiled if kernel.hash not in facts}
    code = code or {}
    code = code | disassembled([k for key, k in missing.items() if key not in code], named=False)
    for key, kernel in missing.items():
        info = elf_info(kernel.asm["cubin"])
        facts[key] = MachineCode(
            registers=info.registers,
            stack=info.stack,
            shared=kernel.metadata.shared,
            tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
            warps=info.threads // 32 or kernel.metadata.num_warps,
            opcodes=dict(Counter(i.opcode for i in code[key][0])),
        )
        text = json.dumps({"format": _FORMAT, **asdict(facts[key])})
        get_cache_manager(key).put(text, "fastlm.json", binary=False)
    return [facts[kernel.hash] for kernel in compiled]
