"""What rows and pointwise ops cost whatever the GPU: bytes moved, bytes kept, waits, precision."""

import warnings

import memory_check
import numpy as np
import pytest
import torch
from memory_check import interp_check
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.bench.capture import capture_launches
from fastlm.bench.cases import hollow, untouched_memory
from fastlm.bench.host import saved_bytes
from fastlm.kernels import OPS, _dispatch
from fastlm.kernels._interpreter import interpreted

M, N = 16, 256
BF16 = torch.bfloat16


@pytest.fixture
def moved(monkeypatch):
    """Bytes that kernels load from and store to tensors of about M * N elements and more."""
    found = {"load": 0, "store": 0}
    stock = memory_check._Launch.check

    def check(self, pointers, mask, nbytes, kind):
        touched = np.broadcast_to(pointers, mask.shape)[mask].astype(np.int64)
        large = [r for r in self.regions if r.high - r.low >= M * N * nbytes // 2]
        inside = np.zeros(touched.size, bool)
        for r in large:  # two of which may be views of one tensor
            inside |= (touched >= r.low) & (touched < r.high)
        found[kind] += int(inside.sum()) * nbytes
        return stock(self, pointers, mask, nbytes, kind)

    monkeypatch.setattr(memory_check._Launch, "check", check)
    return found


def rotary(**more):
    """A size of M * N elements: 4 tokens of 8 heads, whose angles are few beside it."""
    return {"B": 2, "S": 4, "H": 8, "D": 64} | more


ROWS = {"M": M, "N": N}
CHANNELS = {"N": 2, "C": 8, "S": 256, "G": 2}
# (op, size, elements loaded and stored forward, and backward, for each of M * N)
LEAST = [
    ("layer_norm", ROWS, (1, 1), (2, 1)),
    ("rms_norm", ROWS, (1, 1), (2, 1)),
    ("add_layer_norm", ROWS, (2, 2), (3, 1)),
    ("add_rms_norm", ROWS, (2, 2), (3, 1)),
    ("add_rms_norm", ROWS | {"dropout_p": 0.5, "seed": 1}, (2, 2), (3, 2)),
    ("group_norm", CHANNELS, (1, 1), (2, 1)),
    ("softmax", ROWS, (1, 1), (2, 1)),
    ("softmax", ROWS | {"dim": 0}, (1, 1), (2, 1)),
    ("log_softmax", ROWS, (1, 1), (2, 1)),
    ("gelu", ROWS, (1, 1), (2, 1)),
    ("relu_squared", ROWS, (1, 1), (2, 1)),
    ("bias_gelu", ROWS, (1, 1), (2, 1)),
    ("swiglu", ROWS, (2, 1), (3, 2)),
    ("swiglu", ROWS | {"packed": True}, (2, 1), (3, 2)),
    ("geglu", ROWS | {"approximate": "tanh"}, (2, 1), (3, 2)),
    ("rotary_embedding", rotary(), (1, 1), (1, 1)),
    ("rotary_embedding", rotary(interleaved=True), (1, 1), (1, 1)),
    ("dropout", ROWS, (1, 1), (1, 1)),
]


@pytest.mark.parametrize(("name", "size", "forward", "backward"), LEAST)
def test_every_number_crosses_memory_as_often_as_it_must(name, size, forward, backward, moved):
    op, unit = OPS[name], M * N * BF16.itemsize
    with interpreted(), interp_check():
        results = op.fused(**op.example(BF16, torch.device("cpu"), **size))
        assert moved == {"load": forward[0] * unit, "store": forward[1] * unit}
        moved |= {"load": 0, "store": 0}
        outputs = [results] if isinstance(results, Tensor) else list(results)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert moved == {"load": backward[0] * unit, "store": backward[1] * unit}


def test_embedding_reads_and_writes_a_row_a_token(moved):
    """Backward: the gradient once, and the rows that occur; their zeros before are PyTorch's."""
    weight = torch.randn(M, N, dtype=BF16, requires_grad=True)
    unit = M * N * BF16.itemsize
    with interpreted(), interp_check():
        y = OPS["embedding"].fused(torch.randperm(M), weight)
        assert moved == {"load": unit, "store": unit}
        moved |= {"load": 0, "store": 0}
        y.backward(torch.ones_like(y))
    assert moved == {"load": unit, "store": unit}


# --- kept for the backward ----------------------------------------------------------------------

# Bytes beyond inputs and results: a row's statistics are float32, a seed is an int64.
KEPT = [
    ("layer_norm", {}, 8 * M),
    ("rms_norm", {}, 4 * M),
    ("add_layer_norm", {"dropout_p": 0.5, "seed": 1}, 8 * M + 8),
    ("add_rms_norm", {"dropout_p": 0.5, "seed": 1}, 4 * M + 8),
    ("group_norm", CHANNELS, 8 * 2 * 2),
    ("softmax", {}, 0),
    ("log_softmax", {}, 0),
    ("gelu", {}, 0),
    ("relu_squared", {}, 0),
    ("bias_gelu", {}, 0),
    ("swiglu", {}, 0),
    ("geglu", {"approximate": "tanh"}, 0),
    ("rotary_embedding", rotary(), 0),
    ("dropout", {}, 8),
]
# Whose eager PyTorch keeps nothing of the size of the input either, on a CPU.
LEAN = {"layer_norm", "group_norm", "softmax", "log_softmax", "gelu"}


@pytest.mark.parametrize(("name", "more", "kept"), KEPT)
def test_little_is_kept_and_never_more_than_half_of_what_pytorch_keeps(name, more, kept):
    op = OPS[name]
    size = more if "S" in more else ROWS | more
    inputs = op.example(BF16, torch.device("cpu"), **size)
    with interpreted():
        assert saved_bytes(op.fused, inputs) == kept
    if name not in LEAN:
        assert 2 * kept <= saved_bytes(op.reference, inputs)


# --- the host -----------------------------------------------------------------------------------

WAITS = ("_local_scalar_dense", "nonzero", "equal", "unique", "masked_select", "is_nonzero", "item")


class NoWaits(TorchDispatchMode):
    """Refuses operators that hand a tensor's values to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_no_call_waits_for_the_device(op):
    """Forward and backward as on a GPU, up to the launches: a wait would forbid CUDA graphs."""
    inputs = hollow(op, op.dtypes[-1], op.bench_sizes[0])
    with untouched_memory(), capture_launches(90) as captured, NoWaits():
        results = op.fused(**inputs)
        outputs = [results] if isinstance(results, Tensor) else list(results or ())
        graded = [y for y in outputs if y.requires_grad]
        if graded:
            torch.autograd.backward(graded, [torch.empty_like(y) for y in graded])
    assert captured.launches


DROP_INS = ("layer_norm", "rms_norm", "softmax", "log_softmax", "gelu", "dropout")


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", DROP_INS)
def test_autocast_on_a_gpu_gives_pytorchs_dtype(name, given, monkeypatch):
    """The dtype of the result under CUDA autocast, told by fake tensors on a GPU that is not."""
    op = OPS[name]
    monkeypatch.setattr(_dispatch, "_too_old", lambda index: None)
    inputs = op.example(given, torch.device("cpu"), **ROWS)
    inputs.pop("seed", None)  # of dropout; eager PyTorch has none
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        fake = {
            key: torch.empty(t.shape, dtype=t.dtype, device="cuda") if isinstance(t, Tensor) else t
            for key, t in inputs.items()
        }
        before = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", True)
        try:
            assert op.fused(**fake).dtype == op.reference(**fake).dtype
            assert "Triton kernel" in _dispatch.explain(op.fused, **fake)
        finally:
            torch.set_autocast_enabled("cuda", before)
