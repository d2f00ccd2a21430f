"""Running means in bytes: what is kept of them, how far they are off, and their checkpoints."""

import copy

import pytest
import torch
from test_adamw import assert_same, everything, give_gradients, parameters, twins

from fastlm.kernels import AdamW
from fastlm.kernels.optim.rounding import decoded_tensor, encoded_tensor

BF16 = torch.bfloat16
LARGE = ((33, 128), (4200,), (5,))  # rows of whole blocks; a cut block; too small for bytes


def means(optimizer, p):
    state = optimizer.state[p]
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        yield name, state[f"{name}_codes"], state[f"{name}_scale"], signed


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_bytes_are_the_nearest_to_the_float32_means(dtype):
    a = parameters(LARGE, dtype)
    b = twins(a)
    first, second = AdamW(a, state_dtype="8bit"), AdamW(b, state_dtype=torch.float32)
    give_gradients(a, b)
    for params in (a, b):
        params[0].grad[:2, :64] *= 1e-7  # beside others: not 0 in exp_avg_sq
    first.step()
    second.step()
    for p, q in zip(a[:2], b[:2], strict=True):
        for name, codes, scale, signed in means(first, p):
            exact = second.state[q][name]
            want, want_scale = encoded_tensor(exact, signed=signed)
            assert torch.equal(codes, want)
            assert torch.equal(scale.flatten(), want_scale)
            got = decoded_tensor(codes, scale, signed=signed)
            largest = exact.abs().max()
            assert got.abs().max() == largest
            tiny = largest * 2.0 ** (-15 if signed else -31)
            assert ((got - exact).abs() <= exact.abs() / 16 + tiny).all()
            assert signed or (got > 0).eq(exact > 0).all()
        torch.testing.assert_close(p, q)  # the first step knows no bytes yet
    assert first.state[a[0]]["exp_avg_scale"].shape == (33, 1)
    assert first.state[a[1]]["exp_avg_scale"].shape == (33,)
    assert first.state[a[2]]["exp_avg"].dtype == torch.float32
    kept = sum(t.nbytes for name, t in first.state[a[0]].items() if name != "step")
    assert kept == 2 * (33 * 128 + 33 * 4)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_the_next_step_starts_from_the_bytes(dtype):
    """As a float32 run does whose means went through bytes: to the bit."""
    a = parameters(LARGE[:2], dtype)
    b = twins(a)
    first, second = AdamW(a, state_dtype="8bit"), AdamW(b, state_dtype=torch.float32)
    for step in range(2):
        give_gradients(a, b, seed=step)
        first.step()
        second.step()
        for p, q in zip(a, b, strict=True):
            assert torch.equal(p, q)
            for name, codes, scale, signed in means(first, p):
                mean = second.state[q][name]
                mean.copy_(decoded_tensor(*encoded_tensor(mean, signed=signed), signed=signed))
                assert torch.equal(decoded_tensor(codes, scale, signed=signed), mean)


def test_every_byte_stands_for_itself():
    """So that a checkpoint which goes through float32 comes back."""
    codes = torch.arange(256, dtype=torch.uint8)
    with_the_largest = torch.cat([codes[:127], codes[255:]])
    for signed, halves in (
        (True, (codes[:128], codes[128:])),
        (False, (with_the_largest, codes[128:])),
    ):
        for given in halves:
            for size in (1.0, 3.7e-5, 2.9e30):
                x = decoded_tensor(given, torch.tensor([size]), signed=signed)
                back, scale = encoded_tensor(x, signed=signed)
                assert scale == torch.tensor(size)
                assert torch.equal(back, given)


@pytest.mark.usefixtures("kernels")
def test_a_nan_takes_its_block_and_is_not_hidden():
    a = parameters(((64, 128),))
    optimizer = AdamW(a, state_dtype="8bit")
    for _ in range(2):
        give_gradients(a)
        a[0].grad[2, 5] = float("nan")
        optimizer.step()
    assert a[0][2].isnan().all()
    assert a[0].isnan().sum() == 128


@pytest.mark.usefixtures("kernels")
def test_zero_gradients_stay_zero():
    a = parameters(((64, 128),))
    before = a[0].detach().clone()
    optimizer = AdamW(a, state_dtype="8bit", weight_decay=0.0)
    for _ in range(2):
        a[0].grad = torch.zeros_like(a[0])
        optimizer.step()
    assert torch.equal(a[0], before)


def test_training_is_as_good_as_in_float32():
    """A noisy regression, badly scaled, with means that go through bytes as the kernels' do."""
    torch.manual_seed(0)
    x = torch.randn(256, 64) * torch.logspace(-2, 1, 64)
    target = x @ torch.randn(64, 64)
    losses = []
    for coded in (False, True):
        w = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = torch.optim.AdamW([w], lr=0.05, weight_decay=0.0)
        torch.manual_seed(1)
        for _ in range(300):
            rows = torch.randint(256, (32,))
            optimizer.zero_grad()
            (x[rows] @ w - target[rows]).square().mean().backward()
            optimizer.step()
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)) if coded else ():
                mean = optimizer.state[w][name]
                mean.copy_(decoded_tensor(*encoded_tensor(mean, signed=signed), signed=signed))
        losses.append((x @ w.detach() - target).square().mean())
    assert losses[1] < 1.1 * losses[0]
    assert losses[0] < 0.05 * target.square().mean()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_checkpoints_of_any_precision_continue_in_any_other(dtype):
    """Bytes to bytes to the bit; to float32, which torch loads, and back; from torch's."""
    a = parameters(LARGE, dtype)
    options = {"lr": 1e-2, "state_dtype": "8bit", "ema_decay": 0.9, "master": "fp32"}
    first = AdamW(a, **options)
    for step in range(2):
        give_gradients(a, seed=step)
        first.step()
    saved = copy.deepcopy(first.state_dict())
    wide = AdamW(twins(a))
    wide.load_state_dict(copy.deepcopy(saved))
    assert wide.state[wide.param_groups[0]["params"][0]]["exp_avg"].dtype == dtype
    loud = torch.optim.AdamW(twins(a))
    loud.load_state_dict(copy.deepcopy(saved))
    give_gradients(loud.param_groups[0]["params"])
    with pytest.raises(KeyError, match="exp_avg"):  # and not a byte for a mean
        loud.step()

    exported = first.torch_state_dict()
    theirs = torch.optim.AdamW(b := twins(a))
    theirs.load_state_dict(copy.deepcopy(exported))
    assert_same(first.state_dict()["state"][0], saved["state"][0], rtol=0, atol=0)
    assert exported["param_groups"] == theirs.state_dict()["param_groups"]
    for p, q in zip(a, b, strict=True):
        assert theirs.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, codes, scale, signed in means(first, p) if p.numel() > 5 else ():
            mean = decoded_tensor(codes, scale, signed=signed)
            assert torch.equal(theirs.state[q][name], mean.to(dtype))
    give_gradients(b)
    theirs.step()

    runs = [first]
    imported = copy.deepcopy(exported)  # and what only this class keeps
    for i, state in imported["state"].items():
        state |= {
            name: saved["state"][i][name] for name in ("master", "ema") if name in saved["state"][i]
        }
    for state in (saved, imported):
        optimizer = AdamW(twins(a), **options)
        optimizer.load_state_dict(copy.deepcopy(state))
        mine = everything(optimizer.param_groups[0]["params"], optimizer)
        assert_same(mine, everything(a, first), rtol=0, atol=0)
        runs.append(optimizer)
    found = []
    for optimizer in runs:
        params = optimizer.param_groups[0]["params"]
        give_gradients(params, seed=2)
        optimizer.step()
        found.append(everything(params, optimizer))
    for other in found[1:]:
        assert_same(other, found[0], rtol=0, atol=0)


def test_refuses_amsgrad():
    with pytest.raises(ValueError, match="amsgrad must be False"):
        AdamW(parameters(LARGE), state_dtype="8bit", amsgrad=True)
