"""What is special about group_norm: channels, extreme statistics, layouts, errors, the module."""

import pytest
import torch
import torch.nn.functional as F
from harness import assert_bitwise_equal, assert_within_contract, check, doubled, outcome

from fastlm.kernels import OPS, GroupNorm, explain, group_norm
from fastlm.kernels._interpreter import interpreted

OP = OPS["group_norm"]
pytestmark = pytest.mark.usefixtures("kernels")


def inputs(x, num_groups, *, weight=True, bias=True):
    found = {"input": x.requires_grad_(), "num_groups": num_groups}
    for name, wanted in (("weight", weight), ("bias", bias)):
        if wanted:
            found[name] = torch.randn(x.shape[1]).to(x.dtype).requires_grad_()
    return found


@pytest.mark.parametrize("shape", [(2, 6), (1, 6, 4), (2, 12, 3, 5), (2, 6, 1, 2, 3)])
@pytest.mark.parametrize("num_groups", [1, 3, 6])
def test_any_number_of_dimensions_and_groups(shape, num_groups):
    torch.manual_seed(0)
    if shape[1] == num_groups and len(shape) == 2:
        assert "a single number" in explain(group_norm, torch.zeros(1, 6), 6)
        return
    check(OP, inputs(torch.randn(shape), num_groups))


@pytest.mark.parametrize("weight", [True, False])
def test_without_weight_or_bias(weight):
    torch.manual_seed(0)
    check(OP, inputs(torch.randn(2, 6, 9), 2, weight=weight, bias=False))


def test_a_bias_without_a_weight():
    """Against a weight of 1: PyTorch 2.13 has no such gradient on the CPU."""
    torch.manual_seed(0)
    found = inputs(torch.randn(2, 6, 9), 2, weight=False)
    want = outcome(OP.reference, found | {"weight": torch.ones(6)})
    del want["['weight'] after"]
    got = outcome(OP.fused, found)
    assert got.keys() == want.keys()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("S", [50, 9000])
def test_a_large_mean_costs_no_accuracy(S):
    torch.manual_seed(0)
    check(OP, inputs(torch.randn(1, 4, S) + 1e3, 2))


def test_channels_of_unlike_means():
    """Blocks of a wide row whose means are far apart, in one channel and over several."""
    torch.manual_seed(0)
    check(OP, inputs(torch.randn(1, 3, 6000) + torch.tensor([[[0.0], [30.0], [-9.0]]]), 1))


def test_a_bad_number_stays_in_its_group():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5)
    x[0, 1, 2], x[1, 3, 0] = float("nan"), float("inf")
    bad = group_norm(x, 2).isnan().all(-1)
    assert torch.equal(bad, F.group_norm(x, 2).isnan().all(-1))
    assert bad.tolist() == [[True, True, False, False], [False, False, True, True]]


def test_empty_inputs():
    """Sums over nothing are 0; of empty channels PyTorch 2.13 gives NaN on the CPU."""
    found = inputs(torch.randn(0, 4, 3), 2)
    assert_bitwise_equal(outcome(OP.fused, found), outcome(OP.reference, found))
    got = outcome(OP.fused, inputs(torch.randn(2, 4, 0), 2))
    assert got["result"].shape == (2, 4, 0)
    assert (got["gradient of ['weight']"] == 0).all()


def test_channels_last_is_read_as_its_values():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 5)
    y = group_norm(x.to(memory_format=torch.channels_last), 3)
    torch.testing.assert_close(y, group_norm(x, 3), rtol=0, atol=0)


def test_half_precision_input_with_float32_parameters():
    torch.manual_seed(0)
    found = inputs(torch.randn(2, 6, 30), 2)
    found["input"] = found["input"].detach().bfloat16().requires_grad_()
    exact = outcome(OP.reference, doubled(found))
    assert_within_contract(outcome(OP.fused, found), outcome(OP.reference, found), exact)


@pytest.mark.parametrize(
    ("x", "num_groups", "weight"),
    [
        (torch.zeros(2, 6, 3), 4, None),
        (torch.zeros(2, 6, 3), 0, None),
        (torch.zeros(6), 2, None),
        (torch.zeros(2, 6, 3), 2, torch.zeros(5)),
        (torch.zeros(1, 2, 1), 2, None),
        (torch.zeros(2, 6, 3, dtype=torch.int64), 2, None),
    ],
)
def test_refuses_what_pytorch_refuses_in_its_words(x, num_groups, weight):
    errors = (RuntimeError, ValueError, ZeroDivisionError)
    with pytest.raises(errors) as theirs:
        F.group_norm(x, num_groups, weight)
    with pytest.raises(theirs.type) as ours:
        group_norm(x, num_groups, weight)
    assert str(ours.value) == str(theirs.value)


def test_the_module_is_torchs_with_its_state_dict():
    torch.manual_seed(0)
    ours, theirs = GroupNorm(2, 6, eps=1e-4), torch.nn.GroupNorm(2, 6, eps=1e-4)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    x = torch.randn(2, 6, 3)
    with interpreted():
        torch.testing.assert_close(ours(x), theirs(x))
