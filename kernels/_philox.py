"""Dropout without a stored mask: Philox-4x32-10 (Salmon et al. 2011) in kernels and in PyTorch.

Element (row, column) of M rows of N draws word ``column % 4`` at counter
``row * ceil(N / 4) + column // 4`` under the seed: a pure function of seed and place, so the
backward and a recomputed forward drop the same elements, whatever the tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROUNDS = 10
_WORD = 0xFFFFFFFF


@triton.jit
def draw(seed, counters):
    """Four int32 words a counter, in two new last dimensions, for ``tl.reshape`` to lay out."""
    a, b, c, d = tl.randint4x(seed, counters)
    return tl.join(tl.join(a, c), tl.join(b, d)).to(tl.int32, bitcast=True)


def threshold_of(dropout_p: float) -> int:
    """The least word, as int32, that keeps its element."""
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def scale_of(dropout_p: float) -> float:
    """What a kept element is multiplied by."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """One int64 on the device; None draws it from PyTorch's generator of that device."""
    if seed is None:  # there, because CUDA graphs and checkpointing replay that generator
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64).reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _product(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 by 32 bit product; int64 wraps, and its bits are still right."""
    product = x * constant
    return product >> 32 & _WORD, product & _WORD


def words_of(seed: Tensor, counters: Tensor) -> Tensor:
    """The kernels' words, unsigned, by the same Philox in int64 arithmetic: (..., 4)."""
    c0, c1 = counters & _WORD, counters >> 32
    c2 = c3 = torch.zeros_like(counters)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(_ROUNDS):
        high_a, low_a = _product(c0, 0xD2511F53)
        high_b, low_b = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return torch.stack((c0, c1, c2, c3), -1)


def keep_mask(seed: Tensor, dropout_p: float, M: int, N: int) -> Tensor:
    """The (M, N) elements that the kernels keep."""
    quads = triton.cdiv(N, 4)
    drawn = words_of(seed, torch.arange(M * quads, device=seed.device)).view(M, 4 * quads)[:, :N]
    return (drawn ^ 2**31) >= threshold_of(dropout_p) + 2**31
