"""Five tasks with data that the repository makes itself: ``fastlm make-data``.

Each is small enough for a model that trains in minutes on a CPU, and has a simple rule to beat.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import packages, stories, translation


@dataclass(frozen=True)
class Scenario:
    """A task of prompts and answers.

    Attributes:
        about: One line for ``--help``.
        make: A prompt and its answer, drawn from a generator of random numbers.
        rule: A simple answer to a prompt, to compare with; None: there is none beyond the usual.
        rule_name: What the rule does.
        accepts: Whether a text is a right answer to a prompt; None: only the answer given is.
    """

    about: str
    make: Callable[[random.Random], tuple[str, str]]
    rule: Callable[[str], str] | None = None
    rule_name: str = ""
    accepts: Callable[[str, str], bool] | None = None


# --- question answering -------------------------------------------------------------------------

_PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo")
_TOWNS = ("Bern", "Dublin", "Kyoto", "Lagos", "Madrid", "Prague", "Seoul", "Turin")
_INSTRUMENTS = ("piano", "violin", "flute", "harp", "cello", "trumpet")
_TRADES = ("nurse", "baker", "pilot", "tailor", "judge", "miner")
_LIVES = (
    "{who}, a {trade} born in {born}, lives in {home} and plays the {instrument}.",
    "Born in {born}, the {trade} {who} plays the {instrument} and lives in {home}.",
    "In {home} lives {who}, a {trade} who plays the {instrument} and was born in {born}.",
)
_QUESTIONS = (  # each with its answer
    ("Where does {who} live?", "{who} lives in {home}"),
    ("Where was {who} born?", "{who} was born in {born}"),
    ("What does {who} play?", "{who} plays the {instrument}"),
    ("What is the trade of {who}?", "{who} is a {trade}"),
)


def _question(rng: random.Random) -> tuple[str, str]:
    """A sentence about somebody, and a question about one thing of the four that it tells."""
    born, home = rng.sample(_TOWNS, 2)
    facts = {
        "who": rng.choice(_PEOPLE),
        "born": born,
        "home": home,
        "instrument": rng.choice(_INSTRUMENTS),
        "trade": rng.choice(_TRADES),
    }
    question, answer = rng.choice(_QUESTIONS)
    told = f"{rng.choice(_LIVES)} {question}"
    return told.format(**facts), answer.format(**facts)


def _last_of_kind(prompt: str) -> str:
    """The last word of the kind that is asked for, a town, an instrument or a trade, in a reply."""
    words = [word.strip(".,?") for word in prompt.split()]
    who = next(word for word in words if word in _PEOPLE)
    kinds = (_TOWNS, _TOWNS, _INSTRUMENTS, _TRADES)
    for (question, answer), kind in zip(_QUESTIONS, kinds, strict=True):
        if prompt.endswith(question.format(who=who)):
            said = next(word for word in reversed(words) if word in kind)
            return f"{answer.rpartition(' ')[0]} {said}".format(who=who)
    raise ValueError(f"qa: prompt must end with one of its questions; got {prompt!r}")


# --- summarisation ------------------------------------------------------------------------------

_WRITERS = ("Maria", "Jonas", "Lena", "Pavel", "Nadia", "Otto", "Irene", "Karl")
_JOBS = ("teacher", "baker", "nurse", "farmer", "student", "painter")
_CITIES = ("Oslo", "Lima", "Rome", "Cairo", "Delhi", "Paris", "Quito", "Tokyo")
_DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
_EVENTS = {  # what the report says, and what the summary does
    "won the chess final": "wins at chess",
    "opened a school for music": "opens a school",
    "found a very old coin": "finds a coin",
    "built a boat of paper": "builds a boat",
    "sold the last red bicycle": "sells a bicycle",
    "wrote a book about bees": "writes a book",
}
_REPORTS = (
    "On {day}, {who}, a {job} from {home}, {event} in {city}.",
    "In {city}, {who} {event} on {day}, far from home in {home}.",
    "It was a {day} in {city} when the {job} {who} from {home} {event}.",
)
_ASIDES = (
    "The trains from {city} were late.",
    "Rain had fallen since {day}.",
    "A crowd had come from {city}.",
    "Nobody slept much before {day}.",
)


def _report(rng: random.Random) -> tuple[str, str]:
    """A report of an event between two remarks beside the point, and its headline."""
    city, home, elsewhere = rng.sample(_CITIES, 3)
    event = rng.choice(tuple(_EVENTS))
    who = rng.choice(_WRITERS)
    report = rng.choice(_REPORTS).format(
        day=rng.choice(_DAYS), who=who, job=rng.choice(_JOBS), home=home, event=event, city=city
    )
    before, after = (
        aside.format(city=elsewhere, day=rng.choice(_DAYS)) for aside in rng.sample(_ASIDES, 2)
    )
    text = f"{before} {report}" if rng.random() < 0.5 else f"{report} {after}"
    return text, f"{who} {_EVENTS[event]} in {city}"


SCENARIOS = {
    "generation": Scenario("stories about an animal", stories.make, accepts=stories.is_story),
    "qa": Scenario(
        "a question about a sentence",
        _question,
        rule=_last_of_kind,
        rule_name="last word of the kind",
    ),
    "summarisation": Scenario("a report's headline", _report),
    "translation": Scenario(
        "English to French",
        translation.make,
        rule=translation.word_by_word,
        rule_name="dictionary, word by word",
    ),
}


# --- files --------------------------------------------------------------------------------------


def examples(name: str, count: int, held_out: int, seed: int) -> Iterator[dict[str, Any]]:
    """Lines of a data file: no prompt comes twice, so none that is held out was trained on.

    Stories are an exception: there are fewer prompts than lines, so it is the stories that differ.

    Raises:
        ValueError: The task has not so many prompts.
    """
    scenario, rng = SCENARIOS[name], random.Random(seed)
    seen: set[str] = set()
    idle = 0
    while len(seen) < count + held_out:
        prompt, answer = scenario.make(rng)
        key = answer if scenario.accepts else prompt
        idle = idle + 1 if key in seen else 0
        if idle > 1000:
            raise ValueError(
                f"make-data: --examples and --held-out must be at most about {len(seen)} together "
                f"for {name}, which has no more; got {count} and {held_out}"
            )
        if idle:
            continue
        split = "train" if len(seen) < count else "validation"
        seen.add(key)
        yield {"prompt": prompt, "answer": answer, "split": split, "scenario": name}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``fastlm make-data``."""
    names = (*SCENARIOS, "classification")
    parser.add_argument("--task", required=True, choices=names, help="which data to make")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSONL to write")
    parser.add_argument(
        "--examples", type=int, default=8000, metavar="N",
        help="lines to train on (default 8000); classification takes what Python's sources hold",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", type=int, default=400, metavar="N", help="lines to score on (default 400)"
    )
    parser.add_argument("--seed", type=int, default=1337, help="of the data (default 1337)")


def run(args: argparse.Namespace) -> int:
    """Runs ``fastlm make-data`` and gives its exit code."""
    for name in ("examples", "held_out"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"make-data: {flag} must be at least 1; got {getattr(args, name)}")
    if args.task == "classification":
        lines = packages.snippets()
    else:
        lines = examples(args.task, args.examples, args.held_out, args.seed)
    text = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(text), encoding="utf-8")
    print(f"wrote {len(text):,} lines of {args.task} to {args.out}; the first:\n{text[0]}", end="")
    return 0
