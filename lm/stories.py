"""Children's stories from a grammar, and a check of whether a text is one.

A story keeps its word: the animal is the one that was asked for, its name and pronoun stay, and the
thing that it wants, colour and all, is the thing that it gets. A model of a few words of context
writes sentences that sound right and stories that are not.
"""

import random
import re

ANIMALS = ("fox", "bear", "mouse", "hen", "frog", "goat", "duck", "cat")
HEROES = {
    "he": ("Tom", "Max", "Ben", "Sam", "Leo", "Jim"),
    "she": ("Anna", "Mia", "Eva", "Zoe", "Lily", "Ruth"),
}
FRIENDS = ("Oscar", "Nora", "Felix", "Clara", "Hugo", "Ida")
MOODS = ("brave", "sleepy", "small", "clever", "shy", "merry")
COLOURS = ("red", "blue", "green", "yellow", "white")
THINGS = ("kite", "boat", "hat", "drum", "lamp", "bell", "ball")
PLACES = ("forest", "river", "market", "hill", "beach", "farm")
_SHAPE = (
    "Once upon a time there was a {mood} {animal} named {hero}. {Pronoun} wanted a {colour} "
    "{thing}. One day {hero} went to the {place} and met {friend}. {friend} had a {colour} "
    "{thing} and gave it to {hero}. {hero} was happy, and {pronoun} loved the {thing}."
)


def make(rng: random.Random) -> tuple[str, str]:
    """A prompt and a story."""
    pronoun = rng.choice(tuple(HEROES))
    words = {
        "mood": rng.choice(MOODS),
        "animal": rng.choice(ANIMALS),
        "hero": rng.choice(HEROES[pronoun]),
        "pronoun": pronoun,
        "Pronoun": pronoun.capitalize(),
        "colour": rng.choice(COLOURS),
        "thing": rng.choice(THINGS),
        "place": rng.choice(PLACES),
        "friend": rng.choice(FRIENDS),
    }
    return f"Tell me about a {words['animal']}.", _SHAPE.format(**words)


def _pattern() -> re.Pattern[str]:
    """The shape as an expression in which what comes again must be what came first."""
    choices = {
        "mood": MOODS, "animal": ANIMALS, "hero": sum(HEROES.values(), ()), "colour": COLOURS,
        "Pronoun": ("He", "She"), "pronoun": tuple(HEROES), "thing": THINGS, "place": PLACES,
        "friend": FRIENDS,
    }  # fmt: skip
    seen: set[str] = set()

    def slot(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{'|'.join(choices[name])})"

    return re.compile(re.sub(r"\{(\w+)\}", slot, _SHAPE.replace(".", r"\.")))


_PATTERN = _pattern()


def is_story(prompt: str, text: str) -> bool:
    """Whether a text is a story that the grammar could have told, about the animal asked for."""
    found = _PATTERN.fullmatch(text.strip())
    if found is None or not prompt.endswith(f" {found['animal']}."):
        return False
    pronoun = found["pronoun"]
    return found["Pronoun"] == pronoun.capitalize() and found["hero"] in HEROES[pronoun]
