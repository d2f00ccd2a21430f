"""What is special about rms_norm: special values, the weight's offset, mixed dtypes, the module."""

import pytest
import torch
import torch.nn.functional as F
from harness import assert_bitwise_equal, assert_within_contract, check, clones, outcome

from fastlm.kernels import OPS, RMSNorm, backend, rms_norm
from fastlm.kernels._interpreter import interpreted

OP = OPS["rms_norm"]


def inputs(x, **more):
    N = x.shape[-1]
    weight = torch.randn(N, dtype=x.dtype).requires_grad_()
    return {
        "input": x.requires_grad_(),
        "normalized_shape": (N,),
        "weight": weight,
        "eps": 1e-6,
    } | more


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
    eps = torch.finfo(torch.float32).eps
    fused, eager = rms_norm(x, (N,)), F.rms_norm(x, (N,))
    exact = F.rms_norm(x.double(), (N,), eps=eps)
    assert_within_contract({"y": fused}, {"y": eager}, {"y": exact})
    assert fused[0].isnan().all()
    assert_within_contract({"y": fused[2:]}, {"y": eager[2:]}, {"y": exact[2:]})


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", OP.dtypes)
def test_the_default_eps_is_float32s_for_every_dtype(dtype):
    x = torch.full((2, 8), 1e-4, dtype=dtype)
    torch.testing.assert_close(rms_norm(x, (8,)), F.rms_norm(x, (8,)))
    torch.testing.assert_close(
        rms_norm(x, (8,)), rms_norm(x, (8,), eps=torch.finfo(torch.float32).eps), rtol=0, atol=0
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_kept_less_one(dtype):
    """As Gemma keeps it; 1 + weight happens in float32, where bfloat16 would lose the weight."""
    torch.manual_seed(0)
    weight = (torch.randn(64) / 1000).to(dtype).requires_grad_()
    found = inputs(torch.randn(5, 64).to(dtype), weight=weight)
    check(OP, found | {"weight_offset": 1.0})
    x = torch.ones(1, 64, dtype=torch.float32)
    y = rms_norm(x, (64,), weight, eps=0.0, weight_offset=1.0)
    torch.testing.assert_close(y[0], 1 + weight.float())
    assert_bitwise_equal(
        {"y": rms_norm(x, (64,), weight_offset=1.0)}, {"y": rms_norm(x, (64,))}
    )  # no weight, nothing to offset


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4), (4,)])
def test_several_normalised_dimensions(shape):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4) if len(shape) == 3 else torch.randn(5, 2, 3, 4)
    weight = torch.randn(shape).requires_grad_()
    check(
        OP,
        {"input": x.requires_grad_(), "normalized_shape": shape, "weight": weight, "eps": 1e-6},
    )


@pytest.mark.usefixtures("kernels")
def test_the_heads_of_a_packed_projection():
    """Queries as a slice of (B, S, 3, H, D): narrow rows far apart, many to a program."""
    torch.manual_seed(0)
    packed = torch.randn(2, 5, 3, 2, 16)
    check(OP, inputs(packed[:, :, 0]))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (2, 0)])
def test_empty_inputs(shape):
    found = inputs(torch.randn(shape))
    assert_bitwise_equal(outcome(OP.fused, found), outcome(OP.reference, found))


@pytest.mark.usefixtures("kernels")
def test_an_unusual_eps():
    torch.manual_seed(0)
    for eps in (0.0, 1e-12, 1, 3.5):
        check(OP, inputs(torch.randn(3, 50), eps=eps))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_wider_than_65536(dtype):
    torch.manual_seed(0)
    check(OP, inputs(torch.randn(1, 65536 + 3).to(dtype)))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("x_dtype", OP.dtypes)
@pytest.mark.parametrize("weight_dtype", OP.dtypes)
def test_mixed_dtypes(x_dtype, weight_dtype):
    """The result has the input's dtype, each gradient its argument's."""
    torch.manual_seed(0)
    weight = torch.randn(96, dtype=weight_dtype).requires_grad_()
    check(OP, inputs(torch.randn(4, 96, dtype=x_dtype), weight=weight))


@pytest.mark.usefixtures("kernels")
def test_the_weights_gradient_is_summed_in_float32():
    """2^11 rows of ones in bfloat16, whose own sum would stop at 256."""
    x = torch.ones(2048, 8, dtype=torch.bfloat16)
    weight = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    rms_norm(x, (8,), weight, eps=0.0).sum().backward()
    assert (weight.grad == 2048).all()


@pytest.mark.usefixtures("kernels")
def test_the_inputs_are_left_alone():
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    before = x.detach().clone()
    residual = x * 1
    (residual + rms_norm(residual, (8,), weight)).sum().backward()
    assert residual._version == 0
    torch.testing.assert_close(x.detach(), before, rtol=0, atol=0)
    check(OP, inputs(x.detach()))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("x", "shape", "weight"),
    [
        (torch.zeros(2, 3), (4,), None),
        (torch.zeros(2, 3), (), None),
        (torch.zeros(2, 3), (3,), torch.zeros(4)),
        (torch.zeros(2, 3, dtype=torch.int64), (3,), None),
    ],
)
def test_refuses_what_pytorch_refuses_in_its_words(x, shape, weight):
    with pytest.raises(RuntimeError) as theirs:
        F.rms_norm(x, shape, weight)
    with pytest.raises(RuntimeError) as ours:
        rms_norm(x, shape, weight)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.usefixtures("kernels")
def test_checkpointing_gives_the_same_gradient():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    found = inputs(torch.randn(3, 24))
    again = clones(found)
    rms_norm(**found).square().sum().backward()
    checkpoint(
        lambda x: rms_norm(**(again | {"input": x})), again["input"], use_reentrant=False
    ).square().sum().backward()
    torch.testing.assert_close(again["weight"].grad, found["weight"].grad, rtol=0, atol=0)


def test_saved_for_backward_is_the_input_and_four_bytes_a_row():
    x = torch.randn(16, 512, requires_grad=True)
    w = torch.ones(512, requires_grad=True)
    saved = []
    with (
        interpreted(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        rms_norm(x, (512,), w)
    assert sum(t.nbytes for t in saved if t is not x and t is not w) == 16 * 4


def test_the_module_is_torchs_with_its_state_dict():
    torch.manual_seed(0)
    ours, theirs = RMSNorm((3, 4), eps=1e-4), torch.nn.RMSNorm((3, 4), eps=1e-4)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, torch.nn.RMSNorm)
    x = torch.randn(2, 3, 4)
    with interpreted():
        torch.testing.assert_close(ours(x), theirs(x))
        assert RMSNorm(5, elementwise_affine=False).weight is None
        offset = RMSNorm(4, weight_offset=1.0)
        assert (offset.weight == 0).all()
        torch.testing.assert_close(offset(x), torch.nn.RMSNorm(4)(x))
    assert "weight_offset=1.0" in repr(offset)


def test_the_triton_backend_says_why_it_cannot():
    with backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET is not set"):
        rms_norm(torch.zeros(2, 3), (3,))
