r"""Dropout without a stored mask.

Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html.

Forward: y = x / (1 - p) where the number drawn for the element is at least p, else 0.
Backward: the same of dy, with the same draws.

The draw is Philox keyed by the seed and the element's place in the contiguous order, so it is the
same under recomputation, for any strides and on any device. Cost: x is read and y written once,
bound by memory; eager PyTorch moves a byte an element more, each way, for its mask. Saved for the
backward: the seed, 8 bytes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ._dispatch import dispatched
from ._op import Inputs, Op
from ._philox import as_seed, draw, keep_mask, scale_of, threshold_of
from ._register import torch_op
from ._tuned import tunable


def reference(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Dropout in eager PyTorch; the kernel's own mask where a seed is given."""
    if seed is None or not training or p == 0 or not 0 <= p <= 1:
        return F.dropout(input, p, training, inplace)
    keep = keep_mask(as_seed(seed, input.device), p, 1, input.numel()).view(input.shape)
    y = torch.where(keep, input * scale_of(p), 0.0)
    return input.copy_(y) if inplace else y


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _dropout_kernel(x_ptr, seed_ptr, y_ptr, n, threshold, scale, BLOCK: tl.constexpr):
    """A program takes BLOCK numbers, four of a Philox counter. Whole blocks need no mask."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    counters = start // 4 + tl.arange(0, BLOCK // 4)
    keep = tl.reshape(draw(tl.load(seed_ptr), counters), [BLOCK]) >= threshold
    x_ptrs = x_ptr + start + offs
    y_ptrs = y_ptr + start + offs
    if start + BLOCK <= n:
        x = tl.load(x_ptrs).to(tl.float32)
        tl.store(y_ptrs, tl.where(keep, x * scale, 0.0))
    else:
        mask = offs < n - start
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptrs, tl.where(keep, x * scale, 0.0), mask=mask)


# --- launch -------------------------------------------------------------------------------------


def _fake(input: Tensor, p: float, seed: Tensor) -> Tensor:
    return input.new_empty(input.shape)


def _save(ctx, inputs, output):
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _gradients(ctx, dy):
    return _dropout(dy, ctx.p, *ctx.saved_tensors), None, None


@tunable("BLOCK", "num_warps")
def _tile(dtype: torch.dtype) -> dict[str, int]:
    return {"BLOCK": 2048, "num_warps": 4}  # unmeasured


@torch_op("dropout", fake=_fake, setup_context=_save, backward=_gradients)
def _dropout(input: Tensor, p: float, seed: Tensor) -> Tensor:
    y = _fake(input, p, seed)
    n = y.numel()
    if n:
        tile = _tile(input.dtype)
        _dropout_kernel[(triton.cdiv(n, tile["BLOCK"]),)](
            input.contiguous(), seed, y, n, threshold_of(p), scale_of(p), **tile
        )
    return y


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
) -> str | None:
    if input.dtype not in OP.dtypes:
        return f"input is {input.dtype}"
    if inplace:
        return "in place"
    if not 0 <= p <= 1:
        return f"p is {p}"
    return None


@dispatched(eager=reference, uncovered=_uncovered)
def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Zeroes each number with probability ``p``; drop-in for ``F.dropout``.

    Args:
        input: Any shape and strides, float32, float16 or bfloat16.
        p: In [0, 1]; what is kept is divided by 1 - p.
        training: False gives ``input`` back.
        inplace: Write over ``input``, by PyTorch.
        seed: An int, or one integer in a tensor, which decides the mask. None draws one from
            PyTorch's generator, which activation checkpointing and CUDA graphs replay.

    Returns:
        The shape and dtype of ``input``. A dropped number is 0 even where it was not finite.

    Raises:
        ValueError: What ``F.dropout`` raises, for another ``p``.
    """
    if not training or p == 0:
        return input
    return _dropout(input, p, as_seed(seed, input.device))


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` over the fused ``dropout``."""

    def forward(self, input: Tensor) -> Tensor:
        """Drops numbers while training."""
        return dropout(input, self.p, self.training, self.inplace)


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype, device: torch.device, M: int, N: int, p: float = 0.25, seed: int = 7
) -> Inputs:
    x = torch.randn(M, N, dtype=dtype, device=device)
    return {"input": x.requires_grad_(), "p": p, "seed": seed}


OP = Op(
    fused=dropout,
    reference=reference,
    example=_example,
    sizes=({"M": 1, "N": 1}, {"M": 3, "N": 701}, {"M": 4, "N": 512, "p": 0.5, "seed": 2**40 + 3}),
    bench_sizes=tuple({"M": 8192, "N": 2**k} for k in (10, 12, 14)),
    work=lambda input, **_: (2 * input.nbytes, 2 * input.numel()),
)
