"""Words as tokens, by a hash."""

import re
import zlib

_WORD = re.compile(r"\w+|[^\w\s]")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def words(text: str) -> list[str]:
    """Names, numbers and punctuation marks, in order."""
    return _WORD.findall(text)


def parts(word: str) -> list[str]:
    """What a name is put together from, in lower case: ``getFile_2`` of get, file and 2.

    None of a word that is one part as it stands.
    """
    found = _PART.findall(word)
    return [] if found in ([], [word]) else [part.lower() for part in found]


class HashedWords:
    """Words and punctuation marks as ``vocab_size`` numbers, by a hash: no vocabulary to keep.

    Words that share a number are one word to the model, and no number tells its word.

    Args:
        vocab_size: Numbers.
        parts: A name's parts follow it, with numbers of their own.
    """

    def __init__(self, vocab_size: int, *, parts: bool = False):
        self.vocab_size, self.parts = vocab_size, parts

    def encode(self, text: str) -> list[int]:
        """A number a word, and a number a part."""
        found = []
        for word in words(text):
            found.append(word)
            if self.parts:
                found += [f"#{part}" for part in parts(word)]
        return [zlib.crc32(word.encode()) % self.vocab_size for word in found]
