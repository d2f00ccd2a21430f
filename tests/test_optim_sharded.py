"""Optimizers on FSDP2's sharded parameters: two processes, uneven and empty shards."""

import subprocess
import sys

# One process pair for all cases: starting one costs more than a case.
SCRIPT = """
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from fastlm.kernels import AdamW, Lion, Muon
from fastlm.kernels._interpreter import interpreted
from fastlm.kernels.optim import plan

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
hybrid = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))
BF16 = torch.bfloat16

def model(dtype=torch.float32, sizes=(7, 3, 1)):
    torch.manual_seed(0)
    return torch.nn.Sequential(*map(torch.nn.Linear, sizes, sizes[1:])).to(dtype)

def pair(kind, dtype=torch.float32, sizes=(7, 3, 1), mesh=mesh, **options):
    whole, sharded = model(dtype, sizes), model(dtype, sizes)
    fully_shard(sharded, mesh=mesh)
    return [(net, kind(net.parameters(), **options)) for net in (sharded, whole)]

def whole_of(t):
    t = t.int() if t.dtype == torch.int16 else t  # gloo gathers none
    return t.full_tensor() if isinstance(t, DTensor) else t.detach()

def advance(runs, steps, first=0):
    for step in range(first, first + steps):
        for net, optimizer in runs:  # the same gradients to both, whoever holds what of them
            for i, p in enumerate(net.parameters()):
                torch.manual_seed(100 * step + i)
                g = torch.randn(p.shape).to(p.dtype)
                if isinstance(p, DTensor):
                    g = distribute_tensor(g, p.device_mesh, p.placements)
                p.grad = g
            optimizer.step()

def same(runs, exact):
    (a, first), (b, second) = runs
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        pairs = {"parameter": (p, q)}
        pairs |= {name: (t, second.state[q][name]) for name, t in first.state[p].items()}
        for name, (x, y) in pairs.items():
            tolerances = {"rtol": 0, "atol": 0} if exact else {}
            torch.testing.assert_close(
                whole_of(x), whole_of(y), **tolerances, msg=lambda m: f"{name}: {m}"
            )

with interpreted():
    runs = pair(AdamW, lr=1e-2, max_grad_norm=0.5)
    shapes = [p.to_local().shape[0] for p in runs[0][0].parameters()]
    assert shapes == ([2, 2, 1, 1], [1, 1, 0, 0])[rank]
    reductions = []
    before = dist.all_reduce
    dist.all_reduce = lambda *a, **k: (reductions.append(1), before(*a, **k))[1]
    advance(runs[:1], 1)
    assert len(reductions) == 1
    dist.all_reduce = before
    advance(runs[1:], 1)
    advance(runs, 2, 1)
    torch.testing.assert_close(runs[0][1].last_grad_norm, runs[1][1].last_grad_norm)
    assert len(runs[0][1]._planned.written) == 4
    same(runs, exact=False)

    for kind, dtype, sizes, options in (
        (AdamW, torch.float32, (7, 3, 1), {}),
        (AdamW, BF16, (7, 3, 1), {"rounding": "stochastic", "ema_decay": 0.9}),
        (AdamW, BF16, (128, 35, 1), {"state_dtype": "8bit", "rounding": "stochastic"}),
        (Lion, BF16, (7, 3, 1), {"state_dtype": torch.float32, "master": "split"}),
    ):
        runs = pair(kind, dtype, sizes, **options)
        advance(runs, 2)
        same(runs, exact=True)
        if options.get("state_dtype") == "8bit":
            assert isinstance(runs[0][1].state[runs[0][0][0].weight]["exp_avg_scale"], DTensor)

        # Saved and loaded by torch.distributed.checkpoint, the run goes on to the bit.
        net, optimizer = runs[0]
        path = f"{folder}/{kind.__name__}-{dtype}-{len(options)}"
        dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=path)
        again, other = pair(kind, dtype, sizes, **options)[0]
        with torch.no_grad():
            for p, q in zip(again.parameters(), net.parameters(), strict=True):
                p.copy_(q)
        state = {"optimizer": get_optimizer_state_dict(again, other)}
        dcp.load(state, checkpoint_id=path)
        set_optimizer_state_dict(again, other, state["optimizer"])
        advance([(again, other), runs[1]], 1, 2)
        same([(again, other), runs[1]], exact=True)

    runs = pair(AdamW, sizes=(33, 5, 1), lr=1e-2, cautious=True)
    advance(runs, 2)
    same(runs, exact=False)
    # Replicas of shards: clipping, and rounding at random by the place in the whole.
    options = {"rounding": "stochastic", "max_grad_norm": 0.5}
    runs = pair(AdamW, BF16, mesh=hybrid, **options)
    assert runs[0][0][0].weight.device_mesh.ndim == 2
    advance(runs, 2)
    same(runs, exact=True)

    # Muon: each matrix is orthogonalized by one process, whoever is next.
    orthogonalize, seen = plan.orthogonalize, []
    plan.orthogonalize = lambda x, *rest: (seen.append(tuple(x.shape)), orthogonalize(x, *rest))[1]

    def follows(runs, want):
        seen.clear()
        advance(runs[:1], 1)
        assert seen == want[rank], seen
        advance(runs[1:], 1)
        advance(runs, 1, 1)
        for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-2, atol=1e-4)

    want = [[(2, 7, 7), (1, 1, 5)], [(1, 7, 7), (1, 5, 7)]]
    for places in (mesh, hybrid):
        follows(pair(Muon, sizes=(7, 7, 7, 7, 5, 1), mesh=places, lr=1e-2, ns_steps=2), want)
    weights = [torch.randn(9, 3), torch.randn(5, 9)]
    for places, placements, want in (
        (mesh, [Shard(1)], [[(1, 9, 3)], [(1, 5, 9)]]),
        (hybrid, [Shard(0), Shard(1)], 2 * [[(1, 9, 3), (1, 5, 9)]]),  # all by both
    ):
        parts = [distribute_tensor(w, places, placements) for w in weights]
        lists = [torch.nn.ParameterList([t.clone() for t in ts]) for ts in (parts, weights)]
        follows([(net, Muon(net.parameters(), lr=1e-2, ns_steps=2)) for net in lists], want)
dist.destroy_process_group()
"""


def test_two_shards_are_one_model(tmp_path):
    """The kernels on local parts; stochastic rounding too; checkpoints; one all-reduce to clip."""
    script = tmp_path / "shard.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], cwd="/", stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=240)[1].decode() for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    finally:
        for rank in ranks:
            rank.kill()
