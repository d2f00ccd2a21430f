"""Training: data order, schedules, the loop's arithmetic, checkpoints, and the command line."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from fastlm.__main__ import main
from fastlm.lm import GPT, GPTConfig, checkpoint, data
from fastlm.lm.fit import FitConfig, Loop, learning_rate, prepare
from fastlm.lm.options import from_fields
from fastlm.lm.parallel import World
from fastlm.lm.picture import line_chart, ticks
from fastlm.lm.train import TextTask, TrainConfig, train

HERE = World(torch.device("cpu"))
SMALL = {
    "steps": 6, "batch_size": 4, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16,
    "warmup": 2, "eval_sequences": 4, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(["alpha", "beta", "gamma"], k=600)))
    return path


def small(text, **changes) -> TrainConfig:
    return TrainConfig(data=str(text), **{**SMALL, **changes})


def flags(text, **changes) -> list[str]:
    """The same settings as words of a command line."""
    settings = {"data": text, **SMALL, **changes}
    return [w for k, v in settings.items() for w in ("--" + k.replace("_", "-"), str(v))]


def weights(folder) -> dict[str, torch.Tensor]:
    return GPT.from_pretrained(folder).state_dict()


# --- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
def test_the_order_is_a_permutation_and_another_one_for_another_key(n):
    orders = [data.permuted(np.arange(n), n, key) for key in range(3)]
    for order in orders:
        assert sorted(order) == list(range(n))
    if n > 7:
        assert (orders[0] != orders[1]).any()


def test_an_epoch_holds_each_window_once():
    n, T, rows = 1007, 10, 4
    windows = (n - T) // T
    begins = np.concatenate([data.starts(n, T, 5, step, rows) for step in range(200)])
    assert begins.min() >= 0
    assert begins.max() + T + 1 <= n
    for epoch in range(2):
        drawn = np.sort(begins[epoch * windows : (epoch + 1) * windows])
        assert (np.diff(drawn) == T).all()


def test_a_batch_is_a_function_of_seed_step_and_rank(text):
    corpus = data.load(str(text), 16)
    config = small(text)
    worlds = [World(torch.device("cpu"), rank, 2) for rank in range(2)]
    (whole,) = TextTask(corpus, config, 16, HERE).batches(3)
    parts = [next(iter(TextTask(corpus, config, 16, w).batches(3))) for w in worlds]
    for rank, part in enumerate(parts):
        assert torch.equal(part["ids"], whole["ids"][rank::2])
    assert torch.equal(whole["ids"][:, 1:], whole["targets"][:, :-1])
    (other,) = TextTask(corpus, dataclasses.replace(config, seed=4), 16, HERE).batches(3)
    assert not torch.equal(other["ids"], whole["ids"])


def test_the_standard_library_is_text_enough():
    corpus = data.load("stdlib", 64)
    assert len(corpus.train) > 5_000_000
    assert b"import" in corpus.val[:100_000].tobytes()
    assert not any("test" in path.parts for path in data.stdlib_files())


def test_what_is_not_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not found"):
        data.load(str(tmp_path / "nowhere"), 16)
    with pytest.raises(ValueError, match="none in 0 files"):
        data.load(str(tmp_path), 16)
    (tmp_path / "picture").write_bytes(b"\x89PNG\0\xff")
    with pytest.raises(ValueError, match="none in 1 files"):
        data.load(str(tmp_path), 16)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="more than 16 tokens"):
        data.load(str(tmp_path), 16)


def test_a_folder_of_many_files_holds_out_every_tenth(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(str(i % 10) * 100)
    corpus = data.load(str(tmp_path), 16)
    assert set(corpus.val.tobytes()) == {ord("9"), ord("\n")}
    assert ord("9") not in corpus.train.tobytes()


# --- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_schedules_warm_up_and_come_down(schedule):
    config = FitConfig(steps=100, lr=1.0, min_lr=0.1, warmup=10, schedule=schedule)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == pytest.approx(1.0)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    if schedule == "wsd":
        assert rates[10:80] == [1.0] * 70
    assert learning_rate(0, dataclasses.replace(config, warmup=0, steps=1)) <= 1.0


class Uneven:
    """Micro-batches with different numbers of targets."""

    def __init__(self, cuts):
        ids = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0))
        targets = ids.roll(-1, 1)
        targets[0, :13] = -100
        self.rows = [(ids[a:b], targets[a:b]) for a, b in cuts]

    def batches(self, step):
        return [{"ids": ids, "targets": targets} for ids, targets in self.rows]

    def count(self, batch):
        return int((batch["targets"] != -100).sum())

    def loss(self, model, batch):
        return model(batch["ids"], batch["targets"], reduction="sum")[1]

    def evaluate(self, model):
        return {}


def loop_of(task, **changes) -> Loop:
    config = from_fields(FitConfig, {"steps": 3, "warmup": 0, "device": "cpu", **changes})
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
    model = GPT(GPTConfig.preset("tiny", **shape), ops=config.ops)
    return Loop(prepare(model, config, HERE), config, task, HERE)


@pytest.mark.parametrize("cuts", [[(0, 1), (1, 4)], [(0, 2), (2, 3), (3, 4)]])
def test_accumulated_gradients_count_tokens_not_batches(cuts):
    whole, cut = loop_of(Uneven([(0, 4)])), loop_of(Uneven(cuts))
    for _ in range(3):
        for a, b in zip(whole.take_step(), cut.take_step(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_eager_ops_take_the_same_steps():
    fused, eager = (loop_of(Uneven([(0, 4)]), ops=ops, grad_clip=0.1) for ops in ("fused", "eager"))
    for _ in range(3):
        for a, b in zip(fused.take_step(), eager.take_step(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_recomputed_activations_change_nothing():
    plain = loop_of(Uneven([(0, 4)]))
    again = loop_of(Uneven([(0, 4)]), checkpoint_activations=True)
    for _ in range(2):
        assert torch.equal(plain.take_step()[1], again.take_step()[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(dtype):
    exact, half = loop_of(Uneven([(0, 4)])), loop_of(Uneven([(0, 4)]), dtype=dtype)
    for _ in range(3):
        want, got = exact.take_step()[0], half.take_step()[0]
    torch.testing.assert_close(got, want, rtol=2e-2, atol=0)
    assert next(half.model.parameters()).dtype == torch.float32


def test_a_loss_that_is_not_finite_names_its_step():
    loop = loop_of(Uneven([(0, 4)]))
    loop.take_step()
    loop.check_finite()
    with torch.no_grad():
        loop.model.wte.weight[0] = float("nan")
    loop.take_step()
    loop.take_step()
    with pytest.raises(ArithmeticError, match="step 2 is not finite"):
        loop.check_finite()


# --- runs ---------------------------------------------------------------------------------------


def test_a_run_that_goes_on_ends_with_the_same_bits(text, tmp_path):
    """Dropout, two micro-batches and all: as if it had never stopped."""
    changes = {"dropout": 0.2, "micro_batch_size": 2, "save_every": 3, "log_every": 1}
    config = small(text, **changes, schedule="constant")
    train(config, tmp_path / "whole", world=HERE)
    half = dataclasses.replace(config, steps=3)
    train(half, tmp_path / "cut", world=HERE)
    torch.manual_seed(99)
    train(config, tmp_path / "cut", world=HERE, resume=True)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)

    def losses(folder):
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [(r["step"], r["loss"]) for r in map(json.loads, lines) if "loss" in r]

    assert losses("whole") == losses("cut")


def test_the_loss_falls_and_the_folder_tells(text, tmp_path):
    last = train(small(text, steps=40, lr=3e-3, log_every=5), tmp_path / "run", world=HERE)
    assert last["val_loss"] < 4.0
    assert last["bits_per_byte"] == pytest.approx(last["val_loss"] / np.log(2))
    records = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, *range(5, 41, 5)]
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["settings"]["n_embd"] == 16
    assert settings["torch"] == torch.__version__
    picture = ET.parse(tmp_path / "run" / "loss.svg").getroot()
    assert len(picture.findall(".//{*}circle")) == 9 + 1
    assert checkpoint.steps(tmp_path / "run") == [40]


def test_a_kill_at_any_instant_loses_nothing_saved(text, tmp_path):
    """SIGKILL in the midst of saving after every step; the run goes on to the same end."""
    command = [sys.executable, "-m", "fastlm", "train", "--out", str(tmp_path / "killed")]
    command += flags(text, steps=400, save_every=1, schedule="constant")
    process = subprocess.Popen(command, cwd="/", stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (found := checkpoint.steps(tmp_path / "killed")) or found[-1] < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    folder, facts = checkpoint.newest(tmp_path / "killed")
    steps = facts["step"] + 2
    assert folder.name == f"{facts['step']:06d}"
    assert GPT.from_pretrained(tmp_path / "killed")  # at the top of the folder all is whole too
    config = small(text, steps=steps, schedule="constant")
    train(config, tmp_path / "killed", world=HERE, resume=True)
    train(config, tmp_path / "whole", world=HERE)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize("victim", ["model.safetensors", "state.json", "optimizer"])
def test_a_damaged_checkpoint_is_refused(text, tmp_path, victim, capsys):
    train(small(text, steps=2), tmp_path / "run", world=HERE)
    folder = tmp_path / "run" / "checkpoints" / "000002"
    path = folder / victim
    if path.is_dir():
        (path,) = path.iterdir()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--steps", "3"]) == 2
    said = capsys.readouterr().err
    assert path.name in said
    assert "checksum" in said
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        checkpoint.newest(tmp_path / "run")


def test_only_the_newest_checkpoints_stay(text, tmp_path):
    train(small(text, save_every=1, keep=3), tmp_path / "run", world=HERE)
    assert checkpoint.steps(tmp_path / "run") == [4, 5, 6]


# --- command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--batch-size", "4", "--micro-batch-size", "3"], "--batch-size must be a multiple of 3"),
        (["--preset", "gpt9"], "preset must be one of tiny"),
        (["--n-head", "3"], "n_head must divide n_embd, 16; got 3"),
        (["--device", "tpu"], "device must be one of cpu, cuda"),
        (["--device", "cuda:7"], "device cuda:7 is not here"),
        (["--data", "/nowhere/at/all"], "data: '/nowhere/at/all' must be a file or a folder"),
        (["--resume"], "run.json must be a JSON file"),
    ],
)
def test_bad_input_is_one_clear_line(text, tmp_path, words, said, capsys):
    code = main(["train", "--out", str(tmp_path / "run"), *flags(text), *words])
    captured = capsys.readouterr()
    assert code == 2
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run" / "run.json").exists()


def test_unknown_flags_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--learning-rate", "1"])
    assert stop.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_keeps_its_shape(text, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", *out, *flags(text, steps=2)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"step 2/2  loss \d\.\d+ .* tokens/s", shown)
    assert main(["train", *out, *flags(text, steps=2)]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main(["train", *out, "--resume", "--n-layer", "3"]) == 2
    assert "--n-layer must stay 2" in capsys.readouterr().err
    assert main(["train", *out, "--resume", "--steps", "3"]) == 0
    text.write_text(text.read_text() + "more")
    assert main(["train", *out, "--resume", "--steps", "4"]) == 2
    assert "must be what the run began with" in capsys.readouterr().err


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in shown


# --- pictures -----------------------------------------------------------------------------------


def test_ticks_are_round_and_cover():
    for low, high in ((0, 1), (2.3, 5.4), (0, 600), (1e-4, 3e-4), (5, 5)):
        found = ticks(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert 2 <= len(found) <= 9


def test_a_chart_needs_a_finite_point():
    with pytest.raises(ValueError, match="finite point"):
        line_chart("t", "x", "y", {"a": [(1.0, float("nan"))]})
    root = ET.fromstring(line_chart("a < b", "x", "y", {"a": [(1, 2), (3, float("inf")), (4, 5)]}))
    assert len(root.findall(".//{*}circle")) == 2
