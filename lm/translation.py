"""English sentences and their French, from a small grammar, and a dictionary's translation.

French asks for more than words: articles and adjectives agree with the noun, some adjectives come
after it, *le* and *la* lose their vowel before another, and *de* and *le* become *du*.
"""

import random
from typing import NamedTuple


class Noun(NamedTuple):
    """An English noun and its French."""

    en: str
    fr: str
    feminine: bool = False


_NOUNS = (
    Noun("cat", "chat"), Noun("dog", "chien"), Noun("house", "maison", True), Noun("book", "livre"),
    Noun("car", "voiture", True), Noun("garden", "jardin"), Noun("table", "table", True),
    Noun("flower", "fleur", True), Noun("bridge", "pont"), Noun("city", "ville", True),
    Noun("tree", "arbre"), Noun("school", "école", True), Noun("child", "enfant"),
    Noun("street", "rue", True), Noun("train", "train"), Noun("apple", "pomme", True),
)  # fmt: skip
_PLURALS = {"city": "cities", "child": "children"}
# (English, masculine, feminine, before the noun)
_ADJECTIVES = (
    ("small", "petit", "petite", True), ("big", "grand", "grande", True),
    ("pretty", "joli", "jolie", True), ("green", "vert", "verte", False),
    ("black", "noir", "noire", False), ("blue", "bleu", "bleue", False),
    ("red", "rouge", "rouge", False), ("quiet", "calme", "calme", False),
)  # fmt: skip
# (English with one subject, with several, French with one, with several)
_VERBS = (
    ("sees", "see", "voit", "voient"), ("finds", "find", "trouve", "trouvent"),
    ("looks for", "look for", "cherche", "cherchent"), ("likes", "like", "aime", "aiment"),
    ("leaves", "leave", "quitte", "quittent"), ("draws", "draw", "dessine", "dessinent"),
)  # fmt: skip
_PREPOSITIONS = (("in front of", "devant"), ("behind", "derrière"), ("near", "près de"))


def make(rng: random.Random) -> tuple[str, str]:
    """A sentence and its translation."""
    subject, subject_fr, plural = _phrase(rng)
    verb = rng.choice(_VERBS)
    thing, thing_fr, _ = _phrase(rng)
    english = f"{subject} {verb[plural]} {thing}"
    french = f"{subject_fr} {verb[2 + plural]} {thing_fr}"
    if rng.random() < 0.3:
        where, where_fr = rng.choice(_PREPOSITIONS)
        place, place_fr, _ = _phrase(rng, adjectives=False)
        english += f" {where} {place}"
        french += f" {where_fr} {place_fr}".replace("de les ", "des ").replace("de le ", "du ")
    return english, french


def _phrase(rng: random.Random, adjectives: bool = True) -> tuple[str, str, bool]:
    """A noun with its article and perhaps an adjective, in both languages; whether it is plural."""
    noun, plural = rng.choice(_NOUNS), rng.random() < 0.5
    many = "s" if plural else ""
    english = _PLURALS.get(noun.en, noun.en + "s") if plural else noun.en
    french = noun.fr + many
    if adjectives and rng.random() < 0.6:
        en, masculine, feminine, before = rng.choice(_ADJECTIVES)
        english = f"{en} {english}"
        fr = (feminine if noun.feminine else masculine) + many
        french = f"{fr} {french}" if before else f"{french} {fr}"
    return f"the {english}", _article(noun.feminine, plural, french), plural


def _article(feminine: bool, plural: bool, french: str) -> str:
    if plural:
        return f"les {french}"
    if french[0] in "aeiouéh":
        return f"l'{french}"
    return f"la {french}" if feminine else f"le {french}"


def _dictionary() -> dict[str, str]:
    words = {"the": "le"}
    for noun in _NOUNS:
        words[noun.en] = words[_PLURALS.get(noun.en, noun.en + "s")] = noun.fr
    words |= {en: masculine for en, masculine, _, _ in _ADJECTIVES}
    for one, several, fr, _ in _VERBS:
        words[one] = words[several] = fr
    return words | dict(_PREPOSITIONS)


_WORDS = _dictionary()


def word_by_word(prompt: str) -> str:
    """What a dictionary alone makes of a sentence: each word's, or few words', entry in order."""
    words, out = prompt.split(), []
    while words:
        for n in (3, 2, 1):  # "in front of" and "looks for" are entries of their own
            entry = _WORDS.get(" ".join(words[:n]))
            if entry is not None or n == 1:
                out.append(entry or words[0])
                del words[:n]
                break
    return " ".join(out)
