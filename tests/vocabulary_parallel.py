"""One rank of a linear_cross_entropy whose vocabulary two processes share."""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist

from fastlm.kernels import linear_cross_entropy
from fastlm.kernels._interpreter import interpreted

RANKS, V, H, N = 2, 46, 12, 9
CASES = [
    {"reduction": "mean"},
    {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0},
]


def inputs():
    torch.manual_seed(0)
    target = torch.tensor([0, 22, 23, -100, 45, 7, -100, 30, 44])
    shared = [torch.randn(N, H), target]
    return *shared, torch.randn(V, H), torch.randn(V), torch.rand(V) + 0.5


def loss_and_gradients(x, target, matrix, bias, weight, **options):
    x, matrix, bias = (t.clone().requires_grad_() for t in (x, matrix, bias))
    loss = linear_cross_entropy(x, matrix, target, linear_bias=bias, weight=weight, **options)
    (loss * torch.arange(1.0, 1 + loss.numel()).view_as(loss)).sum().backward()
    return [loss.detach(), x.grad, matrix.grad, bias.grad]


def one_rank(rank, port, results):
    """One process: its half of the classes, eager and interpreted, results into the dict."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    x, target, *of_classes = inputs()
    own = [t[rank * V // RANKS : (rank + 1) * V // RANKS] for t in of_classes]
    found = []
    for options in CASES:
        for context in (nullcontext, interpreted):
            with context():
                group = dist.group.WORLD
                found.append(loss_and_gradients(x, target, *own, process_group=group, **options))
    results[rank] = found
    dist.barrier()
    dist.destroy_process_group()
