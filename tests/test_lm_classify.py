"""The text classifier: pooling, training by command, saving, scores, pictures, refusals."""

import json
import random
import xml.etree.ElementTree as ET

import pytest
import torch

from fastlm.__main__ import main
from fastlm.lm import GPT, GPTConfig, classify, packages
from fastlm.lm.classify import Classifier, HashedWords, Labelled
from fastlm.lm.confusion import confusion_chart
from fastlm.lm.finetune import FinetuneConfig
from fastlm.lm.parallel import World
from fastlm.lm.rows import Row, RowsTask, packed, packed_rows
from fastlm.lm.tokenizer import ByteTokenizer
from fastlm.lm.words import parts

SHAPE = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
TEXTS = ["def f ( x )", "yield", "class A : pass , or so it seems"]


def classifier(causal: bool, pooling=None) -> Classifier:
    torch.manual_seed(0)
    config = GPTConfig(**SHAPE, causal=causal, post_norm=not causal, dropout=0.1)
    return Classifier(GPT(config), ["a", "b", "c"], HashedWords(64), pooling).eval()


@pytest.mark.parametrize(("causal", "pooling"), [(False, None), (True, None), (True, "mean")])
def test_a_text_is_its_own_tokens_pooled(causal, pooling):
    """Packed texts do not see each other, and dropout is off in evaluation."""
    model = classifier(causal, pooling)
    rows = [model.tokens(text) for text in TEXTS]
    ids, cu_seqlens = packed(rows)
    logits, _ = model(ids, cu_seqlens=cu_seqlens)
    for row, got in zip(rows, logits, strict=True):
        x = model.body.hidden(torch.tensor([row]))[0]
        wanted = x[-1] if causal and pooling is None else x.mean(0)
        torch.testing.assert_close(got, model.score(wanted))
    targets = torch.tensor([2, 0, 1])
    loss = model(ids, targets, cu_seqlens=cu_seqlens, reduction="sum")[1]
    torch.testing.assert_close(loss, -logits.log_softmax(-1)[range(3), targets].sum())


def test_every_weight_that_is_read_learns():
    model = classifier(causal=False).train()
    ids, cu_seqlens = packed([model.tokens(text) for text in TEXTS])
    model(ids, torch.tensor([0, 1, 2]), cu_seqlens=cu_seqlens)[1].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_predictions_are_probabilities():
    model = classifier(causal=False)
    found = model.predict(TEXTS, batch_size=2)
    for prediction in found:
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        assert prediction.probability == max(prediction.probabilities.values())
        assert prediction.probabilities[prediction.label] == prediction.probability
    alone = [p for text in TEXTS for p in model.predict([text])]
    for a, b in zip(found, alone, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-6)
    assert model.predict([]) == []
    with pytest.raises(ValueError, match="texts must have a word; got ' '"):
        model.predict([" "])


@pytest.mark.parametrize(
    "tokenizer", [HashedWords(64), HashedWords(64, parts=True), ByteTokenizer()]
)
def test_it_comes_back_from_its_folder(tmp_path, tokenizer):
    torch.manual_seed(1)
    config = GPTConfig(
        **{**SHAPE, "vocab_size": tokenizer.vocab_size}, causal=False, post_norm=True
    )
    model = Classifier(GPT(config), ["x", "y"], tokenizer).eval()
    model.save_pretrained(tmp_path)
    again = Classifier.load(tmp_path)
    assert again.labels == ("x", "y")
    assert again.predict(TEXTS) == model.predict(TEXTS)
    (tmp_path / "classifier.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"classifier\.safetensors must hold the head"):
        Classifier.load(tmp_path)
    (tmp_path / "classifier.json").unlink()
    with pytest.raises(ValueError, match=r"must hold a classifier; it has no classifier\.json"):
        Classifier.load(tmp_path)


def test_hashed_words():
    words = HashedWords(1000)
    assert words.encode("a.b(c)  a") == [
        words.encode(w)[0] for w in ("a", ".", "b", "(", "c", ")", "a")
    ]
    assert all(0 <= token < 5 for token in HashedWords(5).encode("many different words here"))


def test_parts_of_words():
    assert parts("getFile_2") == ["get", "file", "2"]
    assert parts("HTTPServer") == ["http", "server"]
    assert [parts(word) for word in ("get", "Get", "GET", "12", "(", "\u00e9")] == [[]] * 6
    words = HashedWords(2**30, parts=True)
    assert words.encode("x getFile")[:2] == HashedWords(2**30).encode("x getFile")
    assert words.encode("getFile file_get")[1:3] == words.encode("file_get getFile")[2:0:-1]
    assert len({*words.encode("getFile"), *words.encode("get file")}) == 5  # parts are no words


def test_tokens_left_out_are_a_function_of_the_seed():
    config = FinetuneConfig(batch_size=4, token_dropout=0.5, task="classify")
    row = Row(list(range(40)), [1])
    task = RowsTask([row], [row], packed_rows, config, World(torch.device("cpu")), None, 0.5)

    def thinned(seed: int) -> Row:
        torch.manual_seed(seed)
        return task.thinned(row)

    assert thinned(1) == thinned(1) != thinned(2)
    lengths = [len(thinned(seed).ids) for seed in range(40)]
    assert min(lengths) < 25
    assert max(lengths) > 37
    assert list(thinned(1).ids) == sorted(thinned(1).ids)
    assert all(task.thinned(Row([7], [0])).ids == [7] for _ in range(40))  # never nothing


def test_scores_of_classes():
    wanted, got = ["a", "a", "a", "b", "b", "c"], ["a", "a", "b", "b", "a", "b"]
    matrix = classify.confusion(wanted, got, ["a", "b", "c"])
    assert matrix == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    scores = classify.class_scores(matrix, ["a", "b", "c"])
    assert scores["a"] == classify.ClassScore(2 / 3, 2 / 3, 2 / 3, 3)
    assert scores["b"] == classify.ClassScore(1 / 3, 1 / 2, 2 / 5, 2)
    assert scores["c"] == classify.ClassScore(0, 0, 0, 1)
    assert classify.accuracy(wanted, got) == 1 / 2


def test_the_picture_of_a_confusion_matrix():
    picture = ET.fromstring(confusion_chart([[3, 1], [0, 4]], ["is <a>", "b"]))
    texts = [e.text for e in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"is <a>", "b", "75", "25", "100"} <= set(texts)
    assert "0" not in texts
    titles = [e.text for e in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert "is <a> called b: 1" in titles


def test_snippets_are_of_ten_packages_and_split_by_place():
    made = list(packages.snippets())
    for split in ("train", "validation"):
        assert {e["label"] for e in made if e["split"] == split} == set(packages.PACKAGES)
    assert all(len(e["text"].split(" ")) == packages.WORDS for e in made)
    share = sum(e["split"] == "validation" for e in made) / len(made)
    assert 0.15 < share < 0.22


# --- training -----------------------------------------------------------------------------------

WORDS = {
    "fruit": ("apple", "pear", "plum"),
    "tool": ("saw", "hammer", "drill"),
    "sky": ("moon", "sun"),
}
TINY = [
    "--task", "classify", "--n-embd", "16", "--n-head", "2", "--n-inner", "32", "--steps", "40",
    "--vocab-size", "4096", "--lr", "1e-2", "--warmup", "5", "--batch-size", "16", "--eval-every",
    "20", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def lines():
    rng = random.Random(0)
    made = []
    for _ in range(120):
        label = rng.choice(tuple(WORDS))
        words = [rng.choice(("the", "a", "and", "old")) for _ in range(4)] + [
            rng.choice(WORDS[label])
        ]
        rng.shuffle(words)
        made.append(Labelled(" ".join(words), label))
    return made


@pytest.fixture(scope="module")
def file(lines, tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": e.text, "label": e.label}) + "\n" for e in lines))
    return path


@pytest.fixture(scope="module")
def tuned(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "run"
    line = ["finetune", "--data", str(file), "--out", str(out), "--checkpoint", "encoder-base"]
    assert main([*line, *TINY]) == 0
    return out


def test_the_linear_baseline_learns(lines):
    texts = [e.text for e in lines]
    got = classify.bag_of_words(lines[:80], texts[80:], features=4096, epochs=20)
    assert classify.accuracy([e.label for e in lines[80:]], got) > 0.95


def test_it_learns_from_own_lines(tuned):
    found = json.loads((tuned / "scores.json").read_text())
    assert found["texts"] == 12
    assert found["accuracy"]["the model"] > 0.9 > found["accuracy"]["most common class"]
    assert set(found["classes"]) == set(WORDS)
    ET.parse(tuned / "confusion.svg")


def test_the_saved_classifier_predicts(tuned, file, tmp_path):
    found = Classifier.load(tuned).predict(["the old hammer", "moon and a"])
    assert [p.label for p in found] == ["tool", "sky"]
    line = ["evaluate", "--checkpoint", str(tuned), "--data", str(file), "--out", str(tmp_path)]
    assert main(line) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["accuracy"]["the model"] > 0.9


def test_a_causal_model_classifies_by_its_last_token(file, tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "block_size": 40, "n_layer": 1, "n_head": 2, "n_embd": 32}
    GPT(GPTConfig(**shape)).save_pretrained(tmp_path / "base")
    flags = ["--task", "classify", "--steps", "2", "--batch-size", "16", "--device", "cpu"]
    flags += ["--token-dropout", "0.3"]
    line = ["finetune", "--data", str(file), "--out", str(tmp_path / "run")]
    assert main([*line, "--checkpoint", str(tmp_path / "base"), *flags]) == 0
    model = Classifier.load(tmp_path / "run")
    assert model.pooling == "last"
    assert isinstance(model.tokenizer, ByteTokenizer)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "must hold at least one line; it is empty"),
        (
            '{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}',
            "must have two labels or more",
        ),
        ('{"text": "a"}', "labels.jsonl:1: must have 'label'"),
        ('{"text": "a", "label": 3}', "labels.jsonl:1: label must be text, not empty; got 3"),
        ('{"text": "  ", "label": "x"}', "labels.jsonl:1: text must be text, not empty"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "y", "split": 1}', "jsonl:2: split"),
    ],
)
def test_bad_labels_are_one_line_and_exit_code_2(tmp_path, capsys, text, wrong):
    file = tmp_path / "labels.jsonl"
    file.write_text(text)
    line = ["finetune", "--data", str(file), "--out", str(tmp_path / "run")]
    assert main([*line, "--checkpoint", "encoder-base", *TINY]) == 2
    said = capsys.readouterr().err
    assert wrong in said
    assert said.count("\n") == 1


def test_wrong_settings(file, tmp_path, capsys):
    with pytest.raises(ValueError, match="labels must be two or more, all different"):
        Classifier(GPT(GPTConfig(**SHAPE)), ["a", "a"], HashedWords(64))
    line = ["finetune", "--data", str(file), "--out", str(tmp_path / "run"), *TINY]
    assert main([*line, "--checkpoint", "encoder-base", "--token-dropout", "1"]) == 2
    assert "--token-dropout must be in [0, 1); got 1.0" in capsys.readouterr().err
    assert main([*line, "--task", "lm", "--token-dropout", "0.1"]) == 2
    assert "--token-dropout must be 0 for --task lm" in capsys.readouterr().err
    assert main([*line, "--checkpoint", "encoder-base", "--no-merge"]) == 2
    assert "--no-merge must not be given for --task classify" in capsys.readouterr().err


def test_adapters_of_a_classifier(tuned, file, tmp_path):
    """They and the head learn; the folder has them in the weights."""
    flags = ["--task", "classify", "--steps", "4", "--batch-size", "16", "--device", "cpu"]
    line = ["finetune", "--data", str(file), "--out", str(tmp_path), "--checkpoint", str(tuned)]
    base = Classifier.load(tuned).body.state_dict()
    assert main([*line, *flags, "--lora-rank", "2", "--lora-targets", "c_fc", "--lr", "0.05"]) == 0
    found = Classifier.load(tmp_path).body.state_dict()
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    assert changed == {"h.0.mlp.c_fc.weight"}
