"""What is special about Muon: against torch's, matrices beside other parameters, its products."""

import copy

import pytest
import torch
from test_adamw import (
    assert_same,
    counted,
    everything,
    give_gradients,
    parameters,
    ran_kernels,
    twins,
)
from torch.testing._internal import common_optimizers

from fastlm.kernels import AdamW, Muon, backend
from fastlm.kernels._interpreter import interpreted
from fastlm.kernels.optim import newton_schulz
from fastlm.kernels.optim.muon import reference

MATRICES = ((20, 33), (40, 12), (20, 33))
MIXED = ((20, 32), (5,), (40, 12), (), (3, 2, 4), (20, 32))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_follows_torchs(dtype):
    """Momentum as torch's; directions as far from float64's as torch's bfloat16 iteration."""
    a = parameters(MATRICES, dtype)
    b = twins(a)
    c = [torch.nn.Parameter(p.detach().double()) for p in a]
    first, second = Muon(a, lr=0.1), torch.optim.Muon(b, lr=0.1)
    buffers = [torch.zeros_like(p) for p in c]
    for step in range(3):
        give_gradients(a, b, c, seed=step)
        for p, q in zip(a, c, strict=True):
            q.grad = p.grad.double()
        first.step()
        second.step()
        grads = [p.grad for p in c]
        reference(c, grads, buffers, lr=0.1, weight_decay=0.1, momentum=0.95)
    assert ran_kernels(first) == 3
    for p, q, exact in zip(a, b, c, strict=True):
        torch.testing.assert_close(
            first.state[p]["momentum_buffer"], second.state[q]["momentum_buffer"],
            rtol=torch.finfo(dtype).eps * 4, atol=torch.finfo(dtype).eps,
        )  # fmt: skip
        ours, torchs = ((t.detach().double() - exact).norm() for t in (p, q))
        assert ours < 1.5 * torchs


def test_symmetric_products_and_the_band_of_singular_values():
    """Of 131 rows: two tiles across, a triangle of three; symmetric to the bit."""
    torch.manual_seed(0)
    x = torch.randn(2, 131, 150)
    x = (x / x.norm(dim=(1, 2), keepdim=True)).bfloat16()
    out = torch.full((2, 131, 131), float("nan"), dtype=torch.bfloat16)
    options = {"NORMED": False, "BLOCK": 128, "BLOCK_K": 64}
    with interpreted():
        newton_schulz.symmetric_kernel[(3, 2)](
            x, out, None, *x.stride(), 131, 150, 0.0, 1.0, 0.0, ADDS=False, **options
        )
        assert torch.equal(out, out.mT)
        torch.testing.assert_close(out.float(), x.float() @ x.float().mT, rtol=2**-8, atol=1e-7)
        gram, out = out, torch.empty_like(out)
        newton_schulz.symmetric_kernel[(3, 2)](
            gram, out, None, *gram.stride(), 131, 131, -4.775, 2.0315, 0.0, ADDS=True, **options
        )
        want = -4.775 * gram.float() + 2.0315 * gram.float() @ gram.float()
        assert torch.equal(out, out.mT)
        torch.testing.assert_close(out.float(), want, rtol=2**-7, atol=1e-6)
        for shape in ((12, 40), (40, 12)):
            direction = torch.randn(1, *shape).bfloat16()
            squares = direction.float().square().sum((1, 2))
            newton_schulz.orthogonalize(direction, squares, (3.4445, -4.775, 2.0315), 5, 1e-7)
            values = torch.linalg.svdvals(direction[0].float())
            assert values.min() > 0.6
            assert values.max() < 1.25


@pytest.mark.usefixtures("kernels")
def test_what_is_no_matrix_is_adamws_in_the_same_launches():
    a = parameters(MIXED)
    b = twins(a)
    first = Muon(a, lr=0.1, adamw_lr=1e-2, adamw_betas=(0.8, 0.9), adamw_weight_decay=0.0)
    assert [group["use_muon"] for group in first.param_groups] == [True, False]
    rest = [b[1], b[3], b[4]]
    second = AdamW(rest, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.0)
    for step in range(2):
        give_gradients(a, b, seed=step)
        with counted() as launches:
            first.step()
        second.step()
    for p, q in zip((a[1], a[3], a[4]), rest, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
        assert_same(first.state[p], second.state[q], rtol=0, atol=0)
    iteration = ["symmetric_kernel", "symmetric_kernel", "product_kernel"] * 5
    assert launches == [
        "prepare_kernel", "momentum_kernel", "sum_chunks_kernel",
        *iteration, *iteration,  # one for each shape, not for each matrix
        "update_kernel", "update_kernel",
    ]  # fmt: skip


def test_groups_choose():
    a = parameters(MIXED)
    groups = [
        {"params": a[:1], "use_muon": False, "lr": 3e-4, "betas": (0.9, 0.95)},
        {"params": a[1:], "lr": 0.02, "weight_decay": 0.0},
    ]
    optimizer = Muon(groups, adamw_lr=1e-3)
    found = [(g["use_muon"], len(g["params"]), g["lr"]) for g in optimizer.param_groups]
    assert found == [(False, 1, 3e-4), (True, 2, 0.02), (False, 3, 1e-3)]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    copied = copy.deepcopy(optimizer)
    copied.add_param_group({"params": parameters(((3,),))})
    assert copied.param_groups[-1]["use_muon"] is False
    with pytest.raises(ValueError, match="2D parameters"):
        Muon([{"params": parameters(((3,),)), "use_muon": True}])
    named = Muon([("weight", a[0]), ("bias", a[1])])
    assert [g["param_names"] for g in named.param_groups] == [["weight"], ["bias"]]


@pytest.mark.usefixtures("kernels")
def test_a_run_moves_to_torch_and_back():
    a = parameters(MATRICES)
    b = twins(a)
    first, second = Muon(a, lr=1e-2, ns_steps=2), torch.optim.Muon(b, lr=1e-2, ns_steps=2)
    for step in range(3):
        give_gradients(a, b, seed=step)
        first.step()
        second.step()
        mine, other = copy.deepcopy(first.state_dict()), copy.deepcopy(second.state_dict())
        first.load_state_dict(other)
        second.load_state_dict(mine)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(
            first.state[p]["momentum_buffer"], second.state[q]["momentum_buffer"]
        )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "8bit", "rounding": "stochastic"},
        {"state_dtype": torch.float32, "master": "split", "max_grad_norm": 0.5},
    ],
    ids=["bytes", "split"],
)
def test_a_checkpoint_of_every_mode_goes_on_bit_for_bit(options):
    a = parameters(((33, 128), (5,)), torch.bfloat16)
    first = Muon(a, ns_steps=2, **options)
    give_gradients(a)
    first.step()
    b = twins(a)
    second = Muon(b, ns_steps=2, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    give_gradients(a, b, seed=1)
    first.step()
    second.step()
    assert_same(everything(a, first), everything(b, second), rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
def test_layouts_of_a_matrix():
    """Transposed, misaligned and spread out in memory: the same answer."""
    values = parameters(((20, 33),))[0].detach()
    layouts = (
        values.T.contiguous().T,
        torch.cat([values.new_zeros(1), values.flatten()])[1:].view(20, 33),
        torch.stack([values, values], -1)[..., 0],
    )
    for laid in layouts:
        a, b = [torch.nn.Parameter(laid)], [torch.nn.Parameter(values.clone())]
        for params in (a, b):
            optimizer = Muon(params, lr=0.1, ns_steps=2)
            params[0].grad = torch.randn(20, 33, generator=torch.Generator().manual_seed(0))
            optimizer.step()
        torch.testing.assert_close(a[0], b[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("where", ["kernels", "torch"])
def test_an_overflow_changes_nothing(where):
    a = parameters(((20, 33), (5,)))
    optimizer = Muon(a, fused=True, ns_steps=1)
    with interpreted(), backend("auto" if where == "kernels" else "torch"):
        for overflows in (True, False):
            before = [p.detach().clone() for p in a]
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            scaler.scale(torch.ones(()))
            give_gradients(a)
            a[1].grad[0] = float("inf") if overflows else 1.0
            scaler.step(optimizer)
            assert torch.equal(a[0], before[0]) is torch.equal(a[1], before[1]) is overflows


def test_the_cpu_path_is_torchs():
    a = parameters(MATRICES)
    b = twins(a)
    first, second = Muon(a), torch.optim.Muon(b)
    for step in range(2):
        give_gradients(a, b, seed=step)
        first.step()
        second.step()
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert first.state[a[0]]["step"] == 2


@pytest.mark.usefixtures("kernels")
def test_pytorchs_own_configurations_and_errors():
    info = next(o for o in common_optimizers.optim_db if o.name == "Muon")
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        if "2D" in str(error.error_regex):
            continue  # here such a parameter is AdamW's
        expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with expect(error.error_type, match=error.error_regex):
            Muon(given.params, **given.kwargs).step()
    for given in info.optim_inputs_func(device="cpu"):
        a = parameters(((12, 20),))
        b = twins(a)
        first, second = Muon(a, **given.kwargs), torch.optim.Muon(b, **given.kwargs)
        give_gradients(a, b)
        first.step()
        second.step()
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", [Muon, torch.optim.Muon])
def test_refuses_what_torch_refuses(kind):
    p = torch.nn.Parameter(torch.zeros(4, 2))
    p.grad = torch.zeros(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="Muon does not support sparse gradients"):
        kind([p]).step()
    p = torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.complex64))
    p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="Muon does not support complex parameters"):
        kind([p]).step()
    with pytest.raises(ValueError, match="is not supported"):
        kind(parameters(((4, 2),)), adjust_lr_fn="other")
