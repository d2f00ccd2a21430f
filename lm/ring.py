"""Ring attention (Liu et al. 2023, https://arxiv.org/abs/2310.01889): sequences cut over processes.

Each process holds a slice of every sequence. Keys and values travel round the ring; each process
attends to the slice that is with it, and the results merge by their log-sum-exps. Slices are
contiguous, so under a causal mask the last process has the most to do.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlm.kernels import merge_attention


class _Shift(torch.autograd.Function):
    """A tensor goes to the process ``by`` places on, its gradient the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: int, group: dist.ProcessGroup) -> Tensor:
        ctx.by, ctx.group = by, group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        x, got = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        to, source = (dist.get_global_rank(group, (rank + d) % size) for d in (by, -by))
        exchange = [
            dist.P2POp(dist.isend, x, to, group),
            dist.P2POp(dist.irecv, got, source, group),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        return got

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Shift.apply(grads[0], -ctx.by, ctx.group), None, None


class RingAttention:
    """Attention over the slices of all processes of a group.

    Args:
        attend: ``flash_attention``, of one process.
        group: The processes, in the order of their slices; all slices are of one length.
    """

    def __init__(self, attend: Callable[..., Any], group: dist.ProcessGroup):
        self.attend, self.group = attend, group

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, dropout_p: float = 0.0
    ) -> Tensor:
        """Attention of this process's queries (B, S, H, D) over every process's keys."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        parts = []
        for step in range(size):
            owner = (rank - step) % size
            seen = k.shape[1] if owner <= rank or not causal else 0  # later slices are the future
            parts.append(
                self.attend(
                    q, k[:, :seen], v[:, :seen],
                    causal=causal and owner == rank, dropout_p=dropout_p, return_lse=True,
                )
            )  # fmt: skip
            if step + 1 < size:
                k, v = _Shift.apply(k, 1, self.group), _Shift.apply(v, 1, self.group)
        return merge_attention(*zip(*parts, strict=True))[0]
