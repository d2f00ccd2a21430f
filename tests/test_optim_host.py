"""What a step does on the host: which hooks run, what is looked up again, what never waits."""

import warnings

import pytest
import torch
from test_adamw import assert_same, everything, give_gradients, parameters, ran_kernels, twins
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from fastlm.bench.capture import capture_launches
from fastlm.kernels import AdamW, Muon
from fastlm.kernels.optim import fused, plan
from fastlm.kernels.optim.kernels import prepare_kernel, update_kernel

MATRICES = ((20, 33), (5,), (20, 33))


class Compiled(CompiledKernel):
    """Stands in for machine code: it notes what it is launched with."""

    src = function = module = packed_metadata = None

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def _init_handles(self):
        pass

    @property
    def run(self):
        return self._note

    def _note(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        self.launched.append((self.name, (x, y, z), args))


class Seen:
    """What Triton looked up and launched since the last ``take``."""

    def __init__(self):
        self.looked_up, self.launched = [], []

    def take(self):
        found = list(self.looked_up), list(self.launched)
        self.looked_up.clear()
        self.launched.clear()
        return found


@pytest.fixture
def launches(monkeypatch):
    """Everything up to a compiled kernel is Triton's own."""
    seen, run = Seen(), JITFunction.run
    with capture_launches("sm90"):
        record = JITFunction._do_compile

        def compiled_once(function, key, signature, device, *rest):
            record(function, key, signature, device, *rest)  # so that capture clears the cache
            kernel = Compiled(function.fn.__name__, seen.launched)
            function.device_caches[device][0][key] = kernel
            return kernel

        def looked_up(function, *args, **kwargs):
            seen.looked_up.append(function.fn.__name__)
            return run(function, *args, **kwargs)

        JITFunction._do_compile = compiled_once  # capture puts Triton's own back
        monkeypatch.setattr(JITFunction, "run", looked_up)
        yield seen


def comparable(launched):
    """Launches without what differs from step to step: a new tensor for the norm."""
    return [
        (name, grid, [(x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for x in args])
        for name, grid, args in launched
    ]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamW, {"max_grad_norm": 0.5}),
        (AdamW, {"state_dtype": torch.float32, "rounding": "stochastic", "cautious": True}),
        (Muon, {"ns_steps": 1, "seed": 3}),
    ],
)
def test_a_kernel_is_looked_up_once_and_launched_with_the_same_arguments(launches, kind, options):
    params = parameters(MATRICES) + parameters(((7,),), torch.bfloat16)
    optimizer = kind(params, **options)
    give_gradients(params)
    optimizer.step()
    looked_up, first = launches.take()
    assert len(looked_up) == len(first)
    for step in range(2):
        give_gradients(params, seed=step)
        optimizer.step()
        looked_up, again = launches.take()
        products = [name for name in looked_up if name in ("symmetric_kernel", "product_kernel")]
        assert looked_up == products  # of which there are as many as matrices have shapes
        assert comparable(again) == comparable(first)


def test_what_a_kernel_is_compiled_for_is_looked_up_when_it_changes(launches):
    params = parameters(MATRICES)
    optimizer = AdamW(params, fused=True, rounding="stochastic")
    give_gradients(params)
    optimizer.step()
    launches.take()
    scale = torch.ones(5)
    for given in (scale[0], scale[1], scale[4]):  # the second is no multiple of 16 bytes
        optimizer.grad_scale, optimizer.found_inf = given, torch.zeros(())
        optimizer.step()
    assert launches.take()[0] == ["prepare_kernel"] * 2
    optimizer.param_groups[0]["seed"] = 2**40
    optimizer.step()
    looked_up, launched = launches.take()
    assert looked_up == ["prepare_kernel", "update_kernel"]
    assert launched[-1][2][5] == 2**40


def test_gradients_off_a_multiple_of_16_bytes_get_another_kernel(launches):
    params = parameters(((8,), (5,)))
    optimizer = AdamW(params)
    give_gradients(params)
    aligned = []
    for memory in (torch.zeros(8), torch.zeros(8), torch.zeros(9)[1:], torch.zeros(8)):
        params[0].grad = memory
        optimizer.step()
        looked_up, launched = launches.take()
        place = update_kernel.arg_names.index("ALIGNED")
        aligned += [
            (len(looked_up), [args[place] for name, _, args in launched if name == "update_kernel"])
        ]
    assert aligned == [(2, [True]), (0, [True]), (3, [False, True]), (2, [True])]


def test_a_hook_of_triton_sees_every_launch(launches, monkeypatch):
    params = parameters(MATRICES)
    optimizer = AdamW(params)
    give_gradients(params)
    optimizer.step()
    seen = []
    monkeypatch.setattr(prepare_kernel, "pre_run_hooks", [lambda *_, **__: seen.append(1)])
    optimizer.step()
    assert len(seen) == 1


def test_hooks_run_as_torchs_do():
    """Of all optimizers and of one; a hook may give the step other arguments."""
    params = parameters(MATRICES)
    give_gradients(params)

    class Own(AdamW):
        def step(self, closure=None):
            calls.append("own")
            return super().step(closure)

    for kind in (AdamW, torch.optim.AdamW, Own):
        optimizer, calls = kind(params), []
        note = calls.append
        handles = [
            register_optimizer_step_pre_hook(lambda *_, note=note: note("before all")),
            register_optimizer_step_post_hook(lambda *_, note=note: note("after all")),
            optimizer.register_step_pre_hook(lambda o, args, _: (args[:1], {"closure": loss})),
            optimizer.register_step_post_hook(lambda *_, note=note: note("after")),
        ]

        def loss(note=note):
            note("closure")
            return 3.0

        try:
            assert optimizer.step() == 3.0
        finally:
            for handle in handles:
                handle.remove()
        own = ["own"] if kind is Own else []
        assert calls == ["before all", *own, "closure", "after", "after all"]
        optimizer.step()
        assert calls[5 if kind is Own else 4 :] == own
    optimizer, calls = AdamW(params), []
    for registers in (
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
    ):
        handle = registers(lambda *_: calls.append(1))
        optimizer.step()
        handle.remove()
        optimizer.step()
    assert len(calls) == 4
    optimizer.register_step_pre_hook(lambda *_: 1)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


def test_a_profile_has_the_steps_range():
    params = parameters(MATRICES)
    give_gradients(params)
    optimizer = AdamW(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}


def test_schedules_see_that_the_step_came_first():
    params = parameters(MATRICES)
    give_gradients(params)
    optimizer = AdamW(params)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        schedule.step()
    assert optimizer._opt_called


@pytest.mark.usefixtures("kernels")
def test_a_gradient_may_change_where_it_lies():
    """Another dtype, order of elements or none at the same address, and the same object."""
    a = parameters(((4, 4),))
    b = twins(a)
    first, second = AdamW(a, lr=1e-2), torch.optim.AdamW(b, lr=1e-2)
    give_gradients(a, b)
    memory, address = a[0].grad, a[0].grad.data_ptr()
    for step in range(6):
        if step in (1, 2):
            a[0].grad.t_()
        if step == 3:
            low = memory.view(torch.bfloat16).flatten()[:16].view(4, 4)
            a[0].grad.data = low.fill_(0.5)
            assert a[0].grad.dtype == torch.bfloat16
        if step == 4:
            a[0].grad = None
        if step == 5:
            a[0].grad = memory.float()
        if step < 4:
            assert a[0].grad.data_ptr() == address
        b[0].grad = None if a[0].grad is None else a[0].grad.float()
        first.step()
        second.step()
    assert ran_kernels(first) == 1
    assert_same(everything(a, first), everything(b, second))


class Operators(TorchDispatchMode):
    """The operators of PyTorch that ran inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_captured_step_reads_nothing_back_and_sends_nothing(launches, monkeypatch):
    """What a CUDA graph needs, on the CPU: kernels, one new scalar, and lr copied on the device."""
    monkeypatch.setattr(fused, "_on_device", lambda x: True)
    sent = []
    to_send = plan._to_send
    monkeypatch.setattr(plan, "_to_send", lambda *args: (sent.append(1), to_send(*args))[1])
    params = parameters(MATRICES)
    rate = torch.tensor(1e-2)
    optimizer = AdamW(params, lr=rate, capturable=True, fused=True, max_grad_norm=1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    give_gradients(params)
    optimizer.step()
    assert sent
    sent.clear()
    launches.take()
    with Operators() as operators:
        for _ in range(2):
            rate.mul_(0.5)
            optimizer.step()
    looked_up, launched = launches.take()
    assert not looked_up
    assert not sent
    assert [name for name, *_ in launched] == [
        "squares_kernel",
        "prepare_kernel",
        "update_kernel",
    ] * 2
    one = ["mul_", "slice", "empty", "select", "select", "squeeze", "copy_"]
    assert sorted(operators.names) == sorted(2 * one)
    tables = [
        [x.data_ptr() for x in args if isinstance(x, torch.Tensor) and x.dim() > 0]
        for *_, args in launched
    ]
    assert tables[:3] == tables[3:]


def test_a_rate_is_written_where_an_earlier_graph_reads_it(launches):
    params = parameters(MATRICES)
    optimizer = AdamW(params)
    give_gradients(params)
    optimizer.step()
    (table,) = {p.hyper.data_ptr() for p, _ in optimizer._planned.plans}
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    ((tables, _),) = optimizer._planned.plans
    assert tables.hyper.data_ptr() == table
    assert tables.hyper[0, 0] == 0.25


def test_a_capture_that_would_copy_from_the_host_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="take an uncaptured step first"):
        plan._to_send(torch.zeros(3), torch.device("cuda"))
