"""What is special about add_layer_norm and add_rms_norm: dropout, dtypes, unused outputs."""

import functools

import pytest
import torch
from harness import assert_bitwise_equal, assert_within_contract, check, doubled, outcome

from fastlm.kernels import OPS, _philox, add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastlm.kernels._interpreter import interpreted

LAYER, RMS = OPS["add_layer_norm"], OPS["add_rms_norm"]
BOTH = pytest.mark.parametrize("op", [LAYER, RMS], ids=lambda op: op.name)
CPU = torch.device("cpu")


def inputs(op, M, N, dtype=torch.float32, **more):
    torch.manual_seed(0)
    return op.example(dtype, CPU, M=M, N=N, **more)


def test_philox_gives_the_published_words():
    """Random123's known answer for philox4x32-10 with counter and key 0."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = _philox.words_of(zero, zero)[0]
    assert [hex(w) for w in words.tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


def test_dropout_drops_its_share_and_each_seed_its_own():
    masks = [_philox.keep_mask(torch.tensor([seed]), 0.3, 200, 501) for seed in (1, 2, 2**63 - 1)]
    for mask in masks:
        n = mask.numel()
        assert abs(mask.sum().item() - 0.7 * n) < 5 * (0.21 * n) ** 0.5
    both = (masks[0] & masks[1]).float().mean().item()
    assert abs(both - 0.49) < 0.01
    for p, kept in ((0.0, True), (1.0, False)):
        assert (_philox.keep_mask(torch.tensor([3]), p, 50, 50) == kept).all()


@pytest.mark.usefixtures("kernels")
@BOTH
def test_the_mask_is_the_same_on_both_code_paths_and_for_any_part_of_the_rows(op):
    found = inputs(op, 9, 70)
    x, residual, more = found.pop("x"), found.pop("residual"), found | {"dropout_p": 0.5, "seed": 5}
    _, whole = op.fused(x, residual, **more)
    _, part = op.fused(x[:4], residual[:4], **more)
    torch.testing.assert_close(part, whole[:4], rtol=0, atol=0)
    _, eager = op.reference(x, residual, **more)
    assert torch.equal(eager == residual, whole == residual)
    _, tensor = op.fused(x, residual, **(more | {"seed": torch.tensor(5)}))
    torch.testing.assert_close(tensor, whole, rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
@BOTH
def test_dropout_of_narrow_and_of_wide_rows(op):
    for M, N in ((5, 66), (1, 16402)):
        check(op, inputs(op, M, N, torch.bfloat16, dropout_p=0.1, seed=3))


@pytest.mark.usefixtures("kernels")
@BOTH
def test_a_row_wider_than_65536(op):
    check(op, inputs(op, 1, 65536 + 3, torch.bfloat16))


@pytest.mark.usefixtures("kernels")
def test_dropout_of_everything_leaves_the_residual():
    found = inputs(LAYER, 3, 20, dropout_p=1.0, seed=1)
    y, new = add_layer_norm(**found)
    torch.testing.assert_close(new, found["residual"], rtol=0, atol=0)
    y.sum().backward()
    assert (found["x"].grad == 0).all()


@pytest.mark.usefixtures("kernels")
def test_without_a_seed_dropout_follows_pytorchs_generator():
    found = inputs(RMS, 3, 40, dropout_p=0.5)
    torch.manual_seed(7)
    first, second = RMS.fused(**found)[1], RMS.fused(**found)[1]
    torch.manual_seed(7)
    torch.testing.assert_close(RMS.fused(**found)[1], first, rtol=0, atol=0)
    assert (first != second).any()


@pytest.mark.usefixtures("kernels")
def test_checkpointing_draws_the_same_mask_again():
    from torch.utils.checkpoint import checkpoint

    found = inputs(LAYER, 4, 40, dropout_p=0.5)
    x, residual = found.pop("x"), found.pop("residual")
    _, new = checkpoint(lambda x: add_layer_norm(x, residual, **found), x, use_reentrant=False)
    new.sum().backward()
    assert torch.equal(x.grad != 0, new != residual)


@pytest.mark.usefixtures("kernels")
@BOTH
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nobody_uses(op, used, dropout_p):
    """Its gradient is None: nothing is added, and no weight has a gradient without y."""
    found = inputs(op, 5, 24, dropout_p=dropout_p, seed=2)

    def alone(**inputs):
        return op.fused(**inputs)[used]

    def eager(**inputs):
        return op.reference(**inputs)[used]

    exact = outcome(eager, doubled(found))
    got = outcome(alone, found)
    assert_within_contract(got, outcome(eager, found), exact)
    assert ("gradient of ['weight']" in got) == (used == 0)


@pytest.mark.usefixtures("kernels")
@BOTH
def test_two_blocks_of_one_stream(op):
    """The stream's gradient through the second norm joins the first's, once."""

    def blocks(fn, x, residual, normalized_shape, **more):
        y, stream = fn(x, residual, normalized_shape, **more)
        y, stream = fn(y * 2, stream, normalized_shape, **more)
        return y, stream

    found = inputs(op, 4, 24)
    exact = outcome(functools.partial(blocks, op.reference), doubled(found))
    eager = outcome(functools.partial(blocks, op.reference), found)
    assert_within_contract(outcome(functools.partial(blocks, op.fused), found), eager, exact)


@pytest.mark.usefixtures("kernels")
@BOTH
@pytest.mark.parametrize(
    ("x", "residual", "new"),
    [
        (torch.bfloat16, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_the_stream_has_its_own_dtype(op, x, residual, new):
    found = inputs(op, 3, 48, x, residual=residual)
    y, stream = op.fused(**found, residual_dtype=new)
    assert (y.dtype, stream.dtype) == (x, new or residual)
    fused, eager = (
        outcome(functools.partial(fn, residual_dtype=new), found) for fn in (op.fused, op.reference)
    )
    exact = outcome(op.reference, doubled(found))
    assert_within_contract(fused, eager, exact)


@pytest.mark.usefixtures("kernels")
def test_y_is_the_norm_of_the_rounded_stream():
    found = inputs(LAYER, 5, 96, torch.bfloat16)
    y, stream = add_layer_norm(**found)
    want = layer_norm(stream, (96,), found["weight"], found["bias"])
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    found = inputs(RMS, 5, 96, torch.bfloat16) | {"weight_offset": 1.0}
    y, stream = add_rms_norm(**found)
    want = rms_norm(stream, (96,), found["weight"], 1e-6, weight_offset=1.0)
    torch.testing.assert_close(y, want, rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
@BOTH
def test_one_gradient_serves_both_inputs(op):
    found = inputs(op, 3, 16)
    outputs = op.fused(**found)
    dx, dresidual = torch.autograd.grad(
        outputs, (found["x"], found["residual"]), [torch.ones_like(o) for o in outputs]
    )
    assert dx.data_ptr() == dresidual.data_ptr()
    for t in (found["x"], found["residual"]):
        t.grad = None
    torch.autograd.backward(op.fused(**found), [torch.ones_like(o) for o in outputs])
    found["x"].grad.zero_()
    assert (found["residual"].grad != 0).any()


@pytest.mark.usefixtures("kernels")
@BOTH
def test_each_tensor_has_its_own_strides(op):
    """x, residual and the two incoming gradients, each in rows a different distance apart."""
    plain = inputs(op, 5, 24)
    torch.manual_seed(1)
    grads = [torch.randn(5, 24) for _ in range(2)]

    def apart(t, distance):
        return torch.cat([t.detach(), t.new_full((5, distance), float("nan"))], 1)[:, :24]

    def run(found, grads):
        outputs = op.fused(**found)
        return outputs, torch.autograd.grad(outputs, (found["x"], found["residual"]), grads)

    moved = {
        name: apart(plain[name], distance).requires_grad_()
        for name, distance in (("x", 1), ("residual", 2))
    }
    got = run(plain | moved, [apart(g, d) for g, d in zip(grads, (3, 4), strict=True)])
    torch.testing.assert_close(got, run(plain, grads), rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
@BOTH
def test_special_rows(op):
    """NaN, infinities, a constant row and zeros stay in their row."""
    found = inputs(op, 5, 40)
    x = found["x"].detach()
    x[0, 3] = float("nan")
    x[1, 5] = float("inf")
    x[2], x[3] = 7.0, 0.0
    found |= {"x": x, "residual": torch.zeros_like(x)}
    fused, eager, exact = op.fused(**found), op.reference(**found), op.reference(**doubled(found))
    for got, peer, truth in zip(fused, eager, exact, strict=True):
        assert_within_contract({"": got}, {"": peer}, {"": truth})


@pytest.mark.usefixtures("kernels")
@BOTH
def test_empty_inputs(op):
    for shape in ((0, 8), (3, 0, 8)):
        x = torch.zeros(shape, requires_grad=True)
        y, stream = op.fused(x, x, (8,))
        (y.sum() + stream.sum()).backward()
        assert y.shape == stream.shape == x.grad.shape == shape


@pytest.mark.usefixtures("kernels")
@BOTH
def test_several_normalised_dimensions(op):
    torch.manual_seed(0)
    x, residual = (torch.randn(2, 3, 4, 5).requires_grad_() for _ in range(2))
    weight = torch.randn(4, 5).requires_grad_()
    found = {"x": x, "residual": residual, "normalized_shape": (4, 5), "weight": weight}
    check(op, found | {"eps": 1e-6, "dropout_p": 0.5, "seed": 4})


@BOTH
def test_bad_arguments(op):
    x = torch.zeros(2, 3)
    for context in (interpreted, torch.no_grad):
        with context():
            with pytest.raises(ValueError, match=f"{op.name}: residual must have the shape of x"):
                op.fused(x, torch.zeros(3), (3,))
            with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\]; got 1.5"):
                op.fused(x, x, (3,), dropout_p=1.5)
            with pytest.raises(RuntimeError, match="shape"):
                op.fused(x, x, (4,))


@pytest.mark.parametrize(("op", "per_row"), [(LAYER, 8), (RMS, 4)])
def test_saved_for_backward_is_the_stream_and_a_few_bytes_a_row(op, per_row):
    found = inputs(op, 16, 512, dropout_p=0.1, seed=1)
    saved = []
    with (
        interpreted(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        _, stream = op.fused(**found)
    given = {t.data_ptr() for t in (stream, *found.values()) if isinstance(t, torch.Tensor)}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in given) == 16 * per_row + 8


@pytest.mark.usefixtures("kernels")
def test_compiles_with_dropout_and_no_seed():
    found = inputs(RMS, 3, 40, dropout_p=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    _, stream = compiled(**found)
    assert 0 < (stream != found["residual"]).float().mean() < 1


@BOTH
def test_the_cpu_path_drops_what_the_kernels_drop(op):
    found = inputs(op, 3, 40, dropout_p=0.5, seed=9)
    without = outcome(op.fused, found)
    assert_bitwise_equal(without, outcome(op.reference, found))
    with interpreted():
        fused = outcome(op.fused, found)
    assert_within_contract(fused, without, outcome(op.reference, doubled(found)))
