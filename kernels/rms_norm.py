r"""Root-mean-square normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).

Forward, for each row x of N numbers:

    rstd = 1 / sqrt(sum(x^2) / N + eps)        y = x * rstd * (weight_offset + weight)

Backward, with g = dy * (weight_offset + weight) and xhat = x * rstd:

    dx = rstd * (g - xhat * mean(g * xhat))        dweight = sum over rows of dy * xhat

Cost: the forward reads x and writes y once, the backward reads x and dy and writes dx: 2 and 3
times M * N elements, both bound by memory. Above WIDE columns a row no longer fits in registers:
it is read once more, for its statistics. Saved for the backward: x, and 4 bytes a row.
"""

import functools
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
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """Root-mean-square normalisation in eager PyTorch."""
    if weight is not None and weight_offset:  # in float32 at least: bfloat16 has few digits near 1
        weight = weight_offset + weight.to(torch.promote_types(weight.dtype, torch.float32))
        if weight.dtype != input.dtype:
            wide = torch.promote_types(weight.dtype, input.dtype)
            y = F.rms_norm(input.to(wide), list(normalized_shape), weight.to(wide), eps)
            return y.to(input.dtype)
    return F.rms_norm(input, list(normalized_shape), weight, eps)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _gain(weight_ptr, cols, mask, weight_offset):
    """What xhat is multiplied by, in float32."""
    return weight_offset + tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr,
    stride_xm, M, N, eps, weight_offset,
    HAS_WEIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalises BLOCK_M whole rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask_m = rows < M
    mask_n = cols < N
    mask = mask_m[:, None] & mask_n[None, :]

    x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / N + eps)

    y = x * rstd[:, None]
    if HAS_WEIGHT:
        y *= _gain(weight_ptr, cols, mask_n, weight_offset)[None, :]

    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)


@triton.jit
def _forward_wide_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr,
    stride_xm, N, eps, weight_offset,
    HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalises one row, a block of columns at a time."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    y_ptr += row * N

    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last")
        x = x.to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares) / N + eps)

    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < N
        x = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first")
        y = x.to(tl.float32) * rstd
        if HAS_WEIGHT:
            y *= _gain(weight_ptr, cols, mask, weight_offset)
        tl.store(y_ptr + cols, y, mask=mask)

    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr,
    stride_dym, stride_xm, M, N, weight_offset,
    HAS_WEIGHT: tl.constexpr, WANTS_DX: tl.constexpr, WANTS_DWEIGHT: tl.constexpr,
    READS_TWICE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes every num_programs-th tile of rows, and sums its part of dweight.

    READS_TWICE: dweight alone stays in registers; a row comes again from the cache for its dx.
    """
    program = tl.program_id(0).to(tl.int64)  # row offsets can pass 2^31
    cols = tl.arange(0, BLOCK_N)
    mask_n = cols < N

    if HAS_WEIGHT and not READS_TWICE:
        weight = _gain(weight_ptr, cols, mask_n, weight_offset)[None, :]
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = rows < M
        mask = mask_m[:, None] & mask_n[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + cols[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)[:, None]
        if WANTS_DX:
            g = dy
            if HAS_WEIGHT:
                if READS_TWICE:
                    g *= _gain(weight_ptr, cols, mask_n, weight_offset)[None, :]
                else:
                    g *= weight
            mean_gx = tl.sum(g * x, 1)[:, None] * rstd / N
            if READS_TWICE:
                tl.debug_barrier()  # past it the compiler cannot know that memory is the same
                x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
                dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
                g = dy
                if HAS_WEIGHT:
                    g *= _gain(weight_ptr, cols, mask_n, weight_offset)[None, :]
            dx = rstd * (g - x * rstd * mean_gx)
            tl.store(dx_ptr + rows[:, None] * N + cols[None, :], dx, mask=mask)
        if WANTS_DWEIGHT:
            dweight += dy * (x * rstd)

    if WANTS_DWEIGHT:
        tl.store(dweight_ptr + program * N + cols, tl.sum(dweight, 0), mask=mask_n)


@triton.jit
def _row_means_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, mean_gx_ptr,
    stride_dym, stride_xm, N, weight_offset,
    HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of one wide row: the mean that dx needs."""
    row = tl.program_id(0).to(tl.int64)
    sum_gx = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < N
        x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + row * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= _gain(weight_ptr, cols, mask, weight_offset)
        sum_gx += g * x
    tl.store(mean_gx_ptr + row, tl.sum(sum_gx) * tl.load(rstd_ptr + row) / N)


@triton.jit
def _backward_wide_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, mean_gx_ptr, dx_ptr, dweight_ptr,
    stride_dym, stride_xm, M, N, weight_offset,
    HAS_WEIGHT: tl.constexpr, WANTS_DX: tl.constexpr, WANTS_DWEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As _backward_kernel over one block of columns, the row means known."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N

    if HAS_WEIGHT:
        weight = _gain(weight_ptr, cols, mask, weight_offset)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    for row in range(program, M, tl.num_programs(0)):
        x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = x * rstd
        if WANTS_DX:
            g = dy * weight if HAS_WEIGHT else dy
            dx = rstd * (g - xhat * tl.load(mean_gx_ptr + row))
            tl.store(dx_ptr + row * N + cols, dx, mask=mask)
        if WANTS_DWEIGHT:
            dweight += dy * xhat

    if WANTS_DWEIGHT:
        tl.store(dweight_ptr + program * N + cols, dweight, mask=mask)


# --- launch -------------------------------------------------------------------------------------


def _forward_fake(
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rstd = input.new_empty(input.shape[: input.dim() - len(shape)], dtype=torch.float32)
    return input.new_empty(input.shape, dtype=dtype), rstd


def _backward_fake(
    dy: Tensor,
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    dx, dweight = (
        t.new_empty(t.shape) if t is not None and w else input.new_empty(0)
        for t, w in zip((input, weight), wanted, strict=True)
    )
    return dx, dweight


@torch_op("rms_norm_backward", fake=_backward_fake)
def _backward(
    dy: Tensor,
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    dx, dweight = _backward_fake(dy, input, shape, weight, rstd, weight_offset, wanted)
    M, N = rstd.numel(), math.prod(shape)
    if M == 0 or N == 0:
        return dx.zero_(), dweight.zero_()
    x, dy = rows_of(input, N), rows_of(dy, N)
    tile, per_multiprocessor = backward_tile(N)
    wants_dx, wants_dweight = wanted
    programs = min(triton.cdiv(M, tile["BLOCK_M"]), per_multiprocessor * multiprocessors(x.device))
    parts = x.new_empty(programs, N, dtype=torch.float32) if wants_dweight else None
    flags = {
        "HAS_WEIGHT": weight is not None,
        "WANTS_DX": wants_dx,
        "WANTS_DWEIGHT": wants_dweight,
    }
    reads_twice = N > WIDE_BACKWARD
    # Past these, and with a mask for every element, it would spill.
    fits = N <= 2 * WIDE_BACKWARD and N % 16 == 0
    fits &= all(t.itemsize == 2 for t in (x, dy, weight) if t is not None)
    if not reads_twice or fits:
        if reads_twice:
            tile["num_warps"] = 32
        _backward_kernel[(programs,)](
            dy, x, weight, rstd, dx, parts,
            dy.stride(0), x.stride(0), M, N, weight_offset,
            READS_TWICE=reads_twice, **flags, **tile,
        )  # fmt: skip
    else:
        mean_gx = torch.empty_like(rstd)
        if wants_dx:
            _row_means_kernel[(M,)](
                dy, x, weight, rstd, mean_gx,
                dy.stride(0), x.stride(0), N, weight_offset,
                HAS_WEIGHT=weight is not None, BLOCK_N=4096, num_warps=8,
            )  # fmt: skip
        _backward_wide_kernel[(programs, triton.cdiv(N, 2048))](
            dy, x, weight, rstd, mean_gx, dx, parts,
            dy.stride(0), x.stride(0), M, N, weight_offset,
            **flags, BLOCK_N=2048, num_warps=8,
        )  # fmt: skip
    if wants_dweight:
        sum_parts(parts, None, dweight, None)
    return dx, dweight


def _save(ctx, inputs, output):
    input, ctx.shape, weight, ctx.eps, ctx.weight_offset, _ = inputs
    ctx.save_for_backward(input, weight, output[1])


def _gradients(ctx, dy, _drstd):
    input, weight, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        inputs = (input, ctx.shape, weight, ctx.eps)
        op = functools.partial(reference, weight_offset=ctx.weight_offset)
        return *eager_gradients(op, inputs, (dy,)), None, None
    wanted = [ctx.needs_input_grad[i] for i in (0, 2)]
    grads = _backward(dy, input, ctx.shape, weight, rstd, ctx.weight_offset, wanted)
    dx, dweight = (g if w else None for g, w in zip(grads, wanted, strict=True))
    return dx, None, dweight, None, None, None


@torch_op("rms_norm", fake=_forward_fake, setup_context=_save, backward=_gradients)
def _forward(
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y, rstd = _forward_fake(input, shape, weight, eps, weight_offset, dtype)
    M, N = rstd.numel(), math.prod(shape)
    if M == 0 or N == 0:
        return y, rstd
    x = rows_of(input, N)
    if N <= WIDE:
        tile = row_tile(N)
        if N > WIDE // 2 and x.itemsize == 4:
            tile["num_warps"] = 32  # 16 spill on sm_80 (Triton 3.7.1)
        _forward_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
            x, weight, y, rstd,
            x.stride(0), M, N, eps, weight_offset,
            HAS_WEIGHT=weight is not None, **tile,
        )  # fmt: skip
    else:
        _forward_wide_kernel[(M,)](
            x, weight, y, rstd,
            x.stride(0), N, eps, weight_offset,
            HAS_WEIGHT=weight is not None, BLOCK_N=4096, num_warps=8,
        )  # fmt: skip
    return y, rstd


# --- public -------------------------------------------------------------------------------------

EPS = torch.finfo(torch.float32).eps  # PyTorch's default for half precision too
# whether autocast makes it float32: not in torch 2.11
_WIDENED = torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")


def _uncovered(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> str | None:
    return uncovered_norm(OP.dtypes, normalized_shape, input, weight=weight)


@dispatched(eager=reference, uncovered=_uncovered)
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """Divides by the root mean square of the trailing dimensions; drop-in for ``F.rms_norm``.

    Args:
        input: (..., *normalized_shape) float32, float16 or bfloat16; any strides, any width.
        normalized_shape: The trailing dimensions that share a mean square.
        weight: ``normalized_shape``, any of the dtypes; None multiplies by 1.
        eps: Added to the mean square. None is 2^-23, float32's, whatever the dtype, as PyTorch.
        weight_offset: Added to ``weight`` in float32; 1 for models that keep weight - 1 (Gemma).

    Returns:
        The shape and dtype of ``input``; float32 under CUDA autocast, where PyTorch does so (not in
        2.11). Statistics are float32. Gradients are the same to the bit from run to run.

    Raises:
        RuntimeError: What ``F.rms_norm`` raises, for shapes that do not fit.
    """
    widened = _WIDENED and input.is_cuda and torch.is_autocast_enabled("cuda")
    dtype = torch.float32 if widened else input.dtype
    weight = None if weight is None else weight.contiguous()
    eps = EPS if eps is None else float(eps)
    return _forward(input, list(normalized_shape), weight, eps, float(weight_offset), dtype)[0]


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` over the fused ``rms_norm``: the same arguments and state_dict.

    Args:
        normalized_shape: The trailing dimensions that share a mean square.
        eps: Added to the mean square; None is float32's epsilon.
        elementwise_affine: Whether there is a weight.
        weight_offset: Added to the weight, which then starts at 1 - weight_offset.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = weight_offset
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        """Makes the module multiply by 1."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last ``len(normalized_shape)`` dimensions of ``x``."""
        return rms_norm(
            x, self.normalized_shape, self.weight, self.eps, weight_offset=self.weight_offset
        )

    def extra_repr(self) -> str:
        """PyTorch's, and the offset where there is one."""
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return super().extra_repr() + offset


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    M: int,
    N: int,
    weight: torch.dtype | bool = True,
    weight_offset: float = 0.0,
) -> Inputs:
    x = 3 * torch.randn(M, N, dtype=dtype, device=device) + 1
    inputs: Inputs = {"input": x.requires_grad_(), "normalized_shape": (N,)}
    if weight:
        kind = dtype if weight is True else weight
        inputs["weight"] = torch.randn(N, dtype=kind, device=device).requires_grad_()
    return inputs | {"eps": 1e-6, "weight_offset": weight_offset}


OP = Op(
    fused=rms_norm,
    reference=reference,
    example=_example,
    sizes=(
        {"M": 1, "N": 1},
        {"M": 13, "N": 1000},
        {"M": 70, "N": 64, "weight_offset": 1.0},
        {"M": 3, "N": 129, "weight": False},
        {"M": 4, "N": 768, "weight": torch.float32},
        {"M": 2, "N": 8208},
        {"M": 1, "N": 16400},
    ),
    bench_sizes=(
        {"M": 2**20, "N": 128},  # the heads of queries
        *({"M": 8192, "N": 2**k} for k in range(10, 15)),
        {"M": 2048, "N": 65536},
    ),
    work=lambda input, weight=None, **_: (
        2 * input.nbytes + (0 if weight is None else weight.nbytes),
        4 * input.numel(),
    ),
)
