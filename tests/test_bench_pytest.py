"""``pytest bench/`` on a simulated GPU: real groups, JSON, comparison and refusal."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastlm.bench import conftest

ROOT = Path(__file__).resolve().parents[1]

# Stands in for bench/conftest.py: the same hooks, a simulated device, made-up peaks.
CONFTEST = """
import os, sys
sys.path.insert(0, {tests!r})
import pytest
from simulated_gpu import SimulatedDevice
from fastlm.bench import conftest as real
from fastlm.bench.conftest import *
from fastlm.bench.suite import Peaks

real.make_device = SimulatedDevice

@pytest.fixture(scope="session")
def peaks(device):
    return Peaks(1e12, dict.fromkeys(("float32", "float16", "bfloat16"), 1e14))

def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["gpu"] = os.environ["SIMULATED_GPU"]
"""

SUITE = """
import os
import pytest, torch
import torch.nn.functional as F
from fastlm.bench.suite import Setting
from fastlm.kernels import OPS

SETTING = Setting(OPS["layer_norm"], torch.float32, {"M": 37, "N": 64})

@pytest.mark.parametrize("contender", ["fused", "eager"])
@pytest.mark.parametrize("case", ["layer_norm forward"])
def test_op(gpu_bench, device, case, contender):
    def call(**inputs):
        device.kernel(float(os.environ["SIMULATED_SECONDS"]))
        return F.layer_norm(**inputs)
    gpu_bench(SETTING, contender, call)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "conftest.py").write_text(CONFTEST.format(tests=str(ROOT / "tests")))
    (tmp_path / "test_suite.py").write_text(SUITE)
    monkeypatch.setattr(conftest, "make_device", conftest.make_device)  # put back afterwards
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass
class Done:
    """How a run of pytest ended."""

    returncode: int
    stdout: str


def run(folder, *words, seconds="20e-6", gpu="simulated"):
    """Pytest inside this process: importing torch again would take most of the time."""
    said = io.StringIO()
    options = ["-q", "-s", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull]
    environment = {"SIMULATED_SECONDS": seconds, "SIMULATED_GPU": gpu}
    environment["PYTEST_XDIST_WORKER"] = ""  # pytest-benchmark measures nothing in a worker
    with mock.patch.dict(os.environ, environment), redirect_stdout(said), redirect_stderr(said):
        try:
            code = int(pytest.main([*options, f"--rootdir={folder}", str(folder), *words]))
        except Exception as error:  # pytest-benchmark ends a session so; a process would exit 1
            said.write(str(error))
            code = 1
    return Done(code, said.getvalue())


def test_the_replayed_times_are_the_engine_s(folder):
    done = run(folder, "--benchmark-json=out.json", "--benchmark-autosave")
    assert done.returncode == 0, done.stdout
    found = json.loads((folder / "out.json").read_text())
    assert found["machine_info"]["gpu"] == "simulated"
    assert len(found["benchmarks"]) == 2
    for bench in found["benchmarks"]:
        assert bench["stats"]["median"] == pytest.approx(20e-6, rel=1e-3)
        assert bench["stats"]["rounds"] >= 30
        assert bench["options"]["timer"] == "cuda_event"
        assert bench["group"] == "layer_norm forward"
        assert bench["extra_info"]["gbs"] > 0
    assert "of the roofline" in done.stdout

    compare = ("--benchmark-compare", "--benchmark-compare-fail=median:5%")
    assert run(folder, *compare).returncode == 0
    slower = run(folder, *compare, seconds="23e-6")
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stdout
    elsewhere = run(folder, "--benchmark-compare", gpu="another")
    assert elsewhere.returncode != 0
    assert "refusing to compare" in elsewhere.stdout


def test_without_a_gpu_the_real_benchmarks_are_skipped():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "bench/bench_ops.py",
            "--benchmark-enable",
            "-k",
            "softmax",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "no CUDA device: nothing was timed" in done.stdout
    assert " passed" not in done.stdout
