"""What is special about AdamW and Adam: many steps, state_dict, layouts, hosts, launches."""

import copy
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from harness import assert_within_contract
from torch.testing._internal import common_optimizers
from triton.runtime import interpreter

from fastlm.kernels import Adam, AdamW, adamw_step, backend, explain
from fastlm.kernels._interpreter import interpreted

SHAPES = ((33, 17), (5,), (700,), (), (0,), (1,), (3, 2, 4))
PAIRS = [
    pytest.param(AdamW, torch.optim.AdamW, id="AdamW"),
    pytest.param(Adam, torch.optim.Adam, id="Adam"),
]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def twins(params):
    """The same values once more, each with its strides."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def give_gradients(*lists, seed=0, skip=()):
    """The same fresh gradients to each list's parameters; none to the places in ``skip``."""
    generator = torch.Generator().manual_seed(seed)
    for i, same in enumerate(zip(*lists, strict=True)):
        g = torch.randn(same[0].shape, generator=generator, dtype=torch.float64)
        for p in same:
            p.grad = None if i in skip else torch.empty_like(p).copy_(g)


def everything(params, optimizer):
    """Parameters and states by name."""
    found = {}
    for i, p in enumerate(params):
        found[f"parameter {i}"] = p.detach()
        found |= {f"{name} {i}": t.detach() for name, t in optimizer.state[p].items()}
    return found


def assert_same(ours, theirs, rtol=1.3e-6, atol=1e-5):
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        torch.testing.assert_close(
            ours[name], want, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def ran_kernels(optimizer):
    """How many parameters the last step updated by kernel."""
    return len(optimizer._planned.written)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}],
    ids=["default", "all"],
)
def test_many_steps_stay_within_the_contract(ours, theirs, dtype, options):
    """Twenty steps, against the same in float64 and torch's in the dtype."""
    params = parameters(dtype=dtype)
    options = {"lr": 1e-2, "eps": 1e-3, **options}  # float16 cannot hold a smaller eps
    runs = []
    for kind, to in ((ours, dtype), (theirs, dtype), (theirs, torch.float64)):
        mine = [torch.nn.Parameter(p.detach().to(to, copy=True)) for p in params]
        runs.append((mine, kind(mine, **options)))
    for step in range(20):
        give_gradients(*(mine for mine, _ in runs), seed=step)
        for mine, _ in runs:  # gradients that every dtype holds alike
            for p in mine:
                p.grad = p.grad.to(dtype).to(p.dtype)
        for _, optimizer in runs:
            optimizer.step()
    assert ran_kernels(runs[0][1]) == len(params)
    fused, eager, exact = (everything(mine, optimizer) for mine, optimizer in runs)
    assert_within_contract(fused, eager, {name: t.double() for name, t in exact.items()})


@pytest.mark.usefixtures("kernels")
def test_many_steps_drift_no_further_from_float64_than_torchs():
    """A thousand steps of the default rate."""
    shape = [(300,)]
    runs = []
    for kind, dtype in (
        (AdamW, torch.float32),
        (torch.optim.AdamW, torch.float32),
        (torch.optim.AdamW, torch.float64),
    ):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(shape)]
        runs.append((params, kind(params, lr=1e-3, weight_decay=0.1)))
    noise = torch.randn(1000, 300, generator=torch.Generator().manual_seed(0))
    for g in noise:
        for (p,), optimizer in runs:
            p.grad = g.to(p.dtype) + p.detach()
            optimizer.step()
    ours, torchs, exact = (p.detach().double() for (p,), _ in runs)
    assert (ours - exact).abs().max() <= (torchs - exact).abs().max()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_groups_of_different_settings_share_the_launches(ours, theirs):
    def groups(params):
        return [
            {"params": params[:2], "lr": torch.tensor(1e-2), "weight_decay": 0.1},
            {"params": params[2:4], "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0},
            {"params": params[4:], "lr": 3e-3, "maximize": True},
        ]

    a = parameters()
    b = twins(a)
    first, second = ours(groups(a)), theirs(groups(b))
    for step in range(3):
        give_gradients(a, b, seed=step)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.param_groups[1]["lr"] *= 0.9
    assert_same(everything(a, first), everything(b, second))
    with counted() as launches:
        first.step()
    assert launches == ["prepare_kernel", "update_kernel"]


@pytest.mark.usefixtures("kernels")
def test_a_group_of_two_dtypes_counts_one_step_and_a_tensor_rate_may_become_a_float():
    """Where other fused optimizers count a step a dtype, or refuse what a scheduler assigns."""
    a = parameters([(5,), (7,)]) + parameters([(5,), (6,)], torch.bfloat16)
    b = twins(a)
    first, second = (
        kind(p, lr=torch.tensor(1e-2)) for kind, p in ((AdamW, a), (torch.optim.AdamW, b))
    )
    schedules = [
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        for optimizer in (first, second)
    ]
    for step in range(3):
        give_gradients(a, b, seed=step)
        for optimizer, schedule in zip((first, second), schedules, strict=True):
            optimizer.step()
            schedule.step(1.0)
        assert all(first.state[p]["step"] == step + 1 for p in a)
    assert first.param_groups[0]["lr"] == pytest.approx(2.5e-3)
    assert_same(everything(a, first), everything(b, second), rtol=5e-3, atol=5e-3)
    assert_same(everything(a[:2], first), everything(b[:2], second))


class counted:
    """The names of the kernels launched inside the block, in the interpreter."""

    def __enter__(self):
        self.names, self.before = [], interpreter.GridExecutor.__call__
        names, before = self.names, self.before

        def call(executor, *args, **kwargs):
            names.append(executor.fn.__name__)
            return before(executor, *args, **kwargs)

        interpreter.GridExecutor.__call__ = call
        return names

    def __exit__(self, *_):
        interpreter.GridExecutor.__call__ = self.before


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("count", [1, 40])
def test_launches_do_not_grow_with_the_number_of_tensors(count):
    params = parameters([(3,)] * count)
    optimizer = AdamW(params)
    for step in range(2):
        give_gradients(params, seed=step)
        with counted() as launches:
            optimizer.step()
        assert launches == ["prepare_kernel", "update_kernel"]


@pytest.mark.parametrize("setting", [{}, {"fused": True}], ids=["default", "fused"])
def test_steps_and_schedules_compile_nothing_new(setting):
    """The signature of each launch at steps 1, 2, 16 and 17, with the rate changing."""
    from fastlm.bench.capture import capture_launches

    params = parameters([(8192,), (100,)])
    optimizer = AdamW(params, **setting)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    with capture_launches("sm90") as capture:
        for _ in range(18):
            give_gradients(params)
            optimizer.step()
            schedule.step()
    assert len(capture.unique()) == 2
    assert {launch.name for launch in capture.unique()} == {"prepare_kernel", "update_kernel"}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("setting", [{}, {"fused": True}], ids=["default", "fused"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_run_moves_to_torch_and_back(ours, theirs, setting, amsgrad):
    """Both optimizers exchange state_dicts half-way and go on as the other would have."""
    a = parameters()
    b = twins(a)
    first = ours(a, lr=1e-2, amsgrad=amsgrad, **setting)
    second = theirs(b, lr=1e-2, amsgrad=amsgrad, **setting)
    for step in range(5):
        give_gradients(a, b, seed=step)
        first.step()
        second.step()
        if step in (1, 2):
            mine, other = copy.deepcopy(first.state_dict()), copy.deepcopy(second.state_dict())
            assert mine["param_groups"] == other["param_groups"]
            first.load_state_dict(other)
            second.load_state_dict(mine)
    assert_same(everything(a, first), everything(b, second))
    assert ran_kernels(first) == len(a)


@pytest.mark.usefixtures("kernels")
def test_a_checkpoint_file_goes_on_bit_for_bit(tmp_path):
    a = parameters()
    first = AdamW(a, lr=1e-2)
    for step in range(2):
        give_gradients(a, seed=step)
        first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    b = twins(a)
    second = AdamW(b, lr=1e-2)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(2, 4):
        give_gradients(a, b, seed=step)
        first.step()
        second.step()
    assert_same(everything(a, first), everything(b, second), rtol=0, atol=0)


def spread(t):
    """The same values with a last stride of 2."""
    return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]


LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "spread": spread,
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "channels last": lambda t: t.reshape(11, 17, 3, 1).contiguous(
        memory_format=torch.channels_last
    ),
}


@pytest.mark.parametrize("gradient", ["like the parameter", "row-major"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("setting", [{}, {"fused": True}], ids=["default", "fused"])
@pytest.mark.parametrize("where", ["kernels", "torch"])
def test_any_layout_of_a_parameter(where, setting, layout, gradient):
    """PyTorch 2.13's own fused CPU step is wrong for several of these."""
    values = parameters([(33, 17)])[0].detach()
    laid = LAYOUTS[layout](values)
    a = [torch.nn.Parameter(laid)]
    b = [torch.nn.Parameter(laid.contiguous())]
    assert a[0].stride() == laid.stride()
    first, second = AdamW(a, lr=1e-2, **setting), torch.optim.AdamW(b, lr=1e-2)
    with backend("auto" if where == "kernels" else "torch"), interpreted():
        for step in range(3):
            give_gradients(a, b, seed=step)
            if gradient == "row-major":
                a[0].grad = a[0].grad.contiguous()
            else:
                grad = torch.empty_strided(laid.shape, laid.stride())
                a[0].grad = grad.copy_(a[0].grad)
            first.step()
            second.step()
        assert ran_kernels(first) == (1 if where == "kernels" else 0)
    assert_same(everything(a, first), everything(b, second))
    assert first.state[a[0]]["exp_avg"].shape == a[0].shape


@pytest.mark.usefixtures("kernels")
def test_an_expanded_parameter_is_refused_as_torch_does():
    a = torch.nn.Parameter(torch.zeros(3).expand(4, 3))
    a.grad = torch.ones(4, 3)
    for kind in (AdamW, torch.optim.AdamW):
        with pytest.raises(RuntimeError, match="single memory location"):
            kind([a]).step()


@pytest.mark.usefixtures("kernels")
def test_parameters_without_gradients_keep_their_own_count():
    """Frozen, thawed, and added after the first steps."""
    a = parameters()
    b = twins(a)
    added = parameters([(6,)], seed=9)
    added += twins(added)
    first, second = AdamW(a, lr=1e-2), torch.optim.AdamW(b, lr=1e-2)
    for step, skip in enumerate([(1,), (), (0, 2), tuple(range(len(a))), ()]):
        give_gradients(a, b, seed=step, skip=skip)
        if step == 2:
            first.add_param_group({"params": added[:1], "lr": 0.1})
            second.add_param_group({"params": added[1:], "lr": 0.1})
        give_gradients(added[:1], added[1:], seed=step)
        first.step()
        second.step()
    assert_same(everything(a, first), everything(b, second))
    assert_same(everything(added[:1], first), everything(added[1:], second))


@pytest.mark.usefixtures("kernels")
def test_tensors_may_move_between_steps():
    """New storage behind a parameter, a state, or a step written by hand."""
    a = parameters()
    b = twins(a)
    first, second = AdamW(a, lr=1e-2), torch.optim.AdamW(b, lr=1e-2)
    for step in range(5):
        give_gradients(a, b, seed=step)
        if step == 1:
            a[0].data = a[0].data.clone()
        if step == 2:
            first.state[a[0]]["exp_avg"] = first.state[a[0]]["exp_avg"].clone()
        if step == 3:
            for p, optimizer in ((a[1], first), (b[1], second)):
                optimizer.state[p]["step"].fill_(10.0)
        if step == 4:
            for p, optimizer in ((a[2], first), (b[2], second)):
                optimizer.state[p]["exp_avg"].data = torch.ones(700)
        first.step()
        second.step()
    assert_same(everything(a, first), everything(b, second))


@pytest.mark.usefixtures("kernels")
def test_steps_out_of_the_kernels_reach_are_counted_on_the_host():
    """float64 steps, which torch makes under that default, stand for steps on another device."""
    torch.set_default_dtype(torch.float64)
    try:
        a = parameters()
        b = twins(a)
        first, second = AdamW(a, lr=1e-2), torch.optim.AdamW(b, lr=1e-2)
        for step in range(4):
            give_gradients(a, b, seed=step, skip=(0,) if step == 1 else ())
            first.step()
            second.step()
            if step == 2:
                first.state[a[0]]["step"].add_(5)
                second.state[b[0]]["step"].add_(5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(first._planned.host_steps) == 1
    assert_same(everything(a, first), everything(b, second))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", [torch.float64, torch.complex64])
def test_what_the_kernel_does_not_cover_is_torchs(kind):
    def make():
        torch.manual_seed(0)
        return [
            torch.nn.Parameter(torch.randn(5, 3)),
            torch.nn.Parameter(torch.randn(4, dtype=kind)),
        ]

    a, b = make(), make()
    first, second = AdamW(a), torch.optim.AdamW(b)
    for _ in range(3):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.ones_like(p)
            q.grad = torch.ones_like(q)
        first.step()
        second.step()
    assert ran_kernels(first) == 1
    assert_same(everything(a, first), everything(b, second))
    with backend("triton"), pytest.raises(RuntimeError, match=str(kind)):
        first.step()


@pytest.mark.usefixtures("kernels")
def test_sparse_gradients_raise_torchs_error():
    p = torch.nn.Parameter(torch.zeros(4, 2))
    optimizer = AdamW([p])
    p.grad = torch.zeros(4, 2)
    optimizer.step()
    p.grad = torch.zeros(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


@pytest.mark.usefixtures("kernels")
def test_differentiable_goes_through_torch():
    w = torch.randn(3, requires_grad=True)
    p = w.clone()
    p.grad = torch.randn(3)
    AdamW([p], lr=1e-2, differentiable=True).step()
    p.sum().backward()
    assert w.grad is not None


@pytest.mark.usefixtures("kernels")
def test_a_parameter_that_stands_twice_gets_torchs_treatment():
    a = parameters([(5,)])
    b = twins(a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = AdamW(a * 2), torch.optim.AdamW(b * 2)
    give_gradients(a, b)
    first.step()
    second.step()
    assert_same(everything(a, first), everything(b, second))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(overflow):
    """The scaler hands its scale to a fused step; an overflow changes nothing, not even a step."""
    a = parameters()
    b = twins(a)
    first, second = AdamW(a, lr=1e-2, fused=True), torch.optim.AdamW(b, lr=1e-2, fused=True)
    assert first._step_supports_amp_scaling
    assert copy.deepcopy(first)._step_supports_amp_scaling
    assert not AdamW(a)._step_supports_amp_scaling
    for step in range(3):
        for params, optimizer in ((a, first), (b, second)):
            give_gradients(params, seed=step)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            for p in params:
                scaler.scale(p.grad)
                p.grad *= 1024
            if overflow and step == 1:
                params[0].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
    assert_same(everything(a, first), everything(b, second))
    assert first.state[a[0]]["step"] == (2 if overflow else 3)


@pytest.mark.usefixtures("kernels")
def test_unscaled_gradients_are_not_unscaled_twice():
    a = parameters([(5,)])
    b = twins(a)
    for params, optimizer in ((a, AdamW(a, fused=True)), (b, torch.optim.AdamW(b))):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        give_gradients(params)
        scaler.scale(torch.ones(()))
        params[0].grad *= 4
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
    torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("kernels")
def test_a_nan_gradient_reaches_its_parameter_and_no_other():
    a = parameters([(700,), (5,)])
    optimizer = AdamW(a)
    give_gradients(a)
    a[0].grad[3] = float("nan")
    optimizer.step()
    assert a[0].isnan().nonzero().flatten().tolist() == [3]
    assert optimizer.state[a[0]]["exp_avg_sq"].isnan().sum() == 1
    assert not a[1].isnan().any()


@pytest.mark.usefixtures("kernels")
def test_deepcopy_and_hooks_and_closures():
    a = parameters()
    optimizer = AdamW(a, lr=1e-2)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        assert torch.is_grad_enabled()
        give_gradients(a)
        calls.append("closure")
        return torch.tensor(3.0)

    assert optimizer.step(closure) == 3.0
    assert calls == ["before", "closure", "after"]
    copied = copy.deepcopy(optimizer)
    assert copied._planned is None
    b = copied.param_groups[0]["params"]
    assert b[0] is not a[0]
    give_gradients(a, b, seed=1)
    optimizer.step()
    copied.step()
    assert_same(everything(b, copied), everything(a, optimizer), rtol=0, atol=0)
    with pytest.raises(AttributeError, match="torchs"):
        copied.torchs  # noqa: B018  no public attribute beside torch's
    assert {k for k in vars(optimizer) if not k.startswith("_")} == {
        k for k in vars(torch.optim.AdamW(parameters())) if not k.startswith("_")
    }


@pytest.mark.usefixtures("kernels")
def test_autograd_notices_that_the_step_wrote():
    w = torch.nn.Parameter(torch.randn(3))
    y = (w * w).sum()
    w.grad = torch.ones(3)
    AdamW([w]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("where", ["kernels", "torch"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_errors_are_torchs(ours, theirs, where):
    """PyTorch's own list of errors for this optimizer."""
    name = theirs.__name__
    info = next(o for o in common_optimizers.optim_db if o.name == name)
    with interpreted(), backend("auto" if where == "kernels" else "torch"):
        for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            given = error.optimizer_error_input
            if issubclass(error.error_type, Warning):
                with pytest.warns(error.error_type, match=error.error_regex):
                    ours(given.params, **given.kwargs)
            else:
                with pytest.raises(error.error_type, match=error.error_regex):
                    ours(given.params, **given.kwargs)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_agrees_with_pytorchs_own_configurations(ours, theirs, dtype):
    """The configurations of PyTorch's test of fused against the for-loop, and its tolerances."""
    info = next(o for o in common_optimizers.optim_db if o.name == theirs.__name__)
    rtol, atol = {torch.float32: (1.3e-6, 1e-5), torch.float64: (1e-7, 1e-7)}.get(
        dtype, (5e-3, 5e-3)
    )
    for given in info.optim_inputs_func(device="cpu", dtype=dtype):
        torch.manual_seed(1)
        a = torch.nn.Sequential(
            torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
        ).to(dtype)
        b = copy.deepcopy(a)
        first = ours(a.parameters(), **given.kwargs)
        second = theirs(b.parameters(), foreach=False, **given.kwargs)
        x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype).reshape(3, 2)
        for step in range(7):
            for model, optimizer in ((a, first), (b, second)):
                optimizer.zero_grad()
                model[2].requires_grad_(step not in (3, 4))
                if step != 2:
                    model(x).sum().backward()
                optimizer.step()
            mine = everything(list(a.parameters()), first)
            other = everything(list(b.parameters()), second)
            assert_same(mine, other, rtol, atol)
            with torch.no_grad():  # as torch's tracker: errors do not add up over the steps
                for name, t in mine.items():
                    t.copy_(other[name])


def test_the_cpu_path_is_torchs_fused_kernel():
    a = parameters()
    b = twins(a)
    first, second = AdamW(a, lr=1e-2), torch.optim.AdamW(b, lr=1e-2, fused=True)
    for step in range(3):
        give_gradients(a, b, seed=step)
        first.step()
        second.step()
    assert ran_kernels(first) == 0
    assert_same(everything(a, first), everything(b, second), rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
def test_torch_compile_sees_one_operator():
    a = parameters([(5, 3), (4,)])
    b = twins(a)
    first, second = AdamW(a, lr=1e-2), AdamW(b, lr=1e-2)
    graphs = []

    def look(graph, _):
        graphs.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(first.step, backend=look)
    for step in range(2):
        give_gradients(a, b, seed=step)
        compiled()
        second.step()
    assert_same(everything(a, first), everything(b, second), rtol=0, atol=0)
    assert [torch.ops.fastlm.adamw_step.default] in graphs


def test_explain_says_which_path_the_function_takes():
    lists = [[torch.zeros(3)] for _ in range(4)]
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
    arguments = (*lists, [], [torch.tensor(0.0)])
    assert "TRITON_INTERPRET" in explain(adamw_step, *arguments, **options)
    with interpreted():
        assert "interpreter" in explain(adamw_step, *arguments, **options)
        arguments = (*lists[:3], [torch.zeros(4)], [], [torch.tensor(0.0)])
        assert "shape" in explain(adamw_step, *arguments, **options)


def test_offsets_past_two_to_the_31_elements():
    """The last chunk of a tensor of 2^31 + 8200 bfloat16, in lazily mapped memory."""
    code = """
        import torch
        from fastlm.kernels.optim import plan, step
        from fastlm.kernels._interpreter import interpreted
        n = 2**31 + 8200
        lists = [[torch.empty(n, dtype=torch.bfloat16)] for _ in range(4)]
        for i, (t,) in enumerate(lists):
            t[-8200:] = i + 1
        whole = plan.Plan._bucket
        def last(self, kind, members):
            bucket = whole(self, kind, [(0, 1)])
            chunk = torch.tensor([[0, 2**31 // 8192 + 1]], dtype=torch.int32)
            return bucket._replace(chunks=chunk)
        plan.Plan._bucket = last
        small = [[t[-16:].clone()] for (t,) in lists]
        options = dict(lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8)
        with interpreted():
            step.adamw_step(*lists, [], [torch.tensor(1.0)], **options)
        step.reference(*small, [], [torch.tensor(1.0)], **options)
        for (t,), (s,) in zip(lists, small):
            torch.testing.assert_close(t[-8:], s[-8:])
            assert t[-16] == t[-17]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120, cwd="/")
