r"""Activations of one tensor: GELU and the squared ReLU.

GELU: Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415. Squared ReLU: So et al. 2021,
https://arxiv.org/abs/2109.08668. Forward, with Phi the standard normal distribution function:

    gelu, "none":  y = x * Phi(x) = x * (1 + erf(x / sqrt(2))) / 2
    gelu, "tanh":  y = x * sigmoid(2 z),   z = sqrt(2 / pi) * (x + 0.044715 x^3)
    relu_squared:  y = max(x, 0)^2

The second is (1 + tanh(z)) / 2 by another name, with one exponential and one reciprocal.
Backward: dx = dy * y'(x), computed again from x.

Cost: the forward reads x and writes y, the backward reads x and dy and writes dx: 2 and 3 elements
each, both bound by memory. Saved for the backward: x, which the layer before keeps anyway.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ._dispatch import dispatched
from ._maths import LOG2_E, exp, reciprocal
from ._op import Inputs, Op
from ._register import eager_gradients, torch_op
from ._tuned import tunable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gelu_reference(input: Tensor, approximate: str = "none") -> Tensor:
    """GELU in eager PyTorch."""
    return F.gelu(input, approximate=approximate)


def relu_squared_reference(x: Tensor) -> Tensor:
    """Squared ReLU in eager PyTorch."""
    return F.relu(x).square()


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _normal(x):
    """Phi(x) and e^(-x^2 / 2), which Phi takes anyway.

    Phi(-a) e^(a^2 / 2) is a polynomial in t = 1 / (1 + 0.255 a), fitted in float64 to within 1.3e-8
    of Phi, and 6.5e-6 of its tail. ``tl.erf`` costs more instructions, and its tail cancels.
    """
    bell = tl.exp2(x * x * (-0.5 * LOG2_E))
    t = reciprocal(1.0 + 0.255 * tl.abs(x))
    tail = 0.27745975178192 + t * -0.08111311537165
    tail = -0.17105232583872 + t * tail
    tail = 0.20932496140560 + t * tail
    tail = 0.05602732686285 + t * tail
    tail = 0.10803603392147 + t * tail
    tail = bell * (t * (0.10131735440787 + t * tail))
    return tl.where(x < 0.0, tail, 1.0 - tail), bell


@triton.jit
def _sigmoid(x):
    """1 / (1 + e^-x) and 1 / (1 + e^x), their tails as exact as their middle."""
    e = exp(-tl.abs(x))
    more = reciprocal(1.0 + e)
    less = e * more
    return tl.where(x < 0.0, less, more), tl.where(x < 0.0, more, less)


@triton.jit
def activation(x, KIND: tl.constexpr):
    """The activation of float32 numbers and its slope there; the unused one costs nothing."""
    if KIND == "gelu":
        phi, bell = _normal(x)
        y = x * phi
        slope = phi + x * (0.3989422804014327 * bell)
    elif KIND == "gelu_tanh":
        square = x * x
        s, rest = _sigmoid(x * (1.5957691216057308 + 0.07135481282553303 * square))
        y = x * s
        bend = x * s * rest
        # Where the tail has died out, the square may already be infinite.
        bend = tl.where(bend == 0.0, 0.0, bend * (1.5957691216057308 + 0.2140644384765991 * square))
        slope = s + bend
    elif KIND == "silu":
        s, rest = _sigmoid(x)
        y = x * s
        slope = s + y * rest
    else:
        tl.static_assert(KIND == "relu_squared")
        positive = tl.where(x < 0.0, 0.0, x)  # tl.maximum would lose NaN
        y = positive * positive
        slope = 2.0 * positive
    return y, slope


@triton.jit
def _forward_kernel(x_ptr, y_ptr, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes BLOCK numbers. Whole blocks need no mask, which would narrow the accesses."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    x_ptrs = x_ptr + start + offs
    y_ptrs = y_ptr + start + offs
    if start + BLOCK <= n:
        y, _ = activation(tl.load(x_ptrs).to(tl.float32), KIND)
        tl.store(y_ptrs, y)
    else:
        mask = offs < n - start
        y, _ = activation(tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32), KIND)
        tl.store(y_ptrs, y, mask=mask)


@triton.jit
def _backward_kernel(dy_ptr, x_ptr, dx_ptr, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """As _forward_kernel."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    dy_ptrs = dy_ptr + start + offs
    x_ptrs = x_ptr + start + offs
    dx_ptrs = dx_ptr + start + offs
    if start + BLOCK <= n:
        dy = tl.load(dy_ptrs).to(tl.float32)
        _, slope = activation(tl.load(x_ptrs).to(tl.float32), KIND)
        tl.store(dx_ptrs, dy * slope)
    else:
        mask = offs < n - start
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        _, slope = activation(tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32), KIND)
        tl.store(dx_ptrs, dy * slope, mask=mask)


# --- launch -------------------------------------------------------------------------------------

GELU_KINDS = {"none": "gelu", "tanh": "gelu_tanh"}  # ``approximate`` to the kernels' KIND


@tunable("BLOCK", "num_warps")
def _tile(kind: str, dtype: torch.dtype) -> dict[str, int]:
    """Twice 16 bytes of half precision a thread; unmeasured."""
    return {"BLOCK": 2048, "num_warps": 4}


def _laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """``x`` itself, or a copy, with the strides of ``like``."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def _eager(x: Tensor, kind: str) -> Tensor:
    if kind == "relu_squared":
        return relu_squared_reference(x)
    return F.gelu(x, approximate="none" if kind == "gelu" else "tanh")


def _forward_fake(x: Tensor, kind: str) -> Tensor:
    return torch.empty_like(x)


def _backward_fake(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    return torch.empty_like(x)


@torch_op("activation_backward", fake=_backward_fake)
def _backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    dx = torch.empty_like(x)  # dense, in the order of x
    n = x.numel()
    if n:
        tile = _tile(f"{kind} backward", x.dtype)
        _backward_kernel[(triton.cdiv(n, tile["BLOCK"]),)](
            _laid_out_as(dy, dx), _laid_out_as(x, dx), dx, n, KIND=kind, **tile
        )
    return dx


def _save(ctx, inputs, output):
    x, ctx.kind = inputs
    ctx.save_for_backward(x)


def _gradients(ctx, dy):
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        return eager_gradients(_eager, (x, ctx.kind), (dy,))
    return _backward(dy, x, ctx.kind), None


@torch_op("activation", fake=_forward_fake, setup_context=_save, backward=_gradients)
def _forward(x: Tensor, kind: str) -> Tensor:
    y = torch.empty_like(x)
    n = x.numel()
    if n:
        tile = _tile(kind, x.dtype)
        _forward_kernel[(triton.cdiv(n, tile["BLOCK"]),)](
            _laid_out_as(x, y), y, n, KIND=kind, **tile
        )
    return y


# --- public -------------------------------------------------------------------------------------


def _gelu_uncovered(input: Tensor, approximate: str = "none") -> str | None:
    if input.dtype not in DTYPES:
        return f"input is {input.dtype}"
    if approximate not in GELU_KINDS:
        return f"approximate is {approximate!r}"
    return None


def _relu_squared_uncovered(x: Tensor) -> str | None:
    return None if x.dtype in DTYPES else f"x is {x.dtype}"


@dispatched(eager=gelu_reference, uncovered=_gelu_uncovered)
def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``input`` times the share of the normal distribution below it; drop-in for ``F.gelu``.

    Args:
        input: Any shape and strides, float32, float16 or bfloat16.
        approximate: ``"none"`` by the error function, ``"tanh"`` as GPT-2.

    Returns:
        The shape, dtype and, where ``input`` is dense, strides of ``input``.

    Raises:
        RuntimeError: What ``F.gelu`` raises, for another ``approximate``.
    """
    return _forward(input, GELU_KINDS[approximate])


@dispatched(eager=relu_squared_reference, uncovered=_relu_squared_uncovered)
def relu_squared(x: Tensor) -> Tensor:
    """``max(x, 0)`` squared, in one pass (Primer: So et al. 2021).

    Args:
        x: Any shape and strides, float32, float16 or bfloat16.

    Returns:
        The shape, dtype and, where ``x`` is dense, strides of ``x``.
    """
    return _forward(x, "relu_squared")


class GELU(nn.GELU):
    """``torch.nn.GELU`` over the fused ``gelu``."""

    def forward(self, input: Tensor) -> Tensor:
        """The activation of each number."""
        return gelu(input, self.approximate)


# --- declaration --------------------------------------------------------------------------------


def _gelu_example(
    dtype: torch.dtype, device: torch.device, M: int, N: int, approximate: str = "none"
) -> Inputs:
    x = 3 * torch.randn(M, N, dtype=dtype, device=device)  # as far as the tails
    return {"input": x.requires_grad_(), "approximate": approximate}


def _relu_squared_example(dtype: torch.dtype, device: torch.device, M: int, N: int) -> Inputs:
    return {"x": torch.randn(M, N, dtype=dtype, device=device).requires_grad_()}


_op = functools.partial(Op, bench_sizes=tuple({"M": 8192, "N": 2**k} for k in (10, 12, 14)))

OPS = (
    _op(
        fused=gelu,
        reference=gelu_reference,
        example=_gelu_example,
        sizes=(
            {"M": 1, "N": 1},
            {"M": 3, "N": 700},
            {"M": 4, "N": 512, "approximate": "tanh"},
        ),
        work=lambda input, **_: (2 * input.nbytes, 10 * input.numel()),
    ),
    _op(
        fused=relu_squared,
        reference=relu_squared_reference,
        example=_relu_squared_example,
        sizes=({"M": 1, "N": 1}, {"M": 3, "N": 700}),
        work=lambda x: (2 * x.nbytes, 2 * x.numel()),
    ),
)
