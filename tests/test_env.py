"""``fastlm env``: what it reports, and a self-test that finds a broken kernel."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

import fastlm
from fastlm import env
from fastlm.kernels import OPS, backend


def run(*words):
    parser = argparse.ArgumentParser()
    env.add_arguments(parser)
    return env.run(parser.parse_args(list(words)))


def test_versions_and_paths(capsys):
    assert run() == 0
    said = capsys.readouterr().out
    assert f"fastlm         {fastlm.__version__}" in said
    assert torch.__version__ in said
    assert "layer_norm runs PyTorch: the tensors are on the CPU" in said


def test_json(capsys):
    assert run("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"].keys() == OPS.keys()
    assert found["fastlm"] == fastlm.__version__
    assert "selftest" not in found


def test_the_backend_shows(monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "torch")
    with backend("torch"):
        found = env.facts()
    assert found["settings"]["FASTLM_BACKEND"] == "torch"
    assert found["ops"]["layer_norm"].endswith('the backend is "torch".')


def test_the_selftest_passes(monkeypatch, capsys):
    monkeypatch.setattr(env, "OPS", {"layer_norm": OPS["layer_norm"]})
    assert run("--selftest") == 0
    assert "ok     layer_norm on the interpreter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda out: out * 1.001, "is off by"),
        (lambda out: out / 0, "not finite"),
        (lambda out: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_the_selftest_finds_a_broken_kernel(monkeypatch, capsys, broken, words):
    good = OPS["layer_norm"]
    fields = {name: getattr(good, name) for name in ("reference", "example", "sizes", "dtypes")}
    bad = SimpleNamespace(
        **fields, name="layer_norm", fused=lambda **inputs: broken(good.fused(**inputs))
    )
    monkeypatch.setattr(env, "OPS", {"layer_norm": bad})
    assert run("--selftest", "--json") == 1
    (test,) = json.loads(capsys.readouterr().out)["selftest"]
    assert not test["passed"]
    assert words in test["detail"]
