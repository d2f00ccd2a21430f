"""Prompts and answers from JSONL as tokens, with a loss on the answers alone.

A line of the file is ``{"prompt": "...", "answer": "..."}`` or ``{"messages": [{"role": "user",
"content": "..."}, {"role": "assistant", "content": "..."}]}``, where a system message may come
first. The template is plain text, so that any tokenizer has it, bytes included::

    System: Answer in one word.
    User: Where is Anna?
    Assistant: garden<end>

What the model must learn, and so the only tokens with a target, is `` garden<end>``: each answer
from the space behind ``Assistant:`` to the end marker.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tokenizer import Tokenizer

END = "<end>"
IGNORED = -100  # what PyTorch's losses leave out
_NAMES = {"system": "System:", "user": "User:", "assistant": "Assistant:"}


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an answer.

    Attributes:
        messages: (role, text) pairs; roles are system, user and assistant.
        split: "train", "validation" or, where the file does not say, None.
        scenario: What made it, a name of ``scenarios.SCENARIOS``, or None.
    """

    messages: tuple[tuple[str, str], ...]
    split: str | None = None
    scenario: str | None = None

    @property
    def question(self) -> str:
        """What was said last before the answer."""
        return self.messages[-2][1]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1][1]


def pieces(messages: Sequence[tuple[str, str]]) -> Iterator[tuple[str, bool]]:
    """Pieces of text, in order, and whether the model should learn to write them."""
    for role, text in messages:
        if role == "assistant":
            yield _NAMES[role], False
            yield f" {text}{END}", True
            yield "\n", False
        else:
            yield f"{_NAMES[role]} {text}\n", False


def prompt_text(messages: Sequence[tuple[str, str]]) -> str:
    """What a model is given to write the next answer."""
    return "".join(text for text, _ in pieces(messages)) + _NAMES["assistant"]


def tokens(example: Example, tokenizer: Tokenizer, block_size: int) -> tuple[list[int], list[int]]:
    """Tokens and, for each, the one that should follow it; ``IGNORED`` outside answers.

    At most ``block_size`` tokens: the beginning of the prompt goes first, then the end of the last
    answer, so that at least one target is always there.
    """
    ids: list[int] = []
    learned: list[bool] = []
    begin = 0
    for text, counts in pieces(example.messages):
        piece = tokenizer.encode(text)
        if counts:
            begin = len(ids)  # in the end, of the last answer
        ids += piece
        learned += [counts] * len(piece)
    while not learned[-1]:  # nothing is to be learned of what follows the last answer
        ids.pop()
        learned.pop()
    start = max(0, min(len(ids) - block_size - 1, begin - 1))
    window = slice(start, start + block_size + 1)
    ids, learned = ids[window], learned[window]
    targets = [t if counts else IGNORED for t, counts in zip(ids[1:], learned[1:], strict=True)]
    return ids[:-1], targets


# --- files --------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with its place in it: ``FILE:LINE``.

    Raises:
        ValueError: The file cannot be read or has no object, or a line is none; the place is named.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data: {path} must be a file of UTF-8 JSON lines; {error}") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"data: {path} must hold at least one line; it is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: must be a JSON object; {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{place}: must be a JSON object; got {type(found).__name__}")
        yield place, found


def read_examples(path: str | Path) -> list[Example]:
    """The conversations of a file.

    Raises:
        ValueError: A line that is none, with its place.
    """
    return [_example(place, found) for place, found in read_jsonl(path)]


def split_of(place: str, found: dict[str, Any]) -> str | None:
    """Which part a line says that it belongs to."""
    split = found.get("split")
    if split not in (None, "train", "validation"):
        raise ValueError(f"{place}: split must be 'train' or 'validation'; got {split!r}")
    return split


def text_of(place: str, found: dict[str, Any], name: str) -> str:
    """A field that must be text."""
    if name not in found:
        raise ValueError(f"{place}: must have {name!r}; has {', '.join(map(repr, found)) or '{}'}")
    text = found[name]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place}: {name} must be text, not empty; got {text!r}")
    return text


def _example(place: str, found: dict[str, Any]) -> Example:
    if "messages" in found:
        messages = _messages(place, found["messages"])
    else:
        messages = (
            ("user", text_of(place, found, "prompt")),
            ("assistant", text_of(place, found, "answer")),
        )
    for _, text in messages:
        if END in text:
            raise ValueError(f"{place}: texts must not hold the end marker {END}; got {text!r}")
    scenario = found.get("scenario")
    return Example(messages, split_of(place, found), scenario)


def _messages(place: str, found: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(found, list) or not all(isinstance(m, dict) for m in found):
        raise ValueError(f"{place}: messages must be a list of objects; got {found!r}")
    messages = []
    for message in found:
        role = message.get("role")
        if role not in _NAMES:
            raise ValueError(f"{place}: role must be one of {', '.join(_NAMES)}; got {role!r}")
        messages.append((role, text_of(place, message, "content")))
    roles = [role for role, _ in messages]
    if len(roles) < 2 or roles[-1] != "assistant" or roles[-2] != "user":
        raise ValueError(
            f"{place}: messages must end with a question of user, then assistant; got {roles}"
        )
    return tuple(messages)
