r"""Softmax and its logarithm along any dimension.

Forward, over the N numbers x of a row, with m = max(x) and d = sum(exp(x - m)):

    softmax: y = exp(x - m) / d        log_softmax: y = x - m - log(d)

Backward, from the output alone:

    softmax: dx = y * (dy - sum(dy * y))        log_softmax: dx = dy - exp(y) * sum(dy)

Cost: the forward reads x and writes y once, the backward reads y and dy and writes dx: 2 and 3
elements each, both bound by memory. A row past _WIDE or _WIDE_BACKWARD columns is read once more:
its maximum and sum come from an online pass (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867). Saved for the backward: y, and nothing else.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import dispatched
from ._launch import rows_of
from ._maths import exp
from ._op import Inputs, Op
from ._register import torch_op
from ._rows import row_tile


def softmax_reference(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax in eager PyTorch."""
    return torch.softmax(input, dim, dtype=dtype)


def log_softmax_reference(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """Logarithm of the softmax in eager PyTorch."""
    return torch.log_softmax(input, dim, dtype=dtype)


# --- kernels ------------------------------------------------------------------------------------
# A row runs along the dimension; M of them lie stride_m apart in each of the outer groups, which
# lie stride_o apart. Along the last dimension there is one group, and stride_n is 1.


@triton.jit
def _tile_rows(M, BLOCK_M: tl.constexpr):
    """The program's group, its rows in there, and which of those there are."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(M, BLOCK_M)
    rows = (program % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    return program // tiles, rows[:, None], rows[:, None] < M


@triton.jit
def _load_float(ptrs, mask, other, dtype: tl.constexpr):
    """Numbers as float32, by way of the dtype that PyTorch would cast them to first."""
    return tl.load(ptrs, mask=mask, other=other).to(dtype).to(tl.float32)


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr,
    stride_xo, stride_xm, stride_xn, stride_yo, stride_ym, stride_yn, M, N,
    LOG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_M whole rows."""
    outer, rows, mask_m = _tile_rows(M, BLOCK_M)
    cols = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    mask = mask_m & (cols < N)
    x_ptrs = x_ptr + outer * stride_xo + rows * stride_xm + cols * stride_xn
    y_ptrs = y_ptr + outer * stride_yo + rows * stride_ym + cols * stride_yn

    x = _load_float(x_ptrs, mask, float("-inf"), y_ptr.dtype.element_ty)
    x -= tl.max(x, 1)[:, None]
    e = exp(x)
    d = tl.sum(e, 1)[:, None]
    if LOG:
        y = x - tl.log(d)
    else:
        y = e * (1.0 / d)
    tl.store(y_ptrs, y, mask=mask)


@triton.jit
def _forward_wide_kernel(
    x_ptr, y_ptr,
    stride_xo, stride_xm, stride_xn, stride_yo, stride_ym, stride_yn, M, N,
    LOG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_M rows, a block of columns at a time."""
    outer, rows, mask_m = _tile_rows(M, BLOCK_M)
    x_ptrs = x_ptr + outer * stride_xo + rows * stride_xm
    y_ptrs = y_ptr + outer * stride_yo + rows * stride_ym

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    d = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        mask = mask_m & (cols < N)
        x = _load_float(x_ptrs + cols * stride_xn, mask, float("-inf"), y_ptr.dtype.element_ty)
        new_m = tl.maximum(m, tl.max(x, 1))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)  # -inf less -inf would be NaN
        d = d * exp(m - shift) + tl.sum(exp(x - shift[:, None]), 1)
        m = new_m
    m = tl.where(m == float("-inf"), 0.0, m)[:, None]
    d = d[:, None]
    for start in range(0, N, BLOCK_N):
        cols = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        mask = mask_m & (cols < N)
        x = _load_float(x_ptrs + cols * stride_xn, mask, float("-inf"), y_ptr.dtype.element_ty)
        if LOG:
            y = x - m - tl.log(d)
        else:
            y = exp(x - m) * (1.0 / d)
        tl.store(y_ptrs + cols * stride_yn, y, mask=mask)


@triton.jit
def _gradient(dy, y, total, LOG: tl.constexpr):
    """Dx, where total sums dy * y, or dy under LOG."""
    if LOG:
        return dy - exp(y) * total
    else:
        return y * (dy - total)


@triton.jit
def _backward_kernel(
    dy_ptr, y_ptr, dx_ptr,
    stride_dyo, stride_dym, stride_dyn, stride_yo, stride_ym, stride_yn, M, N,
    LOG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_M whole rows."""
    outer, rows, mask_m = _tile_rows(M, BLOCK_M)
    cols = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    mask = mask_m & (cols < N)
    dy_ptrs = dy_ptr + outer * stride_dyo + rows * stride_dym + cols * stride_dyn
    offsets = outer * stride_yo + rows * stride_ym + cols * stride_yn

    dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(dy if LOG else dy * y, 1)[:, None]
    tl.store(dx_ptr + offsets, _gradient(dy, y, total, LOG), mask=mask)


@triton.jit
def _backward_wide_kernel(
    dy_ptr, y_ptr, dx_ptr,
    stride_dyo, stride_dym, stride_dyn, stride_yo, stride_ym, stride_yn, M, N,
    LOG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_M rows, a block of columns at a time."""
    outer, rows, mask_m = _tile_rows(M, BLOCK_M)
    dy_ptrs = dy_ptr + outer * stride_dyo + rows * stride_dym
    offsets = outer * stride_yo + rows * stride_ym

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        mask = mask_m & (cols < N)
        dy = tl.load(dy_ptrs + cols * stride_dyn, mask=mask, other=0.0).to(tl.float32)
        if LOG:
            total += dy
        else:
            y_ptrs = y_ptr + offsets + cols * stride_yn
            total += dy * tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(total, 1)[:, None]
    for start in range(0, N, BLOCK_N):
        cols = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        mask = mask_m & (cols < N)
        dy = tl.load(dy_ptrs + cols * stride_dyn, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offsets + cols * stride_yn, mask=mask, other=0.0).to(tl.float32)
        dx = _gradient(dy, y, total, LOG)
        tl.store(dx_ptr + offsets + cols * stride_yn, dx, mask=mask)


# --- launch -------------------------------------------------------------------------------------

_WIDE = 32768  # columns past which a forward row is read in blocks; unmeasured
_WIDE_BACKWARD = 16384  # the same of the backward, which keeps two rows; unmeasured


def _tile(M: int, N: int, last: bool, wide: int) -> tuple[dict[str, int], bool]:
    """A tile, and whether it holds whole rows. Rows side by side are read 32 or more at a time."""
    block_n = triton.next_power_of_2(N)
    if last:
        if wide >= N:
            tile = row_tile(N)
            return tile | {"num_warps": 32 if N > 16384 else tile["num_warps"]}, True
        return {"BLOCK_M": 1, "BLOCK_N": 4096, "num_warps": 8}, False
    block_m = min(triton.next_power_of_2(M), max(32, 4096 // block_n))
    if block_m * block_n <= 8192:
        return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 8}, True
    block_m = min(block_m, 64)
    return {"BLOCK_M": block_m, "BLOCK_N": 4096 // block_m, "num_warps": 8}, False


def _rows(x: Tensor, dim: int) -> tuple[Tensor, tuple[int, int, int], tuple[int, int, int]]:
    """``x`` (a copy where it must be), its groups, rows a group and columns, and their strides."""
    N, inner = x.shape[dim], math.prod(x.shape[dim + 1 :])
    if inner == 1:
        x = rows_of(x, N)
        return x, (1, x.shape[0], N), (0, x.stride(0), 1)
    x = x.contiguous()
    return x, (x.numel() // (N * inner), inner, N), (N * inner, 1, inner)


def _forward_fake(input: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    return input.new_empty(input.shape, dtype=dtype)


def _backward_fake(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    return y.new_empty(y.shape, dtype=dtype)


@torch_op("softmax_backward", fake=_backward_fake)
def _backward(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    dx = _backward_fake(dy, y, dim, dtype, log)
    if y.numel() == 0:
        return dx
    dy, _, dy_strides = _rows(dy, dim)
    y, (groups, M, N), y_strides = _rows(y, dim)
    tile, whole = _tile(M, N, y_strides[2] == 1, _WIDE_BACKWARD)
    kernel = _backward_kernel if whole else _backward_wide_kernel
    kernel[(groups * triton.cdiv(M, tile["BLOCK_M"]),)](
        dy, y, dx,
        *dy_strides, *y_strides, M, N,
        LOG=log, **tile,
    )  # fmt: skip
    return dx


def _save(ctx, inputs, output):
    input, ctx.dim, _, ctx.log = inputs
    ctx.dtype = input.dtype
    ctx.save_for_backward(output)


def _gradients(ctx, dy):
    (y,) = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return _backward(dy, y, ctx.dim, ctx.dtype, ctx.log), None, None, None
    y, dy = y.float(), dy.float()  # create_graph=True: y leads back to the input
    if ctx.log:
        dx = dy - y.exp() * dy.sum(ctx.dim, keepdim=True)
    else:
        dx = y * (dy - (dy * y).sum(ctx.dim, keepdim=True))
    return dx.to(ctx.dtype), None, None, None


@torch_op("softmax", fake=_forward_fake, setup_context=_save, backward=_gradients)
def _forward(input: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    y = _forward_fake(input, dim, dtype, log)
    if y.numel() == 0:
        return y
    x, (groups, M, N), x_strides = _rows(input, dim)
    _, _, y_strides = _rows(y, dim)
    tile, whole = _tile(M, N, x_strides[2] == 1, _WIDE)
    kernel = _forward_kernel if whole else _forward_wide_kernel
    kernel[(groups * triton.cdiv(M, tile["BLOCK_M"]),)](
        x, y,
        *x_strides, *y_strides, M, N,
        LOG=log, **tile,
    )  # fmt: skip
    return y


# --- public -------------------------------------------------------------------------------------


def _uncovered(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> str | None:
    for name, kind in (("input", input.dtype), ("dtype", dtype or input.dtype)):
        if kind not in OPS[0].dtypes:
            return f"{name} is {kind}"
    if not -input.dim() <= dim < input.dim():
        return f"dim {dim} is not a dimension of an input of shape {tuple(input.shape)}"
    return None


def _fused(input: Tensor, dim: int, dtype: torch.dtype | None, log: bool) -> Tensor:
    if dtype is None:
        autocast = torch.is_autocast_enabled("cuda") and input.is_cuda
        dtype = torch.float32 if autocast else input.dtype
    return _forward(input, dim % input.dim(), dtype, log)


@dispatched(eager=softmax_reference, uncovered=_uncovered)
def softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """``exp(input) / sum(exp(input))`` along ``dim``; drop-in for ``torch.softmax``.

    Args:
        input: Any shape, float32, float16 or bfloat16; any strides, any width.
        dim: The dimension whose numbers sum to 1.
        dtype: Cast to first, as PyTorch; default that of ``input``.

    Returns:
        The shape of ``input``; float32 under CUDA autocast where ``dtype`` is None, as PyTorch. The
        arithmetic is float32. -inf gives 0; a row of nothing else gives NaN, as PyTorch.

    Raises:
        IndexError: ``dim`` is not a dimension of ``input``.
    """
    return _fused(input, dim, dtype, log=False)


@dispatched(eager=log_softmax_reference, uncovered=_uncovered)
def log_softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """``log(softmax(input, dim))`` without overflow; drop-in for ``torch.log_softmax``.

    Args:
        input: Any shape, float32, float16 or bfloat16; any strides, any width.
        dim: The dimension whose exponentials sum to 1.
        dtype: Cast to first, as PyTorch; default that of ``input``.

    Returns:
        The shape of ``input``; float32 under CUDA autocast where ``dtype`` is None, as PyTorch.

    Raises:
        IndexError: ``dim`` is not a dimension of ``input``.
    """
    return _fused(input, dim, dtype, log=True)


# --- declaration --------------------------------------------------------------------------------


def _example(dtype: torch.dtype, device: torch.device, M: int, N: int, dim: int = -1) -> Inputs:
    x = 3 * torch.randn(M, N, dtype=dtype, device=device)
    return {"input": x.requires_grad_(), "dim": dim}


_SIZES = (
    {"M": 1, "N": 1},
    {"M": 13, "N": 1000},
    {"M": 37, "N": 66, "dim": 0},
    {"M": 2100, "N": 5, "dim": 0},
    {"M": 1, "N": 33000},
)
_BENCH_SIZES = (
    *({"M": 8192, "N": 2**k} for k in (8, 10, 12, 14)),
    {"M": 4096, "N": 32768},
    {"M": 2048, "N": 131072},
    {"M": 512, "N": 65536, "dim": 0},
)
_op = functools.partial(
    Op,
    example=_example,
    sizes=_SIZES,
    bench_sizes=_BENCH_SIZES,
    work=lambda input, **_: (2 * input.nbytes, 5 * input.numel()),
)

OPS = (
    _op(fused=softmax, reference=softmax_reference),
    _op(fused=log_softmax, reference=log_softmax_reference),
)
