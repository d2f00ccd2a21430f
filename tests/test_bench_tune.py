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


def test_a_switch_is_thrown_where_the_tile_has_one():
    fields = ("stages", "specialised")
    tile = {"stages": 1, "specialised": False}
    assert list(tune.neighbours(tile, fields)) == [
        {"stages": 2, "specialised": False},
        {"stages": 1, "specialised": True},
    ]
    seen = []
    with _tuned.observed(lambda key, tile, fields: seen.append((tile, fields))):
        _tuned.tunable(*fields)(lambda x: {"stages": x, "specialised": None})(3)
    assert seen == [({"stages": 3}, ("stages",))]


REAL = {  # op: size, and each choice that it makes with the pass that times it
    "layer_norm": (
        {"M": 9, "N": 70},
        {"layer_norm: row_tile(70)": "forward", "layer_norm: _backward_tile(70)": "backward"},
    ),
    "flash_attention": (
        {"B": 1, "S_q": 40, "S_k": 40, "H": 1, "H_kv": 1, "D": 16, "causal": True},
        {
            "forward: tile_of(forward, float32 16, 16, False, False)": "forward",
            "gradients: tile_of(dkdv, float32 16, 16, False, False)": "backward",
            "gradients: tile_of(dq, float32 16, 16, False)": "backward",
        },
    ),
    "cross_entropy": (
        {"M": 2, "V": 2600, "softcap": 2.0},
        {"cross_entropy: row_options(float32 2600)": "full"},
    ),
    "linear_cross_entropy": (
        {"N": 17, "H": 33, "V": 150, "softcap": 3.0, "impl": "recompute"},
        {"tiles: _product_tile(float32 33, False)": "full"},
    ),
    "rotary_embedding": ({"S": 7, "H": 2, "D": 16}, {"rotary: _tile(8, 8)": "full"}),
    "gelu": (
        {"M": 3, "N": 700},
        {
            "activations: _tile(gelu, torch.float32)": "forward",
            "activations: _tile(gelu backward, torch.float32)": "backward",
        },
    ),
    "bias_gelu": ({"M": 5, "N": 48}, {"bias_gelu: _block(48)": "full"}),
    "swiglu": (
        {"M": 5, "N": 48, "packed": True},
        {
            "glu: _share(silu, float32 48)": "forward",
            "glu: _share(silu backward, float32 48)": "backward",
        },
    ),
    "dropout": ({"M": 4, "N": 512}, {"dropout: _tile(torch.float32)": "full"}),
    "embedding": ({"T": 7, "V": 5, "N": 40}, {"embedding: _columns(40)": "full"}),
    "int8_linear": (
        {"M": 18, "N": 37, "K": 70},
        {
            "int8_linear: _tile(True, torch.float32, False)": "forward",
            "int8_linear: _tile_backward(torch.float32, False)": "backward",
        },
    ),
    "int4_linear": (
        {"M": 3, "N": 19, "K": 90, "group_size": 32},
        {
            "int4_linear: _few_tile(48)": "forward",
            "int4_linear: _tile_backward(torch.float32)": "backward",
        },
    ),
    "fp8_linear": (
        {"M": 5, "N": 150, "K": 150, "granularity": "block"},
        {"fp8_linear: _tile(True, True)": "forward"},
    ),
    "quantize_fp8": (
        {"M": 5, "K": 300, "granularity": "block"},
        {"fp8_linear: _quantize_tile(3, 128)": "forward"},
    ),
    "sample": (
        {"B": 2, "V": 1500, "temperature": 0.7, "top_k": 50},
        {"sampling: _cut_tile(1500)": "forward", "sampling: _pick_tile(1500)": "forward"},
    ),
    "muon_step": ({"shapes": ((9, 30),), "ns_steps": 2}, {"newton_schulz: _tile()": "forward"}),
}


@pytest.mark.parametrize("op", REAL)
def test_real_ops_choose_tiles_and_are_right_with_others(device, op):
    size, modes = REAL[op]
    setting = Setting(OPS[op], OPS[op].dtypes[0], size)
    with interpreted():
        found = tune.choices(setting, device)
        assert {choice.key: choice.mode for choice in found} == modes
        for choice in found:
            walk = tune._Walk(setting, choice, device, 1e9)
            block = choice.fields[0]
            other = {**choice.tile, block: choice.tile[block] * 2}
            assert walk.fault(other, seed=1) == ""
