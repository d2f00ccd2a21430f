"""Which code runs a call, and what it costs to decide."""

import os
import re
import subprocess
import sys
import timeit

import pytest
import torch
import torch.nn.functional as F

from fastlm.kernels import OPS, backend, explain, layer_norm
from fastlm.kernels._dispatch import dispatched
from fastlm.kernels._interpreter import interpreted


def test_the_cpu_runs_pytorch_and_says_so():
    x = torch.randn(3, 5)
    assert "runs PyTorch: the tensors are on the CPU" in explain(layer_norm, x, (5,))
    assert torch.equal(layer_norm(x, (5,)), F.layer_norm(x, (5,)))


def test_the_interpreter_runs_the_kernel_and_says_so():
    with interpreted():
        assert "Triton kernel" in explain("layer_norm", torch.zeros(3, 5), (5,))
        assert "float64" in explain("layer_norm", torch.zeros(3, 5).double(), (5,))


def test_backend_torch_never_takes_the_kernel():
    with interpreted(), backend("torch"):
        assert explain(layer_norm, torch.zeros(3, 5), (5,)).endswith('the backend is "torch".')


def test_backend_triton_raises_where_nothing_can_run_it():
    with backend("triton"):
        with pytest.raises(RuntimeError, match=r"layer_norm: backend .triton. cannot run"):
            layer_norm(torch.zeros(3, 5), (5,))
        assert "raises" in explain(layer_norm, torch.zeros(3, 5), (5,))


def test_backend_triton_raises_what_the_kernel_does_not_cover():
    with interpreted(), backend("triton"), pytest.raises(RuntimeError, match="float64"):
        layer_norm(torch.zeros(3, 5).double(), (5,))


def test_backends_nest_and_come_back_after_an_exception():
    x = torch.zeros(3, 5)
    with interpreted():
        with backend("torch"):
            with backend("auto"):
                assert "interpreter" in explain(layer_norm, x, (5,))
            assert "torch" in explain(layer_norm, x, (5,))
            with pytest.raises(ZeroDivisionError), backend("auto"):
                raise ZeroDivisionError
            assert "torch" in explain(layer_norm, x, (5,))
        assert "interpreter" in explain(layer_norm, x, (5,))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="auto, triton, torch; got 'cuda'"), backend("cuda"):
        pass
    with pytest.raises(ValueError, match=r"explain: op must be a function of fastlm\.kernels"):
        explain("no_such_op", torch.zeros(1))


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_environment_chooses_for_a_whole_program():
    code = (
        "import torch; from fastlm.kernels import explain, layer_norm;"
        "x = torch.randn(4, 6).bfloat16(); print(explain(layer_norm, x, (6,)));"
        "y = layer_norm(x, (6,));"
        "torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (6,)))"
    )
    interpreter = run(code, TRITON_INTERPRET="1")
    assert "Triton kernel on the interpreter" in interpreter.stdout, interpreter.stderr
    both = run(code, TRITON_INTERPRET="1", FASTLM_BACKEND="torch")
    assert 'the backend is "torch"' in both.stdout, both.stderr
    wrong = run(code, FASTLM_BACKEND="gpu")
    assert "FASTLM_BACKEND must be one of auto, triton, torch; got 'gpu'" in wrong.stderr


def test_importing_is_quick_and_leaves_the_gpu_alone():
    code = (
        "import time, torch, triton; t = time.perf_counter(); import fastlm.kernels;"
        "print(time.perf_counter() - t, torch.cuda.is_initialized())"
    )
    runs = [run(code, PYTHONDONTWRITEBYTECODE="") for _ in range(3)]  # the first writes bytecode
    seconds = min(float(r.stdout.split()[0]) for r in runs)
    assert seconds < 0.3, f"import fastlm.kernels took {seconds:.2f} s beyond torch and triton"
    assert all(r.stdout.split()[1] == "False" for r in runs)


# Steps of optimizers take lists, once for a whole model: microseconds are not counted there.
DROP_INS = [
    pytest.param(op, id=name)
    for name, op in OPS.items()
    if hasattr(op.fused, "dispatch") and not name.endswith("_step")
]


@pytest.mark.parametrize("op", DROP_INS)
def test_choosing_costs_at_most_five_microseconds(op):
    """On the CPU, in front of a fallback that does nothing; the best of many short runs."""

    def nothing(*args, **kwargs):
        pass

    choose = dispatched(eager=nothing, uncovered=op.fused.dispatch.uncovered)
    chosen = choose(op.fused.__wrapped__)
    inputs = op.example(op.dtypes[0], torch.device("cpu"), **op.sizes[0])
    first, *rest = inputs.items()
    options = dict(rest)
    rounds = [
        (
            timeit.timeit(lambda: chosen(first[1], **options), number=200),
            timeit.timeit(lambda: nothing(first[1], **options), number=200),
        )
        for _ in range(15)
    ]
    extra = (min(r[0] for r in rounds) - min(r[1] for r in rounds)) / 200
    assert extra < 5e-6, f"{extra * 1e6:.2f} microseconds"


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "softmax", "gelu"])
def test_a_sharded_tensor_goes_to_pytorch_which_knows_how_to_shard(name):
    """DTensor: no kernel sees a shard as if it were the whole."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        op = OPS[name]
        x = torch.randn(4, 6)
        arguments = {"layer_norm": ((6,),), "rms_norm": ((6,),), "group_norm": (2,)}.get(name, ())
        sharded = distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
        with interpreted():
            assert "a DTensor: PyTorch's op" in explain(op.fused, sharded, *arguments)
            try:
                want = op.reference(sharded, *arguments)
            except NotImplementedError as error:  # of group_norm in torch 2.11
                with pytest.raises(NotImplementedError, match=re.escape(str(error))):
                    op.fused(sharded, *arguments)
                return
            y = op.fused(sharded, *arguments)
        assert torch.equal(y.to_local(), want.to_local())
        torch.testing.assert_close(y.to_local(), op.reference(x, *arguments)[:2])
        with interpreted(), backend("triton"), pytest.raises(RuntimeError, match="a DTensor"):
            op.fused(sharded, *arguments)
    finally:
        dist.destroy_process_group()
