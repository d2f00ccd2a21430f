"""Scores of a saved model beside those of simple baselines: ``fastlm evaluate``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._tok import complete
from .chat import END, Example, Tokenizer, prompt_text, tokens
from .classify import (
    Classifier,
    Labelled,
    accuracy,
    bag_of_words,
    class_scores,
    confusion,
)
from .confusion import confusion_chart
from .model import GPT
from .scores import Answerer, baselines, evaluate, scenario_of, table

_SCORES, _PICTURE = "scores.json", "confusion.svg"


def answerer(model: GPT, tokenizer: Tokenizer, longest: int, temperature: float = 0.0) -> Answerer:
    """A model as an answerer: of each example it sees all but the last answer.

    Args:
        model: Trained on the template of ``chat``.
        tokenizer: Its tokenizer.
        longest: Most tokens of an answer.
        temperature: Of the sampling; 0 takes the likeliest token.
    """

    def answer(examples: Sequence[Example]) -> list[str]:
        room = model.config.block_size - longest
        prompts = [tokenizer.encode(prompt_text(e.messages[:-1]))[-room:] for e in examples]
        return complete(model, prompts, longest, END.encode(), temperature)

    return answer


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
    """Calls held-out texts by their class, prints and writes the scores, and draws the confusion."""
    texts, wanted = [e.text for e in held_out], [e.label for e in held_out]
    got = [p.label for p in model.predict(texts)]
    common = max(model.labels, key=[e.label for e in train].count)
    found = {
        "the model": accuracy(wanted, got),
        "linear, bag of words": accuracy(wanted, bag_of_words(train, texts)),
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
        print(f"{name:20s} {100 * share:6.1f} %")
    (folder / _PICTURE).write_text(confusion_chart(matrix, model.labels), encoding="utf-8")
    classes = {label: vars(score) for label, score in scores.items()}
    _write(folder, {"texts": len(held_out), "accuracy": found, "classes": classes})
    return found


def _write(folder: Path, found: dict[str, Any]) -> None:
    (folder / _SCORES).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
