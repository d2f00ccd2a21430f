"""Whole models beside peers on a CPU: the same parameters, checked, timed; or why not."""

import argparse
import json
import sys

import pytest
import torch

from fastlm.bench import cli, on_gpu, whole_model
from fastlm.bench.host import in_bytes, model_memory_row, saved_bytes
from fastlm.bench.model_contenders import Draw, contender
from fastlm.bench.on_cpu import CpuBench
from fastlm.bench.suite import Peaks
from fastlm.bench.timing import measure
from fastlm.bench.whole_model import Workload
from fastlm.lm import GPT, GPTConfig

# What a clone of nanoGPT offers, around our own eager model.
CLONE = """
from dataclasses import dataclass
import torch
from torch import nn
import fastlm.lm

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: a few")
        ours = fastlm.lm.GPTConfig(activation="ACTIVATION", **vars(config))
        own = fastlm.lm.GPT(ours, ops="eager")
        self.transformer = nn.ModuleDict(dict(wte=own.wte, wpe=own.wpe, h=own.h, ln_f=own.ln_f))
        self.lm_head = own.lm_head
        object.__setattr__(self, "own", own)

    def forward(self, ids, targets=None):
        logits, loss = self.own(ids, targets)
        return (logits[:, -1:] if targets is None else None), loss

    def generate(self, ids, new, temperature=1.0, top_k=None):
        for _ in range(new):
            logits = self(ids[:, -self.own.config.block_size:])[0][:, -1] / temperature
            values, tokens = logits.topk(top_k)
            ids = torch.cat((ids, tokens.gather(1, values.softmax(1).multinomial(1))), 1)
        return ids

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("using fused AdamW: False")
        assert device_type == "cpu"
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
"""
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50}


@pytest.fixture(autouse=True)
def known_peaks(monkeypatch):
    """What the machine can do is not measured for each test."""
    peaks = Peaks(1e10, {"float32": 1e11})
    monkeypatch.setattr(whole_model, "measured_peaks", lambda device, dtypes: peaks)


def clone(folder, activation="gelu"):
    (folder / "model.py").write_text(CLONE.replace("ACTIVATION", activation))
    return folder


def bench(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(word) for word in words]))


def asked(**changes):
    shape = [w for k, v in {**SMALL, **changes}.items() for w in ("--set", f"{k}={v}")]
    return ("--model", "tiny", *shape, "--dtype", "float32", "--device", "cpu", "--budget", "0.2")


BATCH = ("--batch-size", 2, "--length", 8, "--new-tokens", 12)  # past the block of 16


def rows_of(file):
    report = json.loads(file.read_text())
    return report, {(r["mode"], r["contender"]): r for r in report["rows"]}


def test_beside_a_clone_of_nanogpt_on_a_cpu(tmp_path, capsys):
    file, page = tmp_path / "r.json", tmp_path / "r.html"
    names = ("fused", "eager", "nanogpt")
    chosen = [word for name in names for word in ("--contender", name)]
    peer = ("--nanogpt", clone(tmp_path), "--baseline", "nanogpt")
    outputs = ("--json", file, "--html", page)
    assert bench("train", *asked(), *BATCH, *chosen, *peer, *outputs) == 0
    report, rows = rows_of(file)
    assert set(rows) == {(mode, name) for mode in ("train", "decode") for name in names}
    for (mode, _), row in rows.items():
        assert row["status"] == "ok", row
        assert row["error"] < 1e-5
        assert row["tokens_per_second"] == pytest.approx(
            2 * (8 if mode == "train" else 12) / row["p50"]
        )
        assert row["peak_bytes"] is None
    assert f", {torch.get_num_threads()} thread" in report["environment"]["device"]
    assert "driver" not in report["environment"]
    printed = capsys.readouterr().out
    assert "Against nanogpt: " in printed
    assert "number of parameters" not in printed
    assert "driver" not in printed
    assert "None" not in printed
    assert "Peak memory" not in page.read_text()


def test_another_function_than_ours_is_wrong_and_shows_no_time(tmp_path):
    wide = {**SMALL, "activation": "gelu"}
    peer = clone(tmp_path, "relu_squared")
    work = Workload("tiny", 2, 8, torch.float32, 4, changes=wide, nanogpt=peer)
    report = whole_model.run_models(
        [work], CpuBench(), wanted=("fused", "eager", "nanogpt"), budget=0.2
    )
    said = {(r["mode"], r["contender"]): r["status"] for r in report["rows"]}
    assert said["train", "nanogpt"] == said["decode", "nanogpt"] == "wrong"
    assert said["train", "fused"] == said["decode", "fused"] == "ok"


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"activation": "gelu_tanh"}, "nanogpt", "nanogpt has activation='gelu'; the model has"),
        ({"norm": "rms"}, "nanogpt", "nanogpt has norm='layer'"),
        ({"n_kv_head": 1}, "nanogpt", "nanogpt has as many keys as queries"),
        ({"n_inner": 64}, "nanogpt compiled", "and 4 n_embd inside"),
    ],
)
def test_a_model_that_a_peer_has_not_is_skipped_with_the_reason(tmp_path, changes, name, reason):
    work = Workload(
        "tiny",
        1,
        4,
        torch.float32,
        2,
        changes={**SMALL, "activation": "gelu", **changes},
        nanogpt=clone(tmp_path),
    )
    report = whole_model.run_models(
        [work], CpuBench(), modes=["train"], wanted=("fused", name), budget=0.1
    )
    row = next(r for r in report["rows"] if r["contender"] == name)
    assert row["status"] == "skipped"
    assert reason in row["reason"]


def test_sampled_generation_says_how(tmp_path, capsys):
    names = ("--contender", "fused", "--contender", "nanogpt", "--nanogpt", clone(tmp_path))
    how = ("--mode", "decode", "--temperature", 0.8, "--top-k", 5, "--baseline", "nanogpt")
    assert bench("train", *asked(), *BATCH, *names, *how) == 0
    assert "B=2 T=8 and 12 new, temperature=0.8 top_k=5" in capsys.readouterr().out


def settings_of_draws_count(name, folder=None):
    """Greedy texts are alike, hot ones are not, and of one token there is no choice."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("tiny", **{**SMALL, "block_size": 32, "bias": True})).eval()
    found, prompt = contender(name, model, folder), torch.tensor([[1, 2]])

    def text(draw):
        with torch.no_grad():
            return torch.as_tensor(found.grow(prompt, 12, draw)[0]).tolist()

    likeliest = text(Draw())
    assert len(likeliest) == 14
    assert text(Draw()) == text(Draw(5.0, 1)) == likeliest
    assert text(Draw(5.0, 50)) != text(Draw(5.0, 50))


@pytest.mark.parametrize("name", ["fused", "nanogpt"])
def test_temperature_and_top_k_reach_the_draw(name, tmp_path):
    settings_of_draws_count(name, clone(tmp_path))


def test_without_a_clone_nanogpt_says_what_it_needs():
    with pytest.raises(NotImplementedError, match="--nanogpt must say where a clone of it is"):
        contender("nanogpt", GPT(GPTConfig.preset("tiny", n_layer=1)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--nanogpt", "/nowhere"), "--nanogpt must be a clone of nanoGPT; /nowhere/model.py"),
        (
            ("--contender", "gpt5"),
            "--contender must be one of fused, eager, compiled, transformers",
        ),
        (("--set", "n_layer"), "--set must be like NAME=VALUE; got 'n_layer'"),
        (("--set", "layers=3"), "--set must name one of vocab_size, .*; got 'layers'"),
        (("--set", "n_layer=few"), "--set n_layer must be int; got 'few'"),
        (("--set", "bias=no"), "--set bias must be one of true, false; got 'no'"),
        (("--set", "norm=batch"), "--set norm must be one of layer, rms; got 'batch'"),
        (("--set", "n_head=3"), "n_head must divide n_embd"),
        (("--temperature", -1), "--temperature must be at least 0; got -1"),
        (("--top-k", -1), "--top-k must be at least 0; got -1"),
        (("--new-tokens", 0), "--new-tokens must be at least 1; got 0"),
        (("--baseline", "nanogpt"), "--baseline must be one of the contenders"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(monkeypatch, more, message):
    monkeypatch.setattr(on_gpu, "CpuBench", None)
    with pytest.raises(ValueError, match=message):
        bench("train", "--model", "tiny", "--device", "cpu", *more)


def test_a_cpu_s_times_are_of_the_calls_in_turns():
    calls = []
    device = CpuBench()
    found = measure(
        {name: lambda name=name: calls.append(name) for name in "ab"}, device, budget=0.0, cold=True
    )
    assert calls[-6:] == list("ababab")
    assert all(0 < timing.median < 0.1 for timing in found.values())


# --- transformers -------------------------------------------------------------------------------


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="the peer is not installed")


@pytest.mark.parametrize("changes", [{"bias": True}, {"preset": "llama-tiny", "n_kv_head": 1}])
@pytest.mark.parametrize("draw", [Draw(), Draw(0.8, 5)])
def test_beside_transformers(transformers, changes, draw):
    shape = {**SMALL, "block_size": 32, **changes}
    preset = shape.pop("preset", "tiny")
    work = Workload(preset, 2, 8, torch.float32, 4, draw, shape)
    report = whole_model.run_models(
        [work], CpuBench(), wanted=("fused", "eager", "transformers"), budget=0.2
    )
    for row in report["rows"]:
        assert row["status"] == "ok", row
        assert row["error"] < 1e-5


def test_transformers_own_limits_are_reasons(transformers):
    work = Workload("tiny", 1, 8, torch.float32, 12, changes={**SMALL, "bias": True})
    wanted = ("fused", "transformers")
    report = whole_model.run_models([work], CpuBench(), modes=["decode"], wanted=wanted, budget=0.1)
    assert report["rows"][0]["reason"] == "transformers does not go on past n_positions"
    work = Workload("tiny", 1, 8, torch.float32, 4, changes={**SMALL, "bias": False})
    report = whole_model.run_models([work], CpuBench(), modes=["decode"], wanted=wanted, budget=0.1)
    assert report["rows"][0]["reason"].startswith("transformers has no such model")


def test_temperature_and_top_k_reach_transformers(transformers):
    settings_of_draws_count("transformers")


def test_its_memory_is_counted_without_computing(transformers):
    """The count of hollow tensors is that of a real model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("llama-tiny")).bfloat16()
    real = contender("transformers", model)
    ids = torch.zeros(1, 64, dtype=torch.long)
    own = [*real.module.parameters(), *real.module.buffers()]
    inputs = {"ids": ids, "targets": ids, "own": own}
    kept = saved_bytes(lambda ids, targets, own: real.loss(ids, targets), inputs)
    assert model_memory_row("llama-tiny", tokens=64)["transformers"] == kept // 64


def test_without_transformers_its_memory_is_not_counted(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    row = model_memory_row("tiny", tokens=64)
    assert row["transformers"] is None
    assert 0 < row["fused"] < row["eager"]
    assert in_bytes(row["transformers"]) == "not counted"
