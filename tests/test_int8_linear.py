"""What is special about int8_linear: quantisation, shapes, gradients to x, the module, errors."""

import pytest
import torch
import torch.nn.functional as F
from harness import check, outcome

from fastlm.kernels import (
    OPS,
    Int8Linear,
    backend,
    dequantize_int8,
    explain,
    int8_linear,
    quantize_int8,
)

OP = OPS["int8_linear"]
pytestmark = pytest.mark.usefixtures("kernels")


def inputs(*shape, N=19, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=dtype).requires_grad_()
    qweight, scales = quantize_int8(torch.randn(N, shape[-1]))
    found = {"x": x, "qweight": qweight, "scales": scales}
    return found | ({"bias": torch.randn(N, dtype=dtype).requires_grad_()} if bias else {})


@pytest.mark.parametrize("shape", [(70,), (1, 2, 33), (2, 2, 130), (5, 1, 16), (2, 0, 7)])
def test_leading_dimensions(shape):
    check(OP, inputs(*shape))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_rows_around_the_tensor_cores(rows):
    check(OP, inputs(rows, 100, dtype=torch.bfloat16))


def test_codes_are_the_nearest_and_the_extremes_are_reached():
    torch.manual_seed(0)
    weight = torch.randn(6, 50)
    weight[2] = 0
    qweight, scales = quantize_int8(weight)
    assert qweight.abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127]
    error = (dequantize_int8(qweight, scales) - weight).abs()
    assert (error <= scales[:, None] / 2 * (1 + 1e-5)).all()


def test_every_code_is_read_right():
    """All 256 bytes, -128 too, which quantize_int8 never gives."""
    qweight = torch.arange(-128, 128, dtype=torch.int8).view(1, 256)
    for k in (0, 1, 127, 128, 255):
        x = torch.zeros(1, 256)
        x[0, k] = 1
        for rows in (1, 6):
            y = int8_linear(x.expand(rows, -1), qweight, torch.ones(1))
            assert torch.equal(y, torch.full((rows, 1), k - 128.0))


def test_agrees_with_pytorchs_own_kernel():
    found = inputs(6, 64, N=32, dtype=torch.bfloat16, bias=False)
    theirs = torch._weight_int8pack_mm(
        found["x"].detach(), found["qweight"], found["scales"].bfloat16()
    )
    found["scales"] = found["scales"].bfloat16()
    ours = int8_linear(**found)
    torch.testing.assert_close(ours.detach(), theirs)


def test_nan_and_infinity_reach_the_output():
    found = inputs(3, 40, bias=False)
    x = found["x"].detach()
    x[1, 7], x[2, 3] = float("nan"), float("inf")
    y = int8_linear(x, found["qweight"], found["scales"])
    assert y.isfinite().all(1).tolist() == [True, False, False]
    assert y[1].isnan().all()


def test_saved_for_backward_is_the_weight_alone():
    found, saved = inputs(6, 70), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        int8_linear(**found)
    assert {t.data_ptr() for t in saved} == {
        found["qweight"].data_ptr(),
        found["scales"].data_ptr(),
    }


def test_scales_that_want_a_gradient_are_pytorchs():
    found = inputs(3, 40)
    found["scales"].requires_grad_()
    assert "scales wants a gradient" in explain(int8_linear, **found)
    check(OP, found)
    assert "gradient of ['scales']" in outcome(OP.fused, found)


def test_autocast_is_that_of_a_linear():
    found = inputs(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = int8_linear(**found)
    weight = dequantize_int8(found["qweight"], found["scales"], torch.bfloat16)
    want = F.linear(found["x"].bfloat16(), weight, found["bias"].bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": torch.zeros(3, 41)}, "x must be floating point with a last dimension of 40"),
        ({"x": torch.zeros(3, 40, dtype=torch.int32)}, "torch.int32"),
        ({"qweight": torch.zeros(19, 40)}, r"qweight must be \(N, K\) int8"),
        ({"scales": torch.zeros(18)}, r"scales must have shape \(19,\); got \(18,\)"),
        ({"bias": torch.zeros(1)}, r"bias must have shape \(19,\); got \(1,\)"),
    ],
)
def test_refuses_what_does_not_fit(changed, words):
    for name in ("auto", "torch"):
        with backend(name), pytest.raises(ValueError, match=words):
            int8_linear(**(inputs(3, 40) | changed))


def test_quantize_refuses_what_is_no_weight():
    with pytest.raises(ValueError, match="weight must be"):
        quantize_int8(torch.zeros(3))


@pytest.mark.parametrize("bias", [True, False])
def test_the_module_stands_in_for_a_linear(bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 19, bias=bias)
    ours = Int8Linear.from_linear(linear)
    x = torch.randn(2, 3, 40, requires_grad=True)
    torch.testing.assert_close(ours(x), linear(x), rtol=0, atol=0.05)
    assert repr(ours) == f"Int8Linear(in_features=40, out_features=19, bias={bias})"
    other = Int8Linear.from_linear(torch.nn.Linear(40, 19, bias=bias))
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(x), ours(x))
    assert set(ours.state_dict()) == {"qweight", "scales"} | ({"bias"} if bias else set())
