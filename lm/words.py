"""Words as tokens, by a hash."""

import re
import zlib

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Names, numbers and punctuation marks, in order."""
    return _WORD.findall(text)


class HashedWords:
    """Words and punctuation marks as ``vocab_size`` numbers, by a hash: no vocabulary to keep.

    Words that share a number are one word to the model, and no number tells its word.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """A number a word."""
        return [zlib.crc32(word.encode()) % self.vocab_size for word in words(text)]
