"""Training over two processes equals training in one, however the work is cut."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("lm_process.py")
RUNS = ("ddp:4", "context:4", "fsdp:2", "resume-fsdp:4")
TUNED = ("lm-ddp:2", "lm-fsdp:1", "resume-lm-fsdp:2", "classify-fsdp:2")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(data: Path, out: Path, runs, rank=None, port=0) -> subprocess.Popen:
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    if rank is not None:
        variables |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-P", str(SCRIPT), str(data), str(out), str(port), *runs]
    return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL)


def records(folder: Path) -> dict[int, dict[str, float]]:
    """Losses and norms by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept = {k: v for k, v in record.items() if k in ("loss", "grad_norm", "val_loss")}
        found.setdefault(record["step"], {}).update(kept)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Folders of one process's run, and of two processes' runs in each way."""
    root = tmp_path_factory.mktemp("parallel")
    words = random.Random(0).choices(["alpha", "beta", "gamma", "delta"], k=700)
    (root / "text.txt").write_text(" ".join(words))
    port = free_port()
    for task, (one, two) in {"lm": ("prompt", "answer"), "classify": ("text", "label")}.items():
        lines = ({one: " ".join(words[n : n + 3]), two: words[n + 3]} for n in range(0, 60, 4))
        (root / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone = ["ddp:4", "lm-ddp:2", "classify-ddp:2"]
    one = start(root / "text.txt", root / "one", alone)
    two = [start(root / "text.txt", root / "two", RUNS + TUNED, rank, port) for rank in range(2)]
    try:
        assert [process.wait(timeout=240) for process in (one, *two)] == [0, 0, 0]
    finally:
        for process in (one, *two):
            process.kill()
    return root


@pytest.mark.parametrize("parallel", ["ddp", "context", "fsdp"])
def test_two_processes_equal_one(outcomes, parallel):
    """Loss, gradient norm and held-out loss of each step; FSDP stops and goes on half-way."""
    want, got = records(outcomes / "one" / "ddp"), records(outcomes / "two" / parallel)
    for step, figures in want.items():
        for name, value in figures.items():
            assert got[step][name] == pytest.approx(value, rel=2e-5), (step, name)


@pytest.mark.parametrize("run", ["lm-ddp", "lm-fsdp", "classify-fsdp"])
def test_two_processes_fine_tune_like_one(outcomes, run):
    """Figures of each step, and the best weights; with adapters, and from a checkpoint half-way."""
    alone = outcomes / "one" / f"{run.partition('-')[0]}-ddp"
    want, got = records(alone), records(outcomes / "two" / run)
    assert sorted(want) == sorted(got) == [1, 2]
    for step, figures in want.items():
        for name, value in figures.items():
            assert got[step][name] == pytest.approx(value, rel=2e-5), (step, name)
    weights = load_file(outcomes / "two" / run / "model.safetensors")
    for name, tensor in load_file(alone / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-4)


def test_one_process_goes_on_with_the_run_of_two(outcomes):
    """A checkpoint that two processes wrote is read by one, and goes on like one process's."""
    steps = {"one": outcomes / "one" / "ddp", "two": outcomes / "two" / "fsdp"}
    found = {}
    for name, folder in steps.items():
        run = start(outcomes / "text.txt", folder.parent, [f"resume-{folder.name}:6"])
        assert run.wait(timeout=120) == 0
        found[name] = records(folder)[6]
    for name, value in found["one"].items():
        assert found["two"][name] == pytest.approx(value, rel=2e-5), name
