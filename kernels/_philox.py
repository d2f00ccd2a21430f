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
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = tuple((i * 0x9E3779B9, i * 0xBB67AE85) for i in range(_ROUNDS))


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


def words_of(seed: Tensor, counters: Tensor) -> Tensor:
    """The kernels' words, unsigned, by the same Philox in int64 arithmetic: (..., 4).

    A CPU draws few words for a step of generation, where each operation costs the same however
    small it is: so words 0 and 2 are one tensor, 1 and 3 another, and constants are tensors, which
    cost half as much as numbers.
    """
    device, nothing = counters.device, torch.zeros_like(counters)
    pair = torch.stack((counters & _WORD, nothing))
    rest = torch.stack((counters >> 32, nothing))
    word, high = torch.tensor((_WORD, 32), device=device).unbind()
    beside = (2, *[1] * counters.dim())
    multipliers = torch.tensor(_MULTIPLIERS, device=device).view(beside)
    keys = torch.stack((seed & _WORD, seed >> 32)) + torch.tensor(_KEY_STEPS, device=device).view(
        _ROUNDS, *beside
    )
    for key in keys.bitwise_and_(word).unbind():
        product = pair * multipliers  # int64 wraps, and its bits are still right
        pair = (product >> high).bitwise_and_(word).flip(0).bitwise_xor_(rest) ^ key
        rest = product.bitwise_and_(word).flip(0)
    return torch.stack((pair[0], rest[0], pair[1], rest[1]), -1)


def keep_mask(seed: Tensor, dropout_p: float, M: int, N: int) -> Tensor:
    """The (M, N) elements that the kernels keep."""
    quads = triton.cdiv(N, 4)
    drawn = words_of(seed, torch.arange(M * quads, device=seed.device)).view(M, 4 * quads)[:, :N]
    return (drawn ^ 2**31) >= threshold_of(dropout_p) + 2**31
