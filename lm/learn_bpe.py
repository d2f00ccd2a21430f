"""A byte-pair vocabulary learned from texts (Sennrich et al. 2016), in GPT-2's form.

A tiny model spends its depth on spelling where tokens are bytes. A few hundred merges make most
words of a small task one token each: sequences a third as long, and a prompt that can be copied from
word by word.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

Pair = tuple[bytes, bytes]
_PIECES = re.compile(r" ?\w+| ?[^\s\w]+|\s+")


def learn_merges(texts: Iterable[str], count: int) -> list[Pair]:
    """The ``count`` merges, most frequent pair first, or as many as the texts have.

    Nothing is merged across the space before a word, which belongs to the word.
    """
    pieces = Counter(piece for text in texts for piece in _PIECES.findall(text))
    words = [([bytes([b]) for b in piece.encode()], n) for piece, n in pieces.items()]
    pairs: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = defaultdict(set)
    for i, (symbols, n) in enumerate(words):
        _count(symbols, n, i, pairs, where)
    merges: list[Pair] = []
    while len(merges) < count and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        for i in sorted(where[best]):
            symbols, n = words[i]
            _count(symbols, -n, i, pairs, where)
            words[i] = (_merged(symbols, best), n)
            _count(words[i][0], n, i, pairs, where)
        del pairs[best], where[best]
    return merges


def _count(
    symbols: list[bytes], n: int, i: int, pairs: Counter[Pair], where: dict[Pair, set[int]]
) -> None:
    """Adds a word's pairs, or takes them away where n is negative."""
    for pair in zip(symbols, symbols[1:], strict=False):
        pairs[pair] += n
        if n > 0:
            where[pair].add(i)
        else:
            where[pair].discard(i)
        if not pairs[pair]:
            del pairs[pair]


def _merged(symbols: list[bytes], pair: Pair) -> list[bytes]:
    out: list[bytes] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out
