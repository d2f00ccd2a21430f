r"""A linear layer over int4 weights, two a byte, with a scale for each group of an output's inputs.

Forward, with group g of input k:

    y_n = sum_k x_k (q_nk - zero_ng) scale_ng + bias_n

Codes run from 0 to 15; without zeros the code of 0 is 8. Byte j of a group of G holds input j in
its low half and input j + G / 2 in its high half, so that the activations beside both halves are
runs of memory, which load in full width. K is padded to whole groups.

Few rows (decoding) are bound by reading the weights, 0.53 bytes each with float32 scales of groups
of 128. More rows go through tensor cores: a product for each half of a group, of codes less zeros,
exact in every dtype; the scale is applied to the group's float32 sum. Backward: dx, of the weight
rounded to x's dtype, and dbias. Saved for it: nothing but the weight itself.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from . import _dispatch
from ._dispatch import dispatched
from ._launch import rows_of
from ._op import Inputs, Op
from ._register import torch_op
from ._tuned import tunable
from ._weight_only import (
    QuantizedLinear,
    autocast,
    check,
    shares_of,
    sum_shares,
    uncovered,
)

_GROUPS = (32, 64, 128, 256)
_MIDDLE = tl.constexpr(8)  # the code of 0 without zeros


def _check_group(op: str, group_size: int) -> None:
    if group_size not in _GROUPS:
        raise ValueError(f"{op}: group_size must be one of {_GROUPS}; got {group_size}")


def quantize_int4(
    weight: Tensor, group_size: int = 128, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros of a weight: what ``int4_linear`` takes.

    Args:
        weight: (N, K), finite.
        group_size: Inputs that share a scale: 32, 64, 128 or 256. The last group may be short.
        symmetric: A group's largest magnitude becomes 7 steps, and there are no zeros; else its
            range, widened to hold 0, becomes 15 steps.

    Returns:
        Codes (N, groups * group_size / 2) uint8, scales (N, groups) float32, and zeros (N, groups)
        uint8 or None.

    Raises:
        ValueError: Not a matrix of floating-point numbers, or another group size.
    """
    _check_group("quantize_int4", group_size)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize_int4: weight must be (N, K) floating point; "
            f"got {tuple(weight.shape)} {weight.dtype}"
        )
    K = weight.shape[1]
    padded = F.pad(weight.detach().float(), (0, -K % group_size))
    groups = padded.unflatten(1, (padded.shape[1] // group_size, group_size))
    if symmetric:
        scales = groups.abs().amax(2) / 7
        zeros = torch.full_like(scales, _MIDDLE.value)
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = (high - low) / 15
        zeros = torch.where(scales == 0, 0.0, (-low / scales).round())
    scales = torch.where(scales == 0, 1.0, scales)  # a group of zeros
    codes = (groups / scales[:, :, None]).round().add(zeros[:, :, None]).clamp(0, 15)
    low_half, high_half = codes.to(torch.uint8).chunk(2, 2)
    packed = (low_half | high_half << 4).flatten(1)
    return packed, scales, None if symmetric else zeros.to(torch.uint8)


def dequantize_int4(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group_size: int = 128,
    in_features: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight that codes, scales and zeros stand for, rounded once to ``dtype``.

    Args:
        qweight: Codes (N, groups * group_size / 2).
        scales: (N, groups).
        zeros: (N, groups) or None.
        group_size: Of the codes.
        in_features: K, where the last group is short.
        dtype: Of the result (N, K).
    """
    wide = torch.promote_types(scales.dtype, torch.float32)
    halves = qweight.unflatten(1, (scales.shape[1], group_size // 2))
    codes = torch.cat([halves & 15, halves >> 4], 2).to(wide)
    middle = float(_MIDDLE.value) if zeros is None else zeros.to(wide)[:, :, None]
    weight = ((codes - middle) * scales.to(wide)[:, :, None]).flatten(1)
    return weight[:, :in_features].to(dtype)


def reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group_size: int = 128,
    bias: Tensor | None = None,
) -> Tensor:
    """The linear over the dequantised weight in eager PyTorch."""
    _check(x, qweight, scales, zeros, group_size, bias)
    weight = dequantize_int4(
        qweight,
        scales,
        zeros,
        group_size=group_size,
        in_features=x.shape[-1],
        dtype=x.dtype,
    )
    return F.linear(x, weight, bias)


def _check(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    bias: Tensor | None,
) -> None:
    _check_group("int4_linear", group_size)
    if qweight.dim() != 2 or qweight.dtype != torch.uint8:
        raise ValueError(
            f"int4_linear: qweight must be (N, groups * {group_size // 2}) uint8; "
            f"got {tuple(qweight.shape)} {qweight.dtype}"
        )
    N = qweight.shape[0]
    check("int4_linear", x, bias, None, N)
    groups = triton.cdiv(x.shape[-1], group_size)
    codes = {"qweight": (qweight, (N, groups * group_size // 2)), "scales": (scales, (N, groups))}
    if zeros is not None:
        codes["zeros"] = (zeros, (N, groups))
        if zeros.dtype != torch.uint8:
            raise ValueError(f"int4_linear: zeros must be uint8; got {zeros.dtype}")
    check("int4_linear", x, bias, None, N, **codes)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _nibble_to_float(code, zero):
    """Code less zero as float32 by way of 2^23 + code, whose last bits are the code."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)


@triton.jit
def _load_zero(zero_ptr, offsets, mask, HAS_ZEROS: tl.constexpr):
    """Zeros as float32; the middle code where there are none."""
    if HAS_ZEROS:
        return tl.load(zero_ptr + offsets, mask=mask, other=0).to(tl.float32)
    else:
        return tl.full(offsets.shape, _MIDDLE, tl.float32)


@triton.jit
def _add_row(
    acc, low, high, scale, x_ptr, k, stride_xm, M, K,
    ROW: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Adds the products of one row of x, 16 bytes of codes at a time."""
    if ROW < ROWS:
        row = tl.full((), ROW, tl.int64)
        x_ptrs = x_ptr + row * stride_xm + k
        mask = row < M
        x_low = tl.load(x_ptrs, mask=mask & (k < K), other=0.0).to(tl.float32)
        x_high = tl.load(x_ptrs + HALF, mask=mask & (k < K - HALF), other=0.0).to(tl.float32)
        acc += tl.sum(low * x_low[None] + high * x_high[None], 2) * scale
    return acc


@triton.jit
def _gemv_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr,
    stride_xm, stride_qn, M, N, K, GROUPS,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_N outputs of up to four rows; a thread 32 weights of an output.

    16 bytes lie within a group, so that a thread sums their products before it scales the sum.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    chunks = tl.arange(0, BLOCK_B // 16)
    within = tl.arange(0, 16)
    q_ptrs = (
        q_ptr + n[:, None, None] * stride_qn + (chunks * 16)[None, :, None] + within[None, None]
    )
    bytes_of_row = GROUPS * HALF
    acc0 = tl.zeros([BLOCK_N, BLOCK_B // 16], tl.float32)
    acc1 = tl.zeros([BLOCK_N, BLOCK_B // 16], tl.float32)
    acc2 = tl.zeros([BLOCK_N, BLOCK_B // 16], tl.float32)
    acc3 = tl.zeros([BLOCK_N, BLOCK_B // 16], tl.float32)
    for start in range(0, bytes_of_row, BLOCK_B):
        first = start + chunks * 16
        group = first // HALF
        k = (group * (2 * HALF) + first % HALF)[:, None] + within[None, :]
        mask = mask_n[:, None] & (group < GROUPS)[None, :]
        q = tl.load(q_ptrs + start, mask=mask[:, :, None], other=0)
        offsets = n[:, None] * GROUPS + group[None, :]
        scale = tl.load(scale_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        zero = _load_zero(zero_ptr, offsets, mask, HAS_ZEROS)[:, :, None]
        low, high = _nibble_to_float(q & 15, zero), _nibble_to_float(q >> 4, zero)
        acc0 = _add_row(acc0, low, high, scale, x_ptr, k, stride_xm, M, K, 0, ROWS, HALF)
        acc1 = _add_row(acc1, low, high, scale, x_ptr, k, stride_xm, M, K, 1, ROWS, HALF)
        acc2 = _add_row(acc2, low, high, scale, x_ptr, k, stride_xm, M, K, 2, ROWS, HALF)
        acc3 = _add_row(acc3, low, high, scale, x_ptr, k, stride_xm, M, K, 3, ROWS, HALF)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, tl.sum(acc0, 1) + bias, mask=mask_n)
    if ROWS > 1:
        tl.store(y_ptr + N + n, tl.sum(acc1, 1) + bias, mask=mask_n & (M > 1))
    if ROWS > 2:
        tl.store(y_ptr + 2 * N + n, tl.sum(acc2, 1) + bias, mask=mask_n & (M > 2))
        tl.store(y_ptr + 3 * N + n, tl.sum(acc3, 1) + bias, mask=mask_n & (M > 3))


@triton.jit
def _tile_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    stride_xm, stride_qn, M, N, K, GROUPS, share,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of the output over its share of the groups: all where WHOLE."""
    program = tl.program_id(0).to(tl.int64)
    tiles_m = tl.cdiv(M, BLOCK_M)  # the tiles that share weights run together
    m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, HALF)
    mask_m, mask_n = m < M, n < N
    q_ptrs = q_ptr + n[None, :] * stride_qn + j[:, None]
    x_ptrs = x_ptr + m[:, None] * stride_xm + j[None, :]
    begin = tl.program_id(1) * share
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(begin, tl.minimum(begin + share, GROUPS)):
        rest = K - group * (2 * HALF)
        q = tl.load(q_ptrs + group * HALF, mask=mask_n[None, :], other=0)
        offsets = n * GROUPS + group
        scale = tl.load(scale_ptr + offsets, mask=mask_n, other=0.0).to(tl.float32)
        zero = _load_zero(zero_ptr, offsets, mask_n, HAS_ZEROS)[None, :]
        low_ptrs = x_ptrs + group * (2 * HALF)
        x_low = tl.load(low_ptrs, mask=mask_m[:, None] & (j < rest)[None, :], other=0.0)
        mask_high = mask_m[:, None] & (j < rest - HALF)[None, :]
        x_high = tl.load(low_ptrs + HALF, mask=mask_high, other=0.0)
        low = _nibble_to_float(q & 15, zero).to(x_low.dtype)
        high = _nibble_to_float(q >> 4, zero).to(x_low.dtype)
        products = tl.dot(x_low, low, input_precision="tf32x3")
        products = tl.dot(x_high, high, products, input_precision="tf32x3")
        acc += products * scale[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if WHOLE:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    else:
        out_ptr += tl.program_id(1).to(tl.int64) * M * N
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc, mask=mask)


@triton.jit
def _dx_kernel(
    dy_ptr, q_ptr, scale_ptr, zero_ptr, dx_ptr,
    stride_dym, stride_qn, M, N, K, GROUPS,
    HAS_ZEROS: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes both halves of a group of dx and sums over the outputs."""
    program = tl.program_id(0).to(tl.int64)
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = program // tiles_m
    m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, HALF)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = (m < M)[:, None]
    dy_ptrs = dy_ptr + m[:, None] * stride_dym + n[None, :]
    q_ptrs = q_ptr + group * HALF + j[None, :]
    low_sum = tl.zeros([BLOCK_M, HALF], tl.float32)
    high_sum = tl.zeros([BLOCK_M, HALF], tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + n
        mask_n = rows < N
        dy = tl.load(dy_ptrs + start, mask=mask_m & mask_n[None, :], other=0.0)
        q = tl.load(q_ptrs + rows[:, None] * stride_qn, mask=mask_n[:, None], other=0)
        offsets = rows * GROUPS + group
        scale = tl.load(scale_ptr + offsets, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        zero = _load_zero(zero_ptr, offsets, mask_n, HAS_ZEROS)[:, None]
        low = (_nibble_to_float(q & 15, zero) * scale).to(dy.dtype)
        high = (_nibble_to_float(q >> 4, zero) * scale).to(dy.dtype)
        low_sum = tl.dot(dy, low, low_sum, input_precision="tf32x3")
        high_sum = tl.dot(dy, high, high_sum, input_precision="tf32x3")
    k = group * (2 * HALF) + j[None, :]
    dx_ptrs = dx_ptr + m[:, None] * K + k
    tl.store(dx_ptrs, low_sum, mask=mask_m & (k < K))
    tl.store(dx_ptrs + HALF, high_sum, mask=mask_m & (k < K - HALF))


# --- launch -------------------------------------------------------------------------------------

_FEW = 4  # rows that go without tensor cores; unmeasured


@tunable("BLOCK_N", "BLOCK_B", "num_warps")
def _few_tile(row_bytes: int) -> dict[str, int]:
    """The tile of few rows: 32 bytes a thread and turn; unmeasured."""
    if _dispatch._cpu_runner == "interpreter":
        return {"BLOCK_N": 8, "BLOCK_B": 32}
    block_b = min(max(triton.next_power_of_2(row_bytes), 64), 512)
    return {"BLOCK_N": 4096 // block_b, "BLOCK_B": block_b, "num_warps": 4}


@tunable("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
def _tile(thin: bool, dtype: torch.dtype) -> dict[str, int]:
    """The tile of the forward; unmeasured. ``thin``: at most 64 rows."""
    if _dispatch._cpu_runner == "interpreter":
        return {"BLOCK_M": 16, "BLOCK_N": 32}
    if dtype == torch.float32:  # three tf32 products hold both halves of each operand
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    if thin:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


@tunable("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
def _tile_backward(dtype: torch.dtype) -> dict[str, int]:
    """The tile of dx; unmeasured."""
    if _dispatch._cpu_runner == "interpreter":
        return {"BLOCK_M": 16, "BLOCK_N": 32}
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


def _forward_fake(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _backward_fake(
    dy: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, K: int
) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], K)


def _save(ctx, inputs, output):
    x, qweight, scales, zeros, _, ctx.group_size = inputs
    ctx.K = x.shape[-1]
    ctx.save_for_backward(qweight, scales, zeros)


def _save_weight(ctx, inputs, output):
    _, qweight, scales, zeros, ctx.group_size, _ = inputs
    ctx.save_for_backward(qweight, scales, zeros)


def _gradients(ctx, dy):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _backward(dy, *ctx.saved_tensors, ctx.group_size, ctx.K)
    if ctx.needs_input_grad[4]:
        dbias = dy.contiguous().view(-1, dy.shape[-1]).sum(0)
    return dx, None, None, None, dbias, None


def _gradient_of_dy(ctx, ddx):
    return _forward(ddx, *ctx.saved_tensors, None, ctx.group_size), None, None, None, None, None


@torch_op(
    "int4_linear_backward",
    fake=_backward_fake,
    setup_context=_save_weight,
    backward=_gradient_of_dy,
)
def _backward(
    dy: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, K: int
) -> Tensor:
    dx = _backward_fake(dy, qweight, scales, zeros, group_size, K)
    N, groups = scales.shape
    if dx.numel() == 0 or N == 0:
        return dx.zero_()
    dy, qweight = rows_of(dy, N), rows_of(qweight, qweight.shape[1])
    M, tile = dy.shape[0], _tile_backward(dy.dtype)
    _dx_kernel[(triton.cdiv(M, tile["BLOCK_M"]) * groups,)](
        dy, qweight, scales.contiguous(), None if zeros is None else zeros.contiguous(), dx,
        dy.stride(0), qweight.stride(0), M, N, K, groups,
        HAS_ZEROS=zeros is not None, HALF=group_size // 2, **tile,
    )  # fmt: skip
    return dx


@torch_op("int4_linear", fake=_forward_fake, setup_context=_save, backward=_gradients)
def _forward(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    y = _forward_fake(x, qweight, scales, zeros, bias, group_size)
    if y.numel() == 0:
        return y
    N, groups = scales.shape
    K, half = x.shape[-1], group_size // 2
    x, qweight, scales = rows_of(x, K), rows_of(qweight, groups * half), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    bias = None if bias is None else bias.contiguous()
    M = x.shape[0]
    flags = {"HAS_ZEROS": zeros is not None, "HAS_BIAS": bias is not None, "HALF": half}
    if M <= _FEW:
        tile = _few_tile(groups * half)
        _gemv_kernel[(triton.cdiv(N, tile["BLOCK_N"]),)](
            x, qweight, scales, zeros, bias, y,
            x.stride(0), qweight.stride(0), M, N, K, groups,
            ROWS=triton.next_power_of_2(M), **flags, **tile,
        )  # fmt: skip
        return y
    tile = _tile(M <= 64, x.dtype)
    tiles = triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"])
    share = triton.cdiv(groups, shares_of(tiles, groups, x.device))
    shares = triton.cdiv(groups, share)
    out = y if shares == 1 else y.new_empty(shares, M, N, dtype=torch.float32)
    _tile_kernel[(tiles, shares)](
        x, qweight, scales, zeros, bias, out,
        x.stride(0), qweight.stride(0), M, N, K, groups, share,
        WHOLE=shares == 1, **flags, **tile,
    )  # fmt: skip
    if shares > 1:
        sum_shares(out, None, bias, y)
    return y


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group_size: int = 128,
    bias: Tensor | None = None,
) -> str | None:
    _check(x, qweight, scales, zeros, group_size, bias)
    return uncovered(x, bias, scales, qweight, *([] if zeros is None else [zeros]))


@dispatched(eager=reference, uncovered=_uncovered)
def int4_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group_size: int = 128,
    bias: Tensor | None = None,
) -> Tensor:
    """``x @ dequantize_int4(qweight, scales, zeros).T + bias``, the weight read as half bytes.

    Args:
        x: (..., K) float32, float16 or bfloat16; any strides.
        qweight: (N, groups * group_size / 2) uint8, as of ``quantize_int4``; groups is K /
            group_size, rounded up.
        scales: (N, groups) floating point.
        zeros: (N, groups) uint8, the codes of 0; None: 8.
        group_size: Inputs that share a scale: 32, 64, 128 or 256.
        bias: (N,), the dtype of x.

    Returns:
        (..., N), the dtype of x, or of autocast. Sums are float32, also of float32 x. x and bias
        get gradients, so that adapters below a frozen layer train.

    Raises:
        ValueError: Shapes or dtypes outside the above.
    """
    x = autocast(x)
    return _forward(x, qweight, scales.detach(), zeros, bias, group_size)


class Int4Linear(QuantizedLinear):
    """``nn.Linear`` over int4 weights: buffers ``qweight``, ``scales``, ``zeros``; ``bias``."""

    zeros: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: Tensor | None, *, group_size: int, **codes
    ):
        super().__init__(in_features, out_features, bias, **codes)
        self.group_size = group_size

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int = 128, symmetric: bool = True
    ) -> "Int4Linear":
        """Quantises a linear layer; the layer itself is left alone."""
        qweight, scales, zeros = quantize_int4(linear.weight, group_size, symmetric)
        N, K = linear.weight.shape
        codes = {"qweight": qweight, "scales": scales, "zeros": zeros}
        return cls(K, N, linear.bias, group_size=group_size, **codes)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return int4_linear(
            x, self.qweight, self.scales, self.zeros, group_size=self.group_size, bias=self.bias
        )

    def extra_repr(self) -> str:
        """As ``nn.Linear``, with the groups."""
        return f"{super().extra_repr()}, group_size={self.group_size}"


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    M: int,
    N: int,
    K: int,
    group_size: int = 128,
    symmetric: bool = True,
    bias: bool = False,
) -> Inputs:
    x = torch.randn(M, K, dtype=dtype, device=device)
    weight = torch.randn(N, K, device=device) / K**0.5
    qweight, scales, zeros = quantize_int4(weight, group_size, symmetric)
    found = {
        "x": x.requires_grad_(),
        "qweight": qweight,
        "scales": scales,
        "zeros": zeros,
        "group_size": group_size,
    }
    if bias:
        found["bias"] = torch.randn(N, dtype=dtype, device=device).requires_grad_()
    return found


def work(x: Tensor, qweight: Tensor, scales: Tensor, **_: object) -> tuple[int, int]:
    """Bytes: x, the codes, the scales and y, once each. FLOPs: the product."""
    N, K = qweight.shape[0], x.shape[-1]
    M = x.numel() // K
    return x.nbytes + qweight.nbytes + scales.nbytes + M * N * x.itemsize, 2 * M * N * K


OP = Op(
    fused=int4_linear,
    reference=reference,
    example=_example,
    sizes=(
        {"M": 1, "N": 1, "K": 1},
        {"M": 3, "N": 19, "K": 90, "group_size": 32, "symmetric": False, "bias": True},
        {"M": 18, "N": 37, "K": 70, "group_size": 64, "bias": True},
    ),
    bench_sizes=tuple({"M": M, "N": N, "K": 4096} for M in (1, 4, 64, 4096) for N in (4096, 14336)),
    work=work,
)
