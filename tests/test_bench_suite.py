"""The benchmark suite on a simulated GPU: what it times, what it refuses, and how runs compare."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from simulated_gpu import SimulatedDevice

from fastlm.bench import check, cli, compare, contenders
from fastlm.bench.report import html
from fastlm.bench.suite import (
    Peaks,
    Setting,
    run_suite,
    settings,
    summary,
    time_setting,
)
from fastlm.bench.table import static_table, timed_table
from fastlm.bench.timed_report import timed_html
from fastlm.kernels import OPS

OP = OPS["layer_norm"]
SIZE = {"M": 37, "N": 64}
PEAKS = Peaks(bytes=1e12, flops=dict.fromkeys(("float32", "float16", "bfloat16"), 1e14))


@pytest.fixture
def device():
    return SimulatedDevice()


def timed(device, seconds, call=F.layer_norm):
    """A contender that takes this long on the simulated stream, and really computes."""

    def run(**inputs):
        device.kernel(seconds)
        return call(**inputs)

    return run


def rows_of(device, mode="forward", **calls):
    field = contenders.Field(calls, {"apex": "apex is not installed"})
    found = time_setting(Setting(OP, torch.float32, SIZE, mode), field, device, PEAKS, budget=1)
    return {row["contender"]: row for row in found}


# --- one case -----------------------------------------------------------------------------------


def test_right_contenders_get_their_times(device):
    rows = rows_of(device, fused=timed(device, 20e-6), eager=timed(device, 50e-6))
    assert rows["fused"]["p50"] == pytest.approx(20e-6, rel=1e-3)
    assert rows["eager"]["p50"] == pytest.approx(50e-6, rel=1e-3)
    assert rows["fused"]["status"] == "ok"
    assert rows["fused"]["flags"] == []
    assert len(rows["fused"]["samples"]) >= 30
    assert rows["apex"] == rows["apex"] | {"status": "skipped", "reason": "apex is not installed"}


@pytest.mark.parametrize("mode", ["backward", "full"])
def test_backward_and_full(device, mode):
    rows = rows_of(device, mode, fused=timed(device, 20e-6))
    assert rows["fused"]["status"] == "ok"
    assert "roofline" not in rows["fused"]  # the least work is known of the forward alone


def test_a_wrong_contender_shows_no_time(device):
    def wrong(**inputs):
        return F.layer_norm(**inputs) * 1.01

    rows = rows_of(device, fused=timed(device, 20e-6), eager=timed(device, 1e-6, wrong))
    assert rows["eager"]["status"] == "wrong"
    assert "before timing: result 0 is off" in rows["eager"]["reason"]
    assert "p50" not in rows["eager"]


def test_a_contender_that_answers_from_memory_is_found_after_timing(device):
    kept = {}

    def from_memory(**inputs):
        if "answer" not in kept:
            kept["answer"] = F.layer_norm(**inputs)
        return kept["answer"]

    rows = rows_of(device, fused=timed(device, 1e-6, from_memory))
    assert rows["fused"]["status"] == "wrong"
    assert "after timing" in rows["fused"]["reason"]


def test_a_contender_that_changes_its_inputs_is_wrong(device):
    def destructive(input, **rest):
        out = F.layer_norm(input, **rest)
        with torch.no_grad():
            input.zero_()
        return out

    assert rows_of(device, fused=timed(device, 1e-6, destructive))["fused"]["status"] == "wrong"


def test_a_contender_that_gives_no_gradient_is_wrong(device):
    def detached(input, normalized_shape, weight, bias):
        return F.layer_norm(input, normalized_shape, weight.detach(), bias)

    rows = rows_of(device, "full", fused=timed(device, 1e-6, detached))
    assert rows["fused"]["status"] in ("wrong", "failed")


def test_a_contender_that_fails_does_not_end_the_run(device):
    def failing(**inputs):
        raise RuntimeError("no kernel image\nmore")

    rows = rows_of(device, fused=timed(device, 20e-6), eager=failing)
    assert rows["fused"]["status"] == "ok"
    assert rows["eager"] == rows["eager"] | {
        "status": "failed",
        "reason": "RuntimeError: no kernel image",
    }


def test_faster_than_the_card_can_is_invalid(device):
    least = OP.work(**OP.example(torch.float32, torch.device("cpu"), **SIZE))[0] / PEAKS.bytes
    rows = rows_of(device, fused=timed(device, least / 2), eager=timed(device, least * 2))
    assert rows["fused"]["status"] == "invalid"
    assert rows["eager"]["status"] == "ok"
    assert rows["eager"]["roofline"] == pytest.approx(0.5, rel=0.01)


def test_noise_is_flagged(device):
    times = iter([20e-6, 30e-6] * 1000)

    def noisy(**inputs):
        device.kernel(next(times))
        return F.layer_norm(**inputs)

    assert rows_of(device, fused=noisy)["fused"]["flags"] == ["noisy"]


def test_the_contract_allows_what_eager_allows():
    exact = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
    eager = [exact[0] + 1e-3]
    good = check.judge([exact[0] + 1.9e-3], eager, exact, torch.float32)
    bad = check.judge([exact[0] + 2.1e-3], eager, exact, torch.float32)
    assert not good.wrong
    assert "off by" in bad.wrong
    nan = check.judge([torch.tensor([1.0, math.nan])], eager, exact, torch.float32)
    assert "not finite" in nan.wrong


# --- contenders ---------------------------------------------------------------------------------


def test_contenders_say_why_they_are_not_there():
    field = contenders.contenders(OP)
    assert {"fused", "eager", "compiled"} <= field.calls.keys()
    for name in ("liger", "apex"):
        assert name in field.calls or "not installed" in field.skipped[name]
    only = contenders.contenders(OP, wanted=[])
    assert only.calls.keys() == {"fused", "eager"}
    assert only.skipped["compiled"] == "not asked for"


def test_eager_is_pytorch_s_own_op():
    assert contenders.eager_of(OP) is F.layer_norm


# --- a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    """A whole run on the simulated GPU, with times made up and everything else real."""
    device = SimulatedDevice()
    cases = [
        Setting(OP, torch.float32, {"M": m, "N": 64}, mode)
        for m in (8, 16)
        for mode in ("forward", "full")
    ]
    field = contenders.Field(
        {"fused": timed(device, 20e-6), "eager": timed(device, 30e-6)}, {"liger": "not installed"}
    )
    patch = pytest.MonkeyPatch()
    patch.setattr("fastlm.bench.suite.contenders", lambda op, wanted: field)
    patch.setattr("fastlm.bench.suite.measured_peaks", lambda device: PEAKS)
    told = []
    found = run_suite(cases, device, budget=4, progress=told.append)
    patch.undo()
    assert told[0] == "1/4 layer_norm forward float32 M=8 N=64"
    found["environment"] |= {"device": "simulated", "driver": "1"}
    return json.loads(json.dumps(found, allow_nan=False))


def test_a_report_is_json_and_sums_up(report):
    assert report["timed"] is True
    total = summary(report["rows"])
    assert (total["cases"], total["wins"], total["losses"]) == (4, 4, 0)
    assert total["geometric_mean"] == pytest.approx(1.5, rel=0.01)


def test_the_table_and_the_page_show_every_case(report):
    text, page = timed_table(report), timed_html(report)
    assert "Against eager: 4 faster, 0 slower of 4 cases; geometric mean 1.50x." in text
    assert "skipped: not installed" in text
    for words in ("float32 M=8 N=64", "Speed-up over eager", "In no case", "not installed"):
        assert words in page
    assert "http" not in page  # nothing is fetched
    assert "Under the roofline" in page
    assert 'class="lost"' not in page


def test_losses_are_shown(report):
    slow = copy.deepcopy(report)
    for row in slow["rows"]:
        if row["contender"] == "eager" and row["mode"] == "forward":
            row.update({k: row[k] / 10 for k in ("p20", "p50", "p80")})
    assert "2 faster, 2 slower" in timed_table(slow)
    page = timed_html(slow)
    assert "In no case" not in page
    assert page.count('class="lost"') == 1
    assert page.count("0.15x") >= 2


def test_settings_of_a_suite():
    quick = list(settings("quick", ["layer_norm"], ["forward"], ["bfloat16"]))
    full = list(settings("full", ["layer_norm"], ["forward", "full"], ["bfloat16", "float32"]))
    assert len(quick) == 1
    assert len(full) == len(OP.bench_sizes) * 2 * 2 * 2
    assert {s.cold for s in full} == {True, False}


# --- compare ------------------------------------------------------------------------------------


def row(p20, p50, p80):
    return {"p20": p20, "p50": p50, "p80": p80}


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (row(10, 11, 12), row(10, 11, 12), "SAME"),
        (row(10, 11, 12), row(10.9, 11.05, 11.2), "SAME"),
        (row(10, 11, 12), row(8, 9, 9.5), "FASTER"),
        (row(10, 11, 12), row(13, 14, 15), "SLOWER"),
        (row(10, 10.1, 14), row(11, 13, 13.5), "AMBIGUOUS"),
        (row(10, 11, 13), row(10.5, 12, 14), "SAME"),
    ],
)
def test_verdicts_come_from_intervals(old, new, verdict):
    assert compare.verdict(old, new) == verdict


def changed(report, factor, **where):
    new = copy.deepcopy(report)
    for r in new["rows"]:
        if r["status"] == "ok" and all(r[k] == v for k, v in where.items()):
            r.update({k: r[k] * factor for k in ("p20", "p50", "p80")})
    return new


def test_compare_finds_what_changed(report):
    new = changed(report, 1.2, contender="fused", mode="full")
    rows = compare.compare(report, new)
    slower = [r for r in rows if r["verdict"] == "SLOWER"]
    assert [(r["contender"], r["mode"]) for r in slower] == [("fused", "full")] * 2
    assert compare.regressions(rows, 0.05) == slower
    assert compare.regressions(rows, 0.25) == []
    assert "2 SLOWER" in compare.comparison_table(rows)


def test_a_case_that_is_no_longer_right_is_a_regression(report):
    new = copy.deepcopy(report)
    new["rows"][0] |= {"status": "wrong"}
    (worse,) = compare.regressions(compare.compare(report, new), 0.05)
    assert worse["verdict"] == "ok -> wrong"


@pytest.mark.parametrize("fact", ["device", "driver"])
def test_other_hardware_is_refused(report, fact):
    other = copy.deepcopy(report)
    other["environment"][fact] = "another"
    with pytest.raises(ValueError, match=f"{fact} must be the same"):
        compare.compare(report, other)
    with pytest.raises(ValueError, match="must be timed"):
        compare.compare(report, {"timed": False, "rows": []})


# --- command line -------------------------------------------------------------------------------


def bench(*words):
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(list(words)))


def test_compare_and_report_from_files(report, tmp_path, capsys):
    old, new, page = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "page.html"
    old.write_text(json.dumps(report))
    new.write_text(json.dumps(changed(report, 1.2, contender="fused")))
    assert bench("compare", str(old), str(new)) == 0
    assert bench("compare", str(old), str(new), "--fail-above", "5%") == 1
    assert "REGRESSION layer_norm" in capsys.readouterr().out
    assert bench("report", str(old), "--html", str(page)) == 0
    assert page.read_text().startswith("<!doctype html>")


def test_without_a_gpu_run_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bench("run") == 1
    assert "NOTHING WAS TIMED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("static", "--op", "nonsense"), "--op must be one of"),
        (("static", "--target", "h100"), "--target must be one of"),
        (("static", "--processes", "0"), "--processes must be at least 1"),
        (("static", "--run", "/nowhere"), "run folder with metrics.jsonl"),
        (("static", "--json", "/nowhere/x.json"), "must exist"),
        (("compare", "/nowhere.json", "/nowhere.json"), "must be a JSON report"),
        (("compare", "a", "b", "--fail-above", "much"), "--fail-above must be a percentage"),
    ],
)
def test_bad_arguments_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        bench(*words)


def test_the_static_report(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": i, "loss": 5 - i / 100, "tokens_per_second": 1e4} for i in range(100)]
    lines[50]["val_loss"] = 4.6
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 100, "lo'  # killed here
    (run / "metrics.jsonl").write_text(text)
    out, page = tmp_path / "r.json", tmp_path / "r.html"
    words = ("static", "--op", "layer_norm", "--target", "sm_90", "--sizes", "one")
    assert bench(*words, "--json", str(out), "--html", str(page), "--run", str(run)) == 0
    printed = capsys.readouterr().out.strip().split("\n")
    assert printed[0] == printed[-1]
    assert printed[0].startswith("NOTHING WAS TIMED: no CUDA device")
    found = json.loads(out.read_text())
    assert found["timed"] is False
    (forward,) = [r for r in found["rows"] if r["pass"] == "forward"]
    assert forward["kernel"] == "_forward_kernel"
    assert forward["spills"] == 0
    assert forward["refusals"] == []
    (call,) = [c for c in found["calls"] if c["pass"] == "forward"]
    assert call["bytes"] == pytest.approx(call["least_bytes"], rel=0.02)
    low, middle, high = call["microseconds"]
    assert low <= middle <= high
    assert 0.3 < call["roofline_share"] <= 1
    written = page.read_text()
    for words in (
        *("NOTHING WAS TIMED", "Training run", "_backward_kernel", "H100-SXM5", "4.010"),
        "half precision 989 TFLOP/s, from 295 FLOP a byte",
    ):
        assert words in written
    assert "http" not in written
    assert html(found) == written
    forward["accepted"] = ["float64: bias corrections"]
    line = "_forward_kernel: float64: bias corrections (layer_norm; sm_90)"
    assert line in html(found)
    shown = static_table(found)
    assert "Refused by the rules: none\nRefused but accepted: 1\n  " + line in shown


def test_float8_products_are_held_to_their_own_peak(tmp_path):
    out = tmp_path / "r.json"
    bench("static", "--op", "fp8_linear", "--target", "sm_89", "--json", str(out))
    found = json.loads(out.read_text())
    (call,) = found["calls"]
    assert 0.3 < call["roofline_share"] <= 1
    peaks = found["parts"]["sm_89"]["peak_flops"]
    assert peaks["float8"] == pytest.approx(2 * peaks["half precision"])
    assert f"float8 {peaks['float8'] / 1e12:.0f} TFLOP/s" in html(found)


def test_a_report_without_float8_products_shows_no_such_roof(tmp_path):
    out = tmp_path / "r.json"
    bench("static", "--op", "layer_norm", "--target", "sm_89", "--json", str(out))
    assert list(json.loads(out.read_text())["parts"]["sm_89"]["peak_flops"]) == ["half precision"]
