r"""A linear layer over int8 weights with one scale an output: weight-only quantisation.

Forward: y_n = scale_n sum_k x_k q_nk + bias_n, the scale applied to the float32 sum.
Backward (of x and bias): dx_k = sum_n dy_n (scale_n q_nk), the weight rounded to the dtype of x.

Few rows (decoding) are bound by reading the weights, a byte each, half of bfloat16: multiply-adds
on the weights as they come. More rows go through tensor cores: codes are loaded as bytes and become
numbers of x's dtype, which holds them exactly, in registers. Saved for the backward: nothing but
the weight itself.
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
    int8_to_float,
    shares_of,
    sum_shares,
    uncovered,
)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, K) int8 in [-127, 127] and scales (N,) float32, of which a row's largest is 127.

    Args:
        weight: (N, K), finite.

    Raises:
        ValueError: Not a matrix of floating-point numbers.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize_int8: weight must be (N, K) floating point; "
            f"got {tuple(weight.shape)} {weight.dtype}"
        )
    weight = weight.detach().float()
    scales = weight.abs().amax(1) / 127 if weight.shape[1] else weight.new_zeros(weight.shape[0])
    scales = torch.where(scales == 0, 1.0, scales)  # a row of zeros
    return (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def dequantize_int8(qweight: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (N, K) that codes and scales stand for, rounded once to ``dtype``."""
    wide = torch.promote_types(scales.dtype, torch.float32)
    return (qweight.to(wide) * scales.to(wide)[:, None]).to(dtype)


def reference(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear over the dequantised weight in eager PyTorch."""
    _check(x, qweight, scales, bias)
    return F.linear(x, dequantize_int8(qweight, scales, x.dtype), bias)


def _check(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    if qweight.dim() != 2 or qweight.dtype != torch.int8:
        raise ValueError(
            f"int8_linear: qweight must be (N, K) int8; got {tuple(qweight.shape)} {qweight.dtype}"
        )
    N, K = qweight.shape
    check("int8_linear", x, bias, K, N, scales=(scales, (N,)))


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _add_row(
    acc, q, x_ptr, k, inside, stride_xm, M,
    ROW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the products of one row of x, 16 numbers of k at a time."""
    if ROW < ROWS:
        row = tl.full((), ROW, tl.int64)
        mask = inside & (row < M)
        x = tl.load(x_ptr + row * stride_xm + k, mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(q * x[None], 2)
    return acc


@triton.jit
def _gemv_kernel(
    x_ptr, q_ptr, scale_ptr, bias_ptr, y_ptr,
    stride_xm, stride_qn, M, N, K,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_N outputs of up to four rows; a thread 16 weights of an output."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    k = tl.arange(0, BLOCK_K // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    q_ptrs = q_ptr + n.to(tl.int64)[:, None, None] * stride_qn + k[None]
    acc0 = tl.zeros([BLOCK_N, BLOCK_K // 16], tl.float32)
    acc1 = tl.zeros([BLOCK_N, BLOCK_K // 16], tl.float32)
    acc2 = tl.zeros([BLOCK_N, BLOCK_K // 16], tl.float32)
    acc3 = tl.zeros([BLOCK_N, BLOCK_K // 16], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        q = tl.load(q_ptrs + start, mask=mask_n[:, None, None] & inside[None], other=0)
        q = int8_to_float(q)
        acc0 = _add_row(acc0, q, x_ptr + start, k, inside, stride_xm, M, 0, ROWS)
        acc1 = _add_row(acc1, q, x_ptr + start, k, inside, stride_xm, M, 1, ROWS)
        acc2 = _add_row(acc2, q, x_ptr + start, k, inside, stride_xm, M, 2, ROWS)
        acc3 = _add_row(acc3, q, x_ptr + start, k, inside, stride_xm, M, 3, ROWS)
    scale = tl.load(scale_ptr + n, mask=mask_n, other=0.0).to(tl.float32)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, tl.sum(acc0, 1) * scale + bias, mask=mask_n)
    if ROWS > 1:
        tl.store(y_ptr + N + n, tl.sum(acc1, 1) * scale + bias, mask=mask_n & (M > 1))
    if ROWS > 2:
        tl.store(y_ptr + 2 * N + n, tl.sum(acc2, 1) * scale + bias, mask=mask_n & (M > 2))
        tl.store(y_ptr + 3 * N + n, tl.sum(acc3, 1) * scale + bias, mask=mask_n & (M > 3))


@triton.jit
def _tile_kernel(
    x_ptr, q_ptr, scale_ptr, bias_ptr, out_ptr,
    stride_xm, stride_qn, M, N, K, share,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of the output over its share of K: all of it where WHOLE."""
    program = tl.program_id(0).to(tl.int64)
    tiles_m = tl.cdiv(M, BLOCK_M)  # the tiles that share weights run together
    m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = m < M, n < N
    q_ptrs = q_ptr + n[None, :] * stride_qn + k[:, None]
    x_ptrs = x_ptr + m[:, None] * stride_xm + k[None, :]
    begin = tl.program_id(1) * share
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, tl.minimum(begin + share, K), BLOCK_K):
        inside = k < K - start
        q = tl.load(q_ptrs + start, mask=mask_n[None, :] & inside[:, None], other=0)
        x = tl.load(x_ptrs + start, mask=mask_m[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(x, int8_to_float(q).to(x.dtype), acc, input_precision="tf32x3")
    mask = mask_m[:, None] & mask_n[None, :]
    if WHOLE:
        acc *= tl.load(scale_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    else:
        out_ptr += tl.program_id(1).to(tl.int64) * M * N
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc, mask=mask)


@triton.jit
def _dx_kernel(
    dy_ptr, q_ptr, scale_ptr, dx_ptr,
    stride_dym, stride_qn, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of dx (BLOCK_M, BLOCK_K) and sums over the outputs."""
    program = tl.program_id(0).to(tl.int64)
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = program // tiles_m * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    mask_m, mask_k = m < M, k < K
    dy_ptrs = dy_ptr + m[:, None] * stride_dym + n[None, :]
    q_ptrs = q_ptr + n.to(tl.int64)[:, None] * stride_qn + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, N, BLOCK_N):
        inside = n < N - start
        dy = tl.load(dy_ptrs + start, mask=mask_m[:, None] & inside[None, :], other=0.0)
        q = tl.load(q_ptrs, mask=inside[:, None] & mask_k[None, :], other=0)
        scale = tl.load(scale_ptr + start + n, mask=inside, other=0.0).to(tl.float32)
        weight = (int8_to_float(q) * scale[:, None]).to(dy.dtype)
        acc = tl.dot(dy, weight, acc, input_precision="tf32x3")
        q_ptrs += tl.cast(BLOCK_N, tl.int64) * stride_qn
    tl.store(dx_ptr + m[:, None] * K + k[None, :], acc, mask=mask_m[:, None] & mask_k[None, :])


# --- launch -------------------------------------------------------------------------------------

_FEW = 4  # rows that go without tensor cores; unmeasured


@tunable("BLOCK_N", "BLOCK_K", "num_warps")
def _few_tile(N: int, K: int) -> dict[str, int]:
    """The tile of few rows: 32 weights a thread and turn; unmeasured."""
    if _dispatch._cpu_runner == "interpreter":
        return {"BLOCK_N": 8, "BLOCK_K": 64}
    block_k = min(max(triton.next_power_of_2(K), 64), 512)
    return {"BLOCK_N": 4096 // block_k, "BLOCK_K": block_k, "num_warps": 4}


@tunable("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
def _tile(thin: bool, dtype: torch.dtype, aligned: bool) -> dict[str, int]:
    """The tile of the forward; unmeasured. ``thin``: at most 64 rows.

    Rows off 16 bytes load number by number.
    """
    if _dispatch._cpu_runner == "interpreter":
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
    if dtype == torch.float32:  # three tf32 products hold both halves of each operand
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if not aligned:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if thin:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


@tunable("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
def _tile_backward(dtype: torch.dtype, aligned: bool) -> dict[str, int]:
    """The tile of dx; unmeasured.

    Rows off 16 bytes load number by number, each from an address and a mask of its own: the large
    tile then needs 72 to 568 bytes of stack a thread (sm_100, sm_120), and the small one none.
    """
    if _dispatch._cpu_runner == "interpreter":
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    if not aligned:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}


def _forward_fake(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _backward_fake(dy: Tensor, qweight: Tensor, scales: Tensor) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], qweight.shape[1])


def _save(ctx, inputs, output):
    _, qweight, scales, _ = inputs
    ctx.save_for_backward(qweight, scales)


def _save_weight(ctx, inputs, output):
    _, qweight, scales = inputs
    ctx.save_for_backward(qweight, scales)


def _gradients(ctx, dy):
    x_wants, _, _, bias_wants = ctx.needs_input_grad
    dx = _backward(dy, *ctx.saved_tensors) if x_wants else None
    return dx, None, None, dy.contiguous().view(-1, dy.shape[-1]).sum(0) if bias_wants else None


def _gradient_of_dy(ctx, ddx):
    return _forward(ddx, *ctx.saved_tensors, None), None, None


@torch_op(
    "int8_linear_backward",
    fake=_backward_fake,
    setup_context=_save_weight,
    backward=_gradient_of_dy,
)
def _backward(dy: Tensor, qweight: Tensor, scales: Tensor) -> Tensor:
    dx = _backward_fake(dy, qweight, scales)
    N, K = qweight.shape
    if dx.numel() == 0 or N == 0:
        return dx.zero_()
    dy, qweight = rows_of(dy, N), rows_of(qweight, K)
    aligned = N % 16 == K % 16 == dy.stride(0) % 8 == qweight.stride(0) % 16 == 0
    M, tile = dy.shape[0], _tile_backward(dy.dtype, aligned)
    grid = (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(K, tile["BLOCK_K"]),)
    _dx_kernel[grid](
        dy, qweight, scales.contiguous(), dx,
        dy.stride(0), qweight.stride(0), M, N, K,
        **tile,
    )  # fmt: skip
    return dx


@torch_op("int8_linear", fake=_forward_fake, setup_context=_save, backward=_gradients)
def _forward(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    y = _forward_fake(x, qweight, scales, bias)
    N, K = qweight.shape
    if y.numel() == 0:
        return y
    x, qweight, scales = rows_of(x, K), rows_of(qweight, K), scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    M = x.shape[0]
    if M <= _FEW:
        tile = _few_tile(N, K)
        _gemv_kernel[(triton.cdiv(N, tile["BLOCK_N"]),)](
            x, qweight, scales, bias, y,
            x.stride(0), qweight.stride(0), M, N, K,
            HAS_BIAS=bias is not None, ROWS=triton.next_power_of_2(M), **tile,
        )  # fmt: skip
        return y
    aligned = K % 16 == x.stride(0) % 8 == qweight.stride(0) % 16 == 0
    tile = _tile(M <= 64, x.dtype, aligned)
    tiles = triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"])
    steps = triton.cdiv(K, tile["BLOCK_K"])
    share = triton.cdiv(steps, shares_of(tiles, steps, x.device))
    shares = triton.cdiv(steps, share)
    out = y if shares == 1 else y.new_empty(shares, M, N, dtype=torch.float32)
    _tile_kernel[(tiles, shares)](
        x, qweight, scales, bias, out,
        x.stride(0), qweight.stride(0), M, N, K, share * tile["BLOCK_K"],
        HAS_BIAS=bias is not None, WHOLE=shares == 1, **tile,
    )  # fmt: skip
    if shares > 1:
        sum_shares(out, scales, bias, y)
    return y


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None = None
) -> str | None:
    _check(x, qweight, scales, bias)
    return uncovered(x, bias, scales, qweight)


@dispatched(eager=reference, uncovered=_uncovered)
def int8_linear(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ (qweight * scales[:, None]).T + bias``, the weight read as bytes.

    Args:
        x: (..., K) float32, float16 or bfloat16; any strides.
        qweight: (N, K) int8, as of ``quantize_int8``.
        scales: (N,) floating point.
        bias: (N,), the dtype of x.

    Returns:
        (..., N), the dtype of x, or of autocast. Sums are float32, also of float32 x. x and bias
        get gradients, so that adapters below a frozen layer train.

    Raises:
        ValueError: Shapes or dtypes outside the above.
    """
    x = autocast(x)
    return _forward(x, qweight, scales.detach(), bias)


class Int8Linear(QuantizedLinear):
    """``nn.Linear`` over int8 weights: buffers ``qweight`` and ``scales``, parameter ``bias``."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Int8Linear":
        """Quantises a linear layer; the layer itself is left alone."""
        qweight, scales = quantize_int8(linear.weight)
        N, K = qweight.shape
        return cls(K, N, linear.bias, qweight=qweight, scales=scales)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return int8_linear(x, self.qweight, self.scales, self.bias)


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype, device: torch.device, M: int, N: int, K: int, bias: bool = False
) -> Inputs:
    x = torch.randn(M, K, dtype=dtype, device=device)
    qweight, scales = quantize_int8(torch.randn(N, K, device=device) / K**0.5)
    found = {"x": x.requires_grad_(), "qweight": qweight, "scales": scales}
    if bias:
        found["bias"] = torch.randn(N, dtype=dtype, device=device).requires_grad_()
    return found


def work(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None = None) -> tuple[int, int]:
    """Bytes: x, the codes, the scales and y, once each. FLOPs: the product."""
    M, (N, K) = x.numel() // qweight.shape[1], qweight.shape
    return x.nbytes + qweight.nbytes + scales.nbytes + M * N * x.itemsize, 2 * M * N * K


OP = Op(
    fused=int8_linear,
    reference=reference,
    example=_example,
    sizes=(
        {"M": 1, "N": 1, "K": 1},
        {"M": 3, "N": 19, "K": 70, "bias": True},
        {"M": 18, "N": 37, "K": 70, "bias": True},
    ),
    bench_sizes=tuple({"M": M, "N": N, "K": 4096} for M in (1, 4, 64, 4096) for N in (4096, 14336)),
    work=work,
)
