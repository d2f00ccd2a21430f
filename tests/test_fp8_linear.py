"""What is special about float8: codes to the bit, each granularity, PyTorch's product, errors."""

import pytest
import torch
from harness import check

from fastlm.kernels import OPS, backend, dequantize_fp8, explain, fp8_linear, quantize_fp8
from fastlm.kernels.fp8_linear import quantize_reference

OP = OPS["fp8_linear"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_codes_and_scales_are_the_references_to_the_bit(granularity, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 200) * torch.logspace(-6, 6, 200)
    x[0, 1] = 0
    codes, scale = quantize_fp8(x, granularity, dtype)
    want_codes, want_scale = quantize_reference(x, granularity, dtype)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
    assert torch.equal(scale, want_scale)
    largest = torch.finfo(dtype).max
    assert codes.float().abs().max() == largest
    found = dequantize_fp8(codes, scale)
    step = torch.finfo(dtype).eps / 2 * x.abs() + scale.max() * torch.finfo(dtype).tiny
    assert ((found - x).abs() <= step).all()


def test_special_values():
    x = torch.ones(3, 130, dtype=torch.bfloat16)
    x[1, 5], x[2, 129] = float("nan"), float("inf")
    codes, scale = quantize_fp8(x, "block")
    assert scale.isnan().tolist() == [[False, False], [True, False], [False, False]]
    assert codes.float().isnan().sum(1).tolist() == [0, 128, 1]
    assert scale[2, 1] == float("inf")
    assert codes[2, 128].float() == 0


def operands(kinds, granularity="row", M=5, N=150, K=200):
    torch.manual_seed(0)
    x, scale_x = quantize_reference(torch.randn(M, K), granularity, kinds[0])
    weight, scale_w = quantize_reference(torch.randn(N, K), granularity, kinds[1])
    if granularity == "block":
        scale_w = scale_w[::128].contiguous()
    return {"x": x, "weight": weight, "scale_x": scale_x, "scale_w": scale_w}


@pytest.mark.parametrize("kinds", [(E4M3, E5M2), (E5M2, E4M3)])
@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_both_formats_and_every_granularity(kinds, granularity):
    check(OP, operands(kinds, granularity) | {"out_dtype": torch.float32})


@pytest.mark.parametrize("mixed", ["x", "weight"])
def test_one_number_beside_rows(mixed):
    found = operands((E4M3, E4M3)) | {"out_dtype": torch.float32}
    name = {"x": "scale_x", "weight": "scale_w"}[mixed]
    check(OP, found | {name: torch.tensor(0.37)})


def test_leading_dimensions():
    found = operands((E4M3, E4M3), M=6)
    whole = fp8_linear(**found)
    found["x"], found["scale_x"] = found["x"].view(2, 3, -1), found["scale_x"].view(2, 3, 1)
    assert torch.equal(fp8_linear(**found), whole.view(2, 3, -1))
    empty = {"x": found["x"][:0], "scale_x": found["scale_x"][:0]}
    assert fp8_linear(**(found | empty)).shape == (0, 3, 150)


def test_agrees_with_pytorchs_own_product():
    found = operands((E4M3, E4M3), "tensor", M=16, N=32, K=64)
    theirs = torch._scaled_mm(
        found["x"],
        found["weight"].t(),
        found["scale_x"],
        found["scale_w"],
        out_dtype=torch.bfloat16,
    )
    torch.testing.assert_close(fp8_linear(**found), theirs)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": torch.zeros(5, 200)}, "x must be one of"),
        ({"x": torch.zeros(5, 201).to(E4M3)}, r"x must be \(..., K\) and weight \(N, K\)"),
        ({"scale_x": torch.zeros(5)}, "scale_x must be floating point, one number"),
        ({"scale_x": torch.zeros(5, 2)}, "scale_x must be"),
        ({"scale_w": torch.zeros(2, 2)}, "scale_x must be"),
        ({"scale_w": torch.zeros(3, 2)}, "must be floating point, one number"),
        ({"bias": torch.zeros(1)}, r"bias must have shape \(150,\)"),
        ({"out_dtype": torch.int32}, "out_dtype must be one of"),
    ],
)
def test_refuses_what_does_not_fit(changed, words):
    for name in ("auto", "torch"):
        with backend(name), pytest.raises(ValueError, match=words):
            fp8_linear(**(operands((E4M3, E4M3)) | changed))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": "column"}, "granularity must be tensor, row or block"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"x": torch.zeros(3, dtype=torch.int32)}, "x must be"),
    ],
)
def test_quantize_refuses_what_does_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        quantize_fp8(**({"x": torch.zeros(3, 4)} | options))


def test_what_the_kernel_leaves_to_pytorch():
    assert "two passes" in explain(quantize_fp8, torch.zeros(2, 3), "tensor")
    assert "40000 columns" in explain(quantize_fp8, torch.zeros(2, 40000), "row")
    assert "interpreter" in explain(quantize_fp8, torch.zeros(2, 40000), "block")
