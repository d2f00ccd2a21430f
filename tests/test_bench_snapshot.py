"""The machine-code figures hold against the committed snapshot, and a worse one is named."""

import copy
import json

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from fastlm.bench import docs, snapshot
from fastlm.bench.capture import capture_launches
from fastlm.bench.fingerprint import _source, fingerprint
from fastlm.bench.host import (
    _positional,
    call_row,
    import_seconds,
    memory_row,
    saved_bytes,
    step_row,
)
from fastlm.kernels import OPS

KEY = "layer_norm | bfloat16 M=8192 N=4096 | forward | _forward_kernel | sm_90"


@pytest.fixture(scope="module")
def committed():
    return snapshot.read()


@pytest.mark.timeout(600)
def test_nothing_is_worse_than_the_committed_snapshot(committed):
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the snapshot is of triton {committed['triton']}")
    now, _ = snapshot.changed(committed)
    worse = snapshot.regressions(committed, now)
    new = sorted(now["rows"].keys() - committed["rows"].keys())
    assert not worse, "\n".join([*worse, "If this is meant: make snapshot docs"])
    assert not new, "\n".join([*new, "are not in the snapshot: make snapshot docs"])


@pytest.fixture
def small(monkeypatch):
    """A snapshot of one op on one target, where nothing that is unchanged is compiled again."""
    monkeypatch.setattr(snapshot, "OPS", {"relu_squared": OPS["relu_squared"]})
    monkeypatch.setattr(snapshot, "TARGETS", ("sm_90",))
    monkeypatch.setattr(snapshot, "_AGAIN", 0)
    return snapshot.take(processes=1)


def test_only_what_changed_is_compiled(small, monkeypatch):
    now, compiled = snapshot.changed(small, processes=1)
    assert compiled == 0
    assert now["rows"] == small["rows"]
    name = next(name for name in small["rows"] if "backward" in name)
    old = copy.deepcopy(small)
    old["rows"][name] |= {"fingerprint": "of another source", "blocks_per_sm": 99}
    now, compiled = snapshot.changed(old, processes=1)
    assert compiled == 1
    (worse,) = snapshot.regressions(old, now)
    assert worse.startswith(f"{name}: blocks a multiprocessor 99 -> ")
    monkeypatch.setattr(snapshot, "_AGAIN", 1)
    assert snapshot.changed(small, processes=1)[1] == 1


@triton.jit
def _times_two_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N, other=0.0) * 2, mask=offs < N)


def launch_of(kernel, n=64, **options):
    with capture_launches(90) as capture:
        kernel[(1,)](torch.empty(n), torch.empty(n), n, BLOCK=64, **options)
    return capture.launches[0]


def test_a_fingerprint_is_of_all_that_matters_and_of_nothing_else():
    first = fingerprint(launch_of(_times_two_kernel), 90)
    assert first == fingerprint(launch_of(_times_two_kernel), 90)
    others = {
        fingerprint(launch_of(_times_two_kernel), 80),
        fingerprint(launch_of(_times_two_kernel, num_warps=8), 90),
        fingerprint(launch_of(_times_two_kernel, n=48), 90),
    }
    assert len(others | {first}) == 4
    changed = JITFunction(_times_two_kernel.fn)
    changed._unsafe_update_src(_times_two_kernel.src.replace("* 2", "* 3"))
    assert fingerprint(launch_of(changed), 90) not in others | {first}


@triton.jit
def _scaled(x, FACTOR: tl.constexpr):
    return x * FACTOR


@triton.jit
def _calling_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, _scaled(tl.load(x_ptr + offs), 2))


def test_a_fingerprint_follows_what_a_kernel_calls(monkeypatch):
    before = fingerprint(launch_of(_calling_kernel), 90)
    other = JITFunction(_scaled.fn)
    other._unsafe_update_src(_scaled.src.replace("x * FACTOR", "x + FACTOR"))
    monkeypatch.setitem(_calling_kernel.fn.__globals__, "_scaled", other)
    _source.cache_clear()
    assert fingerprint(launch_of(_calling_kernel), 90) != before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 2}, "spills 0 -> 2"),
        ({"float64": 1}, "float64 0 -> 1"),
        ({"tensor": {}}, "no HGMMA any more"),
        ({"blocks_per_sm": 1, "registers": 250}, "registers 40 -> 250"),
        ({"modelled_us": 104.0}, "modelled time 100.0 -> 104.0 us (+4.0%)"),
        ({"error": "PTXASError"}, "PTXASError"),
    ],
)
def test_what_becomes_worse_is_named(committed, change, words):
    old = copy.deepcopy(committed)
    old["rows"][KEY] |= {"modelled_us": 100.0, "tensor": {"HGMMA": 8}, "registers": 40, "spills": 0}
    new = copy.deepcopy(old)
    new["rows"][KEY] |= change
    (worse,) = snapshot.regressions(old, new)
    assert worse.startswith(KEY)
    assert words in worse


def test_small_and_better_changes_pass(committed):
    new = copy.deepcopy(committed)
    new["rows"][KEY]["modelled_us"] *= 1.02
    new["rows"][KEY]["registers"] -= 8
    new["rows"]["another | x | forward | k | sm_90"] = new["rows"][KEY]
    assert snapshot.regressions(committed, new) == []


def test_a_kernel_that_is_gone_is_named(committed):
    new = copy.deepcopy(committed)
    del new["rows"][KEY]
    assert "gone" in snapshot.regressions(committed, new)[0]


def test_another_compiler_needs_another_snapshot(committed, tmp_path):
    with pytest.raises(ValueError, match="take a new one"):
        snapshot.regressions({**committed, "triton": "1.0"}, committed)
    with pytest.raises(ValueError, match="there is no snapshot"):
        snapshot.read(tmp_path / "none.json")


def test_a_snapshot_is_read_as_written(committed, tmp_path):
    file = tmp_path / "snapshot.json"
    snapshot.write(committed, file)
    assert snapshot.read(file) == committed
    assert file.read_text() == snapshot.FILE.read_text()
    assert json.dumps(KEY) in file.read_text()


def test_the_committed_page_is_generated():
    page = docs.benchmarks_page()
    assert docs.PAGE.read_text() == page
    assert "no kernel was timed" in page
    for file in docs.RESULTS.glob("cpu-*.json"):
        report = json.loads(file.read_text())
        assert report["environment"]["device"] in page
        assert all(f"| {row['case']} | {row['contender']} |" in page for row in report["rows"])


# --- memory, launches, calls --------------------------------------------------------------------


def test_bytes_kept_are_counted_once_and_without_inputs():
    x = torch.randn(64, 32, requires_grad=True)

    def twice(x):
        return torch.exp(x) * torch.tanh(x)  # keeps both factors; exp and tanh keep them too

    assert saved_bytes(twice, {"x": x}) == 2 * 64 * 32 * 4
    assert saved_bytes(lambda x: x * x, {"x": x}) == 0  # it keeps its input alone
    assert saved_bytes(lambda x: torch.exp(x), {"x": x}) == 0  # and this its result


def test_layer_norm_keeps_two_numbers_a_row():
    row = memory_row(OPS["layer_norm"])
    assert row["case"] == "bfloat16 M=8192 N=4096"
    assert row["saved"] == 8192 * 2 * 4
    assert (row["launches_forward"], row["launches_backward"]) == (1, 2)


def test_varlen_attention_is_counted_too():
    row = memory_row(OPS["flash_attention_varlen"])
    assert 0 < row["saved"] < row["saved_eager"] / 100


def test_a_training_step_is_counted():
    row = step_row("tiny")
    blocks = 4 * (2 + 5)  # a block's norms, its attention, forward and backward, and its activation
    assert row["launches"] >= blocks
    assert row["other_operators"] < row["eager_operators"]


def test_inputs_go_by_place_where_they_can():
    op = OPS["flash_attention"]
    args, kwargs = _positional(op, {"q": 1, "k": 2, "v": 3, "causal": True})
    assert (args, kwargs) == ([1, 2, 3], {"causal": True})


def test_calls_and_imports_are_measured():
    row = call_row(OPS["layer_norm"], seconds=0.01)
    assert row["fused_us"] > 0
    assert row["over_us"] == pytest.approx(row["fused_us"] - row["eager_us"], abs=0.02)
    assert 0 < import_seconds(tries=1) < 5
