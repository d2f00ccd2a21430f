"""Fixtures of the whole suite: kernels run interpreted on the CPU, fresh memory holds NaN."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # idle OpenMP workers spin, and slow the interpreter

import pytest
import torch

from fastlm.kernels._interpreter import interpreted

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """What compiles every kernel takes longest: processes that share the tests start there."""
    items.sort(key=lambda item: item.path.name not in ("test_compile.py", "test_bench_snapshot.py"))


@pytest.fixture
def kernels():
    """Inside the test, ops on CPU tensors run their Triton kernels in the interpreter."""
    with interpreted():
        yield


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """torch.empty gives NaN, so an element that no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
