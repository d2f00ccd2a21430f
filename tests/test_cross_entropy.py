"""What is special about cross_entropy: values, targets, options, memory, PyTorch's samples."""

import pytest
import torch
import torch.nn.functional as F
from harness import assert_within_contract, check, doubled, outcome
from memory_check import interp_check

from fastlm.bench.capture import capture_launches, sass_ops
from fastlm.kernels import OPS, CrossEntropyLoss, backend, cross_entropy, explain
from fastlm.kernels._interpreter import interpreted

INF, NAN = float("inf"), float("nan")
OP = OPS["cross_entropy"]
KERNELS = pytest.mark.usefixtures("kernels")


def inputs(M, V, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return OP.example(dtype, torch.device("cpu"), M=M, V=V, **options)


# --- values -------------------------------------------------------------------------------------


@KERNELS
@pytest.mark.parametrize("shift", [-1e4, 1e6])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_shift_of_the_logits_costs_no_accuracy(shift, label_smoothing):
    torch.manual_seed(0)
    V = 1500
    x = (torch.randn(2, V) * 64).round() / 64  # exact in float32 after the shift, nearly
    target = torch.randint(0, V, (2,))

    def loss_and_gradient(x):
        x = x.clone().requires_grad_()
        loss = cross_entropy(x, target, label_smoothing=label_smoothing)
        return loss, *torch.autograd.grad(loss, x)

    shifted = x + shift
    for got, want in zip(
        loss_and_gradient(shifted), loss_and_gradient(shifted - shift), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)


@KERNELS
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("V", [12, 700])
def test_infinities_and_nan(V, probabilities):
    """In place of logits, of the first half, of a whole row: NaN and inf just where PyTorch has."""
    found = inputs(7, V, probabilities=probabilities, reduction="none")
    x = found["input"].detach().clone()
    x[0, 3] = -INF
    x[1, : V // 2] = -INF
    x[2] = -INF
    x[3, 5] = INF
    x[4, 7] = NAN
    x[5, 1:] = -INF
    found["input"] = x.requires_grad_()
    if not probabilities:
        found["target"] = torch.tensor([3, V - 1, 0, 5, 0, 0, 1])
    fused, eager = outcome(OP.fused, found), outcome(OP.reference, found)
    assert fused["result"].isnan()[2:5].all()
    assert_within_contract(fused, eager, outcome(OP.reference, doubled(found)))


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_confident_row_at_its_class(dtype):
    """Were p rounded to half precision before 1 is taken off, it would be 0 or a unit off."""
    V = 1000
    x = torch.zeros(4, V)
    x[range(4), [0, 7, 500, 999]] = torch.tensor([12.0, 13.0, 14.0, 16.0])
    x = x.to(dtype).requires_grad_()
    target = torch.tensor([0, 7, 500, 999])
    cross_entropy(x, target, reduction="sum").backward()
    exact = x.detach().double().softmax(1)[range(4), target] - 1
    got = x.grad[range(4), target].double()
    torch.testing.assert_close(got, exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


@KERNELS
def test_logits_all_below_a_negative_number():
    """A running maximum that starts at 0 gives -inf below about -105."""
    check(OP, {"input": (torch.randn(3, 70) - 3000).requires_grad_(), "target": torch.arange(3)})


@KERNELS
@pytest.mark.parametrize("V", [2, 7, 9, 513])
@pytest.mark.parametrize("stride", [0, 2])
def test_rows_that_start_anywhere(V, stride):
    """Heads and tails of every length around the aligned part, in bfloat16."""
    torch.manual_seed(0)
    wide = torch.full((5, V + stride), NAN, dtype=torch.bfloat16)
    wide[:, :V] = torch.randn(5, V)
    x = wide[:, :V].requires_grad_()
    found = {"input": x, "target": torch.randint(0, V, (5,)), "label_smoothing": 0.2}
    with interp_check():
        got = outcome(OP.fused, found)
    exact = outcome(OP.reference, doubled(found))
    assert_within_contract(got, outcome(OP.reference, found), exact)


# --- targets ------------------------------------------------------------------------------------


@KERNELS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_targets_ignored(reduction):
    """NaN for the mean and 0 else, a gradient of 0: PyTorch's answer."""
    found = inputs(4, 40, z_loss=0.0, reduction=reduction)
    found["target"][:] = -100
    fused, eager = outcome(OP.fused, found), outcome(OP.reference, found)
    for name, want in eager.items():
        torch.testing.assert_close(fused[name], want, rtol=0, atol=0, equal_nan=True)
    assert (fused["gradient of ['input']"] == 0).all()


@KERNELS
@pytest.mark.parametrize("wants_lse", [False, True])
def test_ignored_rows_of_nan_cost_nothing(wants_lse):
    """Rows to ignore are not even read, but for their lse."""
    found = inputs(3, 50, softcap=2.0)
    x = found["input"].detach()
    x[1] = NAN
    x.requires_grad_()
    result = cross_entropy(
        x, torch.tensor([1, 5, 2]), ignore_index=5, softcap=2.0, return_lse=wants_lse
    )
    loss = result[0] if wants_lse else result
    loss.backward()
    assert loss.isfinite()
    if wants_lse:
        assert result[1].isnan().tolist() == [False, True, False]
    else:
        assert (x.grad[1] == 0).all()
    assert x.grad[[0, 2]].isfinite().all()


@KERNELS
@pytest.mark.parametrize("ignore_index", [0, 1, 16, -1, 10**10])
def test_any_ignore_index(ignore_index):
    found = inputs(6, 30, weighted=True)
    found["target"] = torch.tensor([0, 1, 16, 2, ignore_index, 29])
    check(OP, found | {"ignore_index": ignore_index})


@KERNELS
def test_targets_outside_give_nan_and_read_nothing():
    """On a GPU: there is nobody to raise to. Other rows are as ever."""
    V = 33
    for weighted in (False, True):
        found = inputs(4, V, weighted=weighted, reduction="none", label_smoothing=0.1)
        found["target"] = torch.tensor([0, V, -1, 2**40])
        with interp_check():
            got = outcome(OP.fused, found)
        for name in ("result", "gradient of ['input']"):
            whole = got[name].reshape(4, -1)
            assert whole[0].isfinite().all()
            assert whole[1:].isnan().all()


def test_targets_outside_raise_on_the_cpu_path():
    for target in (7, -1):
        with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
            cross_entropy(torch.randn(2, 5), torch.tensor([1, target]))


@KERNELS
@pytest.mark.parametrize("shape", [(5,), (2, 5, 2), (1, 5, 1, 3), (2, 5, 1, 0)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_shapes_of_every_kind(shape, probabilities):
    torch.manual_seed(0)
    x = torch.randn(shape)
    rest = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.rand(shape) if probabilities else torch.randint(0, 5, rest)
    found = {"input": x.requires_grad_(), "target": target, "weight": torch.rand(5)}
    check(OP, found | {"label_smoothing": 0.1})
    if x.numel():
        more = {"softcap": 3.0, "z_loss": 0.1, "return_lse": True, "reduction": "none"}
        check(OP, found | more)


# --- options ------------------------------------------------------------------------------------


@KERNELS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_options_at_once(reduction):
    found = inputs(5, 90, torch.bfloat16, weighted=True, reduction=reduction, label_smoothing=0.3)
    found["target"] = torch.tensor([0, 3, 89, 3, 41])
    check(OP, found | {"softcap": 2.0, "z_loss": 0.05, "return_lse": True, "ignore_index": 3})


@KERNELS
def test_lse_is_differentiable_alone_and_for_ignored_rows():
    found = inputs(4, 60)
    found["target"][:2] = -100
    x = found["input"]
    _, lse = cross_entropy(**found, return_lse=True)
    torch.testing.assert_close(lse, x.logsumexp(1))
    (got,) = torch.autograd.grad(lse.square().sum(), x)
    (want,) = torch.autograd.grad(x.logsumexp(1).square().sum(), x)
    torch.testing.assert_close(got, want)


@KERNELS
def test_z_loss_is_the_square_of_lse():
    found = inputs(8, 60)
    x, target = found["input"], found["target"]
    counts = target != -100
    extra = cross_entropy(x, target, z_loss=0.5) - cross_entropy(x, target)
    torch.testing.assert_close(extra, 0.5 * x.logsumexp(1)[counts].square().mean())


def test_a_softcap_fits_the_budget_of_special_functions():
    """2.5 a logit keep the forward of half precision bound by memory on an H100."""
    x = torch.empty(8, 50304, dtype=torch.bfloat16)
    with capture_launches("sm_90") as capture:
        cross_entropy(x, torch.zeros(8, dtype=torch.int64), softcap=30.0)
    launch = capture.launches[0]
    special = sum(n for op, n in sass_ops(launch.compile()).items() if op.startswith("MUFU"))
    a_thread = launch.meta["BLOCK"] / (32 * launch.options.get("num_warps", 4))
    of_a_row = 6  # the target's own logit, lanes joined, a logarithm
    assert special - of_a_row <= 2.5 * a_thread


def test_values_of_options_do_not_recompile():
    """Smoothing, z-loss and softcap are arguments at run time; only whether they are 0 is not."""
    keys = set()
    for value in (0.1, 0.2, 1.0):
        with capture_launches("sm_90") as capture:
            x = torch.empty(16, 256, requires_grad=True)
            target = torch.zeros(16, dtype=torch.int64)
            cross_entropy(
                x, target, label_smoothing=value, z_loss=value, softcap=value, ignore_index=-3
            ).backward()
        keys.add(tuple(launch.key() for launch in capture.launches))
    assert len(keys) == 1


@KERNELS
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_legacy_reductions():
    found = inputs(4, 10)
    x, target = found["input"], found["target"]
    for size_average, reduce in [(None, False), (False, None), (True, True), (False, True)]:
        got = cross_entropy(x, target, None, size_average, -100, reduce)
        torch.testing.assert_close(
            got, F.cross_entropy(x, target, None, size_average, -100, reduce)
        )


def test_errors_are_those_of_pytorch():
    """The kernel leaves every call that PyTorch refuses to PyTorch."""
    x, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    wrong = [
        (x, target.int(), {}),
        (x, target[:2], {}),
        (x, target, {"weight": torch.rand(4)}),
        (x, target, {"weight": torch.rand(5).double()}),
        (x, target, {"label_smoothing": 1.5}),
        (x, target, {"reduction": "all"}),
        (x, torch.zeros(3, 5, dtype=torch.int64), {}),
        (x.long(), target, {}),
    ]
    for input, of, options in wrong:
        with pytest.raises((RuntimeError, ValueError, IndexError, NotImplementedError)) as theirs:
            F.cross_entropy(input, of, **options)
        for context in (backend("torch"), interpreted()):
            with context, pytest.raises(theirs.type) as ours:
                cross_entropy(input, of, **options)
            assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("runs", [interpreted, lambda: backend("torch")])
def test_options_out_of_range(runs):
    x, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with runs():
        with pytest.raises(ValueError, match="z_loss must be 0, for none, or positive; got -1"):
            cross_entropy(x, target, z_loss=-1)
        with pytest.raises(ValueError, match="softcap must be 0, for none, or positive; got inf"):
            cross_entropy(x, target, softcap=INF)
    with pytest.raises(ValueError, match="softcap must be"):
        CrossEntropyLoss(softcap=-3.0)


@KERNELS
def test_second_derivatives_of_loss_and_lse():
    """Through PyTorch's own graph, of each output alone and of both."""
    found = inputs(3, 12, softcap=2.0, z_loss=0.1, return_lse=True)
    x = found["input"]

    def curvature(call, a, b):
        loss, lse = call(**found)
        (g,) = torch.autograd.grad(a * loss + b * lse.sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    for a, b in ((1.0, 0.0), (0.0, 1.0), (2.0, -1.0)):
        torch.testing.assert_close(curvature(cross_entropy, a, b), curvature(OP.reference, a, b))


def test_the_host_never_waits_for_the_device(monkeypatch):
    """No value of a tensor is asked for, forward or backward."""

    def refuse(*args, **options):
        raise AssertionError("a value of a tensor was asked for")

    for options in ({}, {"label_smoothing": 0.1, "weighted": True}, {"probabilities": True}):
        found = inputs(4, 40, **options)
        with capture_launches("sm_90") as capture, monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "nonzero"):
                patch.setattr(torch.Tensor, name, refuse)
            cross_entropy(**found).backward()
        assert [launch.name for launch in capture.launches] == [
            "_forward_kernel",
            "_reduce_kernel",
            "_backward_kernel",
        ]


# --- memory -------------------------------------------------------------------------------------


@KERNELS
def test_logits_are_left_alone():
    x = torch.randn(3, 20, requires_grad=True)
    logits = x * 1
    before = logits.detach().clone()
    cross_entropy(logits, torch.tensor([1, 2, 3]), softcap=2.0).backward()
    assert logits._version == 0
    assert torch.equal(logits, before)


@KERNELS
def test_inplace_backward_reuses_the_logits_and_says_so():
    target = torch.tensor([1, -100, 3])
    leaf = torch.randn(3, 21, requires_grad=True)
    (want,) = torch.autograd.grad(cross_entropy(leaf, target), leaf)
    logits = leaf + 0
    loss = cross_entropy(logits, target, inplace_backward=True)
    assert logits._version == 0
    (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(got, want)
    assert got.data_ptr() == logits.data_ptr()
    assert logits._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)
    with pytest.raises(ValueError, match="must not be used on a leaf"):
        cross_entropy(leaf, target, inplace_backward=True)


@KERNELS
@pytest.mark.parametrize(("label_smoothing", "a_row"), [(0.0, 8), (0.1, 12)])
def test_saved_for_backward(label_smoothing, a_row):
    """The logits and targets themselves, 8 bytes a row, 4 for the mean; 4 a row for smoothing."""
    x = torch.randn(6, 500, requires_grad=True)
    target = torch.randint(0, 500, (6,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy(x, target, label_smoothing=label_smoothing)
    own = {t.data_ptr(): t.nbytes for t in saved}
    assert own.pop(x.data_ptr())
    assert own.pop(target.data_ptr())
    assert sum(own.values()) == 6 * a_row + 4


@KERNELS
@pytest.mark.parametrize("n", [1, 4, 7, 8])
def test_a_padded_view_keeps_its_distance_to_boundaries(n):
    """The gradient of padded[:, :V] lies as the logits do, so that both move 16 bytes at a time."""
    x = torch.randn(3, 520, dtype=torch.bfloat16)[:, : 512 + n].requires_grad_()
    (dx,) = torch.autograd.grad(cross_entropy(x, torch.tensor([0, 1, 2])), x)
    assert (dx.stride(0) - x.stride(0)) % 8 == 0
    assert dx.stride(0) - x.shape[1] < 8


@KERNELS
def test_rows_past_two_to_the_31_elements():
    """Rows a gigabyte apart in memory that is mapped and never touched between them."""
    stride = 2**30 + 64
    values = torch.randn(4, 100)
    torch.use_deterministic_algorithms(False)  # it would fill the memory
    x = torch.empty(3 * stride + 128, dtype=torch.bfloat16).as_strided((4, 100), (stride, 1))
    x.copy_(values)
    found = []
    for logits in (x.requires_grad_(), values.bfloat16().requires_grad_()):
        loss = cross_entropy(logits, torch.tensor([5, 99, 0, 7]))
        found.append((loss, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(*found)


# --- PyTorch ------------------------------------------------------------------------------------


def test_samples_of_pytorch():
    """PyTorch's OpInfo for cross_entropy: on its CPU path, and interpreted."""
    from torch.testing._internal.common_methods_invocations import op_db

    info = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
    torch.manual_seed(0)
    kernels = 0
    for sample in info.sample_inputs("cpu", torch.bfloat16, requires_grad=True):
        found = {"input": sample.input, "target": sample.args[0], **sample.kwargs}
        check(OP, found)
        found["target"] = sample.args[0].detach()  # PyTorch has a gradient for probabilities
        with interpreted():
            kernels += "interpreter" in explain(cross_entropy, **found)
            check(OP, found)
    assert kernels >= 20


@KERNELS
def test_autocast_gives_float32():
    found = inputs(4, 30, torch.bfloat16, weighted=True)
    x = found["input"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(**found, softcap=2.0)
        want = OP.reference(**found, softcap=2.0)
    assert loss.dtype == want.dtype == torch.float32
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert x.grad.dtype == torch.bfloat16


@KERNELS
def test_the_module_is_pytorch_s_with_more():
    ours = CrossEntropyLoss(torch.rand(9), label_smoothing=0.1, z_loss=0.1, softcap=5.0)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    theirs = torch.nn.CrossEntropyLoss(torch.rand(9), label_smoothing=0.1)
    theirs.load_state_dict(ours.state_dict())
    x, target = torch.randn(4, 9), torch.tensor([0, 3, -100, 8])
    want = cross_entropy(x, target, ours.weight, label_smoothing=0.1, z_loss=0.1, softcap=5.0)
    torch.testing.assert_close(ours(x, target), want)
    ours.z_loss = ours.softcap = 0.0
    torch.testing.assert_close(ours(x, target), theirs(x, target))


@KERNELS
def test_sums_over_micro_batches_with_one_divisor():
    """Gradient accumulation: sums over parts, divided by the count of all, are the mean."""
    found = inputs(8, 40)
    x, target = found["input"], found["target"]
    parts = sum(
        cross_entropy(x[i : i + 2], target[i : i + 2], reduction="sum") for i in (0, 2, 4, 6)
    )
    torch.testing.assert_close(parts / (target != -100).sum(), cross_entropy(x, target))
