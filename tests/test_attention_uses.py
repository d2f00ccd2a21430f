"""What attention is built into: PyTorch's registry of implementations, and ring attention."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from ring_attention import RANKS, inputs, one_rank

from fastlm.kernels import OPS, flash_attention, register
from fastlm.kernels._interpreter import interpreted
from fastlm.kernels.attention.register import IMPLEMENTATIONS

# --- PyTorch's registry -------------------------------------------------------------------------


@pytest.fixture
def as_cpu_operators():
    """The registered implementations answer for CPU tensors, as Activated has them do for CUDA."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    with interpreted():
        for operator, implementation in IMPLEMENTATIONS.items():
            library.impl(operator, implementation, "CPU")
        yield
    library._destroy()


def test_register_activates_nothing():
    register()
    assert "FASTLM" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None
    torch.nn.attention.activate_flash_attention_impl("FASTLM")
    assert torch.nn.attention.current_flash_attention_impl() == "FASTLM"
    torch.nn.attention.restore_flash_attention_impl()
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_operator(as_cpu_operators, is_causal):
    """Through PyTorch's own autograd formula for the operator."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 16, requires_grad=True) for _ in "qkv")
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[:2]
    want = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(o, want)
    assert lse.shape == (2, 3, 20)
    do = torch.randn_like(o)
    got = torch.autograd.grad(o, (q, k, v), do)
    for a, b in zip(got, torch.autograd.grad(want, (q, k, v), do), strict=True):
        torch.testing.assert_close(a, b)


def test_sdpa_operator_repeats_its_dropout_in_the_backward(as_cpu_operators):
    q, v = torch.zeros(1, 1, 30, 30), torch.eye(30)[None, None].requires_grad_()
    o = torch.ops.aten._scaled_dot_product_flash_attention(q, q, v, 0.5)[0]
    (dv,) = torch.autograd.grad(o, v, torch.eye(30)[None, None])
    assert 0.3 < (o > 0).double().mean() < 0.7
    torch.testing.assert_close(dv[0, 0], o[0, 0].T)


def test_varlen_operator(as_cpu_operators):
    q, k, v = (torch.randn(50, 2, 16, requires_grad=True) for _ in "qkv")
    ends = torch.tensor([0, 20, 50], dtype=torch.int32)
    o = torch.ops.aten._flash_attention_forward(
        q, k, v, ends, ends, 30, 30, 0.0, True, False, window_size_left=9
    )[0]
    want = torch.cat(
        [
            flash_attention(*(x[None, a:b] for x in (q, k, v)), causal=True, window_size=(9, -1))[0]
            for a, b in ((0, 20), (20, 50))
        ]
    )
    torch.testing.assert_close(o, want)
    got = torch.autograd.grad(o.sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(want.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_operator_cannot_do_is_refused(as_cpu_operators):
    q = torch.randn(1, 8, 1, 16)
    if "block_table" not in str(torch.ops.aten._flash_attention_forward.default._schema):
        pytest.skip("the operator of this PyTorch has no block_table")
    with pytest.raises(RuntimeError, match="block_table has no kernel"):
        torch.ops.aten._flash_attention_forward(
            q, q, q, None, None, 8, 8, 0.0, False, False, block_table=torch.zeros(1, 1)
        )


# --- ring attention -----------------------------------------------------------------------------


def test_ring_attention_of_two_processes_equals_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(one_rank, (port, shared), nprocs=RANKS)
        ranks = [shared[n] for n in range(RANKS)]
    q, k, v = inputs()
    o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    o = o.transpose(1, 2)
    (o * torch.arange(16)).sum().backward()
    for n, whole in enumerate((o.detach(), q.grad, k.grad, v.grad)):
        torch.testing.assert_close(torch.cat([r[n] for r in ranks], 1), whole, rtol=1e-4, atol=1e-4)


# --- the CPU path -------------------------------------------------------------------------------


@pytest.mark.parametrize(("S_q", "S_k"), [(5, 5), (3, 7), (7, 3), (0, 3), (3, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (2, -1), (0, 1)])
def test_windows_on_a_cpu_take_pytorchs_fused_op(S_q, S_k, causal, window_size):
    torch.manual_seed(0)
    shapes = ((2, S_q, 4, 16), (2, S_k, 2, 16), (2, S_k, 2, 16))
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    found = []
    for attend in (flash_attention, OPS["flash_attention"].reference):
        o = attend(*leaves, causal=causal, window_size=window_size)
        found.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_dropout_on_a_cpu_is_pytorchs_unless_seeded():
    q = torch.ones(1, 64, 2, 8)
    torch.manual_seed(0)
    first = flash_attention(q, q, q, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(first, flash_attention(q, q, q, dropout_p=0.5))
    assert 0.9 < first.mean() < 1.1
    seeded = OPS["flash_attention"].reference(q, q, q, dropout_p=0.5, dropout_seed=3)
    assert torch.equal(flash_attention(q, q, q, dropout_p=0.5, dropout_seed=3), seeded)
