"""What is special about Lion: its formula over many steps, options, checkpoints, errors."""

import copy

import pytest
import torch
from harness import assert_within_contract
from test_adamw import (
    assert_same,
    counted,
    everything,
    give_gradients,
    parameters,
    ran_kernels,
    twins,
)

from fastlm.kernels import Lion, backend
from fastlm.kernels._interpreter import interpreted
from fastlm.kernels.optim.lion import reference

SHAPES = ((33, 17), (5,), (), (0,), (33, 128))


def by_hand(params, steps, **options):
    """The formula in the dtype of the parameters, and its states."""
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1} | options
    means = [torch.zeros_like(p) for p in params]
    counts = [torch.tensor(0.0) for _ in params]
    for step in range(steps):
        give_gradients(params, seed=step)
        reference(params, [p.grad for p in params], means, counts, **options)
    named = zip(params, means, strict=True)
    return {f"{i} {n}": t.detach() for i, pair in enumerate(named) for n, t in enumerate(pair)}


@pytest.mark.parametrize("where", ["kernels", "torch"])
@pytest.mark.parametrize("maximize", [False, True])
def test_many_steps_stay_within_the_contract(where, maximize):
    a = parameters(SHAPES)
    exact = by_hand([torch.nn.Parameter(p.detach().double()) for p in a], 8, maximize=maximize)
    eager = by_hand(twins(a), 8, maximize=maximize)
    optimizer = Lion(a, lr=1e-2, weight_decay=0.1, maximize=maximize)
    with interpreted(), backend("auto" if where == "kernels" else "torch"):
        for step in range(8):
            give_gradients(a, seed=step)
            optimizer.step()
    assert ran_kernels(optimizer) == (len(a) if where == "kernels" else 0)
    found = {}
    for i, p in enumerate(a):
        found |= {f"{i} 0": p.detach(), f"{i} 1": optimizer.state[p]["exp_avg"]}
    assert_within_contract(found, eager, exact)


@pytest.mark.usefixtures("kernels")
def test_groups_share_two_launches_and_clipping_is_clip_grad_norm():
    a = parameters(SHAPES)
    b = twins(a)
    first = Lion([{"params": a[:2], "lr": 1e-2}, {"params": a[2:]}], lr=1e-3, max_grad_norm=0.5)
    second = Lion([{"params": b[:2], "lr": 1e-2}, {"params": b[2:]}], lr=1e-3, fused=False)
    for step in range(2):
        give_gradients(a, b, seed=step)
        with counted() as launches:
            first.step()
        norm = torch.nn.utils.clip_grad_norm_(b, 0.5)
        second.step()
        torch.testing.assert_close(first.last_grad_norm, norm)
    assert launches == ["squares_kernel", "prepare_kernel", "update_kernel"]
    assert_same(everything(a, first), everything(b, second))


@pytest.mark.usefixtures("kernels")
def test_cautious_is_the_papers_mask():
    """Elements that the update would move up their gradient stay, the others move by more."""
    (p,) = a = parameters(((40, 30),))
    optimizer = Lion(a, lr=1e-2, betas=(0.9, 0.5), weight_decay=0.0, cautious=True)
    give_gradients(a, seed=1)
    optimizer.step()
    give_gradients(a, seed=2)
    mean, before = optimizer.state[p]["exp_avg"].clone(), p.detach().clone()
    with counted() as launches:
        optimizer.step()
    update = mean.lerp(p.grad, 0.1).sign()
    agrees = update * p.grad > 0
    assert 0.1 < agrees.float().mean() < 0.9
    want = before - 1e-2 * update * agrees / agrees.float().mean()
    torch.testing.assert_close(p.detach(), want)
    assert launches == ["prepare_kernel", "agreement_kernel", "sum_chunks_kernel", "update_kernel"]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_dtype": "8bit", "rounding": "stochastic"},
        {"state_dtype": torch.float32, "master": "split", "ema_decay": 0.9},
        {"master": "fp32", "cautious": True},
    ],
    ids=["default", "bytes", "split", "fp32"],
)
def test_a_checkpoint_of_every_mode_goes_on_bit_for_bit(options, tmp_path):
    a = parameters(SHAPES, torch.bfloat16)
    first = Lion(a, lr=1e-2, **options)
    give_gradients(a)
    first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    b = twins(a)
    second = Lion(b, **options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    third = copy.deepcopy(first)
    c = third.param_groups[0]["params"]
    give_gradients(a, b, c, seed=1)
    for optimizer in (first, second, third):
        optimizer.step()
    assert_same(everything(a, first), everything(b, second), rtol=0, atol=0)
    assert_same(everything(a, first), everything(c, third), rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
def test_a_nan_gradient_reaches_its_parameter():
    a = parameters(((700,),))
    optimizer = Lion(a, cautious=True)
    give_gradients(a)
    a[0].grad[3] = float("nan")
    optimizer.step()
    assert a[0].isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.usefixtures("kernels")
def test_an_overflow_changes_nothing(fused):
    a = parameters(((33, 17),))
    optimizer = Lion(a, fused=fused)
    before = a[0].detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    give_gradients(a)
    a[0].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    assert torch.equal(a[0], before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"weight_decay": float("nan")}, "Invalid weight_decay value: nan"),
        ({"state_dtype": "4bit"}, "Lion: state_dtype must be one of"),
    ],
)
def test_refuses_bad_numbers(options, words):
    with pytest.raises(ValueError, match=words):
        Lion(parameters(((3,),)), **options)


@pytest.mark.usefixtures("kernels")
def test_refuses_sparse_gradients():
    p = torch.nn.Parameter(torch.zeros(4, 2))
    p.grad = torch.zeros(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="Lion does not support sparse gradients"):
        Lion([p]).step()
