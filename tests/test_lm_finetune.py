"""Fine-tuning: adapters, losses on answers alone, learned byte pairs, tasks, and the command."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from fastlm.__main__ import main
from fastlm.lm import GPT, GPTConfig, chat, scenarios, scores, stories, translation
from fastlm.lm.byte_pairs import BytePairTokenizer, learn_merges
from fastlm.lm.evaluate import answerer, load_answers
from fastlm.lm.finetune import FinetuneConfig, finetune
from fastlm.lm.fit import Loop
from fastlm.lm.lora import (
    adapters,
    apply_lora,
    load_lora,
    lora_state_dict,
    merge_lora,
    save_lora,
)
from fastlm.lm.parallel import World
from fastlm.lm.rows import Row, RowsTask, packed_rows, padded_rows
from fastlm.lm.tokenizer import ByteTokenizer, load_tokenizer

HERE = World(torch.device("cpu"))
SMALL = {"vocab_size": 40, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
MODELS = {
    "gpt2": GPTConfig(**SMALL),
    "llama": GPTConfig.preset("llama-tiny", **SMALL, n_kv_head=2, head_dim=6),
}


def model_of(name: str, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(MODELS[name]).eval()


def trained(model: GPT) -> GPT:
    """Adapters as training leaves them: B is no longer 0."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


# --- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_adapters_change_nothing_at_first_then_merge_to_the_same(name):
    model, ids = model_of(name), torch.randint(40, (2, 9))
    before = model(ids)[0]
    names = set(model.state_dict())
    apply_lora(model, rank=3)
    torch.testing.assert_close(model(ids)[0], before, rtol=0, atol=0)
    assert names < set(model.state_dict())
    adapted = trained(model)(ids)[0]
    assert (adapted - before).abs().max() > 1e-2
    merge_lora(model)
    assert set(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(ids)[0], adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_only_adapters_learn(name):
    model = trained(apply_lora(model_of(name), rank=2, dropout=0.1).train())
    ids = torch.randint(40, (2, 9))
    model(ids, ids)[1].backward()
    for parameter, p in model.named_parameters():
        learns = "lora_" in parameter
        assert p.requires_grad == learns, parameter
        assert (p.grad is not None and bool(p.grad.any())) == learns, parameter


def test_parts_of_the_packed_linear_have_adapters_of_their_own():
    config = MODELS["llama"]
    model = trained(
        apply_lora(model_of("llama"), rank=2, alpha=6.0, targets=["c_attn.q", "attn.c_attn.v"])
    )
    D = config.head_width
    q, kv = config.n_head * D, config.kv_heads * D
    for linear in adapters(model).values():
        assert linear.lora_A.shape == (4, 32)
        assert linear.lora_B.shape == (q + kv, 2)
        delta = linear.delta()
        A, B = linear.lora_A, linear.lora_B
        torch.testing.assert_close(delta[:q], 3 * B[:q] @ A[:2])
        torch.testing.assert_close(delta[q + kv :], 3 * B[q:] @ A[2:])
        assert not delta[q : q + kv].any()  # keys are left alone
    assert {name.split(".", 2)[2] for name in adapters(model)} == {"attn.c_attn"}


def test_the_two_halves_of_a_gated_feed_forward_are_apart():
    model = apply_lora(model_of("llama"), rank=2, targets=["c_fc"])
    inner = MODELS["llama"].inner
    for linear in adapters(model).values():
        assert [part.rows for part in linear.parts] == [inner, inner]
        assert linear.lora_A.shape[0] == 4


def test_adapters_alone_are_saved_and_fit_a_loaded_checkpoint(tmp_path):
    base = model_of("gpt2")
    base.save_pretrained(tmp_path / "base")
    model = trained(apply_lora(base, rank=2, alpha=5.0, targets=["c_attn.v", "mlp.c_proj"]))
    save_lora(model, tmp_path / "adapter")
    again = load_lora(GPT.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert lora_state_dict(again).keys() == lora_state_dict(model).keys()
    ids = torch.randint(40, (1, 7))
    torch.testing.assert_close(again(ids)[0], model(ids)[0], rtol=0, atol=0)
    whole = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert (tmp_path / "adapter" / "adapter.safetensors").stat().st_size < whole / 5
    with pytest.raises(ValueError, match=r"adapter\.json: n_layer of the model must be 2"):
        load_lora(GPT(GPTConfig(**{**SMALL, "n_layer": 1})), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"adapter\.safetensors must be a safetensors file"):
        load_lora(GPT.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_wrong_adapters():
    with pytest.raises(ValueError, match=r"targets must be linears of the model, .*got 'q_proj'"):
        apply_lora(model_of("gpt2"), targets=["c_attn", "q_proj"])
    with pytest.raises(ValueError, match="targets must be a list of names; got 'c_attn'"):
        apply_lora(model_of("gpt2"), targets="c_attn")
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        apply_lora(model_of("gpt2"), rank=0)
    with pytest.raises(ValueError, match="dropout must be in"):
        apply_lora(model_of("gpt2"), dropout=1.0)
    with pytest.raises(ValueError, match="model must have no adapters"):
        apply_lora(apply_lora(model_of("gpt2")))
    with pytest.raises(ValueError, match="merge_lora: model must have adapters"):
        merge_lora(model_of("gpt2"))
    with pytest.raises(ValueError, match="save_lora: model must have adapters"):
        save_lora(model_of("gpt2"), "nowhere")


# --- conversations as tokens --------------------------------------------------------------------

TALK = chat.Example(
    (("system", "Be brief."), ("user", "Hi?"), ("assistant", "Yo."),
     ("user", "Where?"), ("assistant", "Hier, là."))
)  # fmt: skip


def learned_text(ids, targets):
    return ByteTokenizer().decode([t for t in targets if t != chat.IGNORED])


def test_the_loss_is_on_the_answers_exactly():
    ids, targets = chat.tokens(TALK, ByteTokenizer(), 200)
    text = ByteTokenizer().decode(ids)
    assert text == (
        "System: Be brief.\nUser: Hi?\nAssistant: Yo.<end>\nUser: Where?\nAssistant: Hier, là.<end"
    )
    assert learned_text(ids, targets) == " Yo.<end> Hier, là.<end>"
    assert all(t in (chat.IGNORED, follows) for t, follows in zip(targets, ids[1:], strict=False))
    assert chat.prompt_text(TALK.messages[:-1]) == text.removesuffix(" Hier, là.<end")


@pytest.mark.parametrize("block_size", range(1, 90))
def test_a_cut_prompt_leaves_something_to_learn(block_size):
    ids, targets = chat.tokens(TALK, ByteTokenizer(), block_size)
    assert (
        len(ids) == len(targets) == min(block_size, len(chat.tokens(TALK, ByteTokenizer(), 200)[0]))
    )
    answer = " Hier, là.<end>"
    room = len(answer.encode())
    learned = learned_text(ids, targets)
    if block_size >= room:
        assert learned.endswith(answer)  # the beginning of the prompt went
    else:
        assert answer.encode().startswith(bytes(targets))  # then the end of the answer


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "must be a JSON object; "),
        ("[1]", "must be a JSON object; got list"),
        ('{"prompt": "a"}', "must have 'answer'; has 'prompt'"),
        ('{"prompt": "a", "answer": " "}', "answer must be text, not empty; got ' '"),
        ('{"prompt": "a", "answer": 3}', "answer must be text, not empty; got 3"),
        ('{"prompt": "a", "answer": "b<end>"}', "texts must not hold the end marker <end>"),
        ('{"prompt": "a", "answer": "b", "split": "test"}', "split must be .*; got 'test'"),
        ('{"messages": "hi"}', "messages must be a list of objects; got 'hi'"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "role must be one of .*; got 'bot'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "messages must end with a question"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, wrong):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl:3: {wrong}"):
        chat.read_examples(file)


def test_a_bad_file(tmp_path):
    with pytest.raises(ValueError, match="must be a file of UTF-8 JSON lines"):
        chat.read_examples(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="must hold at least one line; it is empty"):
        chat.read_examples(tmp_path / "empty.jsonl")


# --- rows ---------------------------------------------------------------------------------------

ROWS = [Row([*range(n)], [-100, *range(2, n + 1)]) for n in (3, 7, 2, 5)]


def test_padded_and_packed_rows_have_one_loss():
    model = model_of("llama")
    padded = model(**padded_rows(ROWS), reduction="sum")[1]
    packed = model(**packed_rows(ROWS), reduction="sum")[1]
    alone = sum(model(**padded_rows([row]), reduction="sum")[1] for row in ROWS)
    torch.testing.assert_close(padded, alone)
    torch.testing.assert_close(packed, alone)


def test_rows_come_once_an_epoch_and_by_rank():
    rows = [Row([i], [i]) for i in range(12)]
    config = FinetuneConfig(batch_size=4, micro_batch_size=1)

    def seen(step, rank=0, size=1):
        world = World(torch.device("cpu"), rank, size)
        task = RowsTask(rows, rows, padded_rows, config, world, lambda model: None)
        return [batch["ids"].item() for batch in task.batches(step)]

    first, second = ([x for i in range(3) for x in seen(e * 3 + i)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert seen(1) == seen(1)
    assert sorted(seen(1, 0, 2) + seen(1, 1, 2)) == sorted(seen(1))


# --- byte pairs ---------------------------------------------------------------------------------

TEXTS = ["the cat sees the dog", "the dog sees the élan.", "the cat\nsees _it_ <end>"] * 3


def test_byte_pairs_are_learned_and_lose_nothing(tmp_path):
    tokenizer = BytePairTokenizer(learn_merges(TEXTS, 60))
    assert tokenizer.encode(" the cat sees") == [
        tokenizer.encode(w)[0] for w in (" the", " cat", " sees")
    ]
    assert tokenizer.vocab_size == 256 + len(tokenizer.merges)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, BytePairTokenizer)
    for text in (*TEXTS, "日本\x00\x7f\t ²thé😀", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert again.encode(text) == tokenizer.encode(text)
    stream = again.stream()
    pieces = [stream.push(token) for token in again.encode("the élan")]
    assert "".join(pieces) == "the élan"


def test_byte_pairs_open_in_the_package_tokenizers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = BytePairTokenizer(learn_merges(TEXTS, 60))
    ours.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(0)
    bits = ["the", " ", "\n", "é", "_", "<end>", " sees", "^]", "[\\", "²", "日本", "\x7f", "\x85"]
    for _ in range(300):
        text = "".join(rng.choices(bits, k=12))
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


# --- tasks and scores ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_a_task_has_no_held_out_line_in_training(name):
    made = list(scenarios.examples(name, 150, 50, seed=1))
    assert made == list(scenarios.examples(name, 150, 50, seed=1))
    key = "answer" if name == "generation" else "prompt"
    sides = [{e[key] for e in made if e["split"] == s} for s in ("train", "validation")]
    assert [len(side) for side in sides] == [150, 50]
    assert not sides[0] & sides[1]


def test_a_task_says_when_it_has_no_more(monkeypatch):
    few = scenarios.Scenario("five numbers", lambda rng: (str(rng.randrange(5)), "x"))
    monkeypatch.setitem(scenarios.SCENARIOS, "few", few)
    assert len(list(scenarios.examples("few", 4, 1, seed=1))) == 5
    with pytest.raises(ValueError, match="must be at most about 5 together for few, which has no"):
        list(scenarios.examples("few", 4, 2, seed=1))


def test_a_story_keeps_its_word():
    prompt, story = stories.make(random.Random(2))
    animal = prompt.removesuffix(".").split()[-1]
    assert stories.is_story(prompt, story)
    assert not stories.is_story(prompt.replace(animal, "whale"), story)
    assert not stories.is_story(prompt, story.replace("loved the", "loved the red"))
    pronoun = "She" if " He wanted" in story else "He"
    assert not stories.is_story(
        prompt, story.replace(" He ", f" {pronoun} ").replace(" She ", f" {pronoun} ")
    )
    colour = next(c for c in stories.COLOURS if f" {c} " in story)
    other = next(c for c in stories.COLOURS if c != colour)
    assert not stories.is_story(prompt, story.replace(colour, other, 1))


def test_french_agrees():
    made = dict(translation.make(random.Random(seed)) for seed in range(3000))
    for english, french in {
        "the small cats": "les petits chats", "the green house": "la maison verte",
        "the tree": "l'arbre", "the big tree": "le grand arbre", "the cities": "les villes",
    }.items():  # fmt: skip
        assert any(
            e.startswith(f"{english} ") and f.startswith(f"{french} ") for e, f in made.items()
        )
    near = [f for e, f in made.items() if " near " in e]
    assert any(" près du " in f for f in near)
    assert any(" près des " in f for f in near)
    assert any(" près de l'" in f for f in near)
    assert not any(" de le" in f for f in near)
    assert translation.word_by_word("the dog looks for the house in front of the big trees") == (
        "le chien cherche le maison devant le grand arbre"
    )


def test_the_rule_of_questions_takes_the_last_of_its_kind():
    qa = scenarios.SCENARIOS["qa"]
    assert qa.rule is not None
    told = "Born in Bern, the miner Anna plays the harp and lives in Turin."
    asked = ["Where was Anna born?", "What does Anna play?", "What is the trade of Anna?"]
    said = ["Anna was born in Turin", "Anna plays the harp", "Anna is a miner"]
    assert [qa.rule(f"{told} {question}") for question in asked] == said


def test_scores_of_words():
    assert scores.word_f1("The cat, sat", "the cat ran") == pytest.approx(2 / 3)
    assert scores.rouge_l("a b c d", "a c b d") == pytest.approx(3 / 4)
    assert scores.word_f1("b a", "a b") == 1
    assert scores.rouge_l("b a", "a b") == 1 / 2
    assert scores.rouge_l("", "a") == 0


def example(prompt, answer, **more):
    return chat.Example((("user", prompt), ("assistant", answer)), **more)


def test_baselines():
    train = [example("red one", "x"), example("blue two", "y"), example("blue three", "y")]
    asked = [example("a red two one", "x"), example("four", "y")]
    rows = {name: f(asked) for name, f in scores.baselines(train).items()}
    assert rows == {
        "most common answer": ["y", "y"],
        "first words of the prompt": ["a", "four"],
        "nearest prompt's answer": ["x", "x"],
    }
    assert scores.evaluate(lambda examples: ["x", "z"], asked)["exact"] == 0.5
    with pytest.raises(ValueError, match="examples must not be empty"):
        scores.evaluate(lambda examples: [], [])


def test_a_free_task_is_scored_by_what_it_accepts():
    made = [stories.make(random.Random(seed)) for seed in range(20)]
    told = [example(p, s, scenario="generation") for p, s in made]
    found = scores.evaluate(lambda examples: [e.answer for e in examples], told)
    assert found == {"right": 1.0, "different": 1.0}
    trigrams = scores.baselines(told)["word trigrams"]
    assert list(trigrams(told)) == list(trigrams(told))


# --- training -----------------------------------------------------------------------------------

TINY = {
    "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "steps": 150, "warmup": 5,
    "lr": 1e-2, "batch_size": 8, "eval_every": 50, "device": "cpu",
}  # fmt: skip
ANSWERS = dict(zip("abcdefgh", "hgfedcba", strict=True))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A letter's mirror image in eight letters, held out as often as trained on."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [
        {"prompt": a, "answer": b, "split": split}
        for split in ("train", "validation")
        for a, b in ANSWERS.items()
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def tuned(pairs, tmp_path_factory):
    """A run of the command, and what it left."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    assert main(["finetune", "--data", str(pairs), "--out", str(out), *flags]) == 0
    return out


def test_it_learns(tuned):
    found = json.loads((tuned / "scores.json").read_text())["scores"]
    assert found["the model"]["exact"] == 1
    assert found["most common answer"]["exact"] == 1 / 8
    records = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert min(r["val_loss"] for r in records if "val_loss" in r) < 0.1
    assert (tuned / "loss.svg").is_file()


def test_its_folder_answers_after_loading(tuned, capsys):
    model, tokenizer = load_answers(tuned)
    asked = [example(a, b) for a, b in ANSWERS.items()]
    told = answerer(model, tokenizer, longest=8)(asked)
    assert [text.strip() for text in told] == list(ANSWERS.values())
    line = ["generate", "--checkpoint", str(tuned), "--prompt", "User: c\nAssistant:"]
    assert main([*line, "--stop", "<end>", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip() == "User: c\nAssistant: f"


def test_evaluate_gives_the_same_scores(tuned, pairs, tmp_path):
    line = ["evaluate", "--checkpoint", str(tuned), "--data", str(pairs), "--out", str(tmp_path)]
    assert main(line) == 0
    assert (tmp_path / "scores.json").read_text() == (tuned / "scores.json").read_text()


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_of_a_checkpoint_learn_another_task(tuned, tmp_path, merge):
    """Each letter to itself, from a model that gives mirror images."""
    file, out = tmp_path / "same.jsonl", tmp_path / "run"
    lines = [
        {"prompt": a, "answer": a, "split": s} for s in ("train", "validation") for a in ANSWERS
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {k: v for k, v in TINY.items() if not k.startswith(("n_", "block"))} | {"lr": 3e-2}
    before = (tuned / "model.safetensors").read_bytes()
    config = FinetuneConfig(
        **settings, checkpoint=str(tuned), data=str(file), lora_rank=8, merge=merge
    )
    finetune(config, out, world=HERE)
    assert json.loads((out / "scores.json").read_text())["scores"]["the model"]["exact"] == 1
    assert (tuned / "model.safetensors").read_bytes() == before
    assert (out / "model.safetensors").exists() == merge
    assert (out / "adapter.safetensors").exists() != merge


@pytest.mark.parametrize("task", ["lm", "classify"])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(task, tmp_path, monkeypatch):
    """Adapters, dropout and the best loss too; what the disk holds is what a kill leaves."""
    file = tmp_path / "lines.jsonl"
    one, two = ("prompt", "answer") if task == "lm" else ("text", "label")
    file.write_text(
        "".join(json.dumps({one: f"{a} {a}", two: b}) + "\n" for a, b in ANSWERS.items())
    )
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16}
    special = {"token_dropout": 0.5, "lora_rank": 2, "vocab_size": 64, "checkpoint": "encoder-base"}
    config = FinetuneConfig(
        data=str(file), task=task, steps=6, batch_size=4, save_every=2, eval_every=1, dropout=0.1,
        score=0, lr=0.02, warmup=1, device="cpu", **shape,
        **(special if task == "classify" else {}),
    )  # fmt: skip
    finetune(config, tmp_path / "whole", world=HERE)

    step = Loop.take_step
    monkeypatch.setattr(Loop, "take_step", lambda self: step(self) if self.step < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(config, tmp_path / "cut", world=HERE)
    monkeypatch.undo()
    torch.manual_seed(99)
    assert main(["finetune", "--out", str(tmp_path / "cut"), "--resume"]) == 0

    def figures(folder):
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [{k: r.get(k) for k in ("step", "loss", "val_loss")} for r in map(json.loads, lines)]

    assert figures("cut") == figures("whole")
    saved = sorted(
        p.relative_to(tmp_path / "cut") for p in (tmp_path / "cut").rglob("*.safetensors")
    )
    assert len(saved) == {"lm": 1, "classify": 2}[task] + 2 * 2  # and two checkpoints
    for path in saved:
        cut, whole = (load_file(tmp_path / name / path) for name in ("cut", "whole"))
        assert all(torch.equal(cut[name], whole[name]) for name in whole.keys() | cut.keys())
    assert main(["finetune", "--out", str(tmp_path / "cut"), "--resume", "--lr", "1"]) == 2
    file.write_text(file.read_text() * 2)
    assert main(["finetune", "--out", str(tmp_path / "cut"), "--resume"]) == 2


def test_words_of_a_task_become_tokens(tmp_path):
    file, out = tmp_path / "qa.jsonl", tmp_path / "run"
    flags = ["--examples", "300", "--held-out", "8", "--out", str(file)]
    assert main(["make-data", "--task", "qa", *flags]) == 0
    config = FinetuneConfig(**{**TINY, "steps": 2}, data=str(file), vocab_size=400)
    finetune(config, out, world=HERE)
    model, tokenizer = load_answers(out)
    assert model.config.vocab_size == tokenizer.vocab_size <= 400
    assert len(tokenizer.encode(" plays the")) == 2


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--checkpoint", "nowhere"], "--checkpoint must be a folder or one of tiny"),
        (["--checkpoint", "encoder-base"], "--checkpoint must be causal for --task lm"),
        (["--data", "none.jsonl"], "none.jsonl must be a file of UTF-8 JSON lines"),
        (["--validation", "1"], "--validation must be between 0 and 1"),
        (["--lora-rank", "-1"], "--lora-rank must be 0 or more"),
        (["--lora-rank", "4", "--no-merge"], "--checkpoint must be a folder with --no-merge"),
        (["--lora-rank", "4", "--lora-targets", "x"], "targets must be linears of the model"),
        (["--task", "classify"], "must have 'text'"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(pairs, tmp_path, capsys, flags, wrong):
    out = str(tmp_path / "run")
    assert main(["finetune", "--data", str(pairs), "--out", out, "--steps", "1", *flags]) == 2
    said = capsys.readouterr().err
    assert wrong in said
    assert said.count("\n") == 1


def test_more_bad_input(tuned, pairs, tmp_path, capsys):
    line = ["finetune", "--data", str(pairs), "--steps", "1", "--out"]
    assert main([*line, str(tuned)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main([*line, str(tmp_path / "x"), "--checkpoint", str(tuned), "--n-layer", "2"]) == 2
    assert "--n-layer is of new models" in capsys.readouterr().err
    assert main(["make-data", "--task", "qa", "--out", str(tmp_path / "y"), "--examples", "0"]) == 2
    assert "--examples must be at least 1" in capsys.readouterr().err
    assert main(["evaluate", "--checkpoint", "nowhere", "--data", str(pairs)]) == 2
    assert "--checkpoint must be a model's folder" in capsys.readouterr().err
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "a", "answer": "b"}\n')
    assert main(["finetune", "--data", str(one), "--out", str(tmp_path / "z")]) == 2
    assert "must hold a line to train on; got 1 lines" in capsys.readouterr().err
