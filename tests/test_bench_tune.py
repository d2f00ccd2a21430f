"""Tuning on a simulated GPU: the walk, the checks, the user's cache, and real ops under trial."""

import argparse
import json
import math

import pytest
import torch
from simulated_gpu import SimulatedDevice

from fastlm.bench import cli, on_gpu, tune
from fastlm.bench.suite import Setting
from fastlm.kernels import OPS, Op, _dispatch, _tuned
from fastlm.kernels._interpreter import interpreted

SHIPPED = {"BLOCK": 64, "num_warps": 4}


@_tuned.tunable("BLOCK", "num_warps")
def _toy_tile(N: int) -> dict[str, int]:
    return dict(SHIPPED)


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A simulated GPU, and a cache of its own."""
    monkeypatch.setenv("FASTLM_CACHE_DIR", str(tmp_path / "cache"))
    found = SimulatedDevice()
    monkeypatch.setattr(on_gpu, "make_device", lambda: found)
    yield found
    _tuned._winners.clear()


@pytest.fixture
def toy(device):
    """An op whose time is least at BLOCK 512; 1024 gives wrong results, 8 warps do not compile."""

    def double(x):
        tile = _toy_tile(x.shape[-1])
        if tile["num_warps"] == 8:
            raise RuntimeError("out of resource: shared memory")
        seconds = 20e-6 * (1 + 0.2 * abs(math.log2(tile["BLOCK"] / 512)))
        device.kernel(5e-6 if tile["BLOCK"] == 1024 else seconds)
        return x * (2.5 if tile["BLOCK"] == 1024 else 2)

    return Op(
        fused=double,
        reference=lambda x: x * 2,
        example=lambda dtype, device, N: {"x": torch.randn(N, dtype=dtype, device=device)},
        sizes=({"N": 8},),
        bench_sizes=({"N": 32}, {"N": 48}),
        work=lambda x: (2 * x.nbytes, x.numel()),
        dtypes=(torch.float32,),
    )


def bench(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(word) for word in words]))


def test_the_walk_ends_at_the_fastest_right_tile(device, toy):
    (row,) = tune.tune([Setting(toy, torch.float32, {"N": 32})], device)
    assert row["status"] == "kept"
    assert row["key"] == "test_bench_tune: _toy_tile(32)"
    assert row["tile"] == {"BLOCK": 512, "num_warps": 4}
    assert row["us"] == pytest.approx(20, rel=0.01)
    assert row["shipped_us"] == pytest.approx(32, rel=0.01)
    assert "wrong" not in row["status"]
    assert "result 0 is off" in row["rejected"]["BLOCK=1024"]
    assert "out of resource" in row["rejected"]["num_warps=8"]
    text = tune.tune_table([row])
    assert "BLOCK=512" in text
    assert "1 of 1 choices have a faster tile; 5 tiles" in text


def test_a_tile_that_is_wrong_on_other_inputs_is_not_kept(device, toy, monkeypatch):
    honest = tune._Walk.fault

    def fault(self, tile, seed):
        return "result 0 is off" if seed == 2 else honest(self, tile, seed)

    monkeypatch.setattr(tune._Walk, "fault", fault)
    (row,) = tune.tune([Setting(toy, torch.float32, {"N": 32})], device)
    assert row["status"].startswith("wrong on other inputs")
    assert tune.winners([row], "abc") == {}


def test_the_budget_ends_the_walk(device, toy):
    settings = [Setting(toy, torch.float32, size) for size in toy.bench_sizes]
    rows = tune.tune(settings, device, budget=1e-3)
    assert rows[-1]["status"] == "not tried: out of time"


def test_equal_tiles_stay(device, toy, monkeypatch):
    monkeypatch.setattr(device, "kernel", lambda seconds: device.launch(20e-6))
    (row,) = tune.tune([Setting(toy, torch.float32, {"N": 32})], device)
    assert row["status"] == "the shipped tile is the fastest"


def test_the_verb_keeps_winners_that_the_next_import_takes(device, toy, monkeypatch, capsys):
    monkeypatch.setitem(OPS, "double", toy)
    words = ("tune", "--op", "double", "--dtype", "float32", "--size", "N=32")
    assert bench(*words, "--dry-run") == 0
    assert "Nothing is kept" in capsys.readouterr().out
    assert not _tuned.cache_file().exists()
    assert bench(*words) == 0
    assert f"Kept in {_tuned.cache_file()}" in capsys.readouterr().out
    (entry,) = json.loads(_tuned.cache_file().read_text())
    assert entry["device"] == "simulated"
    assert entry["tiles"]["test_bench_tune: _toy_tile(32)"]["shipped"] == SHIPPED

    assert _toy_tile(32) == SHIPPED  # not read at run time
    _tuned.load()  # as an import does
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_tuned, "_device", lambda index: "simulated")
    assert _toy_tile(32) == {"BLOCK": 512, "num_warps": 4}
    assert _toy_tile(48) == SHIPPED
    with _dispatch.cpu_runner("compiler"):  # the compile check sees what ships
        assert _toy_tile(32) == SHIPPED
    monkeypatch.setattr(_tuned, "_device", lambda index: "another card")
    assert _toy_tile(32) == SHIPPED


@pytest.mark.parametrize("what", ["driver", "triton", "kernels"])
def test_winners_of_another_driver_triton_or_source_are_left(device, what):
    tiles = {"x: f(1)": {"tile": {"BLOCK": 1}}}
    file = _tuned.keep("simulated", tiles)
    _tuned.load()
    assert _tuned._winners == {"simulated": {"x: f(1)": {"BLOCK": 1}}}
    entries = json.loads(file.read_text())
    entries[0][what] = "another"
    file.write_text(json.dumps(entries))
    _tuned.load()
    assert _tuned._winners == {}
    _tuned.keep("simulated", tiles)  # beside the other, not over it
    assert len(_tuned.read_entries(file)) == 2


def test_keeping_adds_to_what_is_there(device):
    _tuned.keep("simulated", {"a": {"tile": {"BLOCK": 1}}, "b": {"tile": {"BLOCK": 2}}})
    _tuned.keep("simulated", {"b": {"tile": {"BLOCK": 3}}})
    _tuned.load()
    assert _tuned._winners["simulated"] == {"a": {"BLOCK": 1}, "b": {"BLOCK": 3}}


@pytest.mark.parametrize(
    "text", ["", "{", "[]x", '[{"tiles": 3}]', '[{"tiles": {"a": {"tile": {"B": "64"}}}}]']
)
def test_a_broken_cache_is_named_and_left_alone(device, text):
    file = _tuned.cache_file()
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.warns(UserWarning, match="not a file of fastlm bench tune"):
        _tuned.load()
    assert _tuned._winners == {}
    with pytest.raises(ValueError, match="not a file of fastlm bench tune"):
        bench("tune", "--op", "layer_norm")


@pytest.mark.parametrize(
    ("op", "size", "keys"),
    [
        (
            "layer_norm",
            {"M": 9, "N": 70},
            {"layer_norm: row_tile(70)", "layer_norm: _backward_tile(70)"},
        ),
        (
            "flash_attention",
            {"B": 1, "S_q": 40, "S_k": 40, "H": 1, "H_kv": 1, "D": 16, "causal": True},
            {
                "forward: tile_of(forward, float32 16, 16, False)",
                "gradients: tile_of(dkdv, float32 16, 16, False, False)",
                "gradients: tile_of(dq, float32 16, 16, False)",
            },
        ),
    ],
)
def test_real_ops_choose_tiles_and_are_right_with_others(device, op, size, keys):
    setting = Setting(OPS[op], torch.float32, size)
    with interpreted():
        found = tune.choices(setting, device)
        assert {choice.key for choice in found} == keys
        assert {choice.mode for choice in found} == {"forward", "backward"}
        for choice in found:
            walk = tune._Walk(setting, choice, device, 1e9)
            block = choice.fields[0]
            other = {**choice.tile, block: choice.tile[block] * 2}
            assert walk.fault(other, seed=1) == ""
