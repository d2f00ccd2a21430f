"""What AdamW does beyond torch's: clipping, state dtypes, master weights, stochastic rounding."""

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

from fastlm.bench.capture import capture_launches, resources, sass_ops
from fastlm.kernels import Adam, AdamW, backend
from fastlm.kernels._interpreter import interpreted
from fastlm.kernels.optim.kernels import ADAMW
from fastlm.kernels.optim.plan import Plan, Row
from fastlm.kernels.optim.sharding import Place

SHAPES = ((33, 17), (5,), (700,), (), (0,), (1,))
BF16 = torch.bfloat16


@pytest.mark.parametrize("setting", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("where", ["kernels", "torch"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_clip_grad_norm_without_writing_gradients(max_norm, where, setting):
    a = parameters()
    b = twins(a)
    first = AdamW(a, lr=1e-2, eps=1e-3, max_grad_norm=max_norm, **setting)
    second = torch.optim.AdamW(b, lr=1e-2, eps=1e-3)
    assert first.last_grad_norm is None
    with interpreted(), backend("auto" if where == "kernels" else "torch"):
        for step in range(3):
            give_gradients(a, b, seed=step)
            before = [p.grad.clone() for p in a]
            first.step()
            norm = torch.nn.utils.clip_grad_norm_(b, max_norm)
            second.step()
            torch.testing.assert_close(first.last_grad_norm, norm)
            torch.testing.assert_close([p.grad for p in a], before, rtol=0, atol=0)
    kernels = where == "kernels" and "foreach" not in setting
    assert ran_kernels(first) == (len(a) if kernels else 0)
    assert_same(everything(a, first), everything(b, second))


@pytest.mark.usefixtures("kernels")
def test_clipping_takes_one_more_launch_for_all_groups():
    a = parameters()
    groups = [{"params": a[:3], "lr": 1e-2}, {"params": a[3:], "weight_decay": 0.0}]
    optimizer = AdamW(groups, max_grad_norm=1.0)
    give_gradients(a)
    optimizer.step()
    with counted() as launches:
        optimizer.step()
    assert launches == ["squares_kernel", "prepare_kernel", "update_kernel"]


@pytest.mark.usefixtures("kernels")
def test_clipping_after_the_scaler_and_over_two_dtypes():
    """The norm is of the unscaled gradients, and of all dtypes together."""
    a = parameters() + parameters(dtype=BF16, seed=1)
    optimizer = AdamW(a, fused=True, max_grad_norm=0.5)
    give_gradients(a)
    want = torch.sqrt(sum(p.grad.double().square().sum() for p in a))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    for p in a:
        p.grad *= 64
    scaler.step(optimizer)
    torch.testing.assert_close(optimizer.last_grad_norm.double(), want, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("kernels")
def test_a_nan_norm_reaches_every_parameter_as_in_torch():
    a = parameters([(5,), (3,)])
    give_gradients(a)
    a[0].grad[0] = float("nan")
    optimizer = AdamW(a, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.last_grad_norm.isnan()
    assert all(p.isnan().all() for p in a)


@pytest.mark.usefixtures("kernels")
def test_the_norm_of_a_gradient_split_in_two_is_the_same():
    whole = parameters([(1000,)])
    halves = parameters([(1,), (999,)])
    give_gradients(whole)
    halves[0].grad, halves[1].grad = whole[0].grad.split([1, 999])
    norms = []
    for params in (whole, halves):
        optimizer = AdamW(params, max_grad_norm=1.0)
        optimizer.step()
        norms.append(optimizer.last_grad_norm)
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)


def run(params, steps=4, first_step=0, **options):
    optimizer = AdamW(params, lr=1e-2, weight_decay=0.1, **options)
    advance(params, optimizer, steps, first_step)
    return optimizer


def advance(params, optimizer, steps, first_step=0):
    for step in range(first_step, first_step + steps):
        give_gradients(params, seed=step)
        for p in params:  # the same values whatever the parameter's dtype
            p.grad = p.grad.to(BF16).to(p.dtype)
        optimizer.step()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("master", ["fp32", "split"])
def test_master_weights_are_a_float32_run_to_the_bit(master):
    narrow = parameters(SHAPES, BF16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in narrow]
    a = run(narrow, master=master, state_dtype=torch.float32)
    b = run(wide)
    for p, q in zip(narrow, wide, strict=True):
        kept = a.state[p]["master"]
        if master == "split":
            kept = (p.view(torch.int16).int() * 65536 + kept.int()).view(torch.float32)
        torch.testing.assert_close(kept, q.detach(), rtol=0, atol=0)
        torch.testing.assert_close(
            a.state[p]["exp_avg_sq"], b.state[q]["exp_avg_sq"], rtol=0, atol=0
        )
        # The parameter is the nearest bfloat16, a tie away from 0 apart.
        torch.testing.assert_close(p.detach(), q.detach().to(BF16), rtol=2**-8, atol=0)
    assert (narrow[0] == wide[0].to(BF16)).float().mean() > 0.99


@pytest.mark.usefixtures("kernels")
def test_split_masters_hold_extreme_values():
    """NaN, infinities, the largest number and subnormals survive a step that changes nothing."""
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.3e38, -1e-40, 0.0, -0.0])
    p = torch.nn.Parameter(values.to(BF16))
    before = p.detach().clone()
    optimizer = AdamW([p], lr=0.0, master="split", state_dtype=torch.float32, weight_decay=0.0)
    p.grad = torch.zeros_like(p)
    p.grad[3] = float("nan")
    optimizer.step()
    assert p[2].isnan()
    assert p[3].isnan()
    keeps = [4, 5, 6]
    torch.testing.assert_close(p.detach()[keeps], before[keeps], rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
def test_stochastic_rounding_is_unbiased_and_reproducible():
    """A float32 run's weights, rounded to a neighbour: on average, to the weight itself."""

    def once(seed=3, size=4096):
        p = torch.nn.Parameter(torch.ones(size, dtype=BF16))
        optimizer = AdamW([p], lr=2.0**-10, weight_decay=0.0, rounding="stochastic", seed=seed)
        p.grad = -torch.ones_like(p)
        optimizer.step()
        return p.detach()

    got = once()
    assert set(got.tolist()) == {1.0, 1.0 + 2.0**-7}
    share = (got > 1).float().mean()
    assert abs(share - 1 / 8) < 4 * (1 / 8 * 7 / 8 / 4096) ** 0.5
    assert torch.equal(got, once())
    assert not torch.equal(got, once(seed=4))
    assert torch.equal(got[:100], once(size=100))  # an element's bits do not know the size


@pytest.mark.usefixtures("kernels")
def test_stochastic_rounding_differs_by_step_parameter_and_element():
    a = [torch.nn.Parameter(torch.ones(512, dtype=BF16)) for _ in range(2)]
    optimizer = AdamW(a, lr=2.0**-9, weight_decay=0.0, rounding="stochastic")
    patterns = []
    for _ in range(2):
        for p in a:
            p.data.fill_(1.0)
            p.grad = -torch.ones_like(p)
        optimizer.step()
        patterns += [tuple((p > 1).tolist()) for p in a]
    assert len(set(patterns)) == 4
    rows = torch.tensor(patterns[0]).view(-1, 16)
    assert len({tuple(row.tolist()) for row in rows}) > 20


@pytest.mark.usefixtures("kernels")
def test_stochastic_rounding_keeps_nan_and_block_sizes_do_not_matter(monkeypatch):
    from fastlm.kernels.optim import plan

    def once():
        p = torch.nn.Parameter(torch.linspace(-1, 1, 3000).to(BF16))
        p.grad = torch.ones_like(p)
        p.grad[7] = float("nan")
        AdamW([p], rounding="stochastic", lr=1e-3).step()
        return p.detach()

    got = once()
    assert got.isnan().nonzero().flatten().tolist() == [7]
    monkeypatch.setattr(plan, "_CHUNK", 1024)
    monkeypatch.setattr(plan, "_WARPS", 2)
    torch.testing.assert_close(once(), got, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("kernels")
def test_rounding_of_a_part_is_that_of_the_whole():
    """Of rows, of columns, and of an odd piece of a flat tensor, as processes may hold them."""
    weights = torch.linspace(-1, 1, 120).view(12, 10).to(BF16)

    def once(p, place):
        p = p.clone(memory_format=torch.contiguous_format)
        means = [torch.zeros_like(p) for _ in range(2)]
        row = Row(p, torch.ones_like(p), *means, None, torch.zeros(()), 0, "adamw", 3,
                  stochastic=True, place=place)  # fmt: skip
        plan = Plan([row])
        plan.set_hyper([[1e-3, 0.9, 0.999, 1e-8, 0.0, 1.0, float(ADAMW.value), 0.0, 1.0]], [])
        plan.run(None, None, seed=7)
        return p

    whole = once(weights, None)
    assert (whole != weights).any()
    assert torch.equal(once(weights[4:], Place(40, 80, 120, 120, ())), whole[4:])
    assert torch.equal(once(weights[:, 3:7], Place(3, 4, 10, 120, ())), whole[:, 3:7])
    flat = once(weights.flatten()[7:31], Place(7, 24, 120, 120, ()))
    assert torch.equal(flat, whole.flatten()[7:31])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_the_average_of_the_weights(dtype):
    """Of the float32 weights, where there are any."""
    a = parameters(SHAPES, dtype)
    master = {"master": "fp32"} if dtype == BF16 else {}
    optimizer = AdamW(a, lr=0.1, ema_decay=0.9, **master)
    averages = [p.detach().double() for p in a]
    for step in range(3):
        advance(a, optimizer, 1, step)
        weights = [optimizer.state[p].get("master", p.detach()).double() for p in a]
        averages = [0.9 * e + 0.1 * w for e, w in zip(averages, weights, strict=True)]
    for p, want in zip(a, averages, strict=True):
        assert optimizer.state[p]["ema"].dtype == torch.float32
        torch.testing.assert_close(optimizer.state[p]["ema"].double(), want, rtol=1e-6, atol=1e-6)


MODES = [
    {"ema_decay": 0.99, "state_dtype": torch.float32, "master": "split"},
    {"state_dtype": torch.float32},
    {"state_dtype": torch.float32, "rounding": "stochastic", "seed": 5},
    {"state_dtype": torch.float32, "master": "split"},
    {"state_dtype": torch.float32, "master": "fp32", "amsgrad": True},
    {"master": "fp32", "rounding": "stochastic"},
    {"max_grad_norm": 0.5},
]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(map(str, o.values())))
def test_a_checkpoint_of_every_mode_goes_on_bit_for_bit(options, dtype, tmp_path):
    a = parameters(SHAPES, dtype)
    first = run(a, 2, **options)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    b = twins(a)
    second = AdamW(b, **options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    before, after = everything(a, first), everything(b, second)
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    c = copy.deepcopy(first)
    advance(a, first, 2, 2)
    advance(b, second, 2, 2)
    assert_same(everything(a, first), everything(b, second), rtol=0, atol=0)
    d = c.param_groups[0]["params"]
    advance(d, c, 2, 2)
    assert_same(everything(a, first), everything(d, c), rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(map(str, o.values())))
def test_a_checkpoint_of_torchs_starts_any_mode_and_back(options):
    a = parameters(SHAPES, BF16)
    theirs = torch.optim.AdamW(a, lr=1e-2)
    advance(a, theirs, 2)
    b = twins(a)
    ours = AdamW(b, **options)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert all(
        ours.param_groups[0][name] == value for name, value in options.items() if name != "amsgrad"
    )
    advance(b, ours, 1, 2)
    if options.get("state_dtype"):
        assert ours.state[b[0]]["exp_avg"].dtype == torch.float32
    back = torch.optim.AdamW(twins(b))
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    advance(back.param_groups[0]["params"], back, 1, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive; got 0.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be positive; got nan"),
        ({"ema_decay": 1.0}, "ema_decay must be between 0 and 1; got 1.0"),
        ({"master": "half"}, "master must be one of"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"state_dtype": torch.int8}, "state_dtype must be one of"),
        ({"master": "split", "rounding": "stochastic"}, "rounding must be None"),
    ],
)
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_refuses_bad_options(kind, options, words):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {words}"):
        kind(parameters([(3,)]), **options)


def test_says_where_an_option_has_no_kernel():
    a = parameters([(3,)], BF16)
    give_gradients(a)
    with pytest.raises(RuntimeError, match=r"rounding='stochastic' cannot run this step: .*CPU"):
        AdamW(a, rounding="stochastic").step()
    a = parameters([(3,)], torch.float16)
    give_gradients(a)
    with (
        interpreted(),
        pytest.raises(ValueError, match='master="split" must be used with bfloat16'),
    ):
        AdamW(a, master="split").step()


# (parameter's dtype, options, 128-bit loads of the unmasked body of the update)
FP32 = torch.float32
MACHINE_CODE = [
    (FP32, {}, 4),
    (BF16, {"state_dtype": FP32, "rounding": "stochastic"}, 2),
    (BF16, {"state_dtype": FP32, "master": "split"}, 2),
    (BF16, {"state_dtype": "8bit", "rounding": "stochastic"}, 0),
    (FP32, {"amsgrad": True, "fused": True, "max_grad_norm": 1.0}, 5),
    (BF16, {}, 4),
    (torch.float16, {}, 4),
    (BF16, {"state_dtype": FP32}, 2),
    (BF16, {"state_dtype": FP32, "master": "fp32"}, 3),
    (FP32, {"state_dtype": "8bit"}, 2),
    (BF16, {"state_dtype": "8bit"}, 0),
    (FP32, {"state_dtype": BF16}, 2),
    (FP32, {"ema_decay": 0.99}, 5),
    (FP32, {"cautious": True}, 4),
]
TARGETS = [  # every mode on one target, and three modes on three
    pytest.param(*mode, target, id=f"{mode[0]}-{mode[1]}-{target}")
    for i, mode in enumerate(MACHINE_CODE)
    for target in (("sm80", "sm90", "sm100") if 0 < i < 4 else ("sm90",))
]


@pytest.mark.parametrize(("dtype", "options", "wide", "target"), TARGETS)
def test_machine_code(dtype, options, wide, target):
    """No spills, no shared memory in the update, at most 72 registers, wide accesses."""
    params = [torch.nn.Parameter(torch.zeros(10000, dtype=dtype))]
    params[0].grad = torch.zeros(10000, dtype=dtype)
    with capture_launches(target) as capture:
        AdamW(params, **options).step()
    assert {launch.name for launch in capture.unique()} >= {"prepare_kernel", "update_kernel"}
    for launch, compiled in capture.compile_all():
        found, ops = resources(compiled), sass_ops(compiled)
        assert found["spill_stores"] == found["spill_loads"] == 0
        assert found["regs"] <= 72
        if launch.name == "update_kernel":
            assert found["shared"] == 0
            assert not any(op.startswith(("DADD", "DMUL", "DFMA", "BAR")) for op in ops)
            assert ops.get("LDG.E.128", 0) == wide
            narrow = BF16 in (dtype, options.get("state_dtype")) and wide < 4
            assert ops.get("LDG.E.64", 0) >= 2 * narrow
