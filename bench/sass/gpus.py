"""The GPUs of the cost model: their constants, and where each comes from."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Constants of one part. Rates are results a clock and multiprocessor unless said otherwise.

    Attributes:
        name: As sold.
        capability: Such as 90.
        multiprocessors: On the part.
        megahertz: Boost clock of the specification.
        dram_gbs: Nominal memory bandwidth, 10^9 bytes a second.
        shared_kib: Shared memory of a multiprocessor.
        threads: Resident threads a multiprocessor holds.
        blocks: Resident blocks a multiprocessor holds.
        tensor: Dense multiply-adds by kind of operand: ``"f16"`` has 16-bit inputs and float32
            sums, ``"f16a"`` float16 sums.
        ceiling: Best publicly measured share of the nominal tensor peak, by kind, ``""`` for the
            rest; over 1 where the real clock passes the specification's.
        float32: Multiply-adds.
        float16: Multiply-adds of half2 operands, counted singly.
        bfloat16: The same in bfloat16.
        float64: Multiply-adds.
        logic: Integer operations other than additions.
        integer_add: Integer additions.
        special: Reciprocals, exponentials and alike.
        shared_bytes: Bytes a clock between shared memory and registers.
        l2_bytes: Bytes a clock from L2.
        l2_latency: Clocks.
        dram_latency: Clocks.
        mma_sync: Share of ``tensor`` that warp-level mma.sync reaches.
        dram_efficiency: Share of ``dram_gbs`` that streaming kernels reach.
        l2_mib: Size of L2.
        registers: 32-bit registers of a multiprocessor.
    """

    name: str
    capability: int
    multiprocessors: int
    megahertz: int
    dram_gbs: float
    shared_kib: int
    threads: int
    blocks: int
    tensor: Mapping[str, int]
    ceiling: Mapping[str, float]
    float32: int = 128
    float16: int = 256
    bfloat16: int = 256
    float64: int = 2
    logic: int = 64
    integer_add: int = 64
    special: int = 16
    shared_bytes: int = 128
    l2_bytes: float = 64.0
    l2_latency: int = 270
    dram_latency: int = 560
    mma_sync: float = 1.0
    dram_efficiency: float = 0.90
    l2_mib: int = 40
    registers: int = 65536


GPUS = {
    80: Gpu(
        name="A100-SXM4-80GB",
        capability=80,
        multiprocessors=108,
        megahertz=1410,
        dram_gbs=2039,
        shared_kib=164,
        threads=2048,
        blocks=32,
        tensor={"f16": 1024, "f16a": 1024, "tf32": 512, "int8": 2048, "fp64": 64},
        ceiling={"": 0.90},
        float32=64,
        bfloat16=128,
        float64=32,
        l2_bytes=47,
        l2_latency=262,
        dram_latency=466,
        dram_efficiency=0.85,
        l2_mib=40,
    ),
    86: Gpu(
        name="RTX 3090",
        capability=86,
        multiprocessors=82,
        megahertz=1695,
        dram_gbs=936,
        shared_kib=100,
        threads=1536,
        blocks=16,
        tensor={"f16": 256, "f16a": 512, "tf32": 128, "int8": 1024},
        ceiling={"": 1.0},
        float16=128,
        bfloat16=128,
        l2_latency=262,
        dram_latency=466,
        l2_mib=6,
    ),
    89: Gpu(
        name="RTX 4090",
        capability=89,
        multiprocessors=128,
        megahertz=2520,
        dram_gbs=1008,
        shared_kib=100,
        threads=1536,
        blocks=24,
        tensor={"f16": 256, "f16a": 512, "tf32": 128, "int8": 1024, "fp8": 512, "fp8a": 1024},
        ceiling={"": 1.05},
        float16=128,
        bfloat16=128,
        l2_latency=273,
        dram_latency=542,
        l2_mib=72,
    ),
    90: Gpu(
        name="H100-SXM5",
        capability=90,
        multiprocessors=132,
        megahertz=1830,
        dram_gbs=3350,
        shared_kib=228,
        threads=2048,
        blocks=32,
        tensor={
            "f16": 2048,
            "f16a": 2048,
            "tf32": 1024,
            "int8": 4096,
            "fp8": 4096,
            "fp8a": 4096,
            "fp64": 128,
        },
        ceiling={"": 0.79, "fp8": 0.68, "fp8a": 0.68},
        float64=64,
        l2_bytes=39,
        l2_latency=273,
        dram_latency=659,
        mma_sync=0.63,
        dram_efficiency=0.91,
        l2_mib=50,
    ),
    100: Gpu(
        name="B200-SXM",
        capability=100,
        multiprocessors=148,
        megahertz=1860,
        dram_gbs=7700,
        shared_kib=228,
        threads=2048,
        blocks=32,
        tensor={
            "f16": 4096,
            "f16a": 4096,
            "tf32": 2048,
            "int8": 8192,
            "fp8": 8192,
            "fp8a": 8192,
            "fp4": 16384,
            "fp64": 64,
        },
        ceiling={"": 0.71, "fp8": 0.63},
        float64=64,
        l2_latency=300,
        dram_latency=800,
        mma_sync=0.25,
        l2_mib=126,
    ),
    120: Gpu(
        name="RTX 5090",
        capability=120,
        multiprocessors=170,
        megahertz=2407,
        dram_gbs=1792,
        shared_kib=100,
        threads=1536,
        blocks=24,
        tensor={
            "f16": 256,
            "f16a": 512,
            "tf32": 128,
            "int8": 1024,
            "fp8": 512,
            "fp8a": 1024,
            "fp4": 2048,
        },
        ceiling={"": 1.12},
        float16=128,
        bfloat16=128,
        integer_add=128,
        l2_latency=358,
        dram_latency=877,
        l2_mib=96,
    ),
}

# Extra clocks until a result is there; ``launch`` is what starting a block costs.
LATENCY = {
    "special": 18,
    "shared": 26,
    "shuffle": 24,
    "wgmma": 24,
    "tcgen05": 80,
    "tensor memory": 24,
    "barrier": 22,
    "fence": 20,
    "special register": 20,
    "to uniform": 12,
    "launch": 350,
}

SOURCES = {
    "A100: 108 multiprocessors, 1410 MHz, 1024 float16 multiply-adds, L2 5120 B/clk, 2039 GB/s": (
        "NVIDIA A100 whitepaper and 80 GB datasheet"
    ),
    "RTX 3090: 82 multiprocessors, 1695 MHz, 71 TFLOPS (float32 sums), 936 GB/s, 6 MB L2": (
        "NVIDIA Ampere GA102 whitepaper; latencies taken over from the A100, no row was validated"
    ),
    "H100: 132 multiprocessors, 1830 MHz, 989.4 TFLOPS, 228 KB, 3.35 TB/s": (
        "NVIDIA H100 whitepaper; L2 5120 B/clk: PMC10448217 table 3"
    ),
    "B200: 148 multiprocessors, 2.25 PFLOPS at 1.86 GHz, 7.7 TB/s; special and shared as H100": (
        "hmc-tech.com B200 page, chipsandcheese B200 article, FlashAttention-4 (together.ai blog)"
    ),
    "RTX 4090 165.2/330.3 TFLOPS, RTX 5090 209.5/419 TFLOPS, twice the integer additions on 5090": (
        "NVIDIA Ada and RTX Blackwell whitepapers"
    ),
    "results a clock for float32, float16, integers, special functions, shuffles, conversions": (
        "CUDA C++ Programming Guide, arithmetic throughput table"
    ),
    "L2 and DRAM latency; mma.sync about 63 % of wgmma on Hopper": (
        "arXiv 2402.13499, 2501.12084, 2507.10789; ptxas sm_90 HMMA spacing (6 cycles)"
    ),
    "control bits, scoreboards, in-order greedy issue": (
        "arXiv 2503.20481; cross-checked with ptxas (HMMA 8, MUFU 8 cycles on sm_80/90)"
    ),
    "ceiling": (
        "A100 .90 triton test_performance.py; H100 .79 gist jeromeku (780 TF), fp8 .68 triton "
        "PR 5461; B200 .71 FlashAttention-4, fp8 .63 triton PR 9044 (cuBLAS); 5090 1.12 vllm "
        "PR 38338 (235 TF); Ada 1.05 triton PR 3479 (cuBLAS 102 TF on 4080); 3090 assumed"
    ),
    "dram_efficiency": (
        "fitted: slope of Liger-Kernel's benchmark CSV (H100 relu_squared, A100 layer_norm); "
        "others assumed"
    ),
    "assumed (no public source)": (
        "tensor memory 128 B/clk a sub-partition, L2 port 64 B/clk, B200 latencies, LATENCY, "
        "cost of starting a block"
    ),
}

ASSUMPTIONS = [
    "all lanes and predicated instructions active; inside loops the fall-through path is costed",
    "loads of a tensor kernel's loop hit L2, other loads go to DRAM; no hit rates, no contention",
    "TMA boxes are full and hidden by num_stages - 1 iterations; barrier partners matched by "
    "register, else by order",
    "specified boost clock; power limits only through a measured ceiling; instruction cache and "
    "register banks ignored",
    "unknown 32-bit arguments (strides) are large multiples of 4096 in the lane model",
]
