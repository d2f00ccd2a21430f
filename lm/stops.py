"""Strings that end a text, found while it grows."""

from collections.abc import Sequence


class StopText:
    """Passes text on up to the first stop string, and holds back what may be the start of one.

    Attributes:
        hit: Whether a stop string has come.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.hit = tuple(stops), "", False

    def push(self, piece: str) -> str:
        """The text that is certain to come before any stop string."""
        if self.hit:
            return ""
        text = self.held + piece
        ends = [text.find(stop) for stop in self.stops if stop in text]
        self.hit = bool(ends)
        cut = min(ends) if ends else len(text) - self.begun(text)
        self.held = "" if ends else text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """What was held back and was no stop string after all."""
        held, self.held = self.held, ""
        return held

    def begun(self, text: str) -> int:
        """How many characters at the end of a text begin a stop string."""
        longest = min(max(map(len, self.stops), default=1) - 1, len(text))
        for n in range(longest, 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self.stops):
                return n
        return 0
