"""Ragged batches: the same as sequence by sequence, whatever the lengths and the options."""

import pytest
import torch
from harness import assert_bitwise_equal, check, clones, outcome
from memory_check import interp_check

from fastlm.kernels import OPS, explain, flash_attention, flash_attention_varlen
from fastlm.kernels._dispatch import cpu_runner

pytestmark = pytest.mark.usefixtures("kernels")
CPU = torch.device("cpu")
OP = OPS["flash_attention_varlen"]
LENGTHS_Q, LENGTHS_K = (5, 0, 33, 40, 1), (7, 3, 50, 33, 0)


def example(dtype=torch.float32, lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, **options):
    torch.manual_seed(0)
    size = {"H": 2, "H_kv": 1, "D": 16} | options
    return OP.example(dtype, CPU, lengths_q=lengths_q, lengths_k=lengths_k, **size)


OPTIONS = {
    "causal": {"causal": True},
    "window": {"window_size": (9, 2)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1])},
    "alibi by batch": {"alibi_slopes": torch.rand(5, 2)},
    "sinks": {"sinks": torch.tensor([0.3, -0.2])},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 9},
}


@pytest.mark.parametrize("dtype", OP.dtypes)
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option(option, dtype):
    check(OP, example(dtype, return_lse=True, **OPTIONS[option]))


def test_all_options_at_once():
    everything = {}
    for option in OPTIONS.values():
        everything |= option
    check(OP, example(return_lse=True, **everything))


@pytest.mark.parametrize(
    "lengths",
    [
        ((16,), (16,)),
        ((0, 0), (0, 0)),
        ((1, 1, 1), (40, 0, 3)),
        ((31, 32, 33), (1, 2, 3)),
    ],
)
def test_lengths(lengths):
    check(OP, example(lengths_q=lengths[0], lengths_k=lengths[1], causal=True, return_lse=True))


def test_sinks_and_their_gradient():
    check(OP, example(causal=True) | {"sinks": torch.tensor([0.3, -0.2]).requires_grad_()})


def test_no_sequences():
    given = example(lengths_q=(), lengths_k=(), return_lse=True)
    o, lse = flash_attention_varlen(**given)
    assert o.shape == (0, 2, 16)
    assert lse.shape == (2, 0)
    o.sum().backward()
    assert given["k"].grad.shape == (0, 1, 16)


def test_equals_the_dense_op_to_the_bit():
    """Sequences of one length, laid end to end, are a dense batch."""
    q, k, v = (torch.randn(3, 40, 2, 16) for _ in "qkv")
    ends = torch.arange(4, dtype=torch.int32) * 40
    ragged = flash_attention_varlen(
        *(x.reshape(120, 2, 16) for x in (q, k, v)), ends, ends, causal=True
    )
    assert torch.equal(ragged.view(3, 40, 2, 16), flash_attention(q, k, v, causal=True))


def test_a_sequence_does_not_depend_on_the_others():
    given = example(causal=True, return_lse=True)
    o, lse = flash_attention_varlen(**given)
    rows, cols = slice(5, 38), slice(10, 60)
    alone = example(lengths_q=(33,), lengths_k=(50,), causal=True, return_lse=True)
    for name, part in (("q", rows), ("k", cols), ("v", cols)):
        alone[name] = given[name][part]
    o_alone, lse_alone = flash_attention_varlen(**alone)
    assert torch.equal(o[rows], o_alone)
    assert torch.equal(lse[:, rows], lse_alone)


def test_rows_past_the_last_sequence():
    """NaN beyond the end reaches nothing; its results and gradients are 0."""
    given = example(return_lse=True, causal=True)
    longer = clones(given)
    for name in "qkv":
        longer[name] = torch.cat(
            [given[name].detach(), torch.full((9, *given[name].shape[1:]), torch.nan)]
        )
        longer[name].requires_grad_()
    o, lse = flash_attention_varlen(**longer)
    want = outcome(flash_attention_varlen, given)
    assert torch.equal(o[:79], want["result[0]"])
    assert (o[79:] == 0).all()
    assert (lse[:, 79:] == -torch.inf).all()
    o[:79].sum().backward()
    assert all((longer[n].grad[-9:] == 0).all() and longer[n].grad.isfinite().all() for n in "qkv")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_memory(dtype):
    given = example(torch.float16, causal=True, return_lse=True)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        given[name] = given[name].to(dtype)
    with interp_check():
        got = outcome(flash_attention_varlen, given)
    assert_bitwise_equal(got, outcome(flash_attention_varlen, given))


def test_the_host_does_not_read_the_lengths():
    """Fake tensors have no values to read: the whole call traces."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t
            for n, t in example().items()
        }
        assert flash_attention_varlen(**fake).shape == (79, 2, 16)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_compiled_cpu_path(option):
    """The loop over lengths is one operator to the compiler."""
    given = example(return_lse=True, **OPTIONS[option])
    with cpu_runner(None):
        torch._dynamo.reset()
        got = torch.compile(flash_attention_varlen, fullgraph=True, backend="eager")(**given)
        want = flash_attention_varlen(**given)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(1, 79, 2, 16)}, r"q must be \(total, H, D\); got"),
        ({"k": torch.randn(93, 1, 8)}, "k must have q's head dimension, 16; got 8"),
        ({"v": torch.randn(90, 1, 16)}, "v must be"),
        (
            {"q": torch.randn(79, 3, 16), "k": torch.randn(93, 2, 16), "v": torch.randn(93, 2, 16)},
            "heads",
        ),
        ({"cu_seqlens_q": torch.tensor([0.0, 79.0])}, r"cu_seqlens_q must be \(B \+ 1,\) int32"),
        ({"cu_seqlens_k": torch.tensor([0, 93])}, "cu_seqlens_k must have as many entries"),
        ({"alibi_slopes": torch.ones(4, 2)}, "alibi_slopes must be"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=f"flash_attention_varlen: .*{message}"):
        flash_attention_varlen(**example() | change)


def test_explain():
    assert "interpreter" in explain(flash_attention_varlen, **example())
