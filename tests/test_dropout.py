"""What is special about dropout: its mask, the seed, recomputation, PyTorch's edge cases."""

import pytest
import torch
from harness import check

from fastlm.kernels import OPS, Dropout, dropout
from fastlm.kernels._interpreter import interpreted

OP = OPS["dropout"]
pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("n", [0, 3, 4, 5, 2047, 2048, 2049, 4096])
def test_around_whole_blocks(n):
    torch.manual_seed(0)
    check(OP, {"input": torch.randn(n).requires_grad_(), "p": 0.3, "seed": -1})


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_and_the_scale_of_what_is_kept(p):
    y = dropout(torch.ones(40000), p, seed=3)
    kept = y != 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    assert abs(kept.float().mean() - (1 - p)) < 5 * (p * (1 - p) / 40000) ** 0.5


def test_neighbours_are_independent():
    """Pairs of elements at distances that share a counter, a block and a row."""
    kept = (dropout(torch.ones(40960), 0.5, seed=3) != 0).float() - 0.5
    for distance in (1, 2, 3, 4, 8, 1024, 2048):
        product = (kept[distance:] * kept[:-distance]).mean() * 4
        assert abs(product) < 5 / 40000**0.5


def test_the_mask_depends_on_the_seed_and_the_place_alone():
    x = torch.ones(6, 50)
    mask = dropout(x, seed=5) != 0
    assert torch.equal(dropout(x, seed=5) != 0, mask)
    assert torch.equal(dropout(x, seed=torch.tensor([5])) != 0, mask)
    assert torch.equal(dropout(x.bfloat16(), seed=5) != 0, mask)
    assert torch.equal(dropout(torch.ones(50, 6).t(), seed=5) != 0, mask)
    assert torch.equal(dropout(x.flatten(), seed=5).view(6, 50) != 0, mask)
    assert torch.equal(dropout(x[:3], seed=5) != 0, mask[:3])
    for other in (6, 5 + 2**32):
        assert not torch.equal(dropout(x, seed=other) != 0, mask)


def test_without_a_seed_pytorchs_generator_decides():
    x = torch.ones(200)
    torch.manual_seed(4)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(4)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


def test_the_backward_drops_what_the_forward_dropped():
    x = torch.randn(300, requires_grad=True)
    y = dropout(x, 0.4)
    y.backward(torch.ones(300))
    torch.testing.assert_close(x.grad, (y.detach() != 0) / 0.6)


def test_checkpointing_draws_the_same_mask():
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(300, requires_grad=True)
    y = checkpoint(lambda x: dropout(x.square(), 0.4), x, use_reentrant=False)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() * (y.detach() != 0) / 0.6)


def test_the_cpu_path_draws_the_kernels_mask():
    from fastlm.kernels._dispatch import cpu_runner

    x = torch.randn(5, 7)
    for seed in (0, 2**62 + 1, -3):
        want = dropout(x, 0.3, seed=seed)
        with cpu_runner(None):
            torch.testing.assert_close(dropout(x, 0.3, seed=seed), want)


def test_evaluation_and_p_of_0_give_the_input_itself():
    x = torch.randn(3)
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0) is x


def test_p_of_1_gives_zeros():
    x = torch.randn(9, requires_grad=True)
    y = dropout(x, 1.0)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(9))
    assert torch.equal(x.grad, torch.zeros(9))


def test_what_is_dropped_is_zero_and_what_is_kept_keeps_nan():
    x = torch.full((100,), float("nan"))
    y = dropout(x, 0.5, seed=1)
    mask = dropout(torch.ones(100), 0.5, seed=1) != 0
    assert torch.equal(y.isnan(), mask)
    assert (y[~mask] == 0).all()


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_refuses_what_pytorch_refuses_in_its_words(p):
    for options in ({}, {"seed": 3}):
        with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
            dropout(torch.ones(3), p, **options)


def test_in_place_is_pytorchs_own():
    for seed in (None, 3):
        x = torch.ones(100)
        assert dropout(x, 0.5, inplace=True, seed=seed) is x
        assert set(x.tolist()) == {0.0, 2.0}


def test_the_module_is_torchs():
    ours, theirs = Dropout(0.3), torch.nn.Dropout(0.3)
    assert repr(ours) == repr(theirs)
    x = torch.ones(50)
    assert (ours(x) == 0).any()
    assert ours.eval()(x) is x


def test_saved_for_backward_is_the_seed():
    saved = []
    x = torch.randn(1000, requires_grad=True)
    with (
        interpreted(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        dropout(x, 0.5)
    assert sum(t.nbytes for t in saved) == 8
