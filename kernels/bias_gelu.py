r"""GELU of a linear layer's output and bias, fused, with the bias's gradient.

Forward: y = gelu(x + bias), rounded once. Backward, with h = x + bias:

    dx = dy * gelu'(h)        dbias = sum over rows of dx

Cost: the forward moves 2 elements for each of x, the backward 3 and one float32 row a program, both
bound by memory. The programs' rows are summed in a fixed order: two runs agree to the bit. Saved
for the backward: x and bias.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import dispatched
from ._launch import multiprocessors, rows_of
from ._op import Inputs, Op
from ._register import eager_gradients, torch_op
from ._rows import sum_parts
from ._tuned import tunable
from .activations import DTYPES, GELU_KINDS, activation


def reference(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """Bias and GELU in eager PyTorch."""
    return F.gelu(x + bias.to(x.dtype), approximate=approximate)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x_ptr, bias_ptr, y_ptr,
    stride_xm, M, N,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes one tile."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask_n = cols < N
    mask = (rows < M) & mask_n
    x = tl.load(x_ptr + rows * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)
    y, _ = activation(x + bias, KIND)
    tl.store(y_ptr + rows * N + cols, y, mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, dbias_ptr,
    stride_dym, stride_xm, M, N,
    KIND: tl.constexpr, WANTS_DBIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes every num_programs-th tile of its columns, and sums its part of dbias."""
    program = tl.program_id(0).to(tl.int64)  # row offsets can pass 2^31
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    bias = tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        mask = (rows < M) & mask_n[None, :]
        x_ptrs = x_ptr + rows * stride_xm + cols[None, :]
        dy_ptrs = dy_ptr + rows * stride_dym + cols[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        _, slope = activation(x + bias, KIND)
        dx = dy * slope
        tl.store(dx_ptr + rows * N + cols[None, :], dx, mask=mask)
        if WANTS_DBIAS:
            dbias += dx
    if WANTS_DBIAS:
        tl.store(dbias_ptr + program * N + cols, tl.sum(dbias, 0), mask=mask_n)


# --- launch -------------------------------------------------------------------------------------


@tunable("BLOCK_M", "BLOCK_N", "num_warps")
def _block(N: int) -> dict[str, int]:
    """A tile of about 2048 numbers; unmeasured.

    A thread's columns are the same in each row of 1024, so that neither the bias nor the sums of
    dbias meet in shared memory: 0 and 1 barriers on sm_90, against 3 and 8 for rows of 256.
    """
    block_n = min(triton.next_power_of_2(N), 1024)
    return {"BLOCK_M": 2048 // block_n, "BLOCK_N": block_n, "num_warps": 4}


def _tile(M: int, N: int) -> tuple[dict[str, int], int, int]:
    """The tile of M rows, and how many make up the rows and the columns."""
    tile = _block(N)
    tile["BLOCK_M"] = min(tile["BLOCK_M"], triton.next_power_of_2(M))
    return tile, triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(N, tile["BLOCK_N"])


def _forward_fake(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    dy: Tensor, x: Tensor, bias: Tensor, kind: str, wants_dbias: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape if wants_dbias else 0)


@torch_op("bias_gelu_backward", fake=_backward_fake)
def _backward(
    dy: Tensor, x: Tensor, bias: Tensor, kind: str, wants_dbias: bool
) -> tuple[Tensor, Tensor]:
    dx, dbias = _backward_fake(dy, x, bias, kind, wants_dbias)
    if x.numel() == 0:
        return dx, dbias.zero_()
    N = bias.numel()
    x, dy = rows_of(x, N), rows_of(dy, N)
    M = x.shape[0]
    tile, tiles_m, tiles_n = _tile(M, N)
    programs = min(tiles_m, triton.cdiv(4 * multiprocessors(x.device), tiles_n))
    parts = x.new_empty(programs, N, dtype=torch.float32) if wants_dbias else None
    _backward_kernel[(programs, tiles_n)](
        dy, x, bias, dx, parts,
        dy.stride(0), x.stride(0), M, N,
        KIND=kind, WANTS_DBIAS=wants_dbias, **tile,
    )  # fmt: skip
    if wants_dbias:
        sum_parts(None, parts, None, dbias)
    return dx, dbias


def _save(ctx, inputs, output):
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx, dy):
    x, bias = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        approximate = "none" if ctx.kind == "gelu" else "tanh"
        return eager_gradients(reference, (x, bias, approximate), (dy,))
    wants_dx, wants_dbias, _ = ctx.needs_input_grad
    dx, dbias = _backward(dy, x, bias, ctx.kind, wants_dbias)
    return dx if wants_dx else None, dbias if wants_dbias else None, None


@torch_op("bias_gelu", fake=_forward_fake, setup_context=_save, backward=_gradients)
def _forward(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    y = _forward_fake(x, bias, kind)
    if y.numel() == 0:
        return y
    x = rows_of(x, bias.numel())
    M, N = x.shape
    tile, *tiles = _tile(M, N)
    _forward_kernel[tuple(tiles)](x, bias, y, x.stride(0), M, N, KIND=kind, **tile)
    return y


# --- public -------------------------------------------------------------------------------------


def _uncovered(x: Tensor, bias: Tensor, approximate: str = "tanh") -> str | None:
    for name, t in (("x", x), ("bias", bias)):
        if t.dtype not in DTYPES:
            return f"{name} is {t.dtype}"
    if bias.dim() != 1 or bias.shape != x.shape[-1:] or bias.device != x.device:
        return f"bias has shape {tuple(bias.shape)} on {bias.device}, x {tuple(x.shape)}"
    if approximate not in GELU_KINDS:
        return f"approximate is {approximate!r}"
    return None


@dispatched(eager=reference, uncovered=_uncovered)
def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """``F.gelu(x + bias, approximate=approximate)`` in one pass, forward and backward.

    Args:
        x: (..., N) float32, float16 or bfloat16, any strides: a linear layer without its bias.
        bias: (N,), any of the dtypes.
        approximate: ``"none"`` by the error function, ``"tanh"`` as GPT-2.

    Returns:
        The shape and dtype of ``x``. Gradients are the same to the bit from run to run.

    Raises:
        RuntimeError: What PyTorch raises, for shapes that do not fit or another ``approximate``.
    """
    return _forward(x, bias.contiguous(), GELU_KINDS[approximate])


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    M: int,
    N: int,
    approximate: str = "tanh",
    bias: torch.dtype | None = None,
) -> Inputs:
    return {
        "x": (2 * torch.randn(M, N, dtype=dtype, device=device)).requires_grad_(),
        "bias": torch.randn(N, dtype=bias or dtype, device=device).requires_grad_(),
        "approximate": approximate,
    }


OP = Op(
    fused=bias_gelu,
    reference=reference,
    example=_example,
    sizes=(
        {"M": 1, "N": 1},
        {"M": 37, "N": 300},
        {"M": 5, "N": 48, "approximate": "none", "bias": torch.float32},
    ),
    bench_sizes=tuple({"M": 8192, "N": n} for n in (3072, 8192, 16384)),
    work=lambda x, bias, **_: (2 * x.nbytes + bias.nbytes, 11 * x.numel()),
)
