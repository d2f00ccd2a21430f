r"""Losses over x Wᵀ + bias whose logits are never whole: statistics in a product, gradients again.

The forward computes logits a tile at a time on the tensor cores, and keeps of each tile its rows'
maxima and sums (Wijmans et al. 2024, https://arxiv.org/abs/2411.09009). The backward computes them
once more, a strip at a time: some columns of up to STRIP_ROWS rows, 32 MiB whatever N and V are.
They become ds, the loss's gradient by the logits, before they are stored, and ordinary products
read ds back while it is in L2:

    dx[rows] += ds W[strip]        dW[strip] += dsᵀ x[rows]        dbias[strip] += sum of ds

Up to STRIP_ROWS rows dW[strip] is a single product and is written once, in its own dtype; past
them it is summed in float32. No atomics, no order left open.

Cost, with N rows and H features: 2 NHV floating-point operations forward and 6 NHV backward.

A backward without any strip was modelled and left out: a program owns 128 rows of dx, computes ds
256 columns at a time in registers, and adds its products to dx in L2; another kernel does so for
dW, at 8 NHV operations. For 8192 rows of 768 and 50257 classes in bfloat16 on sm_90 dx alone takes
a modelled 3.8 ms (255 registers, no spills; 5.8 ms at 128 columns): for each H columns of dx that
a block adds, 8 H bytes cross L2, and rows of W once more. Today's three products, each at the
speed of ours, take 4.3 ms together. On sm_80 every such tile spills, does not fit or takes 11 ms.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch
from .._maths import exp
from .._tuned import tunable
from ..attention._tiles import gpu_class
from ..cross_entropy import capped

# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _tile_at(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """A program's tile: bands of GROUP tiles of rows, so that a band's rows of W stay in L2."""
    per_band = GROUP * tiles_n
    band = program // per_band
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    rest = program % per_band
    return band * GROUP + rest % height, rest // height


@triton.jit
def _logits_of(
    x_ptr, w_ptr, bias_ptr, rows, cols, stride_xm, stride_wv, N, V, H, softcap,
    HAS_SOFTCAP: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of logits in float32, -inf past the vocabulary, and the slope of their cap.

    Rows past the last repeat it.
    """
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = tl.minimum(rows, N - 1).to(tl.int64)
    w_rows = tl.minimum(cols, V - 1).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + w_rows[None, :] * stride_wv + offs_k[:, None]
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, H, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask = offs_k < H - k
            x = tl.load(x_ptrs, mask=mask[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask[:, None], other=0.0)
        z = tl.dot(x, w, z, input_precision="tf32x3")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if bias_ptr is not None:
        z += tl.load(bias_ptr + w_rows).to(tl.float32)[None, :]
    slope = 1.0
    if HAS_SOFTCAP:
        z, slope = capped(z, softcap)
    return tl.where((cols < V)[None, :], z, float("-inf")), slope


@triton.jit
def _parts_kernel(
    x_ptr, w_ptr, bias_ptr, target_ptr, weight_ptr, m_ptr, d_ptr, pull_ptr, z_y_ptr,
    stride_xm, stride_wv, N, V, H, softcap, tiles_m, tiles_n,
    HAS_SOFTCAP: tl.constexpr, EVEN_K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program's tile of logits leaves its rows' maximum, sum, sum of w z, and the target's z."""
    tile_m, tile_n = _tile_at(tl.program_id(0), tiles_m, tiles_n, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = rows < N
    z, _ = _logits_of(
        x_ptr, w_ptr, bias_ptr, rows, cols, stride_xm, stride_wv, N, V, H, softcap,
        HAS_SOFTCAP, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    m = tl.max(z, 1)
    shift = tl.where(m == float("-inf"), 0.0, m)  # -inf less -inf would be NaN
    d = tl.sum(exp(z - shift[:, None]), 1)
    place = tl.cast(tile_n, tl.int64) * N + rows
    tl.store(m_ptr + place, m, mask=mask_m)
    tl.store(d_ptr + place, d, mask=mask_m)
    if pull_ptr is not None:
        inside = cols < V
        wz = tl.where(inside[None, :], z, 0.0)
        if weight_ptr is not None:
            wz *= tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        tl.store(pull_ptr + place, tl.sum(wz, 1), mask=mask_m)
    y = tl.load(target_ptr + rows, mask=mask_m, other=-1)
    z_y = tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), 1)
    here = (y >= tile_n * BLOCK_N) & (y < tl.minimum(V, (tile_n + 1) * BLOCK_N))
    tl.store(z_y_ptr + rows, z_y, mask=mask_m & here)


@triton.jit
def _strip_kernel(
    x_ptr, w_ptr, bias_ptr, target_ptr, weight_ptr, m_ptr, a_ptr, b_ptr, c_ptr, ds_ptr,
    stride_xm, stride_wv, stride_ds, first, N, V, H, softcap, tiles_m, tiles_n,
    HAS_SOFTCAP: tl.constexpr, EVEN_K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``ds = a exp(z - m) - b [c = y] - c w`` on a tile of the strip that begins at ``first``."""
    tile_m, tile_n = _tile_at(tl.program_id(0), tiles_m, tiles_n, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    strip_cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = first + strip_cols
    mask_m = rows < N
    z, slope = _logits_of(
        x_ptr, w_ptr, bias_ptr, rows, cols, stride_xm, stride_wv, N, V, H, softcap,
        HAS_SOFTCAP, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    m = tl.load(m_ptr + rows, mask=mask_m, other=0.0)
    a = tl.load(a_ptr + rows, mask=mask_m, other=0.0)
    b = tl.load(b_ptr + rows, mask=mask_m, other=0.0)
    y = tl.load(target_ptr + rows, mask=mask_m, other=-1)
    ds = a[:, None] * exp(z - m[:, None])
    ds -= tl.where(cols[None, :] == y[:, None], b[:, None], 0.0)
    inside = cols < V
    if c_ptr is not None:
        c = tl.load(c_ptr + rows, mask=mask_m, other=0.0)
        w = tl.full([BLOCK_N], 1.0, tl.float32)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        ds -= c[:, None] * w[None, :]
    if HAS_SOFTCAP:
        ds *= slope
    places = rows.to(tl.int64)[:, None] * stride_ds + strip_cols[None, :]
    tl.store(ds_ptr + places, ds, mask=mask_m[:, None])


# --- launch -------------------------------------------------------------------------------------

# What the backward holds of ds at once; unmeasured. It fits in L2 (40 MiB on an A100, 50 MiB on an
# H100), and 2048 columns of 8192 rows still fill a GPU with tiles of every product.
STRIP_BYTES, STRIP_ROWS = 32 << 20, 8192


@tunable("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages")
def _product_tile(x: Tensor, light: bool) -> dict[str, int]:
    """The tile of a product; unmeasured.

    light: Nothing but statistics follows the product. On GPUs whose tensor cores read
    operands from shared memory a tile of twice the columns then fits into the registers: for
    8192 rows of 768 and 50257 classes a modelled 1.4 ms against 1.8 ms on sm_90.
    """
    if not x.is_cuda and _dispatch._cpu_runner == "interpreter":
        m, n, k, group, warps, stages = 16, 128, 32, 2, 4, 1
    elif x.dtype == torch.float32:  # both halves of each operand, for three tf32 products
        m, n, k, group, warps, stages = 64, 64, 32, 8, 4, 2
    else:
        wide = light and gpu_class(x) in ("hopper", "blackwell")
        m, n, k, group, warps, stages = 128, 256 if wide else 128, 64, 8, 8, 3
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP": group,
        "num_warps": warps,
        "num_stages": stages,
    }


def _tile(x: Tensor, H: int, *, light: bool = False) -> dict[str, int | bool]:
    """The tile of a product over H columns."""
    tile = _product_tile(x, light)
    return {**tile, "EVEN_K": H % tile["BLOCK_K"] == 0}


def nothing_runs(x: Tensor) -> bool:
    """Whether kernels are only compiled now: then products of matrices need not run either."""
    return not x.is_cuda and _dispatch._cpu_runner == "compiler"


def multiply(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """``out = a @ b + bias``."""
    if nothing_runs(a):
        return
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b`` in the dtype of ``total``; ``=`` where it is the first."""
    if nothing_runs(a):
        return
    if a.is_cuda and a.dtype != total.dtype:
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1)


def add_rows(total: Tensor, a: Tensor, first: bool) -> None:
    """``total += a.sum(0)``, summed in float32 or better; ``=`` where it is the first."""
    if nothing_runs(a):
        return
    summed = a.sum(0, dtype=torch.promote_types(a.dtype, torch.float32))
    if first:
        total.copy_(summed)
    else:
        total.add_(summed)


def statistics(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    softcap: float,
    wants_pull: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of each row of logits: m, d, the target's logit (0 if it is not here), and sum(w z)."""
    (N, H), V = x.shape, matrix.shape[0]
    tile = _tile(x, H, light=bias is None and softcap == 0.0 and not wants_pull)
    tiles_m, tiles_n = triton.cdiv(N, tile["BLOCK_M"]), triton.cdiv(V, tile["BLOCK_N"])
    m, d = x.new_empty(2, tiles_n, N, dtype=torch.float32).unbind()
    pull = torch.empty_like(m) if wants_pull else None
    z_y = m.new_zeros(N)
    _parts_kernel[(tiles_m * tiles_n,)](
        x, matrix, bias, target, weight, m, d, pull, z_y,
        x.stride(0), matrix.stride(0), N, V, H, softcap, tiles_m, tiles_n,
        HAS_SOFTCAP=softcap > 0.0, **tile,
    )  # fmt: skip
    top = m.amax(0)
    shift = torch.where(top == float("-inf"), 0.0, top)
    d = (d * (m - shift).exp()).sum(0)
    return top, d, z_y, None if pull is None else pull.sum(0)


def gradients(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    softcap: float,
    rows: tuple[Tensor, Tensor, Tensor, Tensor | None],
    strip: int | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The wanted of dx and dbias, in float32, and dW, from the rows' (m, a, b, c)."""
    (N, H), V = x.shape, matrix.shape[0]
    tile = _tile(x, H)
    block = tile["BLOCK_N"]
    height = min(N, STRIP_ROWS)
    strip = strip or max(STRIP_BYTES // (height * x.element_size()), 1)
    strip = triton.cdiv(min(strip, V), block) * block
    ds = x.new_empty(height, strip)
    dx = x.new_empty(N, H, dtype=torch.float32) if wanted[0] else None
    dmatrix = matrix.new_empty(V, H) if wanted[1] else None
    dbias = bias.new_empty(V, dtype=torch.float32) if bias is not None and wanted[2] else None
    sums = None  # of dW's strip over blocks of rows
    if dmatrix is not None and height < N:
        sums = x.new_empty(min(strip, V), H, dtype=torch.float32)
    for first in range(0, V, strip):
        last = min(first + strip, V)
        tiles_n = triton.cdiv(last - first, block)
        for top in range(0, N, height):
            some = slice(top, min(top + height, N))
            part = ds[: some.stop - top, : last - first]
            tiles_m = triton.cdiv(part.shape[0], tile["BLOCK_M"])
            _strip_kernel[(tiles_m * tiles_n,)](
                x[some], matrix, bias, target[some], weight,
                *(None if r is None else r[some] for r in rows), ds,
                x.stride(0), matrix.stride(0), ds.stride(0),
                first, part.shape[0], V, H, softcap, tiles_m, tiles_n,
                HAS_SOFTCAP=softcap > 0.0, **tile,
            )  # fmt: skip
            if dx is not None:
                accumulate(dx[some], part, matrix[first:last], first == 0)
            if sums is not None:
                accumulate(sums[: last - first], part.T, x[some], top == 0)
            elif dmatrix is not None:
                multiply(part.T, x, out=dmatrix[first:last])
            if dbias is not None:
                add_rows(dbias[first:last], part, top == 0)
        if sums is not None and dmatrix is not None:
            dmatrix[first:last] = sums[: last - first]
    return dx, dmatrix, dbias
