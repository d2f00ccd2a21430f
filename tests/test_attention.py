"""Attention: what the generic tests do not ask, from causal alignment to refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import assert_bitwise_equal, assert_within_contract, check, doubled, outcome
from memory_check import interp_check

from fastlm.kernels import (
    OPS,
    _tuned,
    backend,
    explain,
    flash_attention,
    scaled_dot_product_attention,
)
from fastlm.kernels._dispatch import cpu_runner
from fastlm.kernels.attention import _tiles, forward, specialised

pytestmark = pytest.mark.usefixtures("kernels")
CPU = torch.device("cpu")
OP = OPS["flash_attention"]
SDPA = OPS["scaled_dot_product_attention"]


def inputs(B=1, S_q=33, S_k=33, H=1, H_kv=None, D=16, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    return OP.example(dtype, CPU, B=B, S_q=S_q, S_k=S_k, H=H, H_kv=H_kv or H, D=D, **options)


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).requires_grad_()


# --- which keys a query sees --------------------------------------------------------------------


def visible(S_q, S_k, **options):
    """The S_q x S_k boolean matrix of what sees what, read off the kernel: v is the identity."""
    q, k = torch.zeros(1, S_q, 1, S_k), torch.zeros(1, S_k, 1, S_k)
    v = torch.eye(S_k)[None, :, None, :]
    return flash_attention(q, k, v, **options)[0, :, 0] > 0


@pytest.mark.parametrize(("S_q", "S_k"), [(1, 40), (40, 1), (33, 33), (20, 50), (50, 20), (64, 32)])
def test_causal_lines_up_the_last_rows(S_q, S_k):
    want = torch.ones(S_q, S_k, dtype=torch.bool).tril(S_k - S_q)
    assert torch.equal(visible(S_q, S_k, causal=True), want)


@pytest.mark.parametrize(("S_q", "S_k"), [(1, 40), (40, 1), (33, 33), (20, 50), (50, 20)])
def test_sdpa_causal_lines_up_the_first_rows(S_q, S_k):
    q, k, v = torch.zeros(1, S_q, S_k), torch.zeros(1, S_k, S_k), torch.eye(S_k)[None]
    seen = scaled_dot_product_attention(q, k, v, is_causal=True)[0] > 0
    assert torch.equal(seen, torch.ones(S_q, S_k, dtype=torch.bool).tril())


# --- results by the contract --------------------------------------------------------------------

LENGTHS = [(1, 1), (1, 65), (65, 1), (5, 17), (17, 5), (31, 97), (97, 31), (64, 64)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("S_q", "S_k"), LENGTHS)
def test_lengths(S_q, S_k, causal):
    check(OP, inputs(S_q=S_q, S_k=S_k, causal=causal, return_lse=True))


@pytest.mark.parametrize("D", [1, 7, 24, 59, 80, 96, 111, 128, 192, 256])
def test_head_dimensions(D):
    check(OP, inputs(S_q=19, S_k=35, D=D, causal=True, dtype=torch.float16))


@pytest.mark.parametrize("D", [136, 192])
def test_heads_of_two_tiles(D):
    check(OP, inputs(S_q=19, S_k=35, D=D, D_v=24, causal=True, dtype=torch.float16))


@pytest.mark.parametrize(("D", "D_v"), [(300, 300), (512, 24)])
def test_wide_heads_have_a_forward_in_half_precision(D, D_v):
    given = inputs(S_q=19, S_k=35, D=D, D_v=D_v, causal=True, dtype=torch.float16)
    assert f"head dimension {D}" in explain(flash_attention, **given)
    given = given | {n: given[n].detach() for n in "qkv"}
    assert "interpreter" in explain(flash_attention, **given)
    check(OP, given)
    single = given | {n: given[n].float() for n in "qkv"}
    assert f"head dimension {D}" in explain(flash_attention, **single)


@pytest.mark.parametrize("dtype", OP.dtypes)
@pytest.mark.parametrize(("H", "H_kv"), [(4, 1), (6, 2), (3, 3)])
def test_grouped_heads(H, H_kv, dtype):
    check(OP, inputs(B=2, S_q=21, S_k=37, H=H, H_kv=H_kv, causal=True, dtype=dtype))


@pytest.mark.parametrize("scale", [0.3, 5.0, -0.5, 0.0])
def test_softmax_scale(scale):
    check(OP, inputs(S_q=18, S_k=34, softmax_scale=scale, return_lse=True))


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_large_logits(size):
    given = inputs(S_q=34, S_k=50, causal=True, return_lse=True)
    with torch.no_grad():
        given["q"] *= size
    check(OP, given)


def test_a_shift_of_every_logit_changes_nothing():
    """A constant direction in k adds the same to all of a row's logits."""
    given = inputs(S_q=34, S_k=50, D=16)
    with torch.no_grad():
        given["q"][..., 0] = 4.0
        given["k"][..., 0] = 1e4
    check(OP, given)


@pytest.mark.parametrize("dtype", OP.dtypes)
def test_no_causal_row_is_skipped_in_a_long_sequence(dtype):
    check(OP, inputs(S_q=150, S_k=150, D=32, causal=True, dtype=dtype, return_lse=True))


# --- rows that see nothing, empty sizes ---------------------------------------------------------


@pytest.mark.parametrize("dtype", OP.dtypes)
def test_rows_without_keys_give_zero_and_no_gradient(dtype):
    given = inputs(S_q=50, S_k=20, causal=True, return_lse=True, dtype=dtype)
    o, lse = flash_attention(**given)
    (o.float().sum() + lse[:, :, 30:].sum()).backward()
    assert (o[:, :30] == 0).all()
    assert (lse[:, :, :30] == -math.inf).all()
    assert (given["q"].grad[:, :30] == 0).all()
    for t in (given["q"], given["k"], given["v"]):
        assert t.grad.isfinite().all()


def test_logits_of_minus_infinity_hide_keys():
    given = inputs(S_q=20, S_k=40, D=16)
    with torch.no_grad():
        given["q"].abs_()
        given["k"][:, 25:] = -math.inf
        given["v"].abs_()
    o = flash_attention(**given)
    want = OP.reference(given["q"], given["k"][:, :25], given["v"][:, :25])
    torch.testing.assert_close(o, want)


@pytest.mark.parametrize("shape", [(0, 3, 3, 1), (1, 0, 3, 1), (1, 3, 0, 1), (1, 0, 0, 1)])
def test_empty_sizes(shape):
    B, S_q, S_k, H = shape
    given = inputs(B=B, S_q=S_q, S_k=S_k, H=H, return_lse=True)
    o, lse = flash_attention(**given)
    assert o.shape == (B, S_q, H, 16)
    assert (o == 0).all()
    assert (lse == -math.inf).all()
    o.sum().backward()
    assert all((given[n].grad == 0).all() for n in "qkv")


# --- lse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", OP.dtypes)
def test_lse_and_its_gradient(dtype):
    check(OP, inputs(S_q=21, S_k=37, H=2, H_kv=1, causal=True, return_lse=True, dtype=dtype))


def test_a_gradient_of_lse_alone_leaves_v_at_zero():
    given = inputs(S_q=21, S_k=37, return_lse=True)
    _, lse = flash_attention(**given)
    lse.sum().backward()
    assert (given["v"].grad == 0).all()
    assert given["q"].grad.abs().max() > 0
    exact = doubled(given)
    OP.reference(**exact)[1].sum().backward()
    for name in "qk":
        torch.testing.assert_close(
            given[name].grad.double(), exact[name].grad, rtol=1e-5, atol=1e-6
        )


# --- NaN ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_propagates_as_in_pytorch(name):
    given = inputs(S_q=40, S_k=40, return_lse=True)
    with torch.no_grad():
        given[name][0, 3, 0, 2] = math.nan
    assert_within_contract(
        outcome(flash_attention, given),
        outcome(OP.reference, given),
        outcome(OP.reference, doubled(given)),
    )


# --- repeatability and memory -------------------------------------------------------------------


def test_a_batch_row_does_not_depend_on_the_others():
    given = inputs(B=3, S_q=40, S_k=40, H=2, H_kv=1, causal=True, return_lse=True)
    whole = outcome(flash_attention, given)
    alone = {n: v[1:2].detach().requires_grad_() if n in "qkv" else v for n, v in given.items()}
    o, lse = flash_attention(**alone)
    assert torch.equal(o, whole["result[0]"][1:2])
    assert torch.equal(lse, whole["result[1]"][1:2])


@pytest.mark.parametrize(
    "size",
    [
        {"S_q": 33, "S_k": 50, "H": 2, "H_kv": 1, "D": 16},
        {"S_q": 50, "S_k": 33, "D": 20},
        {"S_q": 1, "S_k": 17, "D": 1},
        {"S_q": 65, "S_k": 64, "D": 40, "B": 2},
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_memory(size, causal):
    """No access outside a tensor, no two programs on one element; the same bits twice."""
    given = inputs(**size, causal=causal, return_lse=True, dtype=torch.float16)
    with interp_check():
        got = outcome(flash_attention, given)
    assert_bitwise_equal(got, outcome(flash_attention, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_for_the_backward(dtype):
    """q, k, v, o, lse and for float32 two peaks beside it; nothing that grows with S_q S_k."""
    given = inputs(B=2, S_q=48, S_k=64, H=2, dtype=dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        flash_attention(**given)
    q, k = given["q"], given["k"]
    rows = 4 * 2 * 2 * 48 * (3 if dtype == torch.float32 else 1)
    assert sum(t.nbytes for t in saved) == 2 * q.nbytes + 2 * k.nbytes + rows


@pytest.mark.parametrize("expanded", ["batch", "heads"])
def test_expanded_keys(expanded):
    q = leaf(2, 20, 2, 16)
    base = leaf(1, 30, 2, 16) if expanded == "batch" else leaf(2, 30, 1, 16)
    repeated = base.expand(2, 30, 2, 16)
    want = flash_attention(q, repeated.contiguous(), repeated.contiguous())
    assert torch.equal(flash_attention(q, repeated, repeated), want)


def test_a_packed_projection_is_read_in_place():
    """q, k and v as views of one (B, S, 3, H, D) tensor: the usual output of one matmul."""
    qkv = leaf(2, 40, 3, 2, 16)
    o = flash_attention(*qkv.unbind(2), causal=True)
    want = flash_attention(*(x.contiguous() for x in qkv.unbind(2)), causal=True)
    assert torch.equal(o, want)


def test_a_row_stride_that_32_bits_cannot_carry():
    """A row stride of 2^26: kernels offset rows of a tile by 32-bit products, so it is copied."""
    from fastlm.kernels.attention.forward import rows_strided

    wide = torch.empty(1, device="meta").as_strided((1, 4, 1, 8), (2**30, 2**26, 8, 1))
    assert rows_strided(wide).stride(1) == 8
    usual = torch.empty(2, 4, 3, 8)
    assert rows_strided(usual) is usual


@pytest.fixture
def lazy_memory(nan_in_fresh_memory):
    """torch.empty leaves pages untouched, so that a tensor may be larger than the machine."""
    torch.use_deterministic_algorithms(False)


def test_offsets_past_2_to_the_31(lazy_memory):
    """Between batches, and from the first to the last row of one sequence."""
    torch.manual_seed(0)
    far = torch.empty(2**31 + 2**12, dtype=torch.float16).as_strided(
        (2, 40, 1, 16), (2**31, 16, 16, 1)
    )
    stride = 2**23 - 16  # the largest that is not copied
    steep = torch.empty(stride * 264, dtype=torch.float16).as_strided(
        (1, 264, 1, 16), (1, stride, 16, 1)
    )
    for x in (far, steep):
        x.copy_(torch.randn(x.shape))
        q = torch.randn(x.shape[0], 33, 1, 16).half()
        near = x.contiguous()
        assert torch.equal(flash_attention(q, x, x), flash_attention(q, near, near))
        assert torch.equal(
            flash_attention(x[:, -40:], near, near), flash_attention(near[:, -40:], near, near)
        )
        grads = []
        for keys in (x, near):
            k = keys.detach().requires_grad_()
            flash_attention(q, k, k).backward(q)
            grads.append(k.grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("D", [16, 40, 128, 136])
@pytest.mark.parametrize("causal", [False, True])
def test_through_descriptors(monkeypatch, causal, D):
    """Tiles read by TMA, as on Hopper and Blackwell."""
    given = inputs(B=2, S_q=35, S_k=53, H=2, H_kv=1, D=D, causal=causal, dtype=torch.float16)
    monkeypatch.setattr(_tiles, "_INTERPRETED_CLASS", "hopper")
    assert _tiles.described(given["k"].detach(), 16, _tiles.block_d_of(D)) is not None
    check(OP, given)


def test_what_descriptors_cannot_address_goes_through_pointers(monkeypatch):
    monkeypatch.setattr(_tiles, "_INTERPRETED_CLASS", "hopper")
    plain = torch.randn(2, 20, 2, 16).half()
    assert _tiles.described(plain, 16, 16) is not None
    assert _tiles.described(plain.float(), 16, 16) is None
    assert _tiles.described(plain[:, :, :1].expand(2, 20, 2, 16), 16, 16) is None  # a stride of 0
    assert _tiles.described(plain[..., :9].contiguous(), 16, 16) is None  # rows of 18 bytes
    assert (
        _tiles.described(torch.randn(2 * 20 * 32 + 1).half()[1:].view(2, 20, 2, 16), 16, 16) is None
    )
    assert _tiles.described(plain[:1, :, :1], 16, 16) is not None  # of size 1: any stride


FORWARD_TILE = "forward: tile_of(forward, float16 16, 16, False, False)"
SPECIALISED = {FORWARD_TILE: {"m": 128, "specialised": True}}


@pytest.mark.parametrize(
    ("gpu", "causal", "S_k", "form"),
    [
        ("hopper", False, 48, (True, True)),
        ("hopper", False, 53, (True, False)),
        ("hopper", True, 53, (True, False)),
        ("blackwell", True, 53, (False, False)),
    ],
)
def test_specialised_forms(monkeypatch, gpu, causal, S_k, form):
    """What runs in parts on several warps gives the same; the interpreter runs it as one."""
    monkeypatch.setattr(_tiles, "_INTERPRETED_CLASS", gpu)
    forms = []

    def launched(key, q, launch):
        forms.append(key[-1])
        return specialised.launched(key, q, launch)

    monkeypatch.setattr(forward, "launched", launched)
    with _tuned.trial(SPECIALISED):
        check(OP, inputs(B=2, S_q=35, S_k=S_k, H=2, H_kv=1, D=16, causal=causal, dtype=torch.half))
    assert set(forms) == {form}


@pytest.mark.parametrize(
    "options",
    [{"window_size": (4, 0)}, {"softcap": 3.0}, {"D": 256}, {"S_k": 1}, {"dtype": torch.float32}],
    ids=str,
)
def test_what_has_no_specialised_form_runs_plainly(monkeypatch, options):
    monkeypatch.setattr(_tiles, "_INTERPRETED_CLASS", "hopper")
    monkeypatch.setattr(forward, "launched", None)
    given = {"S_k": 20, "D": 16, "dtype": torch.half} | options
    given = inputs(B=1, S_q=20, H=1, H_kv=1, **given)
    tile = _tiles.Tile(128, 16, 4, 1, True)
    monkeypatch.setattr(_tiles, "_INTERPRETED", dict.fromkeys(("forward", "dkdv", "dq"), tile))
    out = flash_attention(**{k: getattr(v, "detach", lambda v=v: v)() for k, v in given.items()})
    assert torch.isfinite(out).all()


def test_a_specialised_form_that_does_not_compile_is_asked_once(monkeypatch):
    monkeypatch.setattr(_tiles, "_INTERPRETED_CLASS", "hopper")
    monkeypatch.setattr(specialised, "_refused", set())
    real, asked = forward._forward_kernel, []

    class Refusing:
        def __getitem__(self, grid):
            def launch(*args, **options):
                asked.append(options["SPECIALISED"])
                if options["SPECIALISED"]:
                    raise RuntimeError("PassManager::run failed")
                return real[grid](*args, **options)

            return launch

    q = torch.randn(1, 35, 1, 16).half()
    plain = flash_attention(q, q, q, causal=True)
    monkeypatch.setattr(forward, "_forward_kernel", Refusing())
    with _tuned.trial(SPECIALISED):
        with pytest.warns(UserWarning, match="does not compile.*PassManager"):
            first = flash_attention(q, q, q, causal=True)
        second = flash_attention(q, q, q, causal=True)
    assert asked == [True, False, False]
    torch.testing.assert_close(first, plain)
    assert torch.equal(first, second)


# --- the drop-in --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "k"),
    [
        ((9, 8), (11, 8)),
        ((3, 9, 8), (3, 11, 8)),
        ((2, 2, 3, 9, 8), (2, 2, 3, 11, 8)),
        ((2, 3, 9, 8), (1, 3, 11, 8)),
        ((3, 9, 8), (2, 3, 11, 8)),
    ],
)
def test_sdpa_batch_dimensions(q, k):
    sdpa_check({"query": leaf(*q), "key": leaf(*k), "value": leaf(*k)})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attn_mask": torch.ones(9, 11, dtype=torch.bool), "is_causal": True}, "is_causal"),
        ({"attn_mask": torch.ones(9, 12)}, "broadcast"),
        ({"attn_mask": torch.ones(9, 11, dtype=torch.int64)}, "int64"),
        ({"dropout_p": 1.0}, "dropout_p"),
        ({"value": torch.randn(2, 3, 11, 300)}, "head dimension"),
        ({"query": torch.randn(2, 3, 9, 8).double()}, "float64"),
        ({"key": torch.randn(2, 1, 11, 8), "value": torch.randn(2, 1, 11, 8)}, "heads"),
        ({"key": torch.randn(2, 3, 11, 6)}, "fit"),
        ({"key": torch.randn(4, 3, 11, 8)}, "broadcast"),
    ],
)
def test_sdpa_leaves_the_rest_to_pytorch(options, why):
    """A call that the kernel does not cover does what PyTorch does: a result, or its error."""
    given = {"query": torch.randn(2, 3, 9, 8), "key": torch.randn(2, 3, 11, 8)}
    given = given | {"value": torch.randn(2, 3, 11, 8)} | options
    assert why in explain(scaled_dot_product_attention, **given)

    def result(fn):
        torch.manual_seed(0)
        try:
            return fn(**given)
        except RuntimeError as error:
            return str(error)

    got, want = (result(f) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


def sdpa_check(given):
    assert "interpreter" in explain(scaled_dot_product_attention, **given)
    assert_within_contract(
        outcome(scaled_dot_product_attention, given),
        outcome(SDPA.reference, given),
        outcome(SDPA.reference, doubled(given)),
    )


@pytest.mark.parametrize("kind", ["bool", "float", "float with a gradient"])
@pytest.mark.parametrize(
    "shape", [(9, 20), (1, 20), (3, 9, 20), (2, 1, 9, 20), (2, 3, 1, 20), (20,)]
)
def test_sdpa_masks(shape, kind):
    torch.manual_seed(0)
    given = {"query": leaf(2, 3, 9, 8), "key": leaf(2, 3, 20, 8), "value": leaf(2, 3, 20, 12)}
    mask = torch.rand(shape) < 0.7
    if kind != "bool":
        mask = torch.randn(shape).masked_fill(~mask, -math.inf)
        mask = mask.requires_grad_(kind == "float with a gradient")
    sdpa_check(given | {"attn_mask": mask})


@pytest.mark.parametrize(
    "shape", [(9, 11), (3, 9, 11), (1, 1, 3, 1, 11), (2, 1, 3, 9, 1), (4, 1, 9, 1)]
)
def test_sdpa_masks_of_many_batch_dimensions(shape):
    torch.manual_seed(0)
    given = {n: leaf(2, 4, 3, 9 if n == "query" else 11, 8) for n in ("query", "key", "value")}
    sdpa_check(given | {"attn_mask": torch.randn(shape)})


def test_sdpa_masks_that_shift_whole_rows_have_no_gradient():
    mask = leaf(2, 3, 9, 1)
    given = {"query": leaf(2, 3, 9, 8), "key": leaf(2, 3, 20, 8), "value": leaf(2, 3, 20, 8)}
    scaled_dot_product_attention(**given, attn_mask=mask).sum().backward()
    assert mask.grad.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_rows_that_a_mask_hides_whole_are_zero(dtype):
    torch.manual_seed(0)
    mask = torch.ones(9, 20, dtype=torch.bool)
    mask[4] = False
    given = {
        name: leaf(2, 3, 9 if name == "query" else 20, 8, dtype=dtype)
        for name in ("query", "key", "value")
    }
    o = scaled_dot_product_attention(**given, attn_mask=mask)
    assert (o[:, :, 4] == 0).all()
    sdpa_check(given | {"attn_mask": mask})


def test_sdpa_nan_in_a_mask_is_not_hidden():
    torch.manual_seed(0)
    mask = torch.zeros(9, 20)
    mask[4, 3] = math.nan
    given = {"query": leaf(2, 3, 9, 8), "key": leaf(2, 3, 20, 8), "value": leaf(2, 3, 20, 8)}
    o = scaled_dot_product_attention(**given, attn_mask=mask)
    assert o[:, :, 4].isnan().all()
    assert o.isnan().sum() == o[:, :, 4].numel()


@pytest.mark.parametrize("sums", [1, 2, 8])
def test_weights_summed_in_any_columns(sums, monkeypatch):
    """As many as GPUs take; the interpreter's tile asks for one of them."""
    monkeypatch.setattr(forward, "partial_sums", lambda *_: sums)
    check(OP, inputs(S_q=40, S_k=70, H=2, causal=True, return_lse=True))


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("value", ["min", "half of min", "-1e30"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_masks_of_the_least_number(dtype, value, with_gradient):
    """As Hugging Face pads: a row of nothing else is the mean of the values, and so its gradient.

    PyTorch's fused backward takes each weight of such a row for 1, hence the reference in full.
    """
    low = torch.finfo(dtype).min
    mask = torch.zeros(40, 40, dtype=dtype)
    mask[2, 1:] = mask[3:] = {"min": low, "half of min": low / 2, "-1e30": -1e30}[value]
    mask[5] = -math.inf
    torch.manual_seed(0)
    given = {n: leaf(2, 3, 40, 16, dtype=dtype) for n in ("query", "key", "value")}
    given["attn_mask"] = mask.requires_grad_(with_gradient)

    def in_full(query, key, value, attn_mask):
        scores = query @ key.mT / 4 + attn_mask
        hidden = scores.isneginf().all(-1, keepdim=True)
        return scores.masked_fill(hidden, 0.0).softmax(-1).masked_fill(hidden, 0.0) @ value

    got = outcome(scaled_dot_product_attention, given)
    assert_within_contract(got, outcome(in_full, given), outcome(in_full, doubled(given)))


def test_sdpa_dropout():
    """As many weights dropped as asked, the rest scaled up; the draw follows manual_seed."""
    q, v = torch.zeros(2, 3, 40, 40), torch.eye(40).expand(2, 3, 40, 40)

    def draw():
        torch.manual_seed(0)
        return scaled_dot_product_attention(q, q, v, dropout_p=0.25)

    o = draw()
    assert torch.equal(o, draw())
    torch.testing.assert_close(o[o > 0], torch.full_like(o[o > 0], 1 / 30))
    assert abs((o > 0).double().mean() - 0.75) < 0.02


def test_sdpa_without_grouped_heads_matches_pytorchs_error():
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError):
        scaled_dot_product_attention(q, k, k)
    scaled_dot_product_attention(q, k, k, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_pytorchs(dtype):
    q, k, v = leaf(1, 2, 9, 8), leaf(1, 2, 9, 8), leaf(1, 2, 9, 8, dtype=torch.float16)
    with torch.autocast("cpu", dtype):
        assert F.scaled_dot_product_attention(q, k, v).dtype == dtype
        o = scaled_dot_product_attention(q, k, v)
        f = flash_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert o.dtype == f.dtype == dtype
    o.float().sum().backward()
    assert q.grad.dtype == torch.float32


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels_on", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(3, 4, 8)}, r"q must be \(B, S, H, D\); got \(3, 4, 8\)"),
        (
            {"k": torch.randn(2, 5, 2, 8)},
            r"k must be \(1, S_k, H_kv, 16\), as q; got \(2, 5, 2, 8\)",
        ),
        (
            {"v": torch.randn(1, 6, 2, 16)},
            r"v must be \(1, 33, 2, 'D_v'\), as k; got \(1, 6, 2, 16\)",
        ),
        (
            {"q": torch.randn(1, 5, 3, 16)},
            r"k's number of heads must divide q's, 3; got 2",
        ),
        (
            {"k": torch.randn(1, 33, 2, 16).half()},
            "k and v must have q's dtype, torch.float32; got",
        ),
    ],
)
def test_refusals(change, message, kernels_on):
    given = inputs(H=2) | change
    runner = cpu_runner("interpreter" if kernels_on else None)
    with runner, pytest.raises(ValueError, match=f"flash_attention: {message}"):
        flash_attention(**given)


@pytest.mark.parametrize("dtype", [torch.float64])
def test_float64_and_wide_heads_run_pytorch(dtype):
    q = torch.randn(1, 5, 1, 8, dtype=dtype)
    assert "float64" in explain(flash_attention, q, q, q)
    assert flash_attention(q, q, q).dtype == dtype
    wide = torch.randn(1, 5, 1, 300)
    assert "head dimension 300" in explain(flash_attention, wide, wide, wide)
    with backend("triton"), pytest.raises(RuntimeError, match="head dimension 300"):
        flash_attention(wide, wide, wide)
