"""Ring attention over ``merge_attention``, and one rank of a two-process run of it."""

import os

import torch
import torch.distributed as dist

from fastlm.kernels import flash_attention, merge_attention
from fastlm.kernels._interpreter import interpreted

SEQUENCE, RANKS = 48, 2


def inputs():
    torch.manual_seed(0)
    return [torch.randn(1, SEQUENCE, 2, 16, requires_grad=True) for _ in "qkv"]


class _Shift(torch.autograd.Function):
    """A tensor goes to the next rank, its gradient to the one before."""

    @staticmethod
    def forward(ctx, x, step):
        ctx.step = step
        rank, world = dist.get_rank(), dist.get_world_size()
        got = torch.empty_like(x)
        work = dist.isend(x.contiguous(), (rank + step) % world)
        dist.recv(got, (rank - step) % world)
        work.wait()
        return got

    @staticmethod
    def backward(ctx, grad):
        return _Shift.apply(grad.contiguous(), -ctx.step), None


def ring_attention(q, k, v):
    """Causal attention of a sequence cut over the ranks: keys travel round, results merge."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = []
    for step in range(world):
        owner = (rank - step) % world
        if owner > rank:  # keys of the future; the collective calls must still match
            o, lse = flash_attention(q, k[:, :0], v[:, :0], return_lse=True)
        else:
            o, lse = flash_attention(q, k, v, causal=owner == rank, return_lse=True)
        parts.append((o, lse))
        if step + 1 < world:
            k, v = _Shift.apply(k, 1), _Shift.apply(v, 1)
    return merge_attention(*zip(*parts, strict=True))[0]


def one_rank(rank, port, results):
    """One process: its shard forward and backward, results into the shared dict."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    own = slice(rank * SEQUENCE // RANKS, (rank + 1) * SEQUENCE // RANKS)
    shards = [x.detach()[:, own].clone().requires_grad_() for x in inputs()]
    with interpreted():
        o = ring_attention(*shards)
        (o * torch.arange(16)).sum().backward()
    results[rank] = [o.detach(), *(x.grad for x in shards)]
    dist.barrier()
    dist.destroy_process_group()
