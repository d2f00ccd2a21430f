"""What is special about linear_cross_entropy: chunks, ranks, memory, targets, PyTorch's samples."""

import dataclasses
import itertools
import socket

import pytest
import test_ops
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import vocabulary_parallel
from harness import assert_within_contract, check, doubled, outcome
from memory_check import interp_check
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.bench.capture import capture_launches
from fastlm.kernels import OPS, LinearCrossEntropyLoss, backend, explain, linear_cross_entropy
from fastlm.kernels import linear_cross_entropy as op
from fastlm.kernels._dispatch import cpu_runner
from fastlm.kernels._interpreter import interpreted
from fastlm.kernels.linear_cross_entropy import tiles
from fastlm.kernels.linear_cross_entropy.eager import chunks_of
from fastlm.kernels.linear_cross_entropy.loss import ProjectedLoss

NAN = float("nan")
OP = OPS["linear_cross_entropy"]
KERNELS = pytest.mark.usefixtures("kernels")
EITHER = pytest.mark.parametrize("runs", [interpreted, lambda: backend("torch")])
IMPL = pytest.mark.parametrize("impl", ["chunked", "recompute"])
TORCH_HAS_IT = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="new in torch 2.13"
)


def inputs(N=5, H=20, V=70, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return OP.example(dtype, torch.device("cpu"), N=N, H=H, V=V, **options)


# --- values -------------------------------------------------------------------------------------


@IMPL
@EITHER
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_options_at_once(runs, impl, reduction):
    found = inputs(
        bias=True, weighted=True, label_smoothing=0.2, softcap=2.0, z_loss=0.05, impl=impl
    )
    found["target"] = torch.tensor([0, 3, 69, 3, 41])
    with runs():
        check(OP, found | {"reduction": reduction, "ignore_index": 3})


@EITHER
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_each_token(runs, dtype):
    """Every row's own incoming gradient reaches its own part of dx and dW, scale and all."""
    found = inputs(6, 16, 40, dtype, bias=True, reduction="none")
    scale = torch.tensor([1.0, -2.0, 0.0, 5.0, 0.25, 3.0])

    def weighed(call):
        def run(**options):
            loss = call(**options)
            return loss * scale.to(loss)

        return run

    with runs():
        fused = outcome(weighed(linear_cross_entropy), found)
    exact = outcome(weighed(OP.reference), doubled(found))
    assert_within_contract(fused, outcome(weighed(OP.reference), found), exact)


@IMPL
@EITHER
@pytest.mark.parametrize("chunk_size", [2, 1000])
def test_any_chunk_size_gives_the_same(runs, impl, chunk_size):
    found = inputs(5, 8, 150, bias=True)
    with runs():
        got = outcome(op, found | {"impl": impl, "chunk_size": chunk_size})
    for name, want in outcome(OP.reference, found).items():
        torch.testing.assert_close(got[name], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_past_a_strip(dtype, monkeypatch):
    """Blocks of rows in the backward: each its own part of dx, all of them in dW and dbias."""
    monkeypatch.setattr(tiles, "STRIP_ROWS", 16)
    found = inputs(40, 8, 150, dtype, bias=True, label_smoothing=0.1, impl="recompute")
    with interpreted():
        check(OP, found | {"chunk_size": 128})


@KERNELS
def test_weight_gradients_are_summed_in_float32():
    """Many chunks of equal parts: a sum in bfloat16 would stop growing at 256 of them."""
    rows = 400
    found = {
        "input": torch.ones(rows, 8, dtype=torch.bfloat16),
        "linear_weight": torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True),
        "target": torch.zeros(rows, dtype=torch.int64),
    }
    with cpu_runner(None):
        linear_cross_entropy(**found, reduction="sum", chunk_size=1).backward()
    want = torch.tensor([-0.5, 0.5]).repeat_interleave(8).view(2, 8) * rows
    torch.testing.assert_close(found["linear_weight"].grad.float(), want)


@KERNELS
def test_small_gradients_of_half_precision_survive_the_mean():
    """Times the divisor before they are summed over rows, they would all round to 0."""
    x = torch.ones(64, 4, dtype=torch.float16, requires_grad=True)
    matrix = torch.zeros(64, 4, dtype=torch.float16, requires_grad=True)
    loss = linear_cross_entropy(x, matrix, torch.zeros(64, dtype=torch.int64))
    (loss * 2.0**-13).backward()
    assert (matrix.grad[1:] == 2.0**-19).all()


@IMPL
@KERNELS
def test_infinities_and_nan(impl):
    """An infinite bias hides a class; NaN stays in its row and in what is summed over rows."""
    found = inputs(4, 8, 70, bias=True, reduction="none", impl=impl)
    bias = found["linear_bias"].detach().clone()
    bias[5] = -float("inf")
    found["linear_bias"] = bias.requires_grad_()
    found["target"] = torch.tensor([0, 1, 5, 69])
    fused, eager = outcome(op, found), outcome(OP.reference, found)
    assert fused["result"].isinf().tolist() == [False, False, True, False]
    assert_within_contract(fused, eager, outcome(OP.reference, doubled(found)))
    x = found["input"].detach().clone()
    x[1, 2] = NAN
    assert op(**(found | {"input": x})).isnan().tolist() == [False, True, False, False]


# --- targets ------------------------------------------------------------------------------------


@IMPL
@EITHER
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_targets_ignored(runs, impl, reduction):
    """NaN for the mean and 0 for the sum, gradients of 0: PyTorch's answer."""
    found = inputs(bias=True, impl=impl, reduction=reduction)
    found["target"][:] = -100
    with runs():
        got = outcome(op, found)
    for name, want in outcome(OP.reference, found).items():
        torch.testing.assert_close(got[name], want, equal_nan=True, rtol=0, atol=0)


@IMPL
def test_targets_outside(impl):
    """NaN from the kernels, which read nothing outside; PyTorch's error on the CPU path."""
    found = inputs(4, 8, 33, weighted=True, label_smoothing=0.1, impl=impl)
    found["target"] = torch.tensor([0, 33, -1, 2**40])
    with interpreted(), interp_check():
        assert op(**found).isnan()
        if impl == "recompute":
            assert op(**found, reduction="none").isnan().tolist() == [False, True, True, True]
    with pytest.raises(IndexError, match="Target 33 is out of bounds"):
        op(**found)


# --- memory -------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """The most elements that any result of PyTorch's ops had."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                self.seen = max(self.seen, t.numel())
        return result


def peak_elements(found, monkeypatch):
    """Of the largest tensor inside our operators, forward and backward."""
    largest = _Largest()
    fresh = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        result = fresh(self, *shape, **options)
        largest.seen = max(largest.seen, result.numel())
        return result

    def linear(*args):
        result = torch._C._nn.linear(*args)
        largest.seen = max(largest.seen, result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(F, "linear", linear)
    monkeypatch.setattr(tiles, "STRIP_BYTES", 128 * 20 * 4)
    with largest:
        op(**found).backward()
    return largest.seen


@IMPL
@EITHER
def test_logits_are_never_whole(runs, impl, monkeypatch):
    """No tensor on the way has as many elements as all logits, or as half of them."""
    found = inputs(20, 4, 640, impl=impl)
    if impl == "chunked" or runs is not interpreted:
        found["chunk_size"] = 5
    with runs():
        assert peak_elements(found, monkeypatch) <= 20 * 640 / 4


@KERNELS
def test_saved_for_backward():
    """chunked: its gradients, dW in float32. recompute: 12 bytes a row and nothing else."""
    for impl, want in (("chunked", 6 * 16 * 2 + 70 * 16 * 4), ("recompute", 6 * 3 * 4)):
        found = inputs(6, 16, 70, torch.bfloat16, impl=impl, reduction="sum")
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            op(**found)
        given = {t.data_ptr() for t in found.values() if isinstance(t, torch.Tensor)}
        own = {t.data_ptr(): t.nbytes for t in saved if t.data_ptr() not in given}
        assert sum(own.values()) == want


@EITHER
def test_inputs_are_left_alone_and_graphs_may_be_retained(runs):
    found = inputs(bias=True)
    with runs():
        loss = op(**found)
        wanted = [found[n] for n in ("input", "linear_weight", "linear_bias")]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted)
    assert all(map(torch.equal, first, second))
    assert all(t._version == 0 for t in wanted)


def test_the_default_chunk_is_a_budget_of_memory():
    """Rows by equal shares, and enough of them that dW is not read and written all the time."""
    x = torch.empty(8192, 1, dtype=torch.bfloat16)
    for V, rows in ((50257, 640), (128256, 256)):
        chunks = chunks_of(x, V, None)
        assert {c.stop - c.start for c in chunks[:-1]} == {rows}
        assert rows * V * 2 <= 64 << 20
        assert [c.start for c in chunks[1:]] == [c.stop for c in chunks[:-1]]
        assert chunks[-1].stop == 8192
    assert [c.stop for c in chunks_of(x[:7], 10, 3)] == [3, 6, 7]


def test_the_host_never_waits_for_the_device(monkeypatch):
    """No value of a tensor is asked for, forward or backward, in any mode of the kernels."""

    def refuse(*args, **options):
        raise AssertionError("a value of a tensor was asked for")

    for options in ({}, {"impl": "recompute"}, {"reduction": "none"}, {"chunk_size": 2}):
        found = inputs(bias=True, weighted=True, label_smoothing=0.1, **options)
        with capture_launches("sm_90") as capture, monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "nonzero"):
                patch.setattr(torch.Tensor, name, refuse)
            op(**found).sum().backward()
        assert len(capture.launches) >= 1


@KERNELS
def test_recomputed_losses_pass_the_generic_tests_too():
    """PyTorch's check of the operators, compilation without a break, second derivatives."""
    size = {"N": 3, "H": 8, "V": 40, "bias": True, "impl": "recompute", "reduction": "none"}
    other = dataclasses.replace(OP, sizes=(size,))
    test_ops.test_opcheck(other)
    test_ops.test_compiles_without_a_graph_break(other)
    test_ops.test_compiles_on_the_cpu_path(other)
    test_ops.test_second_derivatives_come_from_pytorch(other)


# --- ranks --------------------------------------------------------------------------------------


def test_two_ranks_with_half_the_vocabulary_each_equal_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        shared = manager.dict()
        ranks = vocabulary_parallel.RANKS
        mp.spawn(vocabulary_parallel.one_rank, (port, shared), nprocs=ranks)
        of_ranks = [shared[n] for n in range(ranks)]
    runs = itertools.product(vocabulary_parallel.CASES, ("eager", "interpreted"))
    for i, (options, _) in enumerate(runs):
        want = vocabulary_parallel.loss_and_gradients(*vocabulary_parallel.inputs(), **options)
        parts = [found[i] for found in of_ranks]
        for loss, dx, *_ in parts:
            torch.testing.assert_close(loss, want[0])
            torch.testing.assert_close(dx, want[1])
        for n in (2, 3):
            torch.testing.assert_close(torch.cat([part[n] for part in parts]), want[n])


# --- PyTorch ------------------------------------------------------------------------------------


@TORCH_HAS_IT
@pytest.mark.parametrize("name", ["nn.functional.linear_cross_entropy"])
def test_samples_of_pytorch(name):
    """PyTorch's OpInfo, error inputs included, on the CPU path; each twentieth interpreted."""
    from torch.testing._internal.common_methods_invocations import op_db

    infos = [info for info in op_db if info.name == name]
    assert infos
    kernels = 0
    for info in infos:
        torch.manual_seed(0)
        samples = info.sample_inputs("cpu", torch.float32, requires_grad=True)
        for i, sample in enumerate(samples):
            found = dict(zip(("linear_weight", "target"), sample.args, strict=True))
            found |= {"input": sample.input, **sample.kwargs}
            want = outcome(OP.reference, found)
            with interpreted() if i % 20 == 0 else cpu_runner(None):
                kernels += "interpreter" in explain(op, **found)
                got = outcome(op, found)
            for name, value in want.items():
                torch.testing.assert_close(got[name], value, equal_nan=True)
            torch.testing.assert_close(
                F.linear_cross_entropy(
                    sample.input, *sample.args, **(sample.kwargs | {"options": None})
                ),
                want["result"],
                equal_nan=True,
            )
        for error in info.error_inputs("cpu"):
            sample = error.sample_input
            with pytest.raises(error.error_type, match=error.error_regex):
                op(sample.input, *sample.args, **sample.kwargs)
    assert kernels >= 3


def test_options_out_of_range():
    found = inputs()
    for runs in (interpreted, lambda: backend("torch")):
        for option, value, said in (
            ("impl", "fast", "impl must be 'chunked' or 'recompute'; got 'fast'"),
            ("chunk_size", 0, "chunk_size must be 1 or more; got 0"),
            ("z_loss", -1.0, "z_loss must be 0, for none, or positive; got -1.0"),
        ):
            with runs(), pytest.raises(ValueError, match=said):
                op(**found, **{option: value})
    with pytest.raises(ValueError, match="process_group must come with class numbers"):
        op(found["input"], found["linear_weight"], torch.rand(5, 70), process_group="any")


@EITHER
def test_autocast_multiplies_in_half_and_gives_float32(runs):
    found = inputs(bias=True)
    with runs(), torch.autocast("cpu", torch.bfloat16):
        loss = op(**found)
        want = OP.reference(**found)
    assert loss.dtype == want.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=1e-2, atol=1e-2)
    loss.backward()
    assert found["input"].grad.dtype == torch.float32


def test_transforms_and_float64_go_by_pytorch():
    found = inputs(dtype=torch.float64)
    got, want = outcome(op, found), outcome(OP.reference, found)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
    x, matrix, target = found["input"], found["linear_weight"], found["target"]
    gradient = torch.func.grad(lambda x: op(x, matrix, target))(x)
    (expected,) = torch.autograd.grad(OP.reference(x, matrix, target), x)
    torch.testing.assert_close(gradient, expected)


@EITHER
@pytest.mark.parametrize(
    "base", [ProjectedLoss, getattr(nn, "LinearCrossEntropyLoss", ProjectedLoss)]
)
def test_the_module(runs, base):
    """PyTorch's parameters and state_dict, with torch's own class and with our stand-in for it."""
    assert issubclass(LinearCrossEntropyLoss, getattr(nn, "LinearCrossEntropyLoss", ProjectedLoss))
    options = {"bias": True, "weight": torch.rand(30), "label_smoothing": 0.1, "ignore_index": 3}
    torch.manual_seed(0)
    ours = LinearCrossEntropyLoss(8, 30, z_loss=0.1, impl="recompute", **options)
    twin = base(8, 30, **options)
    twin.load_state_dict(ours.state_dict())
    x, target = torch.randn(4, 8), torch.tensor([0, 3, 29, 7])
    with runs():
        loss = ours(x, target)
        loss.backward()
    want = OP.reference(
        x, twin.linear.weight, target, linear_bias=twin.linear.bias, weight=twin.weight,
        label_smoothing=twin.label_smoothing, ignore_index=twin.ignore_index, z_loss=0.1,
    )  # fmt: skip
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(ours.linear.weight.grad, twin.linear.weight.grad)


def test_the_module_of_several_outputs_goes_by_pytorch():
    loss = LinearCrossEntropyLoss(5, 6, out_features=(2,), bias=True)
    x, target = torch.randn(3, 5), torch.randint(0, 6, (3, 2))
    logits = loss.linear(x).view(3, 6, 2)
    torch.testing.assert_close(loss(x, target), F.cross_entropy(logits, target))
