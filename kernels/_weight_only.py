"""What linears over quantised weights share: checks, autocast, and sums of shares of K."""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from . import _dispatch
from ._launch import multiprocessors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(
    op: str, x: Tensor, bias: Tensor | None, K: int | None, N: int, **codes: tuple[Tensor, tuple]
) -> None:
    """Raises where the tensors are not a linear's.

    Args:
        op: Its name.
        x: Activations.
        bias: Bias.
        K: The last dimension that ``x`` must have; None: any.
        N: Outputs.
        codes: Each tensor of the weight beside its shape.
    """
    if not x.is_floating_point() or x.dim() == 0 or K not in (None, x.shape[-1]):
        wanted = "of any length" if K is None else f"of {K}"
        raise ValueError(
            f"{op}: x must be floating point with a last dimension {wanted}; "
            f"got {tuple(x.shape)} {x.dtype}"
        )
    for name, (t, shape) in codes.items():
        if tuple(t.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}; got {tuple(t.shape)}")
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"{op}: bias must have shape ({N},); got {tuple(bias.shape)}")


def uncovered(x: Tensor, bias: Tensor | None, scales: Tensor, *codes: Tensor) -> str | None:
    """Why a linear's kernel leaves this call to PyTorch, or None."""
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}"
    if scales.dtype not in DTYPES:
        return f"scales is {scales.dtype}"
    if bias is not None and bias.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"bias is {bias.dtype} and x {x.dtype}"
    if any(t.device != x.device for t in (scales, *codes, *([] if bias is None else [bias]))):
        return "the tensors are on several devices"
    if scales.requires_grad and torch.is_grad_enabled():
        return "scales wants a gradient"
    if x.numel() == 0:
        return "x is empty"
    return None


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that PyTorch's autocast gives a linear."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


@triton.jit
def int8_to_float(q):
    """Small integers as float32 by way of 2^23 + q, whose last bits are q: no conversion.

    A conversion runs at 16 a clock and multiprocessor, which an H100's memory outruns.
    """
    biased = (q.to(tl.int32) & 0xFF) ^ 0x4B000080
    return biased.to(tl.float32, bitcast=True) - 8388736.0


# --- shares of K --------------------------------------------------------------------------------


@triton.jit
def _sum_shares_kernel(
    part_ptr, scale_ptr, bias_ptr, y_ptr,
    M, N, SHARES,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums all shares of K in one fixed order, so that two runs agree to the bit."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    shares = tl.arange(0, BLOCK_S).to(tl.int64)[:, None]
    mask_n = n < N
    part_ptrs = part_ptr + (shares * M + row) * N + n[None, :]
    mask = (shares < SHARES) & mask_n[None, :]
    y = tl.sum(tl.load(part_ptrs, mask=mask, other=0.0), 0)
    if HAS_SCALE:
        y *= tl.load(scale_ptr + n, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + n, y, mask=mask_n)


def shares_of(tiles: int, steps: int, device: torch.device) -> int:
    """Into how many shares to cut a sum of ``steps`` tiles of K, so that ``tiles`` fill the GPU."""
    if device.type == "cpu" and _dispatch._cpu_runner == "interpreter":
        return min(2, steps)  # a short test must see a share that is not the first
    room = 2 * multiprocessors(device) // max(tiles, 1)
    return max(1, min(room, steps // 4, 16))


def sum_shares(parts: Tensor, scales: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    """Writes the sum of (shares, M, N) float32 parts, scaled and biased, into ``y`` (M, N)."""
    shares, M, N = parts.shape
    block_s = triton.next_power_of_2(shares)
    _sum_shares_kernel[(M, triton.cdiv(N, 512))](
        parts, scales, bias, y,
        M, N, shares,
        HAS_SCALE=scales is not None, HAS_BIAS=bias is not None,
        BLOCK_S=block_s, BLOCK_N=512, num_warps=4,
    )  # fmt: skip


# --- modules ------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is codes and scales, in buffers; the bias stays a parameter."""

    qweight: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, **codes: Tensor):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        for name, t in codes.items():
            self.register_buffer(name, t)
        self.bias = (
            None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        )

    def extra_repr(self) -> str:
        """As ``nn.Linear``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
