"""Keys and values of tokens that the model has seen, so that each token is computed once."""

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
        self.most = 0

    def positions(self, T: int) -> Tensor:
        """Where the next ``T`` tokens of each sequence stand: (batch, T) int64."""
        return self.lengths.long()[:, None] + torch.arange(T, device=self.lengths.device)

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Puts keys and values (batch, T, H_kv, D) at ``positions`` (batch, T) of a layer."""
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.k[layer][rows, positions] = k.to(self.k[layer].dtype)
        self.v[layer][rows, positions] = v.to(self.v[layer].dtype)

    def seen(self, layer: int, T: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, as far as any sequence reaches with ``T`` tokens more."""
        end = self.most + T
        return self.k[layer][:, :end], self.v[layer][:, :end]

    def grow(self, T: int) -> None:
        """Counts ``T`` tokens more in every sequence, once all layers are written.

        Raises:
            ValueError: There is no room for them.
        """
        if self.most + T > self.capacity:
            raise ValueError(
                f"KVCache: capacity must be at least {self.most + T} tokens; got {self.capacity}"
            )
        self.lengths += T
        self.most += T

    def cut(self, lengths: Tensor, most: int) -> None:
        """Forgets all but the first ``lengths`` (batch,) tokens, none of them above ``most``."""
        self.lengths.copy_(lengths)
        self.most = most

    def fork(self, n: int) -> "KVCache":
        """Each sequence ``n`` times, one after the other: one prompt, ``n`` continuations."""
        forked = object.__new__(KVCache)
        forked.capacity, forked.most = self.capacity, self.most
        forked.k = [k.repeat_interleave(n, 0) for k in self.k]
        forked.v = [v.repeat_interleave(n, 0) for v in self.v]
        forked.lengths = self.lengths.repeat_interleave(n)
        return forked
