"""What is special about int4_linear: packing, groups, zeros, the module, errors."""

import pytest
import torch
from harness import check

from fastlm.kernels import (
    OPS,
    Int4Linear,
    backend,
    dequantize_int4,
    int4_linear,
    quantize_int4,
)

OP = OPS["int4_linear"]
pytestmark = pytest.mark.usefixtures("kernels")


def inputs(*shape, N=19, group_size=32, symmetric=True, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=dtype).requires_grad_()
    qweight, scales, zeros = quantize_int4(torch.randn(N, shape[-1]), group_size, symmetric)
    found = {"x": x, "qweight": qweight, "scales": scales, "zeros": zeros}
    found["group_size"] = group_size
    return found | ({"bias": torch.randn(N, dtype=dtype).requires_grad_()} if bias else {})


@pytest.mark.parametrize("shape", [(70,), (1, 2, 33), (2, 3, 64), (2, 0, 7)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_leading_dimensions(shape, symmetric):
    check(OP, inputs(*shape, symmetric=symmetric))


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [2, 6])
def test_groups_whole_and_short(group_size, rows):
    check(OP, inputs(rows, 300, N=5, group_size=group_size, dtype=torch.float16))


def test_a_byte_holds_inputs_half_a_group_apart():
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 16], weight[0, 33] = 7, -3, 7
    qweight, scales, zeros = quantize_int4(weight, 32)
    assert zeros is None
    assert torch.equal(scales, torch.ones(1, 2))
    assert qweight[0, 0] == (7 + 8) | (-3 + 8) << 4
    assert qweight[0, 17] == (7 + 8) | 8 << 4
    assert torch.equal(dequantize_int4(qweight, scales, group_size=32), weight)


@pytest.mark.parametrize("rows", [1, 6])
def test_every_code_and_zero_is_read_right(rows):
    """Bytes of all nibbles against all 16 zeros, an output a zero."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).expand(16, -1).contiguous()
    zeros = torch.arange(16, dtype=torch.uint8)[:, None].expand(-1, 16).contiguous()
    scales = torch.ones(16, 16)
    x = torch.zeros(rows, 512)
    for byte in (0, 77, 255):
        group, within = divmod(byte, 16)
        for half, code in ((0, byte & 15), (16, byte >> 4)):
            x.zero_()[:, 32 * group + half + within] = 1
            y = int4_linear(x, codes, scales, zeros, group_size=32)
            assert torch.equal(y, (code - torch.arange(16.0)).expand(rows, -1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_nearest(symmetric):
    torch.manual_seed(0)
    weight = torch.randn(6, 100) + 1
    weight[2, :32] = 0
    weight[3, 32:64] = 5  # all on one side of 0: the range still holds 0
    qweight, scales, zeros = quantize_int4(weight, 32, symmetric)
    found = dequantize_int4(qweight, scales, zeros, group_size=32, in_features=100)
    step = scales.repeat_interleave(32, 1)[:, :100]
    # With zeros a rounded zero moves both ends of the range by up to half a step.
    assert ((found - weight).abs() <= step * (0.5 if symmetric else 1) * (1 + 1e-5)).all()
    assert (found[2, :32] == 0).all()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": torch.zeros(3, 300)}, r"qweight must have shape \(19, 160\); got \(19, 48\)"),
        ({"qweight": torch.zeros(19, 48)}, "qweight must be .* uint8"),
        ({"scales": torch.zeros(19, 2)}, r"scales must have shape \(19, 3\)"),
        ({"zeros": torch.zeros(19, 2).byte()}, r"zeros must have shape \(19, 3\)"),
        ({"zeros": torch.zeros(19, 3)}, "zeros must be uint8; got torch.float32"),
        ({"group_size": 48}, "group_size must be one of"),
        ({"bias": torch.zeros(1)}, r"bias must have shape \(19,\)"),
    ],
)
def test_refuses_what_does_not_fit(changed, words):
    for name in ("auto", "torch"):
        with backend(name), pytest.raises(ValueError, match=words):
            int4_linear(**(inputs(3, 70) | changed))


def test_quantize_refuses_what_is_no_weight():
    with pytest.raises(ValueError, match="weight must be"):
        quantize_int4(torch.zeros(3))
    with pytest.raises(ValueError, match="group_size must be one of"):
        quantize_int4(torch.zeros(3, 3), 7)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_module_stands_in_for_a_linear(symmetric):
    torch.manual_seed(0)
    linear = torch.nn.Linear(70, 19)
    ours = Int4Linear.from_linear(linear, 32, symmetric)
    x = torch.randn(2, 3, 70, requires_grad=True)
    weight = dequantize_int4(ours.qweight, ours.scales, ours.zeros, group_size=32, in_features=70)
    want = torch.nn.functional.linear(x, weight, linear.bias)
    torch.testing.assert_close(ours(x), want, rtol=1e-5, atol=1e-5)
    expected = "Int4Linear(in_features=70, out_features=19, bias=True, group_size=32)"
    assert repr(ours) == expected
    other = Int4Linear.from_linear(torch.nn.Linear(70, 19), 32, symmetric)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(x), ours(x))
    names = {"qweight", "scales", "bias"} | (set() if symmetric else {"zeros"})
    assert set(ours.state_dict()) == names
