"""What attention compiles to in calls that its declarations do not make."""

import re

import pytest
import torch

from fastlm.bench import capture
from fastlm.kernels import flash_attention

SHARED = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "sm120": 101376}


def leaf(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype).requires_grad_()


def launches(target, call):
    """Each kernel that the call and its backward launch, once."""
    with capture.capture_launches(target) as cap:
        out = call()
        out.backward(torch.empty_like(out))
    return cap.unique()


@pytest.fixture(autouse=True)
def fresh_memory_is_left_alone(nan_in_fresh_memory):
    """Nothing runs here, and large tensors need not be filled."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("target", SHARED)
def test_192_and_128_dimensions_fit(target):
    """Heads of multi-head latent attention: the largest tiles that are in use."""
    q, k, v = leaf(1, 256, 2, 192), leaf(1, 256, 2, 192), leaf(1, 256, 2, 128)
    for launch in launches(target, lambda: flash_attention(q, k, v, causal=True)):
        assert launch.compile().metadata.shared <= SHARED[target]


def test_heads_of_8_times_an_odd_number_are_copied_wide():
    """40 numbers a head: 16 bytes a copy all the same."""
    q, k, v = (leaf(1, 256, 3, 40) for _ in "qkv")
    for launch in launches("sm80", lambda: flash_attention(q, k, v)):
        if launch.name != "rows_kernel":
            opcodes = capture.sass_ops(launch.compile())
            assert any(re.match(r"LDGSTS.*128", op) for op in opcodes), launch
