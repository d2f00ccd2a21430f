"""How good answers are, and the answers that need no model: what a score has to be compared with.

An answerer is a function from prompts to answers. A model is one (``answerer``), and so is each
baseline; ``evaluate`` scores any of them the same way.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from .chat import Example
from .scenarios import SCENARIOS, Scenario

Answerer = Callable[[Sequence[Example]], Sequence[str]]
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """A text's words, in small letters."""
    return _WORD.findall(text.lower())


def word_f1(text: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of words (ROUGE-1), in [0, 1]."""
    ours, theirs = words(text), words(wanted)
    return _f1(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def rouge_l(text: str, wanted: str) -> float:
    """The same of the longest sequence of words that both have in order, gaps allowed."""
    ours, theirs = words(text), words(wanted)
    longest = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for j, other in enumerate(theirs, 1):
            diagonal, longest[j] = (
                longest[j],
                diagonal + 1 if word == other else max(longest[j], longest[j - 1]),
            )
    return _f1(longest[-1], len(ours), len(theirs))


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def scenario_of(examples: Sequence[Example]) -> Scenario | None:
    """What made all of the examples, if they say so."""
    names = {e.scenario for e in examples}
    return SCENARIOS.get(next(iter(names)) or "") if len(names) == 1 else None


def evaluate(answer: Answerer, examples: Sequence[Example]) -> dict[str, float]:
    """Scores of answers, each a mean over the examples, in [0, 1].

    Where the task accepts many answers, ``right`` is the share that it accepts, and ``different``
    the share of different ones. Elsewhere ``exact`` is the share that is the answer to the letter,
    ``word_f1`` and ``rouge_l`` the overlap with it.

    Raises:
        ValueError: There are no examples.
    """
    if not examples:
        raise ValueError("evaluate: examples must not be empty")
    texts = [text.strip() for text in answer(examples)]
    scenario = scenario_of(examples)
    if scenario is not None and scenario.accepts is not None:
        right = [scenario.accepts(e.question, t) for e, t in zip(examples, texts, strict=True)]
        return {"right": sum(right) / len(right), "different": len(set(texts)) / len(texts)}
    pairs = [(text, e.answer) for text, e in zip(texts, examples, strict=True)]
    return {
        "exact": sum(text == wanted for text, wanted in pairs) / len(pairs),
        "word_f1": sum(word_f1(*pair) for pair in pairs) / len(pairs),
        "rouge_l": sum(rouge_l(*pair) for pair in pairs) / len(pairs),
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """Scores by who answered, in percent."""
    names = list(next(iter(rows.values())))
    wide = max(map(len, rows))
    lines = [" " * wide + "".join(f"{name.replace('_', ' '):>11s}" for name in names)]
    lines += [
        f"{who:{wide}s}" + "".join(f"{100 * scores[name]:9.1f} %" for name in names)
        for who, scores in rows.items()
    ]
    return "\n".join(lines)


# --- baselines ----------------------------------------------------------------------------------


def baselines(train: Sequence[Example]) -> dict[str, Answerer]:
    """The answerers to beat, by name, made from what the model was trained on."""
    scenario = scenario_of(train)
    if scenario is not None and scenario.accepts is not None:
        return {"word trigrams": _trigrams(train)}
    found = {
        "most common answer": _most_common(train),
        "first words of the prompt": _first_words(train),
        "nearest prompt's answer": _nearest(train),
    }
    if scenario is not None and scenario.rule is not None:
        rule = scenario.rule
        found[scenario.rule_name] = lambda examples: [rule(e.question) for e in examples]
    return found


def _most_common(train: Sequence[Example]) -> Answerer:
    answer = Counter(e.answer for e in train).most_common(1)[0][0]
    return lambda examples: [answer] * len(examples)


def _first_words(train: Sequence[Example]) -> Answerer:
    """As many words from the beginning of the prompt as an answer has."""
    counts = sorted(len(e.answer.split()) for e in train)
    n = counts[len(counts) // 2]
    return lambda examples: [" ".join(e.question.split()[:n]) for e in examples]


def _nearest(train: Sequence[Example]) -> Answerer:
    """The answer to the prompt that shares most words with this one, of all words in either."""
    bags = [frozenset(words(e.question)) for e in train]
    containing: dict[str, list[int]] = defaultdict(list)
    for i, bag in enumerate(bags):
        for word in bag:
            containing[word].append(i)

    def one(example: Example) -> str:
        bag = frozenset(words(example.question))
        common = Counter(i for word in bag for i in containing.get(word, ()))
        if not common:
            return train[0].answer
        best = max(common, key=lambda i: common[i] / (len(bag) + len(bags[i]) - common[i]))
        return train[best].answer

    return lambda examples: [one(e) for e in examples]


def _trigrams(train: Sequence[Example], seed: int = 0) -> Answerer:
    """Texts in which any three words in a row came in a row before, drawn by how often they did."""
    after: dict[tuple[str, str], list[str]] = defaultdict(list)
    for e in train:
        told = [*e.question.split(), *e.answer.split(), ""]
        for a, b, c in zip(told, told[1:], told[2:], strict=False):
            after[a, b].append(c)
    longest = max(len(e.answer.split()) for e in train)

    def one(example: Example, rng: random.Random) -> str:
        asked = example.question.split()
        told = list(asked)
        while len(told) - len(asked) < longest:
            word = rng.choice(after.get((told[-2], told[-1]), [""]))
            if not word:
                break
            told.append(word)
        return " ".join(told[len(asked) :])

    def answer(examples: Sequence[Example]) -> list[str]:
        rng = random.Random(seed)
        return [one(e, rng) for e in examples]

    return answer
