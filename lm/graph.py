"""A step on fixed memory as one CUDA graph: one launch a token in place of hundreds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .decode import Step


class Graphed:
    """``step`` captured once; each call replays it.

    The capture, and the runs before it that let libraries set themselves up, take no step: what
    they change is put back. Keys and values that they wrote are written over by the next step.
    """

    def __init__(self, step: Step):
        assert step.cache is not None  # without one every step has another shape
        assert step.cache.static
        self.step, self.cache = step, step.cache
        self.before, self.most = [t.clone() for t in step.memory], self.cache.most
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
                self.put_back()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            step()
        self.put_back()

    def put_back(self) -> None:
        """Undoes a step."""
        for t, value in zip(self.step.memory, self.before, strict=True):
            t.copy_(value)
        self.cache.most = self.most

    def __call__(self) -> None:
        """Takes a step."""
        self.graph.replay()
        self.cache.most += 1  # the host's count, which no graph can hold
