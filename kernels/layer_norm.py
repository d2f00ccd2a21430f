r"""Layer normalisation (Ba et al. 2016, https://arxiv.org/abs/1607.06450).

Forward, for each row x of N numbers:

    mean = sum(x) / N        rstd = 1 / sqrt(sum((x - mean)^2) / N + eps)
    xhat = (x - mean) * rstd        y = xhat * weight + bias

Backward, with g = dy * weight:

    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
    dweight = sum over rows of dy * xhat        dbias = sum over rows of dy

Cost: the forward reads x and writes y once, the backward reads x and dy and writes dx: 2 and 3
times M * N elements, both bound by memory. Above WIDE columns a row no longer fits in registers:
it is read once more, for its statistics. Saved for the backward: x, and 8 bytes a row.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ._dispatch import dispatched
from ._launch import multiprocessors, rows_of
from ._op import Inputs, Op
from ._register import eager_gradients, torch_op
from ._rows import WIDE, WIDE_BACKWARD, backward_tile, row_tile, sum_parts, uncovered_norm


def reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation in eager PyTorch."""
    return F.layer_norm(input, list(normalized_shape), weight, bias, eps)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    stride_xm, M, N, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalises BLOCK_M whole rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask_m = rows < M
    mask_n = cols < N
    mask = mask_m[:, None] & mask_n[None, :]

    x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / N
    centred = tl.where(mask, x - mean[:, None], 0.0)  # padding must not enter the variance
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)

    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]

    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=mask)
    tl.store(mean_ptr + rows, mean, mask=mask_m)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)


@triton.jit
def _forward_wide_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    stride_xm, N, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalises one row, a block of columns at a time."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    y_ptr += row * N

    # Each block has its own mean and squared deviations; they merge exactly (Chan et al. 1979).
    mean = 0.0
    deviations = 0.0
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < N
        x = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_last")
        x = x.to(tl.float32)
        size = tl.minimum(N - start, BLOCK_N)
        block_mean = tl.sum(x) / size
        centred = tl.where(mask, x - block_mean, 0.0)
        delta = block_mean - mean
        share = size / (start + size)
        mean += delta * share
        deviations += tl.sum(centred * centred) + delta * delta * share * start
    rstd = tl.rsqrt(deviations / N + eps)

    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < N
        x = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first")
        y = (x.to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + cols, y, mask=mask)

    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_dym, stride_xm, M, N,
    HAS_WEIGHT: tl.constexpr, WANTS_DX: tl.constexpr, WANTS_PARAMETERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes every num_programs-th tile of rows, and sums its part of the parameters'."""
    program = tl.program_id(0).to(tl.int64)  # row offsets can pass 2^31
    cols = tl.arange(0, BLOCK_N)
    mask_n = cols < N

    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = rows < M
        mask = mask_m[:, None] & mask_n[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + cols[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
        xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)

        if WANTS_DX:
            g = dy * weight if HAS_WEIGHT else dy
            mean_g = tl.sum(g, 1) / N
            mean_gx = tl.sum(g * xhat, 1) / N
            dx = rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])
            tl.store(dx_ptr + rows[:, None] * N + cols[None, :], dx, mask=mask)
        if WANTS_PARAMETERS:
            dweight += dy * xhat
            dbias += dy

    if WANTS_PARAMETERS:
        tl.store(dweight_ptr + program * N + cols, tl.sum(dweight, 0), mask=mask_n)
        tl.store(dbias_ptr + program * N + cols, tl.sum(dbias, 0), mask=mask_n)


@triton.jit
def _row_means_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr,
    stride_dym, stride_xm, N,
    HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of one wide row: the two means that dx needs."""
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    sum_g = tl.zeros([BLOCK_N], tl.float32)
    sum_gx = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < N
        x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + row * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += g * tl.where(mask, (x - mean) * rstd, 0.0)
    tl.store(mean_g_ptr + row, tl.sum(sum_g) / N)
    tl.store(mean_gx_ptr + row, tl.sum(sum_gx) / N)


@triton.jit
def _backward_wide_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr,
    dx_ptr, dweight_ptr, dbias_ptr,
    stride_dym, stride_xm, M, N,
    HAS_WEIGHT: tl.constexpr, WANTS_DX: tl.constexpr, WANTS_PARAMETERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As _backward_kernel over one block of columns, the row means known."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N

    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    for row in range(program, M, tl.num_programs(0)):
        x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = (x - tl.load(mean_ptr + row)) * rstd
        if WANTS_DX:
            g = dy * weight if HAS_WEIGHT else dy
            mean_g = tl.load(mean_g_ptr + row)
            dx = rstd * (g - mean_g - xhat * tl.load(mean_gx_ptr + row))
            tl.store(dx_ptr + row * N + cols, dx, mask=mask)
        if WANTS_PARAMETERS:
            dweight += dy * xhat
            dbias += dy

    if WANTS_PARAMETERS:
        tl.store(dweight_ptr + program * N + cols, dweight, mask=mask)
        tl.store(dbias_ptr + program * N + cols, dbias, mask=mask)


# --- launch -------------------------------------------------------------------------------------


def _forward_fake(
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = input.new_empty(input.shape[: input.dim() - len(shape)], dtype=torch.float32)
    return input.new_empty(input.shape, dtype=dtype), stats, torch.empty_like(stats)


def _backward_fake(
    dy: Tensor,
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = (
        t.new_empty(t.shape) if t is not None and w else input.new_empty(0)
        for t, w in zip((input, weight, bias), wanted, strict=True)
    )
    return dx, dweight, dbias


@torch_op("layer_norm_backward", fake=_backward_fake)
def _backward(
    dy: Tensor,
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _backward_fake(dy, input, shape, weight, bias, mean, rstd, wanted)
    M, N = mean.numel(), math.prod(shape)
    if M == 0 or N == 0:
        return dx.zero_(), dweight.zero_(), dbias.zero_()
    x, dy = rows_of(input, N), rows_of(dy, N)
    tile, per_multiprocessor = backward_tile(N)
    wants_dx, wants_parameters = wanted[0], wanted[1] or wanted[2]
    programs = min(triton.cdiv(M, tile["BLOCK_M"]), per_multiprocessor * multiprocessors(x.device))
    parts = [
        x.new_empty(programs, N, dtype=torch.float32) if wants_parameters else None
        for _ in range(2)
    ]
    if N <= WIDE_BACKWARD:
        _backward_kernel[(programs,)](
            dy, x, weight, mean, rstd, dx, *parts,
            dy.stride(0), x.stride(0), M, N,
            HAS_WEIGHT=weight is not None, WANTS_DX=wants_dx, WANTS_PARAMETERS=wants_parameters,
            **tile,
        )  # fmt: skip
    else:
        mean_g, mean_gx = torch.empty_like(mean), torch.empty_like(mean)
        if wants_dx:
            _row_means_kernel[(M,)](
                dy, x, weight, mean, rstd, mean_g, mean_gx,
                dy.stride(0), x.stride(0), N,
                HAS_WEIGHT=weight is not None, BLOCK_N=4096, num_warps=8,
            )  # fmt: skip
        blocks = triton.cdiv(N, 2048)
        _backward_wide_kernel[(programs, blocks)](
            dy, x, weight, mean, rstd, mean_g, mean_gx,
            dx, *parts,
            dy.stride(0), x.stride(0), M, N,
            HAS_WEIGHT=weight is not None, WANTS_DX=wants_dx, WANTS_PARAMETERS=wants_parameters,
            BLOCK_N=2048, num_warps=8,
        )  # fmt: skip
    if wants_parameters:
        sum_parts(parts[0], parts[1], dweight if wanted[1] else None, dbias if wanted[2] else None)
    return dx, dweight, dbias


def _save(ctx, inputs, output):
    input, ctx.shape, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(input, weight, bias, *output[1:])


def _gradients(ctx, dy, _dmean, _drstd):
    input, weight, bias, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        inputs = (input, ctx.shape, weight, bias, ctx.eps)
        return *eager_gradients(F.layer_norm, inputs, (dy,)), None
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    grads = _backward(dy, input, ctx.shape, weight, bias, mean, rstd, wanted)
    dx, dweight, dbias = (g if w else None for g, w in zip(grads, wanted, strict=True))
    return dx, None, dweight, dbias, None, None


@torch_op("layer_norm", fake=_forward_fake, setup_context=_save, backward=_gradients)
def _forward(
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_fake(input, shape, weight, bias, eps, dtype)
    M, N = mean.numel(), math.prod(shape)
    if M == 0 or N == 0:
        return y, mean, rstd
    x = rows_of(input, N)
    flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    if N <= WIDE:
        tile = row_tile(N)
        if N > WIDE // 2:
            tile["num_warps"] = 32  # half the registers: modelled 201 us on sm_90 against 222
        _forward_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
            x, weight, bias, y, mean, rstd,
            x.stride(0), M, N, eps,
            **flags, **tile,
        )  # fmt: skip
    else:
        _forward_wide_kernel[(M,)](
            x, weight, bias, y, mean, rstd,
            x.stride(0), N, eps,
            **flags, BLOCK_N=4096, num_warps=8,
        )  # fmt: skip
    return y, mean, rstd


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> str | None:
    return uncovered_norm(OP.dtypes, normalized_shape, input, weight=weight, bias=bias)


@dispatched(eager=F.layer_norm, uncovered=_uncovered)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalises the trailing dimensions of ``input``; drop-in for ``F.layer_norm``.

    Args:
        input: (..., *normalized_shape) float32, float16 or bfloat16; any strides, any width.
        normalized_shape: The trailing dimensions that share a mean and a variance.
        weight: ``normalized_shape``, any of the dtypes; None multiplies by 1.
        bias: ``normalized_shape``, any of the dtypes; None adds 0.
        eps: Added to the variance.

    Returns:
        The shape and dtype of ``input``; float32 under CUDA autocast, as PyTorch. Statistics are
        float32 and taken in two passes. Gradients are the same to the bit from run to run.

    Raises:
        RuntimeError: What ``F.layer_norm`` raises, for shapes that do not fit.
    """
    dtype = torch.float32 if torch.is_autocast_enabled("cuda") and input.is_cuda else input.dtype
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return _forward(input, list(normalized_shape), weight, bias, float(eps), dtype)[0]


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the fused ``layer_norm``: the same arguments and state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises the last ``len(normalized_shape)`` dimensions of ``input``."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    M: int,
    N: int,
    weight: torch.dtype | bool = True,
    bias: torch.dtype | bool = True,
) -> Inputs:
    x = 3 * torch.randn(M, N, dtype=dtype, device=device) + 1  # a mean far from 0
    inputs: Inputs = {"input": x.requires_grad_(), "normalized_shape": (N,)}
    for name, wanted in (("weight", weight), ("bias", bias)):
        if wanted:
            kind = dtype if wanted is True else wanted
            inputs[name] = torch.randn(N, dtype=kind, device=device).requires_grad_()
    return inputs


OP = Op(
    fused=layer_norm,
    reference=reference,
    example=_example,
    sizes=(
        {"M": 1, "N": 1},
        {"M": 13, "N": 1000},
        {"M": 37, "N": 64, "bias": False},
        {"M": 3, "N": 129, "weight": False},
        {"M": 2, "N": 48, "weight": False, "bias": False},
        {"M": 4, "N": 768, "weight": torch.float32, "bias": torch.float32},
        {"M": 2, "N": 8200},
        {"M": 3, "N": 16400},
    ),
    bench_sizes=(*({"M": 8192, "N": 2**k} for k in range(9, 15)), {"M": 2048, "N": 65536}),
    work=lambda input, weight=None, bias=None, **_: (
        2 * input.nbytes + sum(t.nbytes for t in (weight, bias) if t is not None),
        8 * input.numel(),
    ),
)
