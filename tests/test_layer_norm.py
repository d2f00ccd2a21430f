"""What is special about layer_norm: special values, extreme statistics, autocast, the module."""

import pytest
import torch
import torch.nn.functional as F
from harness import assert_bitwise_equal, assert_within_contract, check, clones, doubled, outcome

from fastlm.kernels import OPS, LayerNorm, backend, layer_norm
from fastlm.kernels._interpreter import interpreted

OP = OPS["layer_norm"]


def inputs(x, *, affine=True):
    N = x.shape[-1]
    found = {"input": x.requires_grad_(), "normalized_shape": (N,)}
    if affine:
        found["weight"] = torch.randn(N, dtype=x.dtype).requires_grad_()
        found["bias"] = torch.randn(N, dtype=x.dtype).requires_grad_()
    return found


@pytest.mark.usefixtures("kernels")
def test_a_large_mean_costs_no_accuracy():
    """Where sum(x^2) - mean^2 would lose every digit."""
    for N in (100, 20000):
        torch.manual_seed(0)
        check(OP, inputs(torch.randn(3, N) + 1e3))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("N", [40, 20000])
def test_an_outlier_in_the_first_column_costs_no_accuracy(N):
    """A variance shifted by the first element would cancel."""
    torch.manual_seed(0)
    x = torch.randn(2, N)
    x[:, 0] = 3e4
    check(OP, inputs(x))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("N", [40, 20000])
@pytest.mark.parametrize("dtype", OP.dtypes)
def test_special_rows(N, dtype):
    """NaN, infinities, a constant row, zeros and denormals: as PyTorch, and only in their row."""
    torch.manual_seed(0)
    x = torch.randn(6, N).to(dtype)
    x[0, 3] = float("nan")
    x[1, 5] = float("inf")
    x[2] = 7.0
    x[3] = 0.0
    x[4] = torch.finfo(dtype).smallest_normal / 4
    fused = layer_norm(x, (N,))
    eager = F.layer_norm(x, (N,))
    assert fused[:2].isnan().all()
    assert eager[:2].isnan().all()
    exact = {"y": F.layer_norm(x[2:].double(), (N,))}
    assert_within_contract({"y": fused[2:]}, {"y": eager[2:]}, exact)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4), (4,)])
def test_several_normalised_dimensions(shape):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4) if len(shape) == 3 else torch.randn(5, 2, 3, 4)
    found = {
        "input": x.requires_grad_(),
        "normalized_shape": shape,
        "weight": torch.randn(shape).requires_grad_(),
        "bias": torch.randn(shape).requires_grad_(),
    }
    check(OP, found)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (2, 0)])
def test_empty_inputs(shape):
    found = inputs(torch.randn(shape))
    assert_bitwise_equal(outcome(OP.fused, found), outcome(OP.reference, found))


@pytest.mark.usefixtures("kernels")
def test_an_unusual_eps():
    torch.manual_seed(0)
    for eps in (0.0, 1e-12, 1, 3.5):
        check(OP, inputs(torch.randn(3, 50)) | {"eps": eps})


@pytest.mark.usefixtures("kernels")
def test_a_row_wider_than_65536():
    torch.manual_seed(0)
    check(OP, inputs(torch.randn(1, 65536 + 3)))


@pytest.mark.usefixtures("kernels")
def test_half_precision_input_with_float32_parameters():
    torch.manual_seed(0)
    found = inputs(torch.randn(4, 96).bfloat16())
    for name in ("weight", "bias"):
        found[name] = found[name].detach().float().requires_grad_()
    y = layer_norm(**found)
    y.sum().backward()
    assert (y.dtype, found["weight"].grad.dtype) == (torch.bfloat16, torch.float32)
    exact = outcome(OP.reference, doubled(found))
    assert_within_contract(outcome(OP.fused, found), outcome(OP.reference, found), exact)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("x", "shape", "weight", "bias"),
    [
        (torch.zeros(2, 3), (4,), None, None),
        (torch.zeros(2, 3), (), None, None),
        (torch.zeros(2, 3), (3,), torch.zeros(4), None),
        (torch.zeros(2, 3), (3,), torch.zeros(3), torch.zeros(2)),
        (torch.zeros(2, 3, dtype=torch.int64), (3,), None, None),
    ],
)
def test_refuses_what_pytorch_refuses_in_its_words(x, shape, weight, bias):
    with pytest.raises(RuntimeError) as theirs:
        F.layer_norm(x, shape, weight, bias)
    with pytest.raises(RuntimeError) as ours:
        layer_norm(x, shape, weight, bias)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.usefixtures("kernels")
def test_backward_twice_over_one_graph():
    x = torch.randn(3, 7, requires_grad=True)
    y = layer_norm(x, (7,))
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
def test_checkpointing_gives_the_same_gradient():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    found = inputs(torch.randn(3, 24))
    again = clones(found)
    layer_norm(**found).square().sum().backward()
    checkpoint(
        lambda x: layer_norm(**(again | {"input": x})), again["input"], use_reentrant=False
    ).square().sum().backward()
    torch.testing.assert_close(again["weight"].grad, found["weight"].grad, rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
def test_torch_func_and_inference_mode():
    x, w = torch.randn(3, 8), torch.randn(8)
    g = torch.func.grad(lambda x: layer_norm(x, (8,), w).sum())(x)
    torch.testing.assert_close(g, torch.func.grad(lambda x: F.layer_norm(x, (8,), w).sum())(x))
    _, t = torch.func.jvp(lambda x: layer_norm(x, (8,), w), (x,), (torch.ones(3, 8),))
    torch.testing.assert_close(
        t, torch.func.jvp(lambda x: F.layer_norm(x, (8,), w), (x,), (torch.ones(3, 8),))[1]
    )
    with torch.inference_mode():
        torch.testing.assert_close(layer_norm(x, (8,), w), F.layer_norm(x, (8,), w))


def test_saved_for_backward_is_the_input_and_eight_bytes_a_row():
    x = torch.randn(16, 512, requires_grad=True)
    w = torch.ones(512, requires_grad=True)
    saved = []
    with (
        interpreted(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        layer_norm(x, (512,), w)
    assert sum(t.nbytes for t in saved if t is not x and t is not w) == 16 * 8


def test_the_module_is_torchs_with_its_state_dict():
    torch.manual_seed(0)
    ours, theirs = LayerNorm((3, 4), eps=1e-4), torch.nn.LayerNorm((3, 4), eps=1e-4)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, torch.nn.LayerNorm)
    x = torch.randn(2, 3, 4)
    with interpreted():
        torch.testing.assert_close(ours(x), theirs(x))
    assert LayerNorm(5, bias=False).bias is None
    assert LayerNorm(5, elementwise_affine=False).weight is None


def test_the_triton_backend_says_why_it_cannot():
    with backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET is not set"):
        layer_norm(torch.zeros(2, 3), (3,))
