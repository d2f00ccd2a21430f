"""Keys and values of tokens that the model has seen, so that each token is computed once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import GPTConfig


class KVCache:
    """Room for ``capacity`` tokens of each of ``batch`` sequences, in every layer.

    Attributes:
        k: One (batch, capacity, H_kv, D) tensor a layer.
        v: The same of the values.
        lengths: (batch,) int32: tokens that each sequence holds.
        most: No sequence holds more than this. A host number, so that nothing waits for the GPU.
        even: Every sequence holds ``most``.
        static: No shape depends on what it holds, so that a CUDA graph can be replayed.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (batch, capacity, config.kv_heads, config.head_width)
        self.capacity = capacity
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.most, self.even, self.static = 0, True, False

    @property
    def begin(self) -> int | Tensor:
        """Where the next token of each sequence stands: one number where that is all it takes."""
        return self.most if self.even and not self.static else self.lengths

    def positions(self, T: int) -> Tensor:
        """Where the next ``T`` tokens of each sequence stand: (batch, T) int64."""
        steps = torch.arange(T, device=self.lengths.device)
        if isinstance(self.begin, int):
            return (steps + self.begin).expand(self.lengths.shape[0], T)
        return self.lengths.long()[:, None] + steps

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Puts keys and values (batch, T, H_kv, D) at ``positions`` (batch, T) of a layer."""
        if isinstance(self.begin, int):  # a copy costs a fifth of an indexed store on a CPU
            end = self.most + k.shape[1]
            self.k[layer][:, self.most : end] = k
            self.v[layer][:, self.most : end] = v
            return
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.k[layer][rows, positions] = k.to(self.k[layer].dtype)
        self.v[layer][rows, positions] = v.to(self.v[layer].dtype)

    def seen(self, layer: int, T: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, as far as any sequence reaches with ``T`` tokens more."""
        if self.static:
            return self.k[layer], self.v[layer]
        end = self.most + T
        return self.k[layer][:, :end], self.v[layer][:, :end]

    def check_room(self, T: int) -> None:
        """Raises ValueError where ``T`` tokens more do not fit."""
        if self.most + T > self.capacity:
            raise ValueError(
                f"KVCache: capacity must be at least {self.most + T} tokens; got {self.capacity}"
            )

    def grow(self, T: int) -> None:
        """Counts ``T`` tokens more in every sequence, once all layers are written."""
        self.lengths += T
        self.most += T

    def cut(self, lengths: Sequence[int]) -> None:
        """Forgets all but the first so many tokens of each sequence."""
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.most, self.even = max(lengths), min(lengths) == max(lengths)

    def fork(self, n: int) -> "KVCache":
        """Each sequence ``n`` times, one after the other: one prompt, ``n`` continuations."""
        forked = object.__new__(KVCache)
        forked.capacity, forked.most = self.capacity, self.most
        forked.even, forked.static = self.even, self.static
        forked.k = [k.repeat_interleave(n, 0) for k in self.k]
        forked.v = [v.repeat_interleave(n, 0) for v in self.v]
        forked.lengths = self.lengths.repeat_interleave(n)
        return forked
