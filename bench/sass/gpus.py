"""The GPUs of the cost model: their constants, and where each comes from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    name: str
    cc: int
    sms: int
    mhz: int
    dram_gbs: float
    smem_kb: int
    threads: int
    ctas: int
    tensor: dict  # dense MAC / clock / SM by operand kind ('f16' = 16-bit inputs + fp32 accumulate, 'f16a' = fp16 acc.)
    ceil: dict  # best public measured fraction of nominal tensor peak (power limit, or >1: real boost clock)
    fp32: int = 128
    lat_l2: int = 270
    lat_dram: int = 560
    l2_bpc: float = 64.0
    hmma: float = 1.0
    alu: int = 64
    iadd: int = 64
    xu: int = 16
    smem_bpc: int = 128
    regs: int = 65536
    f16: int = 256
    bf16: int = 256
    fp64: int = 2
    dram_eff: float = 0.90
    l2_mb: int = 40  # lanes (results / clock / SM); hmma = share of `tensor` reachable by mma.sync


GPUS = {
    80: Gpu(
        "A100-SXM4-80GB",
        80,
        108,
        1410,
        2039,
        164,
        2048,
        32,
        {"f16": 1024, "f16a": 1024, "tf32": 512, "int8": 2048, "fp64": 64},
        {"": 0.90},
        fp32=64,
        lat_l2=262,
        lat_dram=466,
        l2_bpc=47,
        bf16=128,
        fp64=32,
        dram_eff=0.85,
        l2_mb=40,
    ),
    89: Gpu(
        "RTX 4090",
        89,
        128,
        2520,
        1008,
        100,
        1536,
        24,
        {"f16": 256, "f16a": 512, "tf32": 128, "int8": 1024, "fp8": 512, "fp8a": 1024},
        {"": 1.05},
        lat_l2=273,
        lat_dram=542,
        f16=128,
        bf16=128,
        l2_mb=72,
    ),
    90: Gpu(
        "H100-SXM5",
        90,
        132,
        1830,
        3350,
        228,
        2048,
        32,
        {
            "f16": 2048,
            "f16a": 2048,
            "tf32": 1024,
            "int8": 4096,
            "fp8": 4096,
            "fp8a": 4096,
            "fp64": 128,
        },
        {"": 0.79, "fp8": 0.68, "fp8a": 0.68},
        l2_bpc=39,
        lat_l2=273,
        lat_dram=659,
        hmma=0.63,
        fp64=64,
        dram_eff=0.91,
        l2_mb=50,
    ),
    100: Gpu(
        "B200-SXM",
        100,
        148,
        1860,
        7700,
        228,
        2048,
        32,
        {
            "f16": 4096,
            "f16a": 4096,
            "tf32": 2048,
            "int8": 8192,
            "fp8": 8192,
            "fp8a": 8192,
            "fp4": 16384,
            "fp64": 64,
        },
        {"": 0.71, "fp8": 0.63},
        lat_l2=300,
        lat_dram=800,
        hmma=0.25,
        fp64=64,
        l2_mb=126,
    ),
    120: Gpu(
        "RTX 5090",
        120,
        170,
        2407,
        1792,
        100,
        1536,
        24,
        {"f16": 256, "f16a": 512, "tf32": 128, "int8": 1024, "fp8": 512, "fp8a": 1024, "fp4": 2048},
        {"": 1.12},
        lat_l2=358,
        lat_dram=877,
        f16=128,
        bf16=128,
        iadd=128,
        l2_mb=96,
    ),
}
SOURCES = {
    "A100: 108 SM, 1410 MHz, 1024 FP16 FMA/clk/SM, L2 5120 B/clk, 2039 GB/s": "NVIDIA A100 whitepaper and 80 GB datasheet",
    "H100: 132 SM, 1830 MHz, 989.4 TFLOPS (=> 2048 MAC/clk/SM), 228 KB, 3.35 TB/s": "NVIDIA H100 whitepaper; L2 5120 B/clk: PMC10448217 table 3",
    "B200: 148 SM, 2.25 PFLOPS at 1.86 GHz (=> 4096 MAC/clk/SM), 7.7 TB/s; MUFU and smem rate as H100": "hmc-tech.com B200 page, chipsandcheese B200 article, FlashAttention-4 (together.ai blog)",
    "RTX 4090 165.2/330.3 TFLOPS, RTX 5090 209.5/419 TFLOPS (FP16, FP32/FP16 accumulate), 2x INT32 on 5090": "NVIDIA Ada and RTX Blackwell whitepapers",
    "lanes per clock per SM for FP32/FP16/INT/MUFU/shuffle/conversion": "CUDA C++ Programming Guide, arithmetic throughput table",
    "L2/DRAM latency; mma.sync ~63 % of wgmma on Hopper": "arXiv 2402.13499, 2501.12084, 2507.10789; ptxas sm_90 HMMA spacing (6 cycles)",
    "control bits, scoreboards, in-order greedy issue": "arXiv 2503.20481; cross-checked with ptxas (HMMA 8, MUFU 8 cycles on sm_80/90)",
    "ceil": "A100 .90 triton test_performance.py; H100 .79 gist jeromeku (780 TF), fp8 .68 triton PR 5461; B200 .71 FlashAttention-4, "
    "fp8 .63 triton PR 9044 (cuBLAS); 5090 1.12 vllm PR 38338 (235 TF); Ada 1.05 triton PR 3479 (cuBLAS 102 TF on 4080)",
    "dram_eff": "fitted: slope of Liger-Kernel benchmark CSV (H100 relu_squared, A100 layer_norm); others assumed",
    "assumed (no public source)": "TMEM 128 B/clk/SMSP, L2 port 64 B/clk/SM, B200 latencies, LAT table, CTA launch cost",
}
ASSUMPTIONS = [
    "all lanes and predicated instructions active; inside loops the fall-through path is costed",
    "tensor-kernel loop loads hit L2, other loads go to DRAM; no L2 hit-rate, contention or partition model",
    "TMA boxes are full and hidden by (num_stages-1) iterations; mbarrier partners matched by register, else by order",
    "spec boost clock; power throttling only through `ceil`; i-cache and register-bank conflicts ignored",
    "unknown 32-bit kernel arguments (strides) are large multiples of 4096 in the lane model",
]
LAT = {
    "xu": 18,
    "lds": 26,
    "shfl": 24,
    "hgmma": 24,
    "utc": 80,
    "ldtm": 24,
    "bar": 22,
    "fence": 20,
    "s2r": 20,
    "conv": 12,
    "launch": 350,
}
