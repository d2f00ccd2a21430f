"""Every op in OPS: right by the numerics contract, and harmless to everything around it."""

import itertools

import pytest
import torch
from harness import (
    assert_bitwise_equal,
    check,
    clones,
    named_tensors,
    outcome,
)
from memory_check import interp_check
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastlm.kernels import OPS
from fastlm.kernels._interpreter import interpreted

CPU = torch.device("cpu")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
OPCHECKS = (  # the schema's multiplies its inputs, which PyTorch 2.13 cannot in float8
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
LABELS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def label(value) -> str:
    return LABELS.get(value) or str(value)


CASES = [
    pytest.param(
        op, size, dtype, id=f"{op.name}-{'-'.join(map(label, size.values()))}-{label(dtype)}"
    )
    for op in OPS.values()
    for size in op.sizes
    for dtype in op.dtypes
]
SIZES = [
    pytest.param(op, size, id=f"{op.name}-{'-'.join(map(label, size.values()))}")
    for op in OPS.values()
    for size in op.sizes
]
EACH = [pytest.param(op, id=op.name) for op in OPS.values()]

pytestmark = pytest.mark.usefixtures("kernels")


def example(op, size, dtype=torch.float32):
    torch.manual_seed(0)
    return op.example(dtype, CPU, **size)


def usual(op):
    """The op's second size: the first is the smallest, and hides most mistakes."""
    return example(op, op.sizes[min(1, len(op.sizes) - 1)])


@pytest.mark.parametrize(("op", "size", "dtype"), CASES)
def test_matches_float64_by_the_contract(op, size, dtype):
    check(op, example(op, size, dtype))


@pytest.mark.parametrize(("op", "size"), SIZES)
def test_reads_and_writes_only_its_tensors(op, size):
    """Every buffer lies between zones of NaN; a stray access, or a race, raises."""
    inputs = example(op, size, op.dtypes[-1])
    wild = [t for _, t in named_tensors(inputs)]
    with interp_check():
        got = outcome(op.fused, inputs)
    assert_bitwise_equal(got, outcome(op.fused, inputs))
    assert wild  # the example has tensors at all


def spread(t):
    """The same values with a last stride of 2, NaN between them."""
    wide = t.new_full((*t.shape, 2), float("nan") if t.is_floating_point() else 0)
    wide[..., 0] = t.detach()
    return wide[..., 0]


def padded(t):
    """The same values in rows that are three elements further apart, NaN between them."""
    if t.dim() == 0:
        return t.detach().clone()
    wide = t.new_full(
        (*t.shape[:-1], t.shape[-1] + 3), float("nan") if t.is_floating_point() else 0
    )
    wide[..., : t.shape[-1]] = t.detach()
    return wide[..., : t.shape[-1]]


def transposed(t):
    same = t.detach().clone()  # of one row or column, contiguous() would not copy
    return same.mT.contiguous().mT if t.dim() > 1 else same


def offset(t):
    """The same values one element past an aligned address."""
    room = t.new_empty(t.numel() + 1)
    room[1:] = t.detach().reshape(-1)
    return room[1:].view(t.shape)


LAYOUTS = (spread, padded, transposed, offset)

# Rows are read from 16-byte boundaries, wherever they start; the CPU's products of matrices depend
# on how far rows lie apart: other strides, another order of summation.
BY_ADDRESS = {"cross_entropy", "linear_cross_entropy"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "size"), SIZES)
def test_any_strides_give_the_same_answer(op, size, layout):
    """Arguments behind other strides, then incoming gradients."""
    plain = example(op, size)

    def lay_out(t):
        return layout(t).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

    def run(inputs, lay_out_gradient):
        out = list(named_tensors(op.fused(**inputs)))
        graded = [o for _, o in out if o.requires_grad]
        torch.manual_seed(1)
        if graded:
            noise = [torch.randn(o.shape, dtype=o.dtype) for o in graded]  # whatever strides o has
            torch.autograd.backward(graded, [lay_out_gradient(g) for g in noise])
        found = {f"result{n}": o.detach() for n, o in out}
        found |= {f"{n} after": t.detach() for n, t in named_tensors(inputs)}
        return found | {
            f"gradient of {n}": t.grad for n, t in named_tensors(inputs) if t.grad is not None
        }

    want = run(clones(plain), clones)
    got = run(tree_map(lay_out, plain), clones)
    assert_same = torch.testing.assert_close if op.name in BY_ADDRESS else assert_bitwise_equal
    assert_same(got, want)
    assert_bitwise_equal(run(clones(plain), layout), want)


@pytest.mark.parametrize(("op", "size"), SIZES)
def test_expanded_inputs_are_read_as_their_values(op, size):
    """Each argument in turn becomes its first slice, repeated by a stride of 0."""
    plain = example(op, size)
    for name, t in plain.items():
        if not isinstance(t, Tensor) or t.dim() == 0 or 0 in t.shape or not t.requires_grad:
            continue  # lists belong to ops that write in place, which expanded tensors forbid
        repeated = t.detach()[:1].expand(t.shape)
        got = op.fused(**(plain | {name: repeated}))
        want = op.fused(**(plain | {name: repeated.clone()}))
        assert_same = torch.testing.assert_close if op.name in BY_ADDRESS else assert_bitwise_equal
        assert_same(dict(named_tensors(got)), dict(named_tensors(want)))


@pytest.mark.parametrize(("op", "size", "dtype"), CASES)
def test_gradient_of_a_sum(op, size, dtype):
    """``.sum().backward()`` sends a gradient whose strides are all 0."""

    def summed(**inputs):
        outs = [o for _, o in named_tensors(op.fused(**inputs)) if o.requires_grad]
        return sum(o.float().sum() for o in outs) if outs else None

    def ones(**inputs):
        outs = [o for _, o in named_tensors(op.fused(**inputs)) if o.requires_grad]
        if outs:
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])

    inputs = example(op, size, dtype)
    first, second = clones(inputs), clones(inputs)
    total = summed(**first)
    if total is None:
        pytest.skip("the op has no gradient")
    total.backward()
    ones(**second)
    grads = [
        dict(named_tensors(tree_map(lambda t: getattr(t, "grad", None), x)))
        for x in (first, second)
    ]
    assert_bitwise_equal(*grads)


@pytest.mark.parametrize("op", EACH)
def test_every_subset_of_requires_grad(op):
    """A tensor that wants no gradient gets none, and the others get the same as ever."""
    inputs = usual(op)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad]
    if not names:
        pytest.skip("the op has no gradient")
    full = outcome(op.fused, inputs)
    for chosen in itertools.product([False, True], repeat=len(names)):
        wanted = dict(zip(names, chosen, strict=True))
        some = clones(inputs)
        for name, wants in wanted.items():
            some[name].requires_grad_(wants)
        got = outcome(op.fused, some)
        gradients = {n for n in got if n.startswith("gradient")}
        assert gradients == {f"gradient of ['{n}']" for n, wants in wanted.items() if wants}
        assert_bitwise_equal(got, {n: full[n] for n in got})


@pytest.mark.parametrize("op", EACH)
def test_two_runs_agree_to_the_bit(op):
    inputs = usual(op)
    assert_bitwise_equal(outcome(op.fused, inputs), outcome(op.fused, inputs))


class _Recorder(TorchDispatchMode):
    """Notes every call of a fastlm operator, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlm":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", EACH)
def test_opcheck(op):
    """PyTorch's own check of each registered operator: schema, fake, autograd, dynamic shapes."""
    with _Recorder() as recorder:
        outcome(op.fused, usual(op))
    assert recorder.calls
    for func, args, kwargs in recorder.calls:
        differentiable = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "Autograd")

        def fresh(t, wants=differentiable):
            if not isinstance(t, Tensor):
                return t
            return t.detach().clone().requires_grad_(wants and t.is_floating_point())

        float8 = any(t.dtype in FLOAT8 for _, t in named_tensors((args, kwargs)))
        checks = tuple(c for c in OPCHECKS if not float8 or c != "test_schema")
        torch.library.opcheck(
            func, tree_map(fresh, args), tree_map(fresh, kwargs), test_utils=checks
        )


@pytest.mark.parametrize("op", EACH)
def test_compiles_without_a_graph_break(op):
    inputs = usual(op)
    torch._dynamo.reset()
    compiled = torch.compile(op.fused, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(outcome(compiled, inputs), outcome(op.fused, inputs))


@pytest.mark.parametrize("op", EACH)
def test_compiles_on_the_cpu_path(op):
    """Without the interpreter the same call compiles to PyTorch's op."""
    if op.name == "muon_step" and TorchVersion(torch.__version__) < (2, 13):
        pytest.skip("PyTorch's own Muon differs here from itself: addmm in bfloat16 is taken apart")
    inputs = usual(op)
    torch._dynamo.reset()
    from fastlm.kernels._dispatch import cpu_runner

    with cpu_runner(None):
        compiled = torch.compile(op.fused, fullgraph=True, backend="aot_eager")
        assert_bitwise_equal(outcome(compiled, inputs), outcome(op.fused, inputs))


@pytest.mark.parametrize("op", EACH)
def test_second_derivatives_come_from_pytorch(op):
    inputs = usual(op)
    wanted = [t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]
    if not wanted:
        pytest.skip("the op has no gradient")

    def penalty(fn):
        outs = [o for _, o in named_tensors(fn(**inputs)) if o.requires_grad]
        grads = torch.autograd.grad(sum(o.square().sum() for o in outs), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)

    for got, want in zip(penalty(op.fused), penalty(op.reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


@pytest.mark.parametrize("op", EACH)
def test_the_cpu_path_is_the_reference(op):
    from fastlm.kernels._dispatch import cpu_runner

    inputs = usual(op)
    with cpu_runner(None):
        got = outcome(op.fused, inputs)
    for name, value in outcome(op.reference, inputs).items():
        torch.testing.assert_close(got[name], value)


def test_the_interpreter_is_really_on():
    """The fixture routes calls to kernels: the tests above did not compare PyTorch with itself."""
    from fastlm.kernels import explain

    for op in OPS.values():
        if hasattr(op.fused, "dispatch"):
            assert "interpreter" in explain(op.fused, **usual(op))
    with interpreted(), pytest.raises(RuntimeError, match="float64"), _triton_only():
        OPS["layer_norm"].fused(torch.zeros(2, 3, dtype=torch.float64), (3,))


def _triton_only():
    from fastlm.kernels import backend

    return backend("triton")
