"""The verbs that need a GPU, whole, on a simulated one: run, train, tune; crashes and clocks."""

import argparse
import csv
import json
import subprocess

import pytest
import torch
import torch.nn.functional as F
from simulated_gpu import SimulatedDevice

from fastlm.bench import check, cli, contenders, on_gpu, suite, whole_model
from fastlm.bench.suite import Peaks, measured_peaks
from fastlm.bench.timing import Timing
from fastlm.kernels import OPS

PEAKS = Peaks(bytes=1e12, flops=dict.fromkeys(("float32", "float16", "bfloat16"), 1e14))
SIZE = "M=37,N=64"


def bench(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def device(monkeypatch):
    """A simulated GPU in place of the real one; its peaks are made up."""
    found = SimulatedDevice()
    monkeypatch.setattr(on_gpu, "make_device", lambda: found)
    monkeypatch.setattr(suite, "measured_peaks", lambda device: PEAKS)
    monkeypatch.setattr(whole_model, "measured_peaks", lambda device, dtypes: PEAKS)
    return found


@pytest.fixture
def times(monkeypatch, device):
    """Seconds of each contender of layer_norm on the stream, to be changed between runs."""
    seconds = {"fused": 20e-6, "eager": 30e-6, "other": 25e-6}

    def of(name):
        def call(input, normalized_shape, weight=None, bias=None):
            device.kernel(seconds[name])
            return F.layer_norm(input, normalized_shape, weight, bias)

        return call

    def field(op, wanted):
        kept = ["fused", "eager", *(["other"] if wanted is None else wanted)]
        skipped = {"liger": "liger-kernel is not installed"}
        return contenders.Field({name: of(name) for name in kept}, skipped)

    monkeypatch.setattr(suite, "contenders", field)
    return seconds


RUN = ("run", "--op", "layer_norm", "--size", SIZE, "--dtype", "float32", "--mode", "forward")


def test_a_run_with_all_its_outputs_a_comparison_and_a_regression(times, tmp_path, capsys):
    old, new, page, sheet = (tmp_path / name for name in ("a.json", "b.json", "c.html", "d.csv"))
    assert bench(*RUN, "--json", old, "--html", page, "--csv", sheet) == 0
    printed = capsys.readouterr().out
    assert "Against eager: 1 faster, 0 slower of 1 cases; geometric mean 1.50x." in printed
    assert "skipped: liger-kernel is not installed" in printed
    rows = list(csv.DictReader(sheet.open()))
    assert [r["contender"] for r in rows] == ["fused", "eager", "other", "liger"]
    assert float(rows[0]["p50"]) == pytest.approx(20e-6, rel=1e-3)
    kept = page.read_text().split('id="report">')[1].split("</script>")[0]
    assert json.loads(kept) == json.loads(old.read_text())

    times["fused"] = 23e-6
    assert bench(*RUN, "--json", new) == 0
    assert bench("compare", old, new) == 0
    assert bench("compare", old, new, "--fail-above", "5%") == 1
    assert "REGRESSION layer_norm" in capsys.readouterr().out
    assert bench("compare", new, old, "--fail-above", "5%") == 0


def test_a_least_speed_up_and_another_baseline(times, capsys):
    assert bench(*RUN, "--min-speedup", "layer_norm:1.4") == 0
    assert bench(*RUN, "--min-speedup", "layer_norm:1.6") == 1
    assert "1.50x, not 1.6x" in capsys.readouterr().out
    assert bench(*RUN, "--baseline", "other", "--min-speedup", "layer_norm:1.3") == 1
    assert "Against other: 1 faster" in capsys.readouterr().out
    assert bench(*RUN, "--min-speedup", "softmax:1") == 1
    assert "softmax: not measured" in capsys.readouterr().out


def test_a_graph_leaves_the_host_code_out(times, tmp_path):
    file = tmp_path / "graph.json"
    assert bench(*RUN, "--graph", "--contender", "other", "--json", file) == 0
    report = json.loads(file.read_text())
    assert report["graph"] is True
    assert report["rows"][0]["p50"] == pytest.approx(20e-6, rel=1e-3)


def test_check_only_times_nothing(times, device, capsys, monkeypatch):
    monkeypatch.setattr(suite, "measure", lambda *a, **k: pytest.fail("timed"))
    assert bench(*RUN, "--check-only") == 0
    assert "right" in capsys.readouterr().out
    times.clear()  # every call fails now
    assert bench(*RUN, "--check-only") == 1


def test_warm_and_cold(times, tmp_path):
    file = tmp_path / "r.json"
    assert bench(*RUN, "--cache", "cold", "--cache", "warm", "--json", file) == 0
    assert {row["cache"] for row in json.loads(file.read_text())["rows"]} == {"cold", "warm"}


def test_peaks_come_from_a_copy_and_a_product(device, monkeypatch):
    def in_a_millisecond(calls, device, **_):
        return {name: Timing([1e-3], float(call() is None)) for name, call in calls.items()}

    monkeypatch.setattr(suite, "measure", in_a_millisecond)
    found = measured_peaks(device)
    assert found.bytes == pytest.approx(2 * (16 * 16 * 2) * 4 / 1e-3)  # read and written
    for rate in (found.flops[name] for name in ("float32", "float16", "bfloat16")):
        assert rate == pytest.approx(2 * 16**3 / 1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "--budget", "0"), "--budget must be positive"),
        (("run", "--size", "8192"), "--size must be like"),
        (("run", "--size", "M=a b"), "--size must be like"),
        (("run", "--min-speedup", "softmax"), "--min-speedup must be like"),
        (("run", "--min-speedup", "nonsense:1"), "--op must be one of"),
        (("train", "--model", "gpt9"), "--model must be one of"),
        (("train", "--length", "0"), "--length must be at least 1"),
        (("tune", "--op", "nonsense"), "--op must be one of"),
    ],
)
def test_bad_arguments_are_refused(device, words, message):
    with pytest.raises(ValueError, match=message):
        bench(*words)


@pytest.mark.parametrize("verb", ["run", "train", "tune"])
def test_without_a_gpu_nothing_is_timed(verb, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(verb) == 1
    assert "NOTHING WAS TIMED" in capsys.readouterr().out


# --- what may go wrong --------------------------------------------------------------------------


def test_memory_is_poisoned_for_the_check():
    with check.poisoned_memory():
        for fresh in (torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(1).new_empty(4)):
            assert fresh.isnan().all()
        assert torch.empty(3, dtype=torch.int32).tolist() == [-1] * 3
        assert torch.empty(2, dtype=torch.bool).all()
    assert not isinstance(torch.empty, type(lambda: 0))


def test_a_contender_that_does_not_take_the_arguments_is_skipped(device):
    def narrow(input, normalized_shape):
        return F.layer_norm(input, normalized_shape)

    def wide(**inputs):
        device.kernel()
        return F.layer_norm(**inputs)

    def refusing(**inputs):
        raise NotImplementedError("only on Tuesdays\nmore")

    setting = suite.Setting(OPS["layer_norm"], torch.float32, {"M": 5, "N": 8})
    field = contenders.Field({"fused": wide, "narrow": narrow, "refusing": refusing})
    rows = suite.time_setting(setting, field, device, PEAKS, 1.0)
    said = {row["contender"]: (row["status"], row["reason"]) for row in rows}
    assert said["fused"][0] == "ok"
    assert said["narrow"] == ("skipped", "got an unexpected keyword argument 'weight'")
    assert said["refusing"] == ("skipped", "only on Tuesdays")


def test_a_process_that_dies_ends_its_op_alone():
    def process(op, words, file):
        if op == "softmax":
            return subprocess.CompletedProcess([], -11, "", "first\nCUDA error: illegal access")
        rows = [{"op": op}]
        with open(file, "w") as out:
            json.dump({"timed": True, "rows": rows, "seconds": 1.0, "command": ""}, out)
        return subprocess.CompletedProcess([], 0, "", "")

    report = on_gpu.isolated(["gelu", "softmax", "layer_norm"], [], process)
    assert [row["op"] for row in report["rows"]] == ["gelu", "layer_norm", "softmax"]
    assert "ended with -11: CUDA error: illegal access" in report["rows"][-1]["reason"]
    with pytest.raises(ValueError, match="no op could be timed"):
        on_gpu.isolated(["softmax"], [], process)


def test_an_isolated_process_is_given_the_same_arguments():
    parser = argparse.ArgumentParser()
    on_gpu.add_run(parser)
    given = parser.parse_args([*RUN[1:], "--graph", "--cache", "warm", "--contender", "x"])
    again = parser.parse_args(["--op", "layer_norm", *on_gpu._words(given)])
    assert again == given


def test_clocks_are_let_go_of(monkeypatch):
    said = []

    def run(command, **_):
        said.append(command[1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError), on_gpu.locked_clocks(1500):
        raise RuntimeError
    assert said == ["--lock-gpu-clocks=1500,1500", "--reset-gpu-clocks"]

    def refuse(command, **_):
        return subprocess.CompletedProcess(command, 4, "", "you lack permission\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(ValueError, match="you lack permission"), on_gpu.locked_clocks(1500):
        pass


# --- attention's contenders ---------------------------------------------------------------------


def test_pytorch_s_backends_are_contenders_of_both_attentions():
    for name in ("scaled_dot_product_attention", "flash_attention"):
        wanted = ["sdpa", "sdpa math", "sdpa flash"]
        field = contenders.contenders(OPS[name], wanted)
        op, size = OPS[name], {"B": 1, "S_q": 9, "S_k": 9, "H": 2, "H_kv": 1, "D": 8}
        inputs = op.example(torch.float32, torch.device("cpu"), **size)
        exact = op.reference(**inputs)
        torch.testing.assert_close(field.calls["sdpa math"](**inputs), exact)
        asked = "eager" if name.startswith("scaled") else "sdpa"
        assert contenders.note(op, asked, inputs).startswith("backend ")
        assert contenders.note(op, "fused", inputs) == ""


# --- whole models -------------------------------------------------------------------------------


@pytest.fixture
def steps(device, monkeypatch):
    """Steps of models really compute, and take these times on the stream."""
    for name, seconds in (("training_step", 10e-3), ("generation", 5e-3)):
        build = getattr(whole_model, name)

        def built(work, contender, device, build=build, seconds=seconds):
            step = build(work, contender, device)

            def call():
                device.kernel(seconds * (2 if contender == "eager" else 1))
                return step()

            return call

        monkeypatch.setattr(whole_model, name, built)


TINY = ("--model", "tiny", "--set", "n_layer=1", "--batch-size", 2, "--length", 8)
FLOAT = ("--dtype", "float32", "--new-tokens", 2, "--budget", "0.1")


def test_training_and_decoding_of_a_model(steps, tmp_path, capsys):
    file, page = tmp_path / "model.json", tmp_path / "model.html"
    words = ("--contender", "fused", "--contender", "eager", "--json", file, "--html", page)
    assert bench("train", *TINY, *FLOAT, *words) == 0
    rows = {(r["mode"], r["contender"]): r for r in json.loads(file.read_text())["rows"]}
    assert set(rows) == {(m, c) for m in ("train", "decode") for c in ("fused", "eager")}
    for (mode, _), row in rows.items():
        assert row["status"] == "ok", row
        assert row["error"] < 1e-4
        assert "tiny n_layer=1 float32 B=2 T=8" in row["case"]
        tokens = 2 * 8 if mode == "train" else 2 * 2
        assert row["tokens_per_second"] == pytest.approx(tokens / row["p50"])
    assert rows["train", "fused"]["p50"] == pytest.approx(10e-3, rel=1e-3)
    assert rows["decode", "eager"]["p50"] == pytest.approx(10e-3, rel=1e-3)
    assert rows["train", "fused"]["tflops"] > 0
    printed = capsys.readouterr().out
    assert "tiny training step" in printed
    assert "tokens/s" in printed
    assert "tiny generation" in page.read_text()


def test_a_model_with_wrong_gradients_shows_no_time(steps, device, monkeypatch):
    honest = whole_model.gradients

    def wrong(work, contender, *rest, **options):
        found = honest(work, contender, *rest, **options)
        return found * 1.01 if contender == "fused" else found

    monkeypatch.setattr(whole_model, "gradients", wrong)
    work = whole_model.Workload("tiny", 1, 8, torch.float32)
    report = whole_model.run_models(
        [work], device, modes=["train"], wanted=("fused", "eager"), budget=0.1
    )
    fused, eager = report["rows"]
    assert (fused["status"], eager["status"]) == ("wrong", "ok")
    assert "p50" not in fused
