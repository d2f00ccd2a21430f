"""Launches are recorded as the launcher specialises them, and compile without a GPU."""

import hashlib

import pytest
import torch
import triton
import triton.language as tl

from fastlm.bench.capture import as_target, capture_launches, resources, sass_ops
from fastlm.bench.cases import cases_of, hollow
from fastlm.bench.machine_code import read
from fastlm.kernels import OPS
from fastlm.kernels._interpreter import interpreted


@triton.jit
def _copy_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < N, other=0.0), mask=offs < N)


_configs = [triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((512, 2), (1024, 4), (4096, 8))]


@triton.autotune(
    configs=_configs,
    key=["N"],
    prune_configs_by={
        "early_config_prune": lambda configs, args, **_: [
            c for c in configs if c.kwargs["BLOCK"] <= 2048
        ]
    },
)
@triton.heuristics({"EVEN": lambda args: args["N"] % args["BLOCK"] == 0})
@triton.jit
def _tuned_kernel(x_ptr, bias_ptr, out_ptr, scale, N, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs) if EVEN else tl.load(x_ptr + offs, mask=mask, other=0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, x * scale, mask=mask)


def tuned(x, bias=None):
    out = torch.empty_like(x)
    grid = lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)  # noqa: E731
    _tuned_kernel[grid](x, bias, out, 0.5, x.numel())
    return out


def digest() -> str:
    x = torch.empty(64, dtype=torch.bfloat16)
    with capture_launches("sm90") as capture:
        _copy_kernel[(4,)](x, x, 64, BLOCK=16)
    ptx = "".join(compiled.asm["ptx"] for _, compiled in capture.compile_all())
    return hashlib.md5(ptx.encode()).hexdigest()


def test_compiled_code_is_the_same_before_and_after_interpretation():
    before = digest()
    x = torch.zeros(64, dtype=torch.bfloat16)
    with interpreted():
        _copy_kernel[(4,)](x, x.clone(), 64, BLOCK=16)
    assert digest() == before
    assert not triton.knobs.runtime.interpret


def test_launches_are_specialised_as_on_a_gpu():
    x = torch.empty(5001)
    with capture_launches(90) as capture:
        _copy_kernel[(5,)](x[:5000], x[:5000], 5008, BLOCK=1024)
        _copy_kernel[(5,)](x[1:], x[1:], 5000, BLOCK=1024)
        _copy_kernel[(1,)](x, x, 1, BLOCK=1024)
        _copy_kernel[(9,)](x, x, 5008, BLOCK=1024)
    aligned, shifted, one, again = capture.launches
    assert aligned.attrs[0,] == aligned.attrs[2,] == [["tt.divisibility", 16]]
    assert not shifted.attrs[0,]
    assert not shifted.attrs[2,]
    assert one.meta == {"N": 1, "BLOCK": 1024}
    assert [launch.grid for launch in capture.launches] == [
        (5, 1, 1),
        (5, 1, 1),
        (1, 1, 1),
        (9, 1, 1),
    ]
    assert aligned.arguments == {"N": 5008, "BLOCK": 1024}
    assert again.key() == aligned.key()
    assert len(capture.unique()) == 3


def test_autotuners_and_heuristics_are_recorded():
    with capture_launches("sm_80") as capture:
        tuned(torch.empty(4096, dtype=torch.bfloat16))
    tried = {launch.meta["BLOCK"] for launch in capture.launches if launch.phase == "tune"}
    assert tried == {512, 1024}  # pruned to these
    launched = capture.launches[-1]
    assert launched.phase == "launch"
    assert launched.meta["EVEN"] is True
    assert launched.meta["bias_ptr"] is None
    assert not _tuned_kernel.cache  # no made-up timing stays behind


@pytest.mark.parametrize("target", [80, 86, 89, 90, 100, 120])
def test_every_target_compiles_and_is_read(target):
    with capture_launches(target) as capture:
        _copy_kernel[(5,)](torch.empty(4096), torch.empty(4096), 4096, BLOCK=1024)
    ((_, compiled),) = capture.compile_all()
    (code,) = read([compiled])
    assert code == read([compiled])[0]
    assert code.accesses == {"load": {128: 2}, "store": {128: 2}}
    assert code.registers == resources(compiled)["regs"]
    assert sum(sass_ops(compiled).values()) >= code.instructions > 10
    assert resources(compiled)["spill_stores"] == 0


def test_targets_are_named():
    assert as_target("sm_90").arch == as_target("sm90").arch == as_target(90).arch == 90
    with pytest.raises(ValueError, match="target: name must be"):
        as_target("h100")


def test_nested_in_the_interpreter_capture_is_refused():
    with interpreted(), pytest.raises(RuntimeError, match="TRITON_INTERPRET"), capture_launches(90):
        pass


def test_hollow_inputs_have_shapes_and_no_contents():
    op = OPS["layer_norm"]
    real = op.example(torch.float16, torch.device("cpu"), **op.sizes[2])
    empty = hollow(op, torch.float16, op.sizes[2])
    assert real.keys() == empty.keys()
    for name, value in real.items():
        if isinstance(value, torch.Tensor):
            assert empty[name].shape == value.shape
            assert empty[name].stride() == value.stride()
            assert empty[name].dtype == value.dtype
            assert empty[name].requires_grad == value.requires_grad
    shifted = hollow(op, torch.float16, op.sizes[2], offset=1)["input"]
    assert shifted.data_ptr() % 16 == 2


def test_cases_tell_forward_from_backward():
    op = OPS["layer_norm"]
    cases = cases_of(op, 90, sizes=[{"M": 4096, "N": 4096}], dtypes=[torch.bfloat16])
    assert [(c.launch.name, c.backward) for c in cases] == [
        ("_forward_kernel", False),
        ("_backward_kernel", True),
        ("_sum_parts_kernel", True),
    ]
    assert cases[0].label == "bfloat16 M=4096 N=4096"
    assert cases[0].work[0] > 2 * 4096 * 4096 * 2
    (only,) = cases_of(
        op, 90, sizes=[{"M": 64, "N": 64}], dtypes=[torch.half], special="only input"
    )[1:]
    assert only.launch.meta["WANTS_PARAMETERS"] is False
