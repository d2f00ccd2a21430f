r"""Products of 8-bit floating point with scales, and the quantisation of their operands.

Forward: y = (x * scale_x) (weight * scale_w)^T + bias, with a scale for the whole of an operand,
for each of its rows, or for blocks: 128 numbers of a row of x, 128 x 128 of the weight.

Tensor cores of sm_90 sum products of 8 bits in fewer bits than float32 has; every 128 of them are
added up in float32. Quantisation reads x once and writes a byte a number and the scales, bound by
memory: 3 bytes a bfloat16. No gradients.
"""

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from . import _dispatch
from ._dispatch import dispatched
from ._launch import rows_of
from ._op import Inputs, Op
from ._register import torch_op
from ._tuned import tunable

Granularity = Literal["tensor", "row", "block"]

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BLOCK = 128  # numbers that a block's scale covers
_WIDEST = 32768  # numbers of a row that one program holds


def _blocks(n: int) -> int:
    return triton.cdiv(n, _BLOCK)


def _too_old(x: Tensor) -> str | None:
    """Why the device has no float8, or None."""
    if x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
    elif x.device.type == "cpu" and _dispatch._cpu_runner == "compiler":
        capability = divmod(driver.active.get_current_target().arch, 10)
    else:
        return None
    return "float8 wants a GPU of capability 8.9 or more" if capability < (8, 9) else None


# --- quantisation: reference --------------------------------------------------------------------


def _check_quantize(x: Tensor, granularity: str, dtype: torch.dtype) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(
            f"quantize_fp8: x must be (..., K) floating point; got {tuple(x.shape)} {x.dtype}"
        )
    if granularity not in ("tensor", "row", "block"):
        raise ValueError(
            f"quantize_fp8: granularity must be tensor, row or block; got {granularity!r}"
        )
    if dtype not in _FLOAT8:
        raise ValueError(f"quantize_fp8: dtype must be one of {_FLOAT8}; got {dtype}")


def quantize_reference(
    x: Tensor, granularity: Granularity = "row", dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Quantisation in eager PyTorch."""
    _check_quantize(x, granularity, dtype)
    K, largest = x.shape[-1], torch.finfo(dtype).max
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if x.numel() == 0:
        shape = {"tensor": (), "row": (*x.shape[:-1], 1), "block": (*x.shape[:-1], _blocks(K))}
        return x.to(dtype), x.new_ones(shape[granularity])
    if granularity == "tensor":
        groups = x.reshape(1, -1)
    elif granularity == "row":
        groups = x
    else:
        groups = F.pad(x, (0, -K % _BLOCK)).unflatten(-1, (_blocks(K), _BLOCK))
    scale = groups.abs().amax(-1, keepdim=True) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (groups / scale).clamp(-largest, largest).to(dtype)
    if granularity == "tensor":
        return codes.view(x.shape), scale.reshape(())
    if granularity == "row":
        return codes, scale
    return codes.flatten(-2)[..., :K].contiguous(), scale.squeeze(-1)


def dequantize_fp8(
    codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, *, rows: int = 1
) -> Tensor:
    """The numbers that codes and scales stand for, rounded once to ``dtype``.

    Args:
        codes: (..., K).
        scale: One number, (..., 1), or (..., blocks of 128).
        dtype: Of the result.
        rows: Rows that share a scale of blocks: 128 of a weight.
    """
    wide = torch.promote_types(torch.promote_types(scale.dtype, dtype), torch.float32)
    scale = scale.to(wide)
    if scale.dim() and scale.shape[-1] > 1:
        scale = scale.repeat_interleave(_BLOCK, -1)[..., : codes.shape[-1]]
    if rows > 1:
        scale = scale.repeat_interleave(rows, 0)[: codes.shape[0]]
    return (codes.to(wide) * scale).to(dtype)


# --- linear: reference --------------------------------------------------------------------------


def _granularity(x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor) -> Granularity:
    """What the scales are of; raises where they are of neither."""
    (N, K), rows = weight.shape, tuple(x.shape[:-1])
    blocks = {"scale_x": (*rows, _blocks(K)), "scale_w": (_blocks(N), _blocks(K))}
    by_block = scale_w.numel() > 1 and tuple(scale_w.shape) not in ((N,), (N, 1))
    for name, t, row in (("scale_x", scale_x, (*rows, 1)), ("scale_w", scale_w, (N, 1))):
        allowed = [blocks[name]] if by_block else [(), (1,), row]
        fits = tuple(t.shape) in allowed or (not by_block and t.numel() == 1)
        if not fits or not t.is_floating_point():
            raise ValueError(
                f"fp8_linear: {name} must be floating point, one number, {row} by rows or "
                f"{blocks[name]} by blocks of 128 (both scales); got {tuple(t.shape)} {t.dtype}"
            )
    return "block" if by_block else "row"


def _check(
    x: Tensor,
    weight: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"fp8_linear: x must be (..., K) and weight (N, K); "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    for name, t in (("x", x), ("weight", weight)):
        if t.dtype not in (*_FLOAT8, torch.float64):  # float64: what the numerics are held against
            raise ValueError(f"fp8_linear: {name} must be one of {_FLOAT8}; got {t.dtype}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"fp8_linear: bias must have shape ({weight.shape[0]},); got {tuple(bias.shape)}"
        )
    if out_dtype not in OP.dtypes:
        raise ValueError(f"fp8_linear: out_dtype must be one of {OP.dtypes}; got {out_dtype}")
    _granularity(x, weight, scale_x, scale_w)


def reference(
    x: Tensor,
    weight: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The product of the dequantised operands in eager PyTorch."""
    _check(x, weight, scale_x, scale_w, bias, out_dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    by_block = _granularity(x, weight, scale_x, scale_w) == "block"
    left = dequantize_fp8(x, scale_x, wide)
    right = dequantize_fp8(weight, scale_w, wide, rows=_BLOCK if by_block else 1)
    y = F.linear(left, right, None if bias is None else bias.detach().to(wide))
    return y if wide == torch.float64 else y.to(out_dtype)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _quantize_kernel(
    x_ptr, code_ptr, scale_ptr,
    stride_xm, K, GROUPS, largest,
    BLOCK_G: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_G groups of a row: GROUP numbers, or all of the row where it is 0."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    cols = group[:, None] * GROUP + tl.arange(0, WIDTH)[None, :]
    mask = (group < GROUPS)[:, None] & (cols < K)
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(x), 1)
    scale = tl.math.div_rn(most, tl.zeros([BLOCK_G], tl.float32) + largest)
    scale = tl.where(scale == 0.0, 1.0, scale)
    holds_nan = tl.max((x != x).to(tl.int32), 1) > 0  # which a maximum ignores
    scale = tl.where(holds_nan, float("nan"), scale)
    x = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], [BLOCK_G, WIDTH]))
    tl.store(code_ptr + row * K + cols, x.to(code_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row * GROUPS + group, scale, mask=group < GROUPS)


@triton.jit
def _tile_kernel(
    x_ptr, w_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, y_ptr,
    stride_xm, stride_wn, stride_sx, stride_sw, M, N, K,
    BY_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of the output, a block of K at a time."""
    program = tl.program_id(0).to(tl.int64)
    tiles_m = tl.cdiv(M, BLOCK_M)  # the tiles that share weights run together
    m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = m < M, n < N
    x_ptrs = x_ptr + m[:, None] * stride_xm + k[None, :]
    w_ptrs = w_ptr + n[None, :] * stride_wn + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        x = tl.load(x_ptrs + start, mask=mask_m[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_ptrs + start, mask=mask_n[None, :] & inside[:, None], other=0.0)
        if BY_BLOCK:
            block = start // BLOCK_K
            scale_x = tl.load(scale_x_ptr + m * stride_sx + block, mask=mask_m, other=0.0)
            scale_w = tl.load(
                scale_w_ptr + n // BLOCK_K * stride_sw + block, mask=mask_n, other=0.0
            )
            scale_x, scale_w = scale_x.to(tl.float32), scale_w.to(tl.float32)
            acc += tl.dot(x, w) * scale_x[:, None] * scale_w[None, :]
        else:
            acc = tl.dot(x, w, acc, max_num_imprecise_acc=BLOCK_K)
    if not BY_BLOCK:
        scale_x = tl.load(scale_x_ptr + m * stride_sx, mask=mask_m, other=0.0).to(tl.float32)
        scale_w = tl.load(scale_w_ptr + n * stride_sw, mask=mask_n, other=0.0).to(tl.float32)
        acc *= scale_x[:, None] * scale_w[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], acc, mask=mask)


# --- launch -------------------------------------------------------------------------------------


@tunable("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
def _tile(thin: bool, by_block: bool) -> dict[str, int]:
    """The tile of a product; unmeasured. ``thin``: at most 64 rows.

    Scales by block keep a second tile of sums.
    """
    if _dispatch._cpu_runner == "interpreter":
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": _BLOCK}
    if thin:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": _BLOCK, "num_warps": 4, "num_stages": 4}
    block_n = 64 if by_block else 128
    return {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": _BLOCK, "num_warps": 8, "num_stages": 3}


@tunable("BLOCK_G", "num_warps")
def _quantize_tile(groups: int, width: int) -> dict[str, int]:
    """Groups of ``width`` numbers that a program scales: 16 numbers a thread; unmeasured."""
    block_g = min(triton.next_power_of_2(groups), 16)
    return {"BLOCK_G": block_g, "num_warps": min(max(block_g * width // 512, 1), 32)}


def _whole_lanes(x: Tensor) -> Tensor:
    """Rows (M, K) in steps of 16 bytes: a copy with zeros behind them where K is not such a step.

    Byte by byte a tile would not fit its registers.
    """
    short = -x.shape[1] % 16
    if not short and x.stride(0) % 16 == 0:
        return x
    return F.pad(x.view(torch.int8), (0, short)).view(x.dtype)


def _quantize_fake(x: Tensor, by_block: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    groups = _blocks(x.shape[-1]) if by_block else 1
    codes = x.new_empty(x.shape, dtype=dtype)
    return codes, x.new_empty(*x.shape[:-1], groups, dtype=torch.float32)


@torch_op("quantize_fp8", fake=_quantize_fake)
def _quantize(x: Tensor, by_block: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, scale = _quantize_fake(x, by_block, dtype)
    K, groups = x.shape[-1], scale.shape[-1]
    x = rows_of(x, K)
    width = _BLOCK if by_block else triton.next_power_of_2(K)
    tile = _quantize_tile(groups, width)
    _quantize_kernel[(x.shape[0], triton.cdiv(groups, tile["BLOCK_G"]))](
        x, codes, scale,
        x.stride(0), K, groups, torch.finfo(dtype).max,
        WIDTH=width, GROUP=_BLOCK if by_block else 0, **tile,
    )  # fmt: skip
    return codes, scale


def _fake(
    x: Tensor,
    weight: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    by_block: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype)


@torch_op("fp8_linear", fake=_fake)
def _forward(
    x: Tensor,
    weight: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    by_block: bool,
) -> Tensor:
    y = _fake(x, weight, scale_x, scale_w, bias, out_dtype, by_block)
    if y.numel() == 0:
        return y
    N, K = weight.shape
    x, weight = _whole_lanes(rows_of(x, K)), _whole_lanes(rows_of(weight, K))
    M, tile = x.shape[0], _tile(x.shape[0] <= 64, by_block)
    scale_x, scale_w = scale_x.contiguous(), scale_w.contiguous()
    # One row of scales after another; all on one number where there is only one.
    stride_x = _blocks(K) if by_block else int(scale_x.numel() > 1)
    stride_w = _blocks(K) if by_block else int(scale_w.numel() > 1)
    _tile_kernel[(triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)](
        x, weight, scale_x, scale_w, None if bias is None else bias.contiguous(), y,
        x.stride(0), weight.stride(0), stride_x, stride_w, M, N, x.shape[1],
        BY_BLOCK=by_block, HAS_BIAS=bias is not None, **tile,
    )  # fmt: skip
    return y


# --- public -------------------------------------------------------------------------------------


def _quantize_uncovered(
    x: Tensor, granularity: Granularity = "row", dtype: torch.dtype = torch.float8_e4m3fn
) -> str | None:
    _check_quantize(x, granularity, dtype)
    if x.dtype not in QUANTIZE.dtypes:
        return f"x is {x.dtype}"
    if granularity == "tensor":
        return "the scale of a whole tensor takes two passes"
    if x.numel() == 0 or (granularity == "row" and x.shape[-1] > _WIDEST):
        return f"x has {x.shape[-1]} columns"
    return _too_old(x)


@dispatched(eager=quantize_reference, uncovered=_quantize_uncovered)
def quantize_fp8(
    x: Tensor, granularity: Granularity = "row", dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Float8 codes of ``x`` and the scales that give it back: ``codes * scale``.

    Args:
        x: (..., K) float32, float16 or bfloat16; any strides.
        granularity: ``"tensor"``: one scale; ``"row"``: one a row; ``"block"``: one for every 128
            numbers of a row.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.

    Returns:
        Codes (..., K), and scales float32: (), (..., 1) or (..., ceil(K / 128)). The largest
        magnitude of a scale's numbers becomes the largest of the dtype; of zeros the scale is 1.
        NaN makes its scale and all its numbers NaN. No gradients.

    Raises:
        ValueError: Another granularity or dtype.
    """
    return _quantize(x.detach(), granularity == "block", dtype)


def _uncovered(
    x: Tensor,
    weight: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    _check(x, weight, scale_x, scale_w, bias, out_dtype)
    for name, t in (("x", x), ("weight", weight)):
        if t.dtype not in _FLOAT8:
            return f"{name} is {t.dtype}"
    for name, scale in (("scale_x", scale_x), ("scale_w", scale_w), ("bias", bias)):
        if scale is not None and scale.dtype not in OP.dtypes:
            return f"{name} is {scale.dtype}"
    given = (weight, scale_x, scale_w, *([] if bias is None else [bias]))
    if any(t.device != x.device for t in given):
        return "the tensors are on several devices"
    return "x is empty" if x.numel() == 0 else _too_old(x)


@dispatched(eager=reference, uncovered=_uncovered)
def fp8_linear(
    x: Tensor,
    weight: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``(x * scale_x) @ (weight * scale_w).T + bias`` on the 8-bit tensor cores.

    ``torch._scaled_mm(x, weight.T, scale_x, scale_w.T, bias, out_dtype=...)`` with the weight as
    ``F.linear`` takes it, any sizes and strides, and scales by block.

    Args:
        x: (..., K) float8_e4m3fn or float8_e5m2.
        weight: (N, K), of either.
        scale_x: One number, (..., 1), or (..., ceil(K / 128)): as of ``quantize_fp8``.
        scale_w: One number, (N, 1), or, where scale_x is by block too, (ceil(N / 128),
            ceil(K / 128)): one for 128 x 128.
        bias: (N,) floating point.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        (..., N) in ``out_dtype``. No gradients. GPUs before capability 8.9 run PyTorch's float32
        product of the dequantised operands.

    Raises:
        ValueError: Shapes or dtypes outside the above.
    """
    by_block = _granularity(x, weight, scale_x, scale_w) == "block"
    bias = None if bias is None else bias.detach()
    x, weight, scale_x, scale_w = (t.detach() for t in (x, weight, scale_x, scale_w))
    return _forward(x, weight, scale_x, scale_w, bias, out_dtype, by_block)


# --- declaration --------------------------------------------------------------------------------


def _quantize_example(
    dtype: torch.dtype,
    device: torch.device,
    M: int,
    K: int,
    granularity: Granularity = "row",
    to: torch.dtype = torch.float8_e4m3fn,
) -> Inputs:
    x = torch.randn(M, K, dtype=dtype, device=device)
    return {"x": x, "granularity": granularity, "dtype": to}


def _quantize_work(x: Tensor, granularity: Granularity, **_: object) -> tuple[int, int]:
    rows = x.numel() // x.shape[-1]
    scales = {"tensor": 1, "row": rows, "block": rows * _blocks(x.shape[-1])}[granularity]
    return x.nbytes + x.numel() + 4 * scales, 2 * x.numel()


QUANTIZE = Op(
    fused=quantize_fp8,
    reference=quantize_reference,
    example=_quantize_example,
    sizes=(
        {"M": 1, "K": 1},
        {"M": 5, "K": 300, "granularity": "block"},
        {"M": 5, "K": 300, "to": torch.float8_e5m2},
    ),
    bench_sizes=tuple(
        {"M": 8192, "K": 4096, "granularity": granularity} for granularity in ("row", "block")
    ),
    work=_quantize_work,
)


def _example(
    dtype: torch.dtype,
    device: torch.device,
    M: int,
    N: int,
    K: int,
    granularity: Granularity = "row",
    bias: bool = False,
) -> Inputs:
    x, scale_x = quantize_reference(torch.randn(M, K, device=device), granularity)
    weight = torch.randn(N, K, device=device) / K**0.5
    if granularity == "block":
        # Any scale of blocks will do: 128 rows share the scale of the first of them.
        _, scale_w = quantize_reference(weight[::_BLOCK], "block")
        weight = (weight / 4).to(torch.float8_e4m3fn)
    else:
        weight, scale_w = quantize_reference(weight, granularity)
    found = {"x": x, "weight": weight, "scale_x": scale_x, "scale_w": scale_w}
    if bias:
        found["bias"] = torch.randn(N, device=device)
    return found | {"out_dtype": dtype}


def work(
    x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, *, out_dtype: torch.dtype, **_
) -> tuple[int, int]:
    """Bytes: the operands, their scales and y, once each. FLOPs: the product."""
    (N, K), M = weight.shape, x.numel() // weight.shape[1]
    read = sum(t.nbytes for t in (x, weight, scale_x, scale_w))
    return read + M * N * out_dtype.itemsize, 2 * M * N * K


OP = Op(
    fused=fp8_linear,
    reference=reference,
    example=_example,
    sizes=(
        {"M": 1, "N": 1, "K": 1, "granularity": "tensor"},
        {"M": 18, "N": 150, "K": 300, "granularity": "block", "bias": True},
        {"M": 5, "N": 37, "K": 70},
    ),
    bench_sizes=(
        {"M": 64, "N": 4096, "K": 4096},
        {"M": 4096, "N": 4096, "K": 4096, "granularity": "block"},
        {"M": 4096, "N": 4096, "K": 4096},
    ),
    work=work,
)

OPS = (OP, QUANTIZE)
