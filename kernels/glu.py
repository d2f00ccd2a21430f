r"""Gated linear units: SwiGLU and GeGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202).

Forward: y = act(gate) * up, with act SiLU, or GELU by the error function or by tanh.
Backward, from gate and up alone:

    dgate = dy * up * act'(gate)        dup = dy * act(gate)

Cost: the forward moves 3 elements for each of y, the backward 5, both bound by memory. gate and up
are two tensors, or the two halves of one that a single matrix product wrote: then so is the
gradient. Saved for the backward: the inputs, where eager PyTorch keeps act(gate) too.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import dispatched
from ._launch import rows_of
from ._op import Inputs, Op
from ._register import eager_gradients, torch_op
from ._tuned import tunable
from .activations import DTYPES, GELU_KINDS, activation


def _halves(name: str, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up, cut from one packed tensor where ``up`` is None."""
    if up is not None:
        return gate, up
    if gate.dim() == 0 or gate.shape[-1] % 2:
        raise ValueError(
            f"{name}: gate must have an even last dimension, gate and up side by side, where up is "
            f"None; got shape {tuple(gate.shape)}"
        )
    half = gate.shape[-1] // 2
    return gate.narrow(-1, 0, half), gate.narrow(-1, half, half)


def swiglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """SwiGLU in eager PyTorch."""
    gate, up = _halves("swiglu", gate, up)
    return F.silu(gate) * up


def geglu_reference(gate: Tensor, up: Tensor | None = None, approximate: str = "none") -> Tensor:
    """GeGLU in eager PyTorch."""
    gate, up = _halves("geglu", gate, up)
    return F.gelu(gate, approximate=approximate) * up


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The program's rows and columns, and whether all of them exist."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    row = program // blocks * BLOCK_M
    col = program % blocks * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    cols = col + tl.arange(0, BLOCK_N)[None, :]
    return rows, cols, (row + BLOCK_M <= M) & (col + BLOCK_N <= N)


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr,
    stride_gm, stride_um, stride_ym, M, N,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes one tile. Whole tiles need no mask, which would narrow the accesses."""
    rows, cols, whole = _tile_of(M, N, BLOCK_M, BLOCK_N)
    gate_ptrs = gate_ptr + rows * stride_gm + cols
    up_ptrs = up_ptr + rows * stride_um + cols
    y_ptrs = y_ptr + rows * stride_ym + cols
    if whole:
        gate = tl.load(gate_ptrs).to(tl.float32)
        up = tl.load(up_ptrs).to(tl.float32)
        y, _ = activation(gate, KIND)
        tl.store(y_ptrs, y * up)
    else:
        mask = (rows < M) & (cols < N)
        gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)
        y, _ = activation(gate, KIND)
        tl.store(y_ptrs, y * up, mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    stride_dym, stride_gm, stride_um, stride_dgm, stride_dum, M, N,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As _forward_kernel."""
    rows, cols, whole = _tile_of(M, N, BLOCK_M, BLOCK_N)
    dy_ptrs = dy_ptr + rows * stride_dym + cols
    gate_ptrs = gate_ptr + rows * stride_gm + cols
    up_ptrs = up_ptr + rows * stride_um + cols
    dgate_ptrs = dgate_ptr + rows * stride_dgm + cols
    dup_ptrs = dup_ptr + rows * stride_dum + cols
    if whole:
        dy = tl.load(dy_ptrs).to(tl.float32)
        y, slope = activation(tl.load(gate_ptrs).to(tl.float32), KIND)
        up = tl.load(up_ptrs).to(tl.float32)
        tl.store(dgate_ptrs, dy * up * slope)
        tl.store(dup_ptrs, dy * y)
    else:
        mask = (rows < M) & (cols < N)
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
        y, slope = activation(gate, KIND)
        up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dgate_ptrs, dy * up * slope, mask=mask)
        tl.store(dup_ptrs, dy * y, mask=mask)


# --- launch -------------------------------------------------------------------------------------


@tunable("elements", "num_warps")
def _share(kind: str, x: Tensor) -> dict[str, int]:
    """Numbers of a tile: twice 16 bytes of half precision a thread; unmeasured."""
    return {"elements": 2048, "num_warps": 4}


def _tiled(*tensors: Tensor) -> tuple[list[Tensor], list[int], int, int]:
    """The tensors as rows, their row strides, M and N; gapless ones are all one row.

    A row stride of 0 stands for the only row, so that the compiler knows it as a multiple of 16.
    """
    N = tensors[0].shape[-1] if tensors[0].dim() else 1
    rows = [rows_of(t, N) for t in tensors]
    M = rows[0].shape[0]
    if all(t.is_contiguous() for t in rows):
        M, N = 1, M * N
    return rows, [t.stride(0) if M > 1 else 0 for t in rows], M, N


def _tile(share: dict[str, int], M: int, N: int) -> tuple[dict[str, int], tuple[int]]:
    elements, warps = share["elements"], share["num_warps"]
    block_n = min(triton.next_power_of_2(N), elements)
    block_m = min(elements // block_n, triton.next_power_of_2(M))
    programs = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps}, (programs,)


def _eager(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    if kind == "silu":
        return swiglu_reference(gate, up)
    return geglu_reference(gate, up, "none" if kind == "gelu" else "tanh")


def _forward_fake(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    return gate.new_empty(_halves("glu", gate, up)[0].shape)


def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


@torch_op("glu_backward", fake=_backward_fake)
def _backward(dy: Tensor, gate: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    dgate, dup = _backward_fake(dy, gate, up, kind)
    if dy.numel():
        gradients = _halves("glu", dgate, None if up is None else dup)
        tensors, strides, M, N = _tiled(dy, *_halves("glu", gate, up), *gradients)
        tile, grid = _tile(_share(f"{kind} backward", dy), M, N)
        _backward_kernel[grid](*tensors, *strides, M, N, KIND=kind, **tile)
    return dgate, dup


def _save(ctx, inputs, output):
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx, dy):
    gate, up = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        return eager_gradients(_eager, (gate, up, ctx.kind), (dy,))
    dgate, dup = _backward(dy, gate, up, ctx.kind)
    wants = ctx.needs_input_grad
    return dgate if wants[0] else None, dup if wants[1] else None, None


@torch_op("glu", fake=_forward_fake, setup_context=_save, backward=_gradients)
def _forward(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    y = _forward_fake(gate, up, kind)
    if y.numel():
        tensors, strides, M, N = _tiled(*_halves("glu", gate, up), y)
        tile, grid = _tile(_share(kind, y), M, N)
        _forward_kernel[grid](*tensors, *strides, M, N, KIND=kind, **tile)
    return y


# --- public -------------------------------------------------------------------------------------


def _swiglu_uncovered(gate: Tensor, up: Tensor | None = None) -> str | None:
    for name, t in (("gate", gate), ("up", up)):
        if t is not None and t.dtype not in DTYPES:
            return f"{name} is {t.dtype}"
    if up is None:
        return None
    if gate.dtype != up.dtype or gate.shape != up.shape or gate.device != up.device:
        return "gate and up differ in dtype, shape or device"
    return None


def _geglu_uncovered(
    gate: Tensor, up: Tensor | None = None, approximate: str = "none"
) -> str | None:
    if approximate not in GELU_KINDS:
        return f"approximate is {approximate!r}"
    return _swiglu_uncovered(gate, up)


@dispatched(eager=swiglu_reference, uncovered=_swiglu_uncovered)
def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """``F.silu(gate) * up`` in one pass, forward and backward.

    Args:
        gate: (..., N) float32, float16 or bfloat16, any strides; with ``up`` None (..., 2N), the
            gate in the first half of the last dimension and up in the second.
        up: The shape and dtype of ``gate``, or None.

    Returns:
        (..., N), the dtype of ``gate``.

    Raises:
        ValueError: ``up`` is None and the last dimension of ``gate`` is odd.
    """
    _halves("swiglu", gate, up)
    return _forward(gate, up, "silu")


@dispatched(eager=geglu_reference, uncovered=_geglu_uncovered)
def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "none") -> Tensor:
    """``F.gelu(gate, approximate=approximate) * up`` in one pass, forward and backward.

    Args:
        gate: (..., N) float32, float16 or bfloat16, any strides; with ``up`` None (..., 2N), the
            gate in the first half of the last dimension and up in the second.
        up: The shape and dtype of ``gate``, or None.
        approximate: ``"none"`` by the error function, ``"tanh"`` as Gemma.

    Returns:
        (..., N), the dtype of ``gate``.

    Raises:
        ValueError: ``up`` is None and the last dimension of ``gate`` is odd.
        RuntimeError: What ``F.gelu`` raises, for another ``approximate``.
    """
    _halves("geglu", gate, up)
    return _forward(gate, up, GELU_KINDS[approximate])


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype, device: torch.device, M: int, N: int, packed: bool = False
) -> Inputs:
    if packed:
        return {"gate": (2 * torch.randn(M, 2 * N, dtype=dtype, device=device)).requires_grad_()}
    gate, up = (2 * torch.randn(M, N, dtype=dtype, device=device) for _ in range(2))
    return {"gate": gate.requires_grad_(), "up": up.requires_grad_()}


def _geglu_example(
    dtype: torch.dtype, device: torch.device, M: int, N: int, approximate: str, **layout: bool
) -> Inputs:
    return _example(dtype, device, M, N, **layout) | {"approximate": approximate}


def _work(gate: Tensor, up: Tensor | None = None, approximate: str = "") -> tuple[int, int]:
    elements = gate.numel() // (2 if up is None else 1)
    return 3 * elements * gate.element_size(), (10 if approximate else 6) * elements


OPS = (
    Op(
        fused=swiglu,
        reference=swiglu_reference,
        example=_example,
        sizes=(
            {"M": 1, "N": 1},
            {"M": 3, "N": 700},
            {"M": 5, "N": 48, "packed": True},
            {"M": 2, "N": 1100, "packed": True},
        ),
        bench_sizes=(
            *({"M": 8192, "N": n} for n in (2048, 8192, 14336)),
            {"M": 8192, "N": 14336, "packed": True},
        ),
        work=_work,
    ),
    Op(
        fused=geglu,
        reference=geglu_reference,
        example=_geglu_example,
        sizes=(
            {"M": 1, "N": 1, "approximate": "none"},
            {"M": 3, "N": 700, "approximate": "none"},
            {"M": 5, "N": 48, "approximate": "tanh", "packed": True},
        ),
        bench_sizes=tuple(
            {"M": 8192, "N": 14336, "approximate": a, "packed": p}
            for a, p in (("none", False), ("tanh", False), ("tanh", True))
        ),
        work=_work,
    ),
)
