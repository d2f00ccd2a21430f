"""One process of a two-process run of ring attention, its kernels interpreted."""

import os

import torch
import torch.distributed as dist

from fastlm.kernels import flash_attention
from fastlm.kernels._interpreter import interpreted
from fastlm.lm.ring import RingAttention

SEQUENCE, RANKS = 48, 2


def inputs():
    torch.manual_seed(0)
    return [torch.randn(1, SEQUENCE, 2, 16, requires_grad=True) for _ in "qkv"]


def one_rank(rank, port, results):
    """One process: its shard forward and backward, results into the shared dict."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    own = slice(rank * SEQUENCE // RANKS, (rank + 1) * SEQUENCE // RANKS)
    shards = [x.detach()[:, own].clone().requires_grad_() for x in inputs()]
    with interpreted():
        o = RingAttention(flash_attention, dist.group.WORLD)(*shards, causal=True)
        (o * torch.arange(16)).sum().backward()
    results[rank] = [o.detach(), *(x.grad for x in shards)]
    dist.barrier()
    dist.destroy_process_group()
