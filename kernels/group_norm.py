r"""Group normalisation (Wu and He 2018, https://arxiv.org/abs/1803.08494).

A row is the W numbers of one sample's group of channels, S of each. Forward, for each row x:

    mean = sum(x) / W        rstd = 1 / sqrt(sum((x - mean)^2) / W + eps)
    xhat = (x - mean) * rstd        y = xhat * weight[channel] + bias[channel]

Backward, from the sums of each sample's channel, db = sum(dy) and dw = sum(dy * xhat):

    mean_g = sum(weight * db) / W        mean_gx = sum(weight * dw) / W
    dx = rstd * (dy * weight - mean_g - xhat * mean_gx)
    dweight = sum over samples of dw        dbias = sum over samples of db

Cost: the forward reads x and writes y once, the backward reads x and dy once and writes dx; above
WIDE numbers a row, WIDE_BACKWARD in the backward, what is read is read once more. Bound by memory.
Saved for the backward: x, and 8 bytes a row.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ._dispatch import dispatched
from ._op import Inputs, Op
from ._register import eager_gradients, torch_op
from ._rows import WIDE, WIDE_BACKWARD, sum_parts


def reference(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group normalisation in eager PyTorch."""
    return F.group_norm(input, num_groups, weight, bias, eps)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _affine(xhat, weight_ptr, bias_ptr, channels, mask):
    """Each row of xhat times its channel's weight, plus its bias, where there are such."""
    if weight_ptr is not None:
        xhat *= tl.load(weight_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        xhat += tl.load(bias_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    return xhat


@triton.jit
def _tile_of_a_row(W, S, CHANNELS, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """The program's row, its channels within the group, and where their numbers lie."""
    row = tl.program_id(0).to(tl.int64)
    members = tl.arange(0, BLOCK_C)[:, None]
    cols = tl.arange(0, BLOCK_S)[None, :]
    mask_c = members < CHANNELS
    return row, members, mask_c, mask_c & (cols < S), row * W + members * S + cols


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    W, S, GROUPS, CHANNELS, eps,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program normalises one row, as a tile of its channels."""
    row, members, mask_c, mask, offsets = _tile_of_a_row(W, S, CHANNELS, BLOCK_C, BLOCK_S)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x) / W
    centred = tl.where(mask, x - mean, 0.0)  # padding must not enter the variance
    rstd = tl.rsqrt(tl.sum(centred * centred) / W + eps)
    channels = row % GROUPS * CHANNELS + members
    y = _affine(centred * rstd, weight_ptr, bias_ptr, channels, mask_c)
    tl.store(y_ptr + offsets, y, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _forward_wide_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    W, S, GROUPS, CHANNELS, eps,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program normalises one row, a block of its channels at a time."""
    row = tl.program_id(0).to(tl.int64)
    members = tl.arange(0, BLOCK_C).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK_S)[None, :]
    x_ptr += row * W
    y_ptr += row * W

    # Each block has its own mean and squared deviations; they merge exactly (Chan et al. 1979).
    seen = 0.0
    mean = 0.0
    deviations = 0.0
    for c in range(0, CHANNELS, BLOCK_C):
        for s in range(0, S, BLOCK_S):
            mask = (c + members < CHANNELS) & (s + cols < S)
            ptrs = x_ptr + (c + members) * S + (s + cols)
            x = tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            size = tl.minimum(CHANNELS - c, BLOCK_C) * tl.minimum(S - s, BLOCK_S)
            size = size.to(tl.float32)
            block_mean = tl.sum(x) / size
            centred = tl.where(mask, x - block_mean, 0.0)
            delta = block_mean - mean
            share = size / (seen + size)
            mean += delta * share
            deviations += tl.sum(centred * centred) + delta * delta * share * seen
            seen += size
    rstd = tl.rsqrt(deviations / W + eps)

    for c in range(0, CHANNELS, BLOCK_C):
        channels = row % GROUPS * CHANNELS + (c + members)
        for s in range(0, S, BLOCK_S):
            mask_c = c + members < CHANNELS
            mask = mask_c & (s + cols < S)
            offsets = (c + members) * S + (s + cols)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
            xhat = (x.to(tl.float32) - mean) * rstd
            y = _affine(xhat, weight_ptr, bias_ptr, channels, mask_c)
            tl.store(y_ptr + offsets, y, mask=mask)

    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dw_ptr, db_ptr, dx_ptr,
    W, S, GROUPS, CHANNELS,
    WANTS_DX: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program takes one row, as a tile of its channels: their sums, and dx."""
    row, members, mask_c, mask, offsets = _tile_of_a_row(W, S, CHANNELS, BLOCK_C, BLOCK_S)
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    xhat = (x - tl.load(mean_ptr + row)) * rstd
    db = tl.sum(dy, 1)[:, None]
    dw = tl.sum(dy * xhat, 1)[:, None]
    tl.store(db_ptr + row * CHANNELS + members, db, mask=mask_c)
    tl.store(dw_ptr + row * CHANNELS + members, dw, mask=mask_c)
    if WANTS_DX:
        channels = row % GROUPS * CHANNELS + members
        mean_g = tl.sum(_affine(db, weight_ptr, None, channels, mask_c)) / W
        mean_gx = tl.sum(_affine(dw, weight_ptr, None, channels, mask_c)) / W
        g = _affine(dy, weight_ptr, None, channels, mask_c)
        tl.store(dx_ptr + offsets, rstd * (g - mean_g - xhat * mean_gx), mask=mask)


@triton.jit
def _channel_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, dw_ptr, db_ptr,
    M, S, CHANNELS,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M channels of a sample: the sums of dy and of dy * xhat."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < M
    groups = rows // CHANNELS
    mean = tl.load(mean_ptr + groups, mask=mask_m, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + groups, mask=mask_m, other=0.0)
    db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, S, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = mask_m[:, None] & (cols < S)[None, :]
        offsets = rows[:, None] * S + cols[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        db += dy
        dw += tl.where(mask, dy * (x - mean), 0.0)
    tl.store(db_ptr + rows, tl.sum(db, 1), mask=mask_m)
    tl.store(dw_ptr + rows, tl.sum(dw, 1) * rstd, mask=mask_m)


@triton.jit
def _backward_wide_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dw_ptr, db_ptr, dx_ptr,
    M, W, S, GROUPS, CHANNELS,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes a block of BLOCK_M channels of samples, whose groups' sums are known."""
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    mask_m = rows < M
    groups = rows // CHANNELS
    first = groups % GROUPS * CHANNELS

    members = tl.arange(0, BLOCK_C)[None, :]
    mask = mask_m & (members < CHANNELS)
    sums = groups * CHANNELS + members
    db = tl.load(db_ptr + sums, mask=mask, other=0.0)
    dw = tl.load(dw_ptr + sums, mask=mask, other=0.0)
    mean_g = tl.sum(_affine(db, weight_ptr, None, first + members, mask), 1)[:, None] / W
    mean_gx = tl.sum(_affine(dw, weight_ptr, None, first + members, mask), 1)[:, None] / W

    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = mask_m & (cols < S)
    offsets = rows * S + cols
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + groups, mask=mask_m, other=0.0)
    rstd = tl.load(rstd_ptr + groups, mask=mask_m, other=0.0)
    g = _affine(dy, weight_ptr, None, rows % (GROUPS * CHANNELS), mask_m)
    dx = rstd * (g - mean_g - (x - mean) * rstd * mean_gx)
    tl.store(dx_ptr + offsets, dx, mask=mask)


# --- launch -------------------------------------------------------------------------------------


def _forward_fake(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = input.new_empty((input.shape[0], num_groups), dtype=torch.float32)
    return input.new_empty(input.shape, dtype=dtype), stats, torch.empty_like(stats)


def _backward_fake(
    dy: Tensor,
    input: Tensor,
    num_groups: int,
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


def _sizes(input: Tensor, num_groups: int) -> tuple[int, int, int, int]:
    """Rows, numbers in one, numbers of a channel, and channels of a group."""
    S = math.prod(input.shape[2:])
    channels = input.shape[1] // num_groups
    return input.shape[0] * num_groups, channels * S, S, channels


@torch_op("group_norm_backward", fake=_backward_fake)
def _backward(
    dy: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _backward_fake(dy, input, num_groups, weight, bias, mean, rstd, wanted)
    if input.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    x, dy = input.contiguous(), dy.contiguous()
    M, W, S, channels = _sizes(x, num_groups)
    dw, db = mean.new_empty((2, *x.shape[:2])).unbind()
    block_c, block_s = (triton.next_power_of_2(n) for n in (channels, S))
    if block_c * block_s <= WIDE_BACKWARD:
        _backward_kernel[(M,)](
            dy, x, weight, mean, rstd, dw, db, dx,
            W, S, num_groups, channels,
            WANTS_DX=wanted[0], BLOCK_C=block_c, BLOCK_S=block_s,
            num_warps=min(max(block_c * block_s // 512, 1), 16),  # 16 numbers of each a thread
        )  # fmt: skip
    else:
        block_s = min(block_s, 4096)
        block_m = 4096 // block_s  # so much that the loads of the channels' sums count little
        programs = triton.cdiv(M * channels, block_m)
        tile = {"BLOCK_M": block_m, "BLOCK_N": block_s, "num_warps": 8}
        _channel_sums_kernel[(programs,)](
            dy, x, mean, rstd, dw, db,
            M * channels, S, channels,
            **tile,
        )  # fmt: skip
        if wanted[0]:
            _backward_wide_kernel[(programs, triton.cdiv(S, block_s))](
                dy, x, weight, mean, rstd, dw, db, dx,
                M * channels, W, S, num_groups, channels,
                BLOCK_C=block_c, **(tile | {"num_warps": 4}),
            )  # fmt: skip
    if wanted[1] or wanted[2]:
        sum_parts(dw, db, dweight if wanted[1] else None, dbias if wanted[2] else None)
    return dx, dweight, dbias


def _save(ctx, inputs, output):
    input, ctx.num_groups, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(input, weight, bias, *output[1:])


def _gradients(ctx, dy, _dmean, _drstd):
    input, weight, bias, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        inputs = (input, ctx.num_groups, weight, bias, ctx.eps)
        return *eager_gradients(F.group_norm, inputs, (dy,)), None
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    grads = _backward(dy, input, ctx.num_groups, weight, bias, mean, rstd, wanted)
    dx, dweight, dbias = (g if w else None for g, w in zip(grads, wanted, strict=True))
    return dx, None, dweight, dbias, None, None


@torch_op("group_norm", fake=_forward_fake, setup_context=_save, backward=_gradients)
def _forward(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_fake(input, num_groups, weight, bias, eps, dtype)
    if y.numel() == 0:
        return y, mean, rstd
    x = input.contiguous()
    M, W, S, channels = _sizes(x, num_groups)
    block_c, block_s = (triton.next_power_of_2(n) for n in (channels, S))
    kernel = _forward_kernel if block_c * block_s <= WIDE else _forward_wide_kernel
    if kernel is _forward_wide_kernel:
        block_s = min(block_s, 4096)
        block_c = min(block_c, 4096 // block_s)
    kernel[(M,)](
        x, weight, bias, y, mean, rstd,
        W, S, num_groups, channels, eps,
        BLOCK_C=block_c, BLOCK_S=block_s,
        num_warps=min(max(block_c * block_s // 512, 1), 32),  # 16 numbers a thread
    )  # fmt: skip
    return y, mean, rstd


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> str | None:
    if input.dim() < 2 or num_groups < 1 or input.shape[1] % num_groups:
        return f"input of shape {tuple(input.shape)} does not have {num_groups} groups"
    if input.numel() == num_groups:
        return "a group is a single number"
    for name, t in (("input", input), ("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.dtype not in OP.dtypes:
            return f"{name} is {t.dtype}"
        if t.device != input.device:
            return f"{name} is on {t.device} and input on {input.device}"
        if t is not input and tuple(t.shape) != (input.shape[1],):
            return f"{name} has shape {tuple(t.shape)}, not ({input.shape[1]},)"
    return None


@dispatched(eager=F.group_norm, uncovered=_uncovered)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalises each sample's groups of channels; drop-in for ``F.group_norm``.

    Args:
        input: (N, C, ...) float32, float16 or bfloat16, of any width; any strides, though a copy
            is made where it is not contiguous.
        num_groups: A divisor of C.
        weight: (C,), any of the dtypes; None multiplies by 1.
        bias: (C,), any of the dtypes; None adds 0.
        eps: Added to the variance.

    Returns:
        The shape and dtype of ``input``; float32 under CUDA autocast, as PyTorch. Statistics are
        float32 and taken in two passes. Gradients are the same to the bit from run to run.

    Raises:
        RuntimeError: What ``F.group_norm`` raises, for shapes that do not fit.
        ValueError: What it raises where a group is a single number.
    """
    dtype = torch.float32 if torch.is_autocast_enabled("cuda") and input.is_cuda else input.dtype
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return _forward(input, num_groups, weight, bias, float(eps), dtype)[0]


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` over the fused ``group_norm``: the same arguments and state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises each sample's ``num_groups`` groups of channels."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    N: int,
    C: int,
    S: int,
    G: int,
    affine: torch.dtype | bool = True,
) -> Inputs:
    x = 3 * torch.randn(N, C, S, dtype=dtype, device=device) + 1  # a mean far from 0
    inputs: Inputs = {"input": x.requires_grad_(), "num_groups": G}
    if affine:
        kind = dtype if affine is True else affine
        for name in ("weight", "bias"):
            inputs[name] = torch.randn(C, dtype=kind, device=device).requires_grad_()
    return inputs


OP = Op(
    fused=group_norm,
    reference=reference,
    example=_example,
    sizes=(
        {"N": 2, "C": 1, "S": 1, "G": 1},
        {"N": 3, "C": 6, "S": 35, "G": 2},
        {"N": 2, "C": 8, "S": 3, "G": 8, "affine": False},
        {"N": 1, "C": 6, "S": 4150, "G": 2, "affine": torch.float32},
    ),
    bench_sizes=tuple(
        {"N": n, "C": c, "S": s, "G": 32}
        for n, c, s in ((32, 512, 256), (16, 320, 4096), (4, 128, 65536))
    ),
    work=lambda input, weight=None, bias=None, **_: (
        2 * input.nbytes + sum(t.nbytes for t in (weight, bias) if t is not None),
        8 * input.numel(),
    ),
)
