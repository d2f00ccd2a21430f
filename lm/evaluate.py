"""Scores of a saved model beside those of simple baselines: ``fastlm evaluate``."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .chat import END, Example, prompt_text, read_examples
from .classify import (
    Classifier,
    Labelled,
    accuracy,
    bag_of_words,
    class_scores,
    confusion,
    read_labelled,
)
from .confusion import confusion_chart
from .generate import generate
from .lora import load_lora, merge_lora
from .model import GPT
from .scores import Answerer, baselines, evaluate, scenario_of, table
from .tokenizer import Tokenizer, load_tokenizer

_SCORES, _PICTURE = "scores.json", "confusion.svg"


def answerer(model: GPT, tokenizer: Tokenizer, longest: int, temperature: float = 0.0) -> Answerer:
    """A model as an answerer: of each example it sees all but the last answer.

    Args:
        model: Trained on the template of ``chat``.
        tokenizer: Its tokenizer.
        longest: Most tokens of an answer.
        temperature: Of the sampling, by a fixed seed; 0 takes the likeliest token.
    """
    room = model.config.block_size - longest
    options = {"temperature": temperature, "stop": END, "tokenizer": tokenizer, "seed": 0}

    def texts(rows: list[list[int]], times: int) -> list[str]:
        grown = generate(model, rows, longest, num_return_sequences=times, **options)
        begins = [len(row) for row in rows for _ in range(times)]
        return [
            tokenizer.decode(row[begin:].tolist()).partition(END)[0]
            for row, begin in zip(grown, begins, strict=True)
        ]

    def answer(examples: Sequence[Example]) -> list[str]:
        prompts = [prompt_text(e.messages[:-1]) for e in examples]
        rows = {prompt: tokenizer.encode(prompt)[-room:] for prompt in prompts}
        if temperature:  # the same prompt again wants another text
            drawn = {p: iter(texts([rows[p]], n)) for p, n in Counter(prompts).items()}
            return [next(drawn[p]) for p in prompts]
        found: list[str] = []
        for start in range(0, len(prompts), 64):
            found += texts([rows[p] for p in prompts[start : start + 64]], 1)
        return found

    return answer


def load_answers(folder: str | Path, lora: str | Path | None = None) -> tuple[GPT, Tokenizer]:
    """A saved language model, perhaps with adapters of another folder, and its tokenizer.

    Raises:
        ValueError: Files that are missing or damaged.
    """
    model = GPT.from_pretrained(folder)
    if lora is not None:
        merge_lora(load_lora(model, lora))
    return model, load_tokenizer(folder)


def score_answers(
    model: GPT,
    tokenizer: Tokenizer,
    train: Sequence[Example],
    held_out: Sequence[Example],
    folder: Path,
) -> dict[str, dict[str, float]]:
    """Answers held-out prompts, prints and writes the scores, the baselines' among them."""
    longest = 1 + max(len(tokenizer.encode(f" {e.answer}{END}")) for e in train)
    longest = min(longest, model.config.block_size - 1)
    scenario = scenario_of(held_out)
    free = scenario is not None and scenario.accepts is not None
    mine = answerer(model, tokenizer, longest, temperature=0.8 if free else 0.0)
    rows = {
        name: evaluate(answer, held_out)
        for name, answer in {"the model": mine, **baselines(train)}.items()
    }
    print(f"{len(held_out)} held-out prompts\n{table(rows)}")
    _write(folder, {"prompts": len(held_out), "scores": rows})
    return rows


def score_classes(
    model: Classifier, train: Sequence[Labelled], held_out: Sequence[Labelled], folder: Path
) -> dict[str, float]:
    """Classifies held-out texts, prints and writes the scores, and draws the confusion."""
    texts, wanted = [e.text for e in held_out], [e.label for e in held_out]
    got = [p.label for p in model.predict(texts)]
    common = max(model.labels, key=[e.label for e in train].count)
    found = {
        "the model": accuracy(wanted, got),
        "linear, bag of words": accuracy(wanted, bag_of_words(train, texts)),
        "linear, words and parts": accuracy(wanted, bag_of_words(train, texts, parts=True)),
        "most common class": accuracy(wanted, [common] * len(wanted)),
    }
    matrix = confusion(wanted, got, model.labels)
    scores = class_scores(matrix, model.labels)
    wide = max(map(len, (*model.labels, "class")))
    print(f"{'class':{wide}s}  precision  recall      F1  texts")
    for label, s in scores.items():
        numbers = f"{100 * s.precision:9.1f} {100 * s.recall:7.1f} {100 * s.f1:7.1f}"
        print(f"{label:{wide}s}  {numbers}  {s.count:5d}")
    print(f"accuracy of {len(held_out)} held-out texts")
    for name, share in found.items():
        print(f"{name:23s} {100 * share:6.1f} %")
    (folder / _PICTURE).write_text(confusion_chart(matrix, model.labels), encoding="utf-8")
    classes = {label: vars(score) for label, score in scores.items()}
    _write(folder, {"texts": len(held_out), "accuracy": found, "classes": classes})
    return found


def _write(folder: Path, found: dict[str, Any]) -> None:
    (folder / _SCORES).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# --- command line -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``fastlm evaluate``."""
    parser.add_argument("--checkpoint", required=True, type=Path, help="the model's folder")
    parser.add_argument("--data", required=True, help="the JSONL that it was fine-tuned on")
    parser.add_argument("--lora", type=Path, help="a folder of adapters for the model")
    parser.add_argument(
        "--limit", type=int, default=200, metavar="N", help="most held-out lines (default 200)"
    )
    parser.add_argument(
        "--out", type=Path, help="where scores.json goes, and the picture (default: checkpoint)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``fastlm evaluate`` on the lines that say ``"split": "validation"``, or on all.

    Raises:
        ValueError: Folders or lines that are none.
    """
    if args.limit < 1:
        raise ValueError(f"--limit must be at least 1; got {args.limit}")
    if not args.checkpoint.is_dir():
        raise ValueError(f"--checkpoint must be a model's folder; got {args.checkpoint}")
    out = args.out or args.lora or args.checkpoint
    out.mkdir(parents=True, exist_ok=True)
    if (args.checkpoint / "classifier.json").is_file():
        texts = read_labelled(args.data)
        held_out = [e for e in texts if e.split == "validation"] or texts
        train = [e for e in texts if e.split != "validation"]
        score_classes(Classifier.load(args.checkpoint), train, held_out[: args.limit], out)
        return 0
    examples = read_examples(args.data)
    asked = [e for e in examples if e.split == "validation"] or examples
    train_examples = [e for e in examples if e.split != "validation"]
    model, tokenizer = load_answers(args.checkpoint, args.lora)
    score_answers(model, tokenizer, train_examples, asked[: args.limit], out)
    return 0
