"""Prompts that grow until each has ended: what may be asked, and where each row stops."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .decode import Rows, Sampling
from .lookup import Lookup
from .model import GPT
from .stops import StopText
from .tokenizer import TextStream, Tokenizer

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]


@dataclass(frozen=True)
class Request:
    """What is asked beside the prompts: see ``generate``."""

    max_new_tokens: int | None = None
    max_length: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    stop: str | Sequence[str] = ()
    tokenizer: Tokenizer | None = None
    eos_token_id: int | Sequence[int] | None = None
    seed: int | None = None
    use_cache: bool = True
    slide: bool = False
    speculative: int = 0

    def __post_init__(self) -> None:
        """Raises where the numbers contradict each other."""
        if (self.max_new_tokens is None) == (self.max_length is None):
            raise must("one of max_new_tokens and max_length", "be given", "both or neither")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise must("max_new_tokens", "be at least 1", self.max_new_tokens)
        if self.num_return_sequences < 1:
            raise must("num_return_sequences", "be at least 1", self.num_return_sequences)
        if self.num_return_sequences > 1 and self.temperature == 0:
            rule = "be 1 with temperature 0, which gives the same text each time"
            raise must("num_return_sequences", rule, self.num_return_sequences)
        if self.speculative < 0:
            raise must("speculative", "be 0 (off) or more", self.speculative)
        if self.speculative and (self.repetition_penalty != 1.0 or not self.use_cache):
            rule = "be 0 with a repetition_penalty or without a cache"
            raise must("speculative", rule, self.speculative)
        if "" in self.stops:
            raise must("stop", "hold no empty string", list(self.stops))
        if self.stops and self.tokenizer is None:
            raise must("tokenizer", "be given beside stop, to read the text", None)

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a row."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a row."""
        ends = self.eos_token_id
        return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)

    def sampling(self) -> Sampling:
        """How tokens are chosen; a seed that was not given comes from PyTorch's generator."""
        seed = int(torch.randint(2**63 - 1, ())) if self.seed is None else self.seed
        return Sampling(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, seed
        )

    def new_tokens(self, prompt: Sequence[int], block_size: int) -> int:
        """How many tokens a prompt may grow by."""
        new = self.max_new_tokens
        if new is None:
            assert self.max_length is not None
            new = self.max_length - len(prompt)
            if new < 1:
                rule = f"be above the prompt's {len(prompt)} tokens, which it counts"
                raise must("max_length", rule, self.max_length)
        if len(prompt) + new > block_size and not self.slide:
            raise ValueError(
                f"generate: prompt and new tokens must fit block_size, {block_size}; got "
                f"{len(prompt)} and {new}. With slide=True the model goes on with the last half "
                "of its block"
            )
        return new


class Growth:
    """Rows that grow until each has ended; iterating gives each step's new tokens a row."""

    def __init__(self, model: GPT, ids: Prompts, request: Request):
        config, n = model.config, request.num_return_sequences
        if not config.causal:
            raise must("model", "be causal", "an encoder")
        prompts = as_prompts(ids, config.vocab_size)
        new = [request.new_tokens(prompt, config.block_size) for prompt in prompts]
        self.model, self.request = model, request
        self.limits = [len(p) + k for p, k in zip(prompts, new, strict=True) for _ in range(n)]
        on_gpu = model.wte.weight.is_cuda and not request.speculative
        self.grown = Rows(
            model, prompts, n, max(new), request.sampling(), request.use_cache, graphed=on_gpu
        )
        self.done = [False] * len(self.limits)
        self.lengths = [len(row) for row in self.grown.tokens]  # as far as the rows count
        self.stops: list[tuple[TextStream, StopText]] = []
        if request.tokenizer is not None and request.stops:
            texts = (request.tokenizer.stream() for _ in self.limits)
            self.stops = [(text, StopText(request.stops)) for text in texts]

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Steps until all rows have ended. The model is in evaluation mode meanwhile."""
        was_training = self.model.training
        if any(module.training for module in self.model.modules()):
            self.model.eval()  # which to say again costs as much as a token
        try:
            lookups = [Lookup(row) for row in self.grown.tokens] if self.request.speculative else []
            drawn = self.grown.first()
            while True:
                yield [self.taken(row, tokens) for row, tokens in enumerate(drawn)]
                if all(self.done):
                    return
                for lookup, tokens in zip(lookups, drawn, strict=False):
                    lookup.add(tokens)
                drafts = [lookup.draft(self.request.speculative) for lookup in lookups]
                drawn = self.grown.next(drafts)
        finally:
            if was_training:
                self.model.train()

    def taken(self, row: int, tokens: list[int]) -> list[int]:
        """Those of a row's new tokens that come before its end."""
        kept: list[int] = []
        for token in tokens:
            if self.done[row]:
                break
            kept.append(token)
            self.lengths[row] += 1
            full = self.lengths[row] == self.limits[row]
            self.done[row] = full or token in self.request.ends or self.stopped(row, token)
        return kept

    def stopped(self, row: int, token: int) -> bool:
        """Whether a row's new text holds a stop string now."""
        if not self.stops:
            return False
        text, stop = self.stops[row]
        stop.push(text.push(token))
        return stop.hit

    def rows(self) -> list[list[int]]:
        """The rows up to their ends."""
        return [row[:n] for row, n in zip(self.grown.tokens, self.lengths, strict=True)]


def as_prompts(ids: Prompts, vocab_size: int) -> list[list[int]]:
    """One list of tokens a prompt. Raises where there is none, or one that no model could read."""
    if isinstance(ids, Tensor):
        if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise must("ids", "be (B, T) integers", f"{ids.dtype} {tuple(ids.shape)}")
        ids = ids.reshape(-1, ids.shape[-1]).tolist()
    many: list[Any] = [p.tolist() if isinstance(p, Tensor) else p for p in ids]
    if many and all(isinstance(p, int) for p in many):
        many = [many]
    for prompt in many:
        if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not prompt:
            raise must("ids", "hold at least one token a prompt", repr(prompt))
        for token in prompt:
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise must("ids", f"be tokens below vocab_size, {vocab_size}", repr(token))
    if not many:
        raise must("ids", "hold at least one prompt", "none")
    return [list(prompt) for prompt in many]


def must(name: str, rule: str, got: object) -> ValueError:
    """The error of an argument that breaks a rule."""
    return ValueError(f"generate: {name} must {rule}; got {got}")
