"""What is special about rotary_embedding: offsets, ragged batches, in place, the inverse."""

import itertools

import pytest
import torch
from harness import check

from fastlm.kernels import OPS, explain, rotary_embedding
from fastlm.kernels._interpreter import interpreted

OP = OPS["rotary_embedding"]
pytestmark = pytest.mark.usefixtures("kernels")
BOTH = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])


def tables(positions, R):
    angles = torch.arange(positions)[:, None] * 1e4 ** -torch.linspace(0, 1, R // 2)
    return angles.cos(), angles.sin()


def test_halves_are_hugging_faces_rotation():
    """The product q * cos + rotate_half(q) * sin, with the tables written twice side by side."""
    torch.manual_seed(0)
    q = torch.randn(2, 5, 3, 8)
    cos, sin = tables(5, 8)
    turned = torch.cat((-q[..., 4:], q[..., :4]), -1)
    wide = [torch.cat((t, t), -1)[:, None] for t in (cos, sin)]
    torch.testing.assert_close(rotary_embedding(q, cos, sin), q * wide[0] + turned * wide[1])


def test_interleaved_is_a_complex_product():
    torch.manual_seed(0)
    q = torch.randn(2, 5, 3, 8)
    cos, sin = tables(5, 8)
    z = torch.view_as_complex(q.view(2, 5, 3, 4, 2)) * torch.complex(cos, sin)[:, None]
    got = rotary_embedding(q, cos, sin, interleaved=True)
    torch.testing.assert_close(got, torch.view_as_real(z).flatten(-2))


@BOTH
def test_scores_depend_on_the_distance_alone(interleaved):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16)
    cos, sin = tables(64, 16)

    def score(i, j):
        turned = [
            rotary_embedding(x, cos, sin, interleaved=interleaved, offsets=p)
            for x, p in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(54, 50))


@BOTH
@pytest.mark.parametrize("H", [1, 8, 9, 17])
@pytest.mark.parametrize(("D", "R"), [(12, 12), (80, 20), (16, 2), (7, 6)])
def test_any_number_of_heads_and_of_turned_dimensions(interleaved, H, D, R):
    torch.manual_seed(0)
    x = torch.randn(1, 3, H, D).bfloat16().requires_grad_()
    cos, sin = tables(3, R)
    check(OP, {"x": x, "cos": cos, "sin": sin, "interleaved": interleaved})


@BOTH
@pytest.mark.parametrize("offsets", [0, 5, torch.tensor([3, 0]), torch.tensor([1, 5]).int()])
def test_offsets(interleaved, offsets):
    torch.manual_seed(0)
    cos, sin = tables(11, 8)
    found = {"x": torch.randn(2, 6, 2, 8).requires_grad_(), "cos": cos, "sin": sin}
    check(OP, found | {"interleaved": interleaved, "offsets": offsets})


@pytest.mark.parametrize("ends", [(0, 9), (0, 0, 9), (0, 1, 1, 1, 4, 9), (0, 3, 7), (0, 0)])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_ragged_batches(ends, kind):
    """Sequences of no token, and tokens of no sequence, against each sequence on its own."""
    torch.manual_seed(0)
    x = torch.randn(9, 2, 8)
    cos, sin = tables(20, 8)
    offsets = torch.arange(len(ends) - 1)
    got = rotary_embedding(x, cos, sin, offsets=offsets, cu_seqlens=torch.tensor(ends, dtype=kind))
    want = x.clone()
    for shift, (start, end) in enumerate(itertools.pairwise(ends)):
        if start < end:
            want[start:end] = rotary_embedding(x[start:end], cos, sin, offsets=shift)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_many_ragged_sequences():
    torch.manual_seed(0)
    lengths = torch.randint(0, 4, (37,))
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    cos, sin = tables(8, 4)
    x = torch.randn(int(ends[-1]), 1, 4).requires_grad_()
    check(OP, {"x": x, "cos": cos, "sin": sin, "cu_seqlens": ends, "offsets": 1})


@BOTH
def test_the_gradient_of_the_gradient(interleaved):
    torch.manual_seed(0)
    cos, sin = tables(3, 6)
    cos, sin = 2 * cos, 3 * sin  # not orthogonal, so that no order of derivatives is the identity
    for fn in (OP.fused, OP.reference):
        x = torch.linspace(-1, 1, 36).view(1, 3, 2, 6).requires_grad_()
        y = fn(x, cos, sin, interleaved=interleaved)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.pow(2).sum(), x)
        if fn is OP.fused:
            ours = dx.detach(), ddx
    torch.testing.assert_close(ours, (dx.detach(), ddx))


@BOTH
@pytest.mark.parametrize("R", [8, 6])
def test_in_place_writes_over_x_and_nothing_else(interleaved, R):
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 2, 8)
    before, (cos, sin) = qkv.clone(), tables(5, R)
    q = qkv[:, :, 0]
    y = rotary_embedding(q, cos, sin, interleaved=interleaved, inplace=True)
    assert y.data_ptr() == q.data_ptr()
    want = rotary_embedding(before[:, :, 0], cos, sin, interleaved=interleaved)
    torch.testing.assert_close(qkv[:, :, 0], want, rtol=0, atol=0)
    torch.testing.assert_close(qkv[:, :, 1:], before[:, :, 1:], rtol=0, atol=0)


@BOTH
def test_in_place_has_the_same_gradient(interleaved):
    torch.manual_seed(0)
    cos, sin = tables(5, 8)
    weight, dy = torch.randn(2, 5, 3, 8, requires_grad=True), torch.randn(2, 5, 3, 8)
    grads = []
    for inplace in (False, True):
        y = rotary_embedding(2 * weight, cos, sin, interleaved=interleaved, inplace=inplace)
        grads += torch.autograd.grad(y, weight, dy)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_in_place_on_a_view_of_a_projection_has_the_same_gradient():
    torch.manual_seed(0)
    cos, sin = tables(5, 8)
    weight = torch.randn(2, 5, 3, 1, 8, requires_grad=True)
    grads = []
    for inplace in (False, True):
        qkv = 2 * weight
        rotary_embedding(qkv[:, :, 1], cos, sin, inplace=inplace)
        if not inplace:
            turned = rotary_embedding(qkv[:, :, 1], cos, sin)
            qkv = torch.stack((qkv[:, :, 0], turned, qkv[:, :, 2]), 2)
        grads += torch.autograd.grad(qkv.square().sum(), weight)
    torch.testing.assert_close(grads[1], grads[0])


def test_in_place_under_torch_compile():
    torch.manual_seed(0)
    torch._dynamo.reset()
    cos, sin = tables(5, 8)
    x = torch.randn(1, 5, 2, 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def turned(x):
        return rotary_embedding(2 * x, cos, sin, inplace=True)

    want = rotary_embedding(2 * x, cos, sin)
    torch.testing.assert_close(turned(x), want, rtol=0, atol=0)
    torch.testing.assert_close(turned(x.requires_grad_()), want, rtol=0, atol=0)


def test_in_place_refuses_a_leaf_and_an_expanded_tensor():
    cos, sin = tables(2, 4)
    with pytest.raises(RuntimeError, match="leaf"):
        rotary_embedding(torch.randn(1, 2, 1, 4, requires_grad=True), cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="single memory location"):
        rotary_embedding(torch.randn(1, 2, 1, 4).expand(2, 2, 1, 4), cos, sin, inplace=True)


def test_a_position_outside_the_tables_gives_nan_and_reads_nothing():
    cos, sin = tables(4, 4)
    x = torch.randn(2, 3, 1, 4)
    y = rotary_embedding(x, cos, sin, offsets=torch.tensor([2, -1]))
    assert y.isnan().any(-1).any(-1).tolist() == [[False, False, True], [True, False, False]]


def test_half_precision_is_rounded_once():
    """With float32 tables and arithmetic the result is the exact one, rounded."""
    torch.manual_seed(0)
    x, (cos, sin) = torch.randn(1, 40, 2, 16).bfloat16(), tables(40, 16)
    exact = OP.reference(x.double(), cos.double(), sin.double())
    off = rotary_embedding(x, cos, sin) != exact.bfloat16()
    assert off.float().mean() < 0.001  # float32 may land on the other side of a tie


@pytest.mark.parametrize("shape", [(0, 3, 1, 4), (1, 0, 1, 4), (1, 3, 0, 4), (3, 1, 4)])
def test_empty_and_single_sequences(shape):
    cos, sin = tables(3, 4)
    check(OP, {"x": torch.randn(shape).requires_grad_(), "cos": cos, "sin": sin})


def test_a_table_that_wants_a_gradient_gets_it_from_pytorch():
    cos, sin = tables(3, 4)
    x = torch.randn(1, 3, 2, 4)
    assert "wants a gradient" in explain(rotary_embedding, x, cos.requires_grad_(), sin)
    rotary_embedding(x, cos, sin).sum().backward()
    assert cos.grad is not None


X, (COS, SIN) = torch.zeros(2, 3, 1, 4), tables(5, 4)


@pytest.mark.parametrize(
    ("x", "cos", "sin", "options", "message"),
    [
        (X[0, 0], COS, SIN, {}, r"x must have shape \(B, S, H, D\); got \(1, 4\)"),
        (X, COS, SIN, {"cu_seqlens": torch.tensor([0, 3])}, r"x must have shape \(total, H, D\)"),
        (X, COS[0], SIN[0], {}, r"cos must have shape \(positions, R / 2\)"),
        (X, *tables(5, 6), {}, r"2 <= R <= 4"),
        (X, COS, SIN[:4], {}, r"sin must have the shape of cos, \(5, 2\); got \(4, 2\)"),
        (X, COS, SIN, {"offsets": 3}, r"cos must hold the 6 positions up to the end of x; got"),
        (X, COS, SIN, {"offsets": -1}, "offsets must be at least 0; got -1"),
        (X, COS, SIN, {"offsets": torch.zeros(3).int()}, "offsets must be an int or hold 2"),
        (X, COS, SIN, {"offsets": torch.zeros(2)}, "got shape .2,., torch.float32"),
        (X[0], COS, SIN, {"cu_seqlens": torch.tensor([0])}, "cu_seqlens must hold the B"),
        (X[0], COS, SIN, {"cu_seqlens": torch.tensor([0.0, 3])}, "got shape .2,., torch.float32"),
    ],
)
def test_errors(x, cos, sin, options, message):
    for fn in (OP.fused, OP.reference):
        with pytest.raises(ValueError, match="rotary_embedding: .*" + message):
            fn(x, cos, sin, **options)


def test_saved_for_backward_is_the_tables():
    saved = []
    cos, sin = tables(4, 8)
    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    with (
        interpreted(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        rotary_embedding(x, cos, sin)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}
