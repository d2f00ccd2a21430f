"""Examples of any lengths for the training loop, padded or end to end.

A causal model takes them padded on the right, which no token sees: on a CPU that is what is fast
(a step of 32 sequences of 20-36 tokens, 4 layers 128 wide: 128 ms padded, 212 ms packed; of 80-120
tokens 712 and 722 ms). An encoder, in which every token sees all, takes them packed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .chat import IGNORED
from .data import permuted
from .fit import Batch, FitConfig
from .parallel import World


class Row(NamedTuple):
    """An example: its tokens, and a target for each of them or one for all."""

    ids: Sequence[int]
    targets: Sequence[int]


def packed(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows end to end, (total,) int64, and where they begin and end, (rows + 1,) int32."""
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return torch.tensor([token for row in rows for token in row]), ends.int()


def packed_rows(rows: Sequence[Row]) -> Batch:
    """Rows end to end, as arguments of a model; the shortest first.

    Neighbours of one length go through a CPU's attention together, and a loss knows no order.
    """
    rows = sorted(rows, key=lambda row: len(row.ids))
    ids, cu_seqlens = packed([row.ids for row in rows])
    targets, _ = packed([row.targets for row in rows])
    return {"ids": ids, "targets": targets, "cu_seqlens": cu_seqlens}


def padded_rows(rows: Sequence[Row]) -> Batch:
    """Rows with nothing to learn behind their ends, as arguments of a causal model."""
    longest = max(len(row.ids) for row in rows)
    pad = [longest - len(row.ids) for row in rows]
    ids = [[*row.ids, *[0] * n] for row, n in zip(rows, pad, strict=True)]
    targets = [[*row.targets, *[IGNORED] * n] for row, n in zip(rows, pad, strict=True)]
    return {"ids": torch.tensor(ids), "targets": torch.tensor(targets)}


class RowsTask:
    """What the loop trains on: rows in an order of its own each epoch.

    Args:
        train: Rows to learn.
        held_out: Rows to judge by.
        collate: ``padded_rows`` or ``packed_rows``.
        config: The run's settings.
        world: This process takes every ``world.size``-th row of a step, from its rank on.
        save_best: Is given the model, in every process, each time that its held-out loss is the
            lowest so far.
        token_dropout: Training leaves out a share of a row's tokens, drawn each time between 0 and
            this, so that rows still come in full length and every position learns.

    Attributes:
        best_loss: The lowest held-out loss so far.
    """

    def __init__(
        self,
        train: Sequence[Row],
        held_out: Sequence[Row],
        collate: Callable[[Sequence[Row]], Batch],
        config: FitConfig,
        world: World,
        save_best: Callable[[nn.Module], None],
        token_dropout: float = 0.0,
    ):
        self.train, self.held_out, self.collate = train, held_out, collate
        self.config, self.world, self.save_best = config, world, save_best
        self.token_dropout, self.best_loss = token_dropout, float("inf")

    def batches(self, step: int) -> Iterator[Batch]:
        """Rows drawn without replacement: a pure function of (seed, step, rank)."""
        config, n = self.config, len(self.train)
        index = step * config.batch_size + np.arange(config.batch_size)
        chosen = np.empty_like(index)
        for epoch in np.unique(index // n):
            now = index // n == epoch
            chosen[now] = permuted(index[now] % n, n, config.seed * 1_000_003 + int(epoch))
        mine, micro = chosen[self.world.rank :: self.world.size], config.micro(self.world.size)
        for i in range(0, len(mine), micro):
            yield self.collate([self.thinned(self.train[j]) for j in mine[i : i + micro]])

    def thinned(self, row: Row) -> Row:
        """A row without some of its tokens, by PyTorch's generator, which each step seeds."""
        if not self.token_dropout:
            return row
        share = self.token_dropout * torch.rand(())
        kept = (torch.rand(len(row.ids)) >= share).tolist()
        ids = [token for token, keep in zip(row.ids, kept, strict=True) if keep]
        return Row(ids or row.ids, row.targets)

    def count(self, batch: Batch) -> int:
        """Targets that count."""
        return int((batch["targets"] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy in nats, summed."""
        return model(**batch, reduction="sum")[1]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Cross entropy of the held-out rows; saves the model where it is the lowest so far."""
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        mine = self.held_out[self.world.rank :: self.world.size]
        for i in range(0, -(-len(self.held_out) // self.world.size), 32):
            rows = mine[i : i + 32]
            batch = self.collate(rows or self.held_out[:1])  # a shared model wants all processes
            moved = {name: t.to(total.device) for name, t in batch.items()}
            loss = self.loss(model, moved).double()
            if rows:
                total += torch.stack((loss, loss.new_tensor(self.count(batch))))
        loss_sum, count = self.world.total(total).tolist()
        mean = loss_sum / count
        if mean < self.best_loss:
            self.best_loss = mean
            self.save_best(model)
        return {"val_loss": mean}

    def state(self) -> dict[str, Any]:
        """The lowest loss: what has been saved as the best stays so."""
        return {"best_loss": self.best_loss}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self.best_loss = state["best_loss"]
