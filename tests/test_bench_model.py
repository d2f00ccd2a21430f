"""The cost model: what it reads off machine code, how often loops turn, what it makes of both."""

import pytest
import torch
import triton
import triton.language as tl

from fastlm.bench.capture import capture_launches
from fastlm.bench.model import cost, model, roofline
from fastlm.bench.sass import GPUS, SOURCES, analyse, occupancy
from fastlm.bench.ttir import dots, exponentials, memory_tiles, parse
from fastlm.bench.turns import trip_counts


@triton.jit
def _copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _rows_kernel(x_ptr, y_ptr, stride, M, BLOCK: tl.constexpr):
    """Every num_programs-th row; as many turns as rows there are for the program."""
    cols = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), M, tl.num_programs(0)):
        total += tl.load(x_ptr + row * stride + cols)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + cols, total)


@triton.jit
def _period_kernel(a_ptr, b_ptr, c_ptr, PERIOD, BLOCK: tl.constexpr):
    """As tiles of causal attention: each program of a period has one more product than the last."""
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(tl.program_id(0) % PERIOD + 1):
        tile = i.to(tl.int64) * BLOCK * BLOCK
        acc = tl.dot(tl.load(a_ptr + tile + offs), tl.load(b_ptr + tile + offs), acc)
    tl.store(c_ptr + offs, acc)


@triton.jit
def _triangle_kernel(x_ptr, y_ptr, N, LATER: tl.constexpr, BLOCK: tl.constexpr):
    """Nested loops whose counts hang on the program and on each other."""
    cols = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * 2, N)
    if LATER:
        end = N - end
    for i in range(end):
        for j in range(i + 1):
            total += tl.load(x_ptr + (i + j).to(tl.int64) * BLOCK + cols)
    tl.store(y_ptr + cols, total)


@triton.jit
def _data_kernel(x_ptr, n_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(n_ptr)):
        total += tl.load(x_ptr + i.to(tl.int64) * BLOCK + cols)
    tl.store(y_ptr + cols, total)


@triton.jit
def _search_kernel(x_ptr, ends_ptr, y_ptr, B, BLOCK: tl.constexpr):
    """Finds its sequence by bisection, returns early past its end, and reads a block a turn."""
    low, high = 0, B
    while low + 1 < high:
        middle = (low + high) // 2
        if tl.load(ends_ptr + middle) <= tl.program_id(0):
            low = middle
        else:
            high = middle
    length = tl.load(ends_ptr + low + 1) - tl.load(ends_ptr + low)
    if length > 100:
        return
    cols = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(length):
        total += tl.load(x_ptr + i.to(tl.int64) * BLOCK + cols)
    tl.store(y_ptr + cols, total)


@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    rows, cols, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK):
        k = (start + inner).to(tl.int64)
        a = tl.load(a_ptr + rows[:, None].to(tl.int64) * K + k[None, :])
        b = tl.load(b_ptr + k[:, None] * N + cols[None, :])
        acc = tl.dot(tl.exp2(a.to(tl.float32)).to(a.dtype), b, acc)
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], acc)


X = torch.empty(1 << 20)


def launched(kernel, target, *args, grid, **options):
    with capture_launches(target) as capture:
        kernel[grid](*args, **options)
    (launch,) = capture.launches
    compiled = launch.compile()
    return launch, compiled


def turns_of(launch, compiled, program=0):
    kernel = parse(compiled.asm["ttir"])
    return trip_counts(kernel, launch.values(), launch.grid, (program, 0, 0))


def test_turns_of_a_grid_stride_loop():
    launch, compiled = launched(_rows_kernel, 90, X, X, 1024, 1000, grid=(132,), BLOCK=1024)
    for program in (0, 75, 76, 131):
        assert turns_of(launch, compiled, program) == [len(range(program, 1000, 132))]


@pytest.mark.parametrize("later", [False, True])
def test_turns_of_nested_loops(later):
    launch, compiled = launched(_triangle_kernel, 90, X, X, 24, later, grid=(16,), BLOCK=128)
    for program in (0, 3, 11, 15):
        end = min((program + 1) * 2, 24)
        end = 24 - end if later else end
        assert turns_of(launch, compiled, program) == [end, sum(i + 1 for i in range(end))]


@pytest.mark.parametrize("period", [3, 16, 20, 64])
def test_programs_that_stand_for_a_grid_are_in_no_step_with_it(period):
    a = torch.empty(1 << 20, dtype=torch.float16)
    launch, compiled = launched(_period_kernel, 90, a, a, X, period, grid=(4096,), BLOCK=64)
    found = model(launch, compiled.asm["ttir"], cost(compiled))
    assert found.flops == pytest.approx(4096 * (period + 1) / 2 * 2 * 64**3, rel=0.06)


def test_turns_that_hang_on_a_table_are_read_from_it():
    n = torch.tensor([7], dtype=torch.int32)
    launch, compiled = launched(_data_kernel, 90, X, n, X, grid=(1,), BLOCK=1024)
    assert turns_of(launch, compiled) == [7]


def test_turns_after_a_search_and_an_early_return():
    ends = torch.tensor([0, 3, 10, 12, 500], dtype=torch.int32)
    launch, compiled = launched(_search_kernel, 90, X, ends, X, 4, grid=(500,), BLOCK=1024)
    for program, length in ((0, 3), (2, 3), (3, 7), (9, 7), (10, 2), (11, 2), (12, 0), (400, 0)):
        assert turns_of(launch, compiled, program) == [length]


def test_turns_that_hang_on_large_data_are_not_known():
    n = torch.empty(100_000, dtype=torch.int32)
    launch, compiled = launched(_data_kernel, 90, X, n, X, grid=(1,), BLOCK=1024)
    assert turns_of(launch, compiled) == [None]
    found = model(launch, compiled.asm["ttir"], cost(compiled))
    assert found.guessed
    assert any("hangs on data" in note for note in found.notes)


@pytest.mark.parametrize("target", [80, 86, 89, 90, 100, 120])
def test_a_copy_moves_its_bytes_at_the_part_s_rate(target):
    programs = 64 * 1024
    launch, compiled = launched(_copy_kernel, target, X, X, grid=(programs,), BLOCK=1024)
    found = model(launch, compiled.asm["ttir"], cost(compiled))
    assert found.bytes == programs * 1024 * 4 * 2
    assert found.bound == "DRAM"
    low, middle, high = found.microseconds
    at_peak = found.bytes / GPUS[target].dram_gbs / 1e3
    assert low == pytest.approx(at_peak, rel=0.02)
    assert at_peak < middle < 1.35 * at_peak
    assert middle < high
    assert roofline(target, (int(found.bytes), 0), half=True) == pytest.approx(at_peak)


def test_a_product_does_its_flops():
    half = X.to(torch.bfloat16)
    launch, compiled = launched(
        _product_kernel, 90, half, half, X, 4096, grid=(132,), M=128, N=128, BLOCK=64, num_warps=8
    )
    report = cost(compiled)
    found = model(launch, compiled.asm["ttir"], report)
    assert found.flops == pytest.approx(132 * 2 * 128 * 128 * 4096, rel=0.05)
    assert report.hot_loop().dtype == "f16"
    assert dots(parse(compiled.asm["ttir"])) == [(128, 128, 64, "bf16")]
    assert exponentials(compiled.asm["ttgir"])[0] == 128 * 64
    tiles = memory_tiles(parse(compiled.asm["ttir"]))
    assert ("load", 128 * 64, 16) in tiles
    assert ("store", 128 * 128, 32) in tiles


def test_a_report_is_kept_beside_the_kernel():
    _, compiled = launched(_copy_kernel, 90, X, X, grid=(64,), BLOCK=2048)
    assert cost(compiled) == cost(compiled)
    assert cost(compiled) == analyse(
        compiled.asm["cubin"],
        90,
        warps=compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
        stages=compiled.metadata.num_stages,
    )


def test_uncoalesced_access_is_seen():
    _, good = launched(_copy_kernel, 90, X, X, grid=(64,), BLOCK=1024)
    _, shifted = launched(_copy_kernel, 90, X[1:], X[1:], grid=(64,), BLOCK=1024)
    assert cost(good).bytes_per_access == 512
    assert cost(shifted).bytes_per_access < 200


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "tensor_memory", "expected"),
    [
        (255, 0, 8, 0, (1, "registers")),
        (32, 0, 4, 0, (16, "registers")),
        (16, 100_000, 4, 0, (2, "shared memory")),
        (16, 0, 32, 0, (2, "threads")),
        (32, 0, 4, 256, (2, "tensor memory")),
        (255, 240_000, 8, 0, (0, "shared memory")),
    ],
)
def test_occupancy(registers, shared, warps, tensor_memory, expected):
    assert occupancy(GPUS[90], registers, shared, warps, tensor_memory) == expected


def test_every_part_has_its_sources():
    said = " ".join(SOURCES)
    for gpu in GPUS.values():
        assert gpu.name.split("-")[0] in said


def test_not_a_cubin():
    with pytest.raises(ValueError, match="cubin"):
        analyse(b"\x7fELF" + bytes(200), 90)
