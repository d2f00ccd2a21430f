"""The rules of the compile check refuse kernels with planted defects, and pass good ones."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from fastlm.bench.capture import capture_launches
from fastlm.bench.compile import Failure, compile_all
from fastlm.bench.machine_code import disassembled
from fastlm.bench.rules import accepted, refusals
from fastlm.bench.sass import parse


@triton.jit
def _good_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = row * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * 2)


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(x_ptr + N + offs)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(N):
        total += x * start + y * (total + start)
    tl.store(y_ptr + offs, total + x + y)


@triton.jit
def _scalar_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs * stride, tl.load(x_ptr + offs * stride))


@triton.jit
def _float64_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, (x.to(tl.float64) / 3.0).to(tl.float32))


@triton.jit
def _int32_row_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _int32_widened_late_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * 4 + tl.arange(0, 4)
    offs = (rows * stride).to(tl.int64)[:, None] + tl.arange(0, BLOCK)[None, :]
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _int32_loop_kernel(x_ptr, y_ptr, stride, M, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(M):
        total += tl.load(x_ptr + row * stride + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.arange(0, BLOCK), total)


@triton.jit
def _int32_table_kernel(x_ptr, y_ptr, table_ptr, stride, BLOCK: tl.constexpr):
    page = tl.load(table_ptr + tl.program_id(0))
    offs = page * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, o_ptr, N, M: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr
):
    rows, cols, dims = tl.arange(0, M), tl.arange(0, BLOCK), tl.arange(0, D)
    q = tl.load(q_ptr + rows[:, None] * D + dims[None, :])
    acc = tl.zeros([M, D], tl.float32)
    for start in range(0, N, BLOCK):
        k = tl.load(k_ptr + (start + cols).to(tl.int64)[:, None] * D + dims[None, :])
        s = tl.dot(q, k.T)
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        acc = tl.dot(p.to(q.dtype), k, acc)
    tl.store(o_ptr + rows[:, None] * D + dims[None, :], acc.to(q.dtype))


@triton.jit
def _slow_to_compile_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    for _ in tl.static_range(60):
        x = tl.sort(x) * 2
    tl.store(y_ptr + offs, x)


FLOATS = torch.empty(1 << 16)
HALVES = torch.empty(1 << 16, dtype=torch.bfloat16)


def compiled(kernel, target, *args, grid=(64,), main_path=True, **options):
    """The kernel's launch, compiled, as though its sizes were those it is built for."""
    with capture_launches(target) as capture:
        kernel[grid](*args, **options)
    (result,) = compile_all([(capture.launches[0], target)], processes=1)
    assert not isinstance(result, Failure), result.message
    result.main_path = main_path
    return result


def attention(target, **options):
    return compiled(_attention_kernel, target, HALVES, HALVES, HALVES, 4096, **options)


def rules_of(result) -> set[str]:
    return {text.split(":")[0] for text in refusals(result)}


@pytest.mark.parametrize("target", [80, 90, 100, 120])
def test_good_kernels_pass(target):
    assert refusals(compiled(_good_kernel, target, FLOATS, FLOATS, 4096, BLOCK=1024)) == []
    size = {"M": 128, "BLOCK": 64, "D": 64, "num_warps": 8 if target == 90 else 4}
    assert refusals(attention(target, num_stages=2, **size)) == []


def test_spills_are_refused():
    bad = compiled(_spilling_kernel, 90, FLOATS, FLOATS, 100, BLOCK=4096, num_warps=1)
    assert "spills" in rules_of(bad)


def test_scalar_access_is_refused_on_the_main_path_alone():
    bad = compiled(_scalar_kernel, 90, FLOATS, FLOATS, 4096, BLOCK=1024)
    assert rules_of(bad) == {"narrow_access"}
    bad.main_path = False
    assert rules_of(bad) == set()


def test_an_unaligned_view_loses_its_vectors():
    view = FLOATS[1:]
    bad = compiled(_good_kernel, 90, view, FLOATS, 4096, BLOCK=1024)
    assert rules_of(bad) == {"narrow_access"}


def test_float64_is_refused_but_in_a_single_program():
    bad = compiled(_float64_kernel, 90, FLOATS, FLOATS, BLOCK=1024)
    assert rules_of(bad) == {"float64"}
    bad.one_program = True
    assert rules_of(bad) == set()


@pytest.mark.parametrize(
    ("kernel", "args"),
    [
        (_int32_row_kernel, (4096,)),
        (_int32_widened_late_kernel, (4096,)),
        (_int32_loop_kernel, (4096, 100)),
        (_int32_table_kernel, (torch.empty(64, dtype=torch.int32), 4096)),
    ],
)
def test_32_bit_address_products_are_refused(kernel, args):
    assert "narrow_addresses" in rules_of(compiled(kernel, 90, FLOATS, FLOATS, *args, BLOCK=1024))


def test_serialised_wgmma_is_refused():
    assert "serialised" in rules_of(attention(90, M=128, BLOCK=128, D=64, num_warps=4))
    assert "serialised" not in rules_of(attention(90, M=128, BLOCK=128, D=64, num_warps=8))


@pytest.mark.parametrize("target", [80, 90])
def test_duplicated_exponentials_are_refused(target):
    bad = attention(target, M=64, BLOCK=64, D=64, num_warps=8, num_stages=2)
    good = attention(target, M=64, BLOCK=64, D=64, num_warps=4, num_stages=2)
    assert rules_of(bad) == {"duplicated_exponentials"}
    assert rules_of(good) == set()


def test_too_much_shared_and_tensor_memory_is_refused():
    bad = attention(100, M=128, BLOCK=256, D=256, num_warps=8, num_stages=2)
    texts = refusals(bad)
    assert any("shared memory" in text for text in texts)
    assert any("tensor memory" in text for text in texts)
    assert "tensor_cores" in rules_of(bad)  # what compiles is a trap of a few instructions


def test_collapsed_register_allocation_is_refused():
    """Only the figures are made up: ptxas takes minutes to collapse (sm_80, triton 3.7.1)."""
    result = compiled(_good_kernel, 80, FLOATS, FLOATS, 4096, BLOCK=1024)
    result.code = dataclasses.replace(result.code, registers=32, stack=6016)
    assert "collapsed" in rules_of(result)


def test_a_product_off_the_newest_tensor_cores_is_refused():
    good = attention(90, M=128, BLOCK=64, D=64, num_warps=8)
    hgmma = good.code.opcodes
    for replacement in ({}, {"HMMA.16816.F32.BF16": 64}):
        opcodes = {k: n for k, n in hgmma.items() if not k.startswith("HGMMA")} | replacement
        good.code = dataclasses.replace(good.code, opcodes=opcodes)
        assert "tensor_cores" in rules_of(good)


def test_a_compilation_that_takes_too_long_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    with capture_launches(90) as capture:
        _slow_to_compile_kernel[(1,)](FLOATS, FLOATS, BLOCK=1024)
    (result,) = compile_all([(capture.launches[0], 90)], processes=1, seconds=0.3)
    assert isinstance(result, Failure)
    assert "not compiled after" in result.message


def test_accepted_refusals_are_of_one_kernel_and_rule():
    said = "float64: 3 float64 instructions in a kernel of many programs"
    assert accepted("prepare_kernel", "float32", said) == ("prepare_kernel", "float64", "")
    assert accepted("update_kernel", "float32", said) is None
    assert accepted("prepare_kernel", "float32", "spills: 3 instructions spill registers") is None
    narrow = "narrow_access: most loads are narrow"
    assert accepted("momentum_kernel", "bfloat16 (2 x 3)", narrow)
    assert accepted("momentum_kernel", "float32 (2 x 3)", narrow) is None


def test_a_kernel_that_calls_a_subroutine_is_read_in_the_batch_as_alone(monkeypatch):
    x = torch.empty(1 << 12)
    with capture_launches(90) as captured:
        _float64_kernel[(4,)](x, x, 1024)
        _good_kernel[(4,)](x, x, 1024, 1024)
    launches = captured.launches
    kernels = [launch.compile() for launch in launches]
    named = disassembled(kernels)
    runs = []
    disassembler = parse._nvdisasm
    monkeypatch.setattr(parse, "_nvdisasm", lambda *a: (runs.append(a), disassembler(*a))[1])
    bare = disassembled(kernels, named=False)
    assert len(runs) == 1
    opcodes = {key: [i.opcode for i in code[0]] for key, code in named.items()}
    assert any("CALL" in name for name in opcodes[kernels[0].hash])
    assert {key: [i.opcode for i in code[0]] for key, code in bare.items()} == opcodes
