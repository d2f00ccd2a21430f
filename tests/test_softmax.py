"""What is special about softmax and log_softmax: any dimension, infinities, shifts, dtype=."""

import pytest
import torch
from harness import assert_bitwise_equal, assert_within_contract, check, doubled, outcome

from fastlm.kernels import OPS, explain, log_softmax, softmax
from fastlm.kernels._interpreter import interpreted

INF = float("inf")
DTYPES = OPS["softmax"].dtypes
BOTH = pytest.mark.parametrize("op", [OPS["softmax"], OPS["log_softmax"]], ids=lambda op: op.name)
pytestmark = pytest.mark.usefixtures("kernels")


@BOTH
@pytest.mark.parametrize("dim", range(-4, 4))
def test_every_dimension(op, dim):
    torch.manual_seed(0)
    check(op, {"input": torch.randn(2, 3, 1, 5).requires_grad_(), "dim": dim})


@BOTH
def test_a_wide_dimension_that_is_not_the_last(op):
    torch.manual_seed(0)
    check(op, {"input": torch.randn(2, 300, 70).bfloat16().requires_grad_(), "dim": 1})


@BOTH
@pytest.mark.parametrize("N", [12, 33000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(op, N, dtype):
    """In place of values, of the first block, and of a whole row: NaN just where PyTorch has it."""
    torch.manual_seed(0)
    x = torch.randn(6, N).to(dtype)
    x[0, 3] = -INF
    x[1, : N // 2] = -INF
    x[2] = -INF
    x[3, 5] = INF
    x[4, 7] = float("nan")
    x[5, 1:] = -INF
    found = {"input": x[[0, 1, 5]].requires_grad_()}
    check(op, found)
    found = {"input": x}
    fused, eager = outcome(op.fused, found), outcome(op.reference, found)
    assert fused["result"].isnan()[2:5].all()
    assert_within_contract(fused, eager, outcome(op.reference, doubled(found)))


@BOTH
@pytest.mark.parametrize("N", [200, 33000])
@pytest.mark.parametrize("shift", [1e4, -1e4, 1e6])
def test_a_shift_of_the_logits_costs_no_accuracy(op, N, shift):
    torch.manual_seed(0)
    x = (torch.randn(2, N) * 64).round() / 64 + shift  # exact in float32 after the shift, nearly
    check(op, {"input": x.requires_grad_()})
    torch.testing.assert_close(op.fused(x), op.fused(x - shift), rtol=1e-6, atol=1e-6)


@BOTH
def test_far_apart_logits(op):
    """Where exp underflows, the logarithm does not."""
    x = torch.linspace(-3e4, 3e4, 40).reshape(2, 20).requires_grad_()
    check(op, {"input": x})
    assert log_softmax(x.detach()).isfinite().all()


@BOTH
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_the_dtype_argument(op, given, wanted):
    """Cast first, as PyTorch; the gradient comes back in the input's dtype."""
    torch.manual_seed(0)
    x = (100 + 4 * torch.randn(3, 50)).to(given).requires_grad_()
    found = {"input": x, "dtype": wanted}
    cast = {"input": x.detach().to(wanted).requires_grad_()}
    fused, eager = outcome(op.fused, found), outcome(op.reference, found)
    assert fused["result"].dtype == wanted
    exact = outcome(op.reference, doubled(cast))
    results = [{"result": found["result"]} for found in (fused, eager, exact)]
    assert_within_contract(*results)
    name = "gradient of ['input']"
    assert fused[name].dtype == given
    torch.testing.assert_close(fused[name], eager[name], rtol=2e-2, atol=2e-2)


@BOTH
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (3, 0, 8)])
def test_empty_inputs(op, shape):
    found = {"input": torch.randn(shape).requires_grad_()}
    assert_bitwise_equal(outcome(op.fused, found), outcome(op.reference, found))


@BOTH
def test_what_the_kernels_leave_to_pytorch(op):
    for x, more, reason in (
        (torch.tensor(3.0), {}, "not a dimension"),
        (torch.zeros(2, 3, dtype=torch.float64), {}, "float64"),
        (torch.zeros(2, 3), {"dtype": torch.float64}, "float64"),
        (torch.ones(2, 3, dtype=torch.int64), {"dtype": torch.float32}, "int64"),
    ):
        assert reason in explain(op.fused, x, **more)
        torch.testing.assert_close(op.fused(x, **more), op.reference(x, **more))


@BOTH
def test_refuses_what_pytorch_refuses_in_its_words(op):
    for x, dim in ((torch.zeros(2, 3), 2), (torch.zeros(2, 3), -3), (torch.zeros(2).long(), 0)):
        with pytest.raises((IndexError, RuntimeError)) as theirs:
            op.reference(x, dim)
        with pytest.raises(theirs.type) as ours:
            op.fused(x, dim)
        assert str(ours.value) == str(theirs.value)


@BOTH
def test_the_input_is_left_alone(op):
    x = torch.randn(3, 8, requires_grad=True)
    y = x * 1
    op.fused(y).square().sum().backward()
    assert y._version == 0


def test_saved_for_backward_is_the_output_alone():
    x = torch.randn(4, 64, requires_grad=True)
    for op in (softmax, log_softmax):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            y = op(x)
        assert [t.data_ptr() for t in saved] == [y.data_ptr()]


def test_the_functional_and_the_tensor_method_agree():
    x = torch.randn(3, 40)
    torch.testing.assert_close(softmax(x, dim=-1), torch.nn.functional.softmax(x, dim=-1))
    torch.testing.assert_close(log_softmax(x, 1), x.log_softmax(1))
    with interpreted():
        torch.testing.assert_close(softmax(x).sum(-1), torch.ones(3))


@BOTH
def test_a_row_wider_than_65536(op):
    torch.manual_seed(0)
    check(op, {"input": (3 * torch.randn(1, 65536 + 3)).bfloat16().requires_grad_()})
