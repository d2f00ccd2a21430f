"""What is special about the activations and gated units: tails, layouts, packed halves, errors."""

import pytest
import torch
import torch.nn.functional as F
from harness import assert_bitwise_equal, check, doubled, outcome

from fastlm.kernels import GELU, OPS, backend, bias_gelu, explain, geglu, gelu, relu_squared, swiglu
from fastlm.kernels._interpreter import interpreted

DTYPES = OPS["gelu"].dtypes
pytestmark = pytest.mark.usefixtures("kernels")


def unary(name, x, **options):
    argument = "input" if name == "gelu" else "x"
    return {argument: x.requires_grad_(), **options}


UNARY = [("gelu", {"approximate": "none"}), ("gelu", {"approximate": "tanh"}), ("relu_squared", {})]


@pytest.mark.parametrize(("name", "options"), UNARY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tails_and_special_values(name, options, dtype):
    """Where exp overflows or dies out, and infinities and NaN in their places."""
    huge = torch.finfo(dtype).max
    edges = torch.tensor([0.0, 1e-8, 6, 12, 40, 90, 200], dtype=dtype)
    check(OPS[name], unary(name, torch.cat([edges, -edges]), **options))
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), huge, -huge], dtype=dtype)
    found = unary(name, x, **options)
    exact = outcome(OPS[name].reference, doubled(found))["result"].to(dtype)
    got = outcome(OPS[name].fused, found)["result"]
    torch.testing.assert_close(got, exact, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), UNARY)
@pytest.mark.parametrize("n", [0, 2047, 2048, 2049, 4096])
def test_around_whole_blocks(name, options, n):
    torch.manual_seed(0)
    check(OPS[name], unary(name, torch.randn(n), **options))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(()),
        torch.randn(4, 6).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 6)[:, 1:4],
        torch.randn(1, 6).expand(4, 6),
        torch.randn(3, 0),
    ],
    ids=["scalar", "transposed", "channels_last", "slice", "expanded", "empty"],
)
def test_results_have_pytorchs_strides(x):
    y = gelu(x)
    want = F.gelu(x)
    torch.testing.assert_close(y, want)
    assert y.stride() == want.stride()


@pytest.mark.parametrize("x", [torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)])
def test_gelu_refuses_what_pytorch_refuses_in_its_words(x):
    with pytest.raises(RuntimeError) as theirs:
        F.gelu(x)
    with pytest.raises(RuntimeError) as ours:
        gelu(x)
    assert str(ours.value) == str(theirs.value)


def test_the_module_is_torchs():
    for approximate in ("none", "tanh"):
        ours, theirs = GELU(approximate), torch.nn.GELU(approximate)
        assert repr(ours) == repr(theirs)
        x = torch.randn(3, 5)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("op", [swiglu, geglu])
@pytest.mark.parametrize("N", [1, 5, 2048, 2054])
def test_packed_halves_are_the_split_tensors(op, N):
    """The same bits, and one gradient in the layout of the input."""
    torch.manual_seed(0)
    packed = torch.randn(3, 2, 2 * N, requires_grad=True)
    gate, up = (t.detach().clone().requires_grad_() for t in packed.split(N, -1))
    dy = torch.randn(3, 2, N)
    y, want = op(packed), op(gate, up)
    y.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    torch.testing.assert_close(packed.grad, torch.cat([gate.grad, up.grad], -1), rtol=0, atol=0)


def test_halves_of_one_tensor_are_read_where_they_lie():
    """Views of wide rows, and of rows unlike each other's."""
    torch.manual_seed(0)
    packed = torch.randn(5, 2 * 40)
    gate, up = packed.split(40, -1)
    want = swiglu(packed)
    for one, other in ((gate, up), (gate.clone(), up), (gate, up.clone())):
        torch.testing.assert_close(swiglu(one, other), want, rtol=0, atol=0)


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_packed_needs_an_even_last_dimension(op):
    for x in (torch.randn(2, 5), torch.randn(())):
        with pytest.raises(ValueError, match=f"{op.__name__}: gate must have an even last"):
            op(x)
        with interpreted(), backend("torch"), pytest.raises(ValueError, match="even last"):
            op(x)


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_what_broadcasts_goes_to_pytorch(op):
    op = OPS[op]
    torch.manual_seed(0)
    gate, up = torch.randn(3, 4), torch.randn(4)
    assert "differ" in explain(op.fused, gate, up)
    torch.testing.assert_close(op.fused(gate, up), op.reference(gate, up))
    torch.testing.assert_close(op.fused(gate, up.double()), op.reference(gate, up.double()))


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (4,), ()])
def test_empty_and_flat_gates(op, shape):
    torch.manual_seed(0)
    found = {n: torch.randn(shape).requires_grad_() for n in ("gate", "up")}
    check(OPS[op], found)


def test_saved_for_backward_is_the_inputs_alone():
    saved = []
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    bias = torch.randn(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(gate, up)
        geglu(gate, up)
        gelu(gate)
        relu_squared(up)
        bias_gelu(gate, bias)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (gate, up, bias)}


def test_bias_gelu_rounds_once():
    """The sum of x and bias is no number of float16 here, and must not become one."""
    x = torch.linspace(64, 128, 50)[:, None].half()
    bias = torch.full((1,), -0.04).half()
    exact = x.double() + bias.double()  # where gelu is the identity
    got = bias_gelu(x, bias, "none").double()
    assert ((got - exact).abs() <= (exact.half().double() - exact).abs()).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (4,), (2, 3, 4)])
def test_bias_gelu_of_any_shape(shape):
    torch.manual_seed(0)
    found = {"x": torch.randn(shape).requires_grad_()}
    found["bias"] = torch.randn(shape[-1]).requires_grad_()
    check(OPS["bias_gelu"], found)


def test_a_nan_in_the_bias_stays_in_its_column():
    torch.manual_seed(0)
    x, bias = torch.randn(3, 6, requires_grad=True), torch.randn(6)
    bias[2] = float("nan")
    bias.requires_grad_()
    bias_gelu(x, bias).sum().backward()
    for grad in (x.grad[0], bias.grad):
        assert grad.isnan().nonzero().tolist() == [[2]]


def test_bias_gelu_leaves_odd_biases_to_pytorch():
    x = torch.randn(3, 4)
    torch.testing.assert_close(bias_gelu(x, torch.ones(())), F.gelu(x + 1, approximate="tanh"))
    with pytest.raises(RuntimeError, match="must match the size"):
        bias_gelu(x, torch.ones(3))


def test_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    gate, up = (torch.randn(3, 24, requires_grad=True) for _ in range(2))
    want = torch.autograd.grad(swiglu(gate, up).square().sum(), (gate, up))
    y = checkpoint(swiglu, gate, up, use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), (gate, up))
    assert_bitwise_equal(dict(enumerate(got)), dict(enumerate(want)))
