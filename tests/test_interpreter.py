"""The interpreter is exact and strict, and the memory check sees stray accesses and races."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from memory_check import MemoryCheckError, interp_check
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from fastlm.kernels import _interpreter

BF16 = torch.bfloat16
OWNERS = (tl.tensor, tl.block_type, tl.dtype, tl.core, tl, TritonSemantic)
STOCK = {  # before anything is interpreted
    (owner, name): getattr(owner, name)
    for owner in OWNERS
    for name, thing in vars(owner).items()
    if callable(thing)
}


pytestmark = pytest.mark.usefixtures("kernels")


def every_bf16() -> torch.Tensor:
    """All 65,536 bfloat16 values, NaN included."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)


def random_bf16(n: int = 4096) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.randint(-30, 30, (n,), generator=generator).float())
    return (torch.randn(n, generator=generator) * scale).to(BF16)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every element, NaN where NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _binary_kernel(  # noqa: C901
    x_ptr, y_ptr, out_ptr, flag_ptr, N: tl.constexpr, OP: tl.constexpr
):
    offs = tl.arange(0, N)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = (x / y).to(x.dtype)
    elif OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "max":
        out = tl.maximum(x, y)
    elif OP == "min":
        out = tl.minimum(x, y)
    elif OP == "where":
        out = tl.where(x > y, x, y)
    elif OP == "half":
        out = x * 0.5
    elif OP == "plus one":
        out = x + 1
    elif OP == "fma":
        out = tl.fma(x, y, x)
    tl.store(out_ptr + offs, out)
    tl.store(flag_ptr + offs, (x < y).to(tl.int8) + 2 * (x >= y) + 4 * (x == y) + 8 * (x != y))


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@triton.jit
def _implicit_cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tile = offs[:, None] * N + offs[None, :]
    tl.store(out_ptr + tile, tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile)))


@triton.jit
def _reduce_kernel(x_ptr, sum_ptr, max_ptr, min_ptr, where_ptr, scan_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(sum_ptr, tl.sum(x))
    tl.store(max_ptr, tl.max(x))
    tl.store(min_ptr, tl.min(x))
    tl.store(where_ptr, tl.argmax(x, 0))
    tl.store(scan_ptr + offs, tl.cumsum(x))


@triton.jit
def _atomic_kernel(x_ptr, old_ptr, value):
    tl.store(old_ptr + tl.program_id(0), tl.atomic_add(x_ptr, value.to(tl.bfloat16)))


@triton.jit
def _scalar_kernel(x_ptr, out_ptr, s, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) * s)


@triton.jit
def _scalar_to_half_kernel(out_ptr, s):
    tl.store(out_ptr, s.to(tl.float16))


@triton.jit
def _full_kernel(out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), tl.full([N], 1.7, tl.bfloat16))


@triton.jit
def _and_kernel(out_ptr, lo, hi, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, 1, mask=(offs >= lo) and (offs < hi))


@triton.jit
def _if_block_kernel(out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    if offs < 4:
        tl.store(out_ptr + offs, 1)


@triton.jit
def _chained_kernel(out_ptr, hi, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, 1, mask=0 <= offs < hi)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    tl.store(out_ptr + offs, x, mask=offs < N)


@triton.jit
def _same_cell_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def _read_neighbour_kernel(x_ptr, N):
    i = tl.program_id(0)
    tl.store(x_ptr + i, tl.load(x_ptr + (i + 1) % N) + 1)


@triton.jit
def _table_kernel(table_ptr, N, BLOCK: tl.constexpr):
    ptr = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    offs = tl.arange(0, BLOCK)
    tl.store(ptr + offs, tl.load(ptr + offs, mask=offs < N) + 1, mask=offs < N)


# --- values -------------------------------------------------------------------------------------

BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "max": torch.fmax,
    "min": torch.fmin,
    "where": lambda x, y: torch.where(x > y, x, y),
    "half": lambda x, y: x * 0.5,
    "plus one": lambda x, y: x + 1,
    "fma": lambda x, y: (x.double() * y.double() + x.double()).float().to(BF16),
}


@pytest.mark.parametrize("name", BINARY)
def test_bf16_arithmetic_is_torch_s(name):
    x, y = random_bf16(), random_bf16().flip(0)
    x[:4] = torch.tensor([float("nan"), 1.0, float("inf"), -0.0])
    y[:4] = torch.tensor([1.0, float("nan"), -1.0, 0.0])
    out, flags = torch.empty_like(x), torch.empty(x.numel(), dtype=torch.int8)
    _binary_kernel[(1,)](x, y, out, flags, N=x.numel(), OP=name)
    assert equal(out, BINARY[name](x, y))
    compared = (x < y) * 1 + (x >= y) * 2 + (x == y) * 4 + (x != y) * 8
    assert torch.equal(flags, compared.to(torch.int8))


def test_f32_to_bf16_rounds_to_nearest_even():
    """All midpoints and their neighbours, infinities and NaN."""
    high = np.arange(0, 2**16, dtype=np.uint32) << 16
    bits = np.concatenate([high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x = torch.from_numpy(bits.view(np.float32).copy())
    assert equal(torch.from_numpy(_interpreter.f32_to_bf16(x.numpy())).view(BF16), x.to(BF16))
    chosen = x[:: x.numel() // 2**15][: 2**15].contiguous()
    for kernel in (_cast_kernel, _implicit_cast_kernel):
        out = torch.empty(chosen.numel(), dtype=BF16)
        kernel[(1,)](chosen, out, N=chosen.numel())
        assert equal(out, chosen.to(BF16))


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.float64])
def test_casts_from_bf16_are_exact(target):
    x = every_bf16()
    out = torch.empty(x.numel(), dtype=target)
    _cast_kernel[(1,)](x, out, N=x.numel())
    assert equal(out, x.to(target))


@pytest.mark.parametrize("source", [torch.float16, torch.float64, torch.int32, torch.int64])
def test_casts_to_bf16_are_exact(source):
    if source is torch.float16:
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    else:
        x = torch.arange(-(2**15), 2**15).to(source) * 3
    out = torch.empty(x.numel(), dtype=BF16)
    _cast_kernel[(1,)](x, out, N=x.numel())
    assert equal(out, x.float().to(BF16))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_rounds_and_saturates(kind):
    x = torch.randn(1024, generator=torch.Generator().manual_seed(1)) * 100
    x[:3] = torch.tensor([1e6, -1e6, 1e-9])
    out = torch.empty(x.numel(), dtype=kind)
    _cast_kernel[(1,)](x, out, N=x.numel())
    largest = torch.finfo(kind).max
    assert torch.equal(out.float(), x.clamp(-largest, largest).to(kind).float())
    back = torch.empty_like(x)
    _cast_kernel[(1,)](out, back, N=x.numel())
    assert torch.equal(back, out.float())


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_dot(dtype):
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(32, 32, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_reductions_of_bf16():
    x = torch.randn(256, generator=torch.Generator().manual_seed(3)).to(BF16)
    total, high, low = (torch.empty(1, dtype=BF16) for _ in range(3))
    where, scan = torch.empty(1, dtype=torch.int32), torch.empty_like(x)
    _reduce_kernel[(1,)](x, total, high, low, where, scan, N=256)
    assert total.item() == pytest.approx(x.double().sum().item(), rel=2**-7, abs=2**-7)
    assert (high.item(), low.item()) == (x.max().item(), x.min().item())
    assert x[where.item()] == x.max()
    torch.testing.assert_close(scan.double(), x.double().cumsum(0), rtol=2**-7, atol=2**-6)


def test_atomic_add_of_bf16():
    x, old = torch.zeros(1, dtype=BF16), torch.empty(8, dtype=BF16)
    _atomic_kernel[(8,)](x, old, 1.5)
    assert x.item() == 12
    assert old.sort().values.tolist() == [1.5 * i for i in range(8)]


def test_bf16_constants():
    out = torch.empty(16, dtype=BF16)
    _full_kernel[(1,)](out, N=16)
    assert torch.equal(out, torch.full((16,), 1.7, dtype=BF16))


def test_scalar_arguments_are_float32():
    """float16 times a float argument is float32 on the GPU: the argument is typed."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(4)).half()
    out = torch.empty(64)
    _scalar_kernel[(1,)](x, out, 0.1, N=64)
    assert torch.equal(out, x.float() * torch.tensor(0.1))
    half = torch.empty(1, dtype=torch.float16)
    _scalar_to_half_kernel[(1,)](half, 0.1)
    assert half.item() == torch.tensor(0.1).half().item()


# --- strictness ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "args"), [(_and_kernel, (2, 5)), (_if_block_kernel, ()), (_chained_kernel, (5,))]
)
def test_the_truth_of_a_block_is_refused(kernel, args):
    if kernel is _chained_kernel and triton.__version__ >= "3.9":
        pytest.skip("this interpreter chains comparisons as the compiler refuses to")
    with pytest.raises(Exception, match="truth value of a block"):
        kernel[(1,)](torch.zeros(16), *args, N=16)


def test_unknown_keywords_are_refused():
    x = torch.zeros(16)
    with pytest.raises(KeyError, match="BLOK"):
        _copy_kernel[(1,)](x, x.clone(), 16, BLOCK=16, BLOK=32)


# --- memory check -------------------------------------------------------------------------------


def test_accesses_inside_pass_the_memory_check():
    x, out = torch.randn(37), torch.zeros(37)
    with interp_check():
        _copy_kernel[(3,)](x, out, 37, BLOCK=16)
    assert torch.equal(x, out)


@pytest.mark.parametrize("which", ["load", "store"])
def test_accesses_past_the_end_are_caught(which):
    short, long = torch.randn(37), torch.zeros(40)
    args = (short, long) if which == "load" else (long, short)
    with (
        pytest.raises(MemoryCheckError, match=f"out of bounds {which}.*valid 0..36"),
        interp_check(),
    ):
        _copy_kernel[(3,)](*args, 40, BLOCK=16)


def test_accesses_past_a_view_inside_its_storage_are_caught():
    storage, out = torch.randn(64), torch.zeros(64)
    with pytest.raises(MemoryCheckError, match="out of bounds load"), interp_check():
        _copy_kernel[(4,)](storage[:60], out, 64, BLOCK=16)


@pytest.mark.parametrize(
    ("kernel", "args"),
    [(_same_cell_kernel, ()), (_read_neighbour_kernel, (8,))],
)
def test_races_are_caught(kernel, args):
    x = torch.zeros(8)
    with pytest.raises(MemoryCheckError, match="race"), interp_check():
        kernel[(8,)](x, *args)
    with interp_check(race=False):
        kernel[(8,)](x, *args)


def test_atomics_are_no_race():
    x, old = torch.zeros(1, dtype=BF16), torch.empty(8, dtype=BF16)
    with interp_check():
        _atomic_kernel[(8,)](x, old, 1.0)


def test_tensors_behind_a_table_of_addresses():
    tensors = [torch.zeros(20), torch.zeros(20)]
    table = torch.tensor([t.data_ptr() for t in tensors])
    with interp_check():
        _table_kernel[(2,)](table, 20, BLOCK=32)
    assert all(bool((t == 1).all()) for t in tensors)
    with pytest.raises(MemoryCheckError, match="of the table"), interp_check():
        _table_kernel[(2,)](table, 21, BLOCK=32)
    same = torch.tensor([tensors[0].data_ptr()] * 2)
    with pytest.raises(MemoryCheckError, match="race"), interp_check():
        _table_kernel[(2,)](same, 20, BLOCK=32)


# --- what is remembered of types ----------------------------------------------------------------


@triton.jit
def _constants_kernel(out_ptr, N: tl.constexpr):
    """The same number of several types, and blocks of one shape."""
    offs = tl.arange(0, N)
    small = tl.full([N], 200, tl.uint8)
    tl.store(out_ptr + offs, (small + small).to(tl.float32))  # wraps
    tl.store(out_ptr + N + offs, (small.to(tl.int32) + 200).to(tl.float32))
    wide = tl.full([N], 2049.0, tl.float32)
    tl.store(out_ptr + 2 * N + offs, wide.to(tl.float16) + 1.0)  # float16 rounds 2049 to 2048
    tl.store(out_ptr + 3 * N + offs, wide + 1)
    tl.store(out_ptr + 4 * N + offs, wide.to(tl.float16) + wide)  # in float32
    square = offs[:, None] + tl.zeros([N, N], tl.int32)
    tl.store(out_ptr + 5 * N + offs, tl.max(square, 1) + 0.5)


@triton.jit
def _fails_kernel(x_ptr):
    tl.load(x_ptr + tl.arange(0, 3))  # no power of two


def test_remembered_types_are_told_apart():
    for _ in range(2):  # the second finds everything remembered
        found = torch.full((6, 4), float("nan"))
        _constants_kernel[(1,)](found, 4)
        for row, want in zip(found, (144.0, 400.0, 2048.0, 2050.0, 4097.0), strict=False):
            assert torch.equal(row, torch.full((4,), want))
        assert found[5].tolist() == [0.5, 1.5, 2.5, 3.5]


def test_a_launch_gives_triton_its_own_functions_back():
    """The compiler of the same process must not meet what the interpreter put there."""
    with pytest.raises(interpreter.InterpreterError):
        _fails_kernel[(1,)](torch.zeros(4))
    _constants_kernel[(1,)](torch.zeros(24), 4)
    assert [key for key, stock in STOCK.items() if getattr(*key) is not stock] == []
