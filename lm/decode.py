"""Rows of tokens that grow: a prompt computed once, then one step a token on fixed memory.

A row's tokens depend on its own prompt and its own seed alone: padding stands on its right and is
forgotten, and the token at place t is a pure function of (logits, seed, t). So a row comes out the
same in any batch, and drafted tokens can be checked whatever the temperature.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import KVCache
from .flat import flat_step, head
from .graph import Graphed
from .model import GPT


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen out of logits.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Only the k most likely tokens; 0: all.
        top_p: Only the most likely tokens that together reach this probability.
        min_p: Only tokens at least this many times as likely as the most likely one.
        repetition_penalty: Divides positive logits of tokens that the row holds already, and
            multiplies negative ones (Keskar et al. 2019).
        seed: Of the draws.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises where a number has no meaning."""
        rules = {
            "temperature": ("be 0 or more", 0 <= self.temperature < float("inf")),
            "top_k": ("be 0 (all) or more", self.top_k >= 0),
            "top_p": ("be above 0 and at most 1", 0 < self.top_p <= 1),
            "min_p": ("be from 0 to 1", 0 <= self.min_p <= 1),
            "repetition_penalty": ("be above 0", 0 < self.repetition_penalty < float("inf")),
        }
        for name, (rule, kept) in rules.items():
            if not kept:
                raise ValueError(f"generate: {name} must {rule}; got {getattr(self, name)}")

    def row_seed(self, i: int) -> int:
        """The seed of a prompt's i-th continuation, the same whatever the prompt (splitmix64)."""
        x = (self.seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return (x ^ x >> 31) >> 1  # it must fit int64


class Step:
    """One token more for every row: a function of no arguments on memory that stays in place.

    Attributes:
        token: (rows, 1) int64: the newest token of each row, which the model has not seen.
        place: (rows,) int64: how many tokens each row has drawn.
        held: (rows, vocab_size) bool: tokens that a row holds; None without a penalty on them.
    """

    def __init__(self, model: GPT, rows: Sequence[Sequence[int]], n: int, sampling: Sampling):
        device = model.wte.weight.device
        self.model, self.sampling = model, sampling
        self.cache: KVCache | None = None
        self.flat: Callable[[Tensor], Tensor] | None = None
        self.head = head(model)
        self.token = torch.zeros(len(rows), 1, dtype=torch.int64, device=device)
        self.place = torch.zeros(len(rows), dtype=torch.int64, device=device)
        seeds = [sampling.row_seed(row % n) for row in range(len(rows))]
        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=device)
        self.held: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            held = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool)
            for row, tokens in enumerate(rows):
                held[row, torch.tensor(tokens)] = True
            self.held = held.to(device)

    def __call__(self) -> None:
        """Feeds the newest tokens and draws the next."""
        if self.flat is not None and self.cache is not None and self.cache.even:
            hidden = self.flat(self.token[:, 0])
        else:
            hidden = self.model.hidden(self.token, cache=self.cache)[:, -1]
        self.draw(self.head(hidden))

    def behind(self, cache: KVCache) -> None:
        """Says where the keys and values are of what the rows hold."""
        self.cache, self.flat = cache, flat_step(self.model, cache)

    @property
    def memory(self) -> list[Tensor]:
        """All that a step changes, keys and values apart."""
        held = [] if self.held is None else [self.held]
        return [self.token, self.place, *held] + (
            [] if self.cache is None else [self.cache.lengths]
        )

    def draw(self, logits: Tensor) -> None:
        """Takes the next token of each row out of its logits (rows, vocab_size)."""
        if self.held is not None:
            penalty = self.sampling.repetition_penalty
            fewer = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self.held, fewer, logits)
        self.token[:, 0] = self.chosen(logits, self.seeds, self.place)
        self.place += 1
        if self.held is not None:
            self.held.scatter_(1, self.token, True)

    def chosen(self, logits: Tensor, seeds: Tensor, places: Tensor) -> Tensor:
        """A token of each row of logits: (rows,) int64."""
        s = self.sampling
        if s.temperature == 0:
            return logits.argmax(-1)
        return self.model.ops.sample(
            logits, temperature=s.temperature, top_k=min(s.top_k, logits.shape[-1]),
            top_p=s.top_p, min_p=s.min_p, seed=seeds, offset=places,
        )  # fmt: skip


def agreed(draft: Sequence[int], drawn: Sequence[int]) -> int:
    """How many tokens of a draft are what was drawn in their place."""
    for i, (foreseen, token) in enumerate(zip(draft, drawn, strict=False)):
        if foreseen != token:
            return i
    return min(len(draft), len(drawn))


class Rows:
    """Prompts, each with ``n`` continuations, that grow together.

    Attributes:
        tokens: Of each row, its prompt first.
        begins: Where what the model sees of each row begins: 0 until the row is longer than the
            model's block, then as far on as leaves half a block.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        n: int,
        most_new: int,
        sampling: Sampling,
        use_cache: bool,
        graphed: bool,
    ):
        self.model, self.n, self.use_cache, self.graphed = model, n, use_cache, graphed
        self.tokens = [list(prompt) for prompt in prompts for _ in range(n)]
        block = model.config.block_size
        self.begins = [max(len(row) - block, 0) for row in self.tokens]
        self.capacity = min(block, max(map(len, prompts)) + most_new)
        self.step = Step(model, self.tokens, n, sampling)
        self.run: Callable[[], None] = self.step

    @torch.inference_mode()
    def first(self) -> list[list[int]]:
        """Computes each prompt once, and draws the first token of each row."""
        contexts = self.contexts(self.n)
        cache = self.new_cache(len(contexts))
        logits = self.last_logits(contexts, cache)
        if cache is not None:
            self.step.behind(cache.fork(self.n) if self.n > 1 else cache)
        self.step.draw(logits.repeat_interleave(self.n, 0))
        return self.newest([[token] for token in self.step.token[:, 0].tolist()])

    @torch.inference_mode()
    def next(self, drafts: Sequence[Sequence[int]] = ()) -> list[list[int]]:
        """One token more of each row, or as many as its draft foresaw and one more."""
        cache = self.step.cache
        if self.slide() or cache is None:
            if cache is not None:
                cache.cut([0] * len(self.tokens))
            self.step.draw(self.last_logits(self.contexts(), cache))
        elif any(drafts) and cache.most + 1 < self.capacity:
            return self.newest(self.checked(drafts, cache))
        else:
            self.take_step(cache)
        return self.newest([[token] for token in self.step.token[:, 0].tolist()])

    def take_step(self, cache: KVCache) -> None:
        """Runs the step; from the second one on as a graph, if it may be one."""
        if self.graphed and self.run is self.step:
            cache.static = True
            self.run = Graphed(self.step)
        self.run()

    def checked(self, drafts: Sequence[Sequence[int]], cache: KVCache) -> list[list[int]]:
        """What each row draws at each place of its draft, as far as the draft is right.

        A draw is a pure function of logits, seed and place: where the draft says what is drawn,
        the logits behind it are those of the row itself.
        """
        step, device = self.step, self.step.token.device
        T = min(1 + max(map(len, drafts)), self.capacity - cache.most)
        fed = [[row[-1], *draft][:T] for row, draft in zip(self.tokens, drafts, strict=True)]
        ids = torch.tensor([f + [0] * (T - len(f)) for f in fed], device=device)
        logits = self.model.lm_head(self.model.hidden(ids, cache=cache)).flatten(0, 1)
        places = (step.place[:, None] + torch.arange(T, device=device)).flatten()
        drawn = step.chosen(logits, step.seeds.repeat_interleave(T), places).view(-1, T).tolist()
        new = [row[: 1 + agreed(f[1:], row)] for f, row in zip(fed, drawn, strict=True)]
        held = [len(row) - begin for row, begin in zip(self.tokens, self.begins, strict=True)]
        cache.cut([n - 1 + len(row) for n, row in zip(held, new, strict=True)])
        step.token[:, 0] = torch.tensor([row[-1] for row in new], device=device)
        step.place += torch.tensor([len(row) for row in new], device=device)
        return new

    def newest(self, drawn: list[list[int]]) -> list[list[int]]:
        """Adds drawn tokens to the rows, and gives them back."""
        for row, tokens in zip(self.tokens, drawn, strict=True):
            row += tokens
        return drawn

    def slide(self) -> bool:
        """Moves on the beginning of rows that have outgrown the block; whether there were any."""
        block = self.model.config.block_size
        outgrown = [i for i, row in enumerate(self.tokens) if len(row) - self.begins[i] > block]
        for i in outgrown:
            self.begins[i] = len(self.tokens[i]) - max(block // 2, 1)
        return bool(outgrown)

    def contexts(self, every: int = 1) -> list[list[int]]:
        """What the model sees of each row, or of each ``every``-th."""
        seen = (row[begin:] for row, begin in zip(self.tokens, self.begins, strict=True))
        return list(seen)[::every]

    def new_cache(self, rows: int) -> KVCache | None:
        """An empty cache for so many rows, where one is wanted."""
        if not self.use_cache:
            return None
        weight = self.model.wte.weight
        return KVCache(self.model.config, rows, self.capacity, weight.device, weight.dtype)

    def last_logits(self, contexts: list[list[int]], cache: KVCache | None) -> Tensor:
        """Logits after each context (rows, vocab_size), from one pass over all of them."""
        lengths, device = [len(c) for c in contexts], self.model.wte.weight.device
        longest = max(lengths)
        padded = [c + [0] * (longest - len(c)) for c in contexts]
        hidden = self.model.hidden(torch.tensor(padded, device=device), cache=cache)
        if cache is not None:
            cache.cut(lengths)  # the padding
        ends = torch.tensor(lengths, device=device)
        return self.model.lm_head(hidden[torch.arange(len(lengths), device=device), ends - 1])
