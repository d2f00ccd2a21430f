"""AdamW on FSDP2's sharded parameters: two processes, uneven and empty shards."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from fastlm.kernels import AdamW
from fastlm.kernels._interpreter import interpreted

rank, store, max_norm = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 3), torch.nn.Linear(3, 1))

whole, sharded = model(), model()
fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
assert [p.to_local().shape[0] for p in sharded.parameters()] == ([2, 2, 1, 1], [1, 1, 0, 0])[rank]
with interpreted():
    first = AdamW(sharded.parameters(), lr=1e-2, max_grad_norm=max_norm or None)
    second = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    for step in range(3):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        for net in (sharded, whole):
            net.zero_grad()
            net(x).square().sum().backward()
        if max_norm:
            norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), max_norm)
        first.step()
        second.step()
        if max_norm:
            torch.testing.assert_close(first.last_grad_norm.full_tensor(), norm)
for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(p.full_tensor(), q.detach())
dist.destroy_process_group()
"""


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_two_shards_are_one_model(max_norm, tmp_path):
    """PyTorch takes the step of DTensors; clipping is over all shards."""
    script = tmp_path / "shard.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(max_norm)], cwd="/")
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
