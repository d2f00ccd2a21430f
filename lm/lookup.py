"""Drafts from a row's own past: what followed the last time its newest tokens stood there.

Prompt lookup (Saxena 2023): text repeats itself, so a guess is free, and a model checks several
tokens in one pass for the price of one. Nothing is lost but that pass where the guess is wrong.
"""

from collections.abc import Sequence

SPANS = (3, 2)  # tokens that must match, longer first


class Lookup:
    """Where each short run of a row's tokens last ended."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """Takes tokens more at the row's end."""
        for token in tokens:
            for span in SPANS:  # the run that ends just before this token, now that one follows it
                if len(self.tokens) >= span:
                    self.ends[tuple(self.tokens[-span:])] = len(self.tokens)
            self.tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """At most so many tokens that may come next; none where nothing repeats."""
        for span in SPANS:
            end = self.ends.get(tuple(self.tokens[-span:]))
            if end is not None and len(self.tokens) >= span:
                return self.tokens[end : end + most]
        return []
