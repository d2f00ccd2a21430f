"""What attention compiles to in calls that its declarations do not make."""

import re

import pytest
import torch
import triton

from fastlm.bench import capture
from fastlm.bench.compile import compile_all
from fastlm.bench.machine_code import read
from fastlm.bench.rules import refusals
from fastlm.bench.sass.parse import machine_code as code_of
from fastlm.kernels import _tuned, flash_attention
from fastlm.kernels.attention import backward, forward, gradients

SHARED = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "sm120": 101376}


def leaf(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype).requires_grad_()


def launches(target, call):
    """Each kernel that the call and its backward launch, once."""
    with capture.capture_launches(target) as cap:
        out = call()
        out.backward(torch.empty_like(out))
    return cap.unique()


@pytest.fixture(autouse=True)
def fresh_memory_is_left_alone(nan_in_fresh_memory):
    """Nothing runs here, and large tensors need not be filled."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("target", SHARED)
def test_192_and_128_dimensions_fit(target):
    """Heads of multi-head latent attention: the largest tiles that are in use."""
    q, k, v = leaf(1, 256, 2, 192), leaf(1, 256, 2, 192), leaf(1, 256, 2, 128)
    for launch in launches(target, lambda: flash_attention(q, k, v, causal=True)):
        assert launch.compile().metadata.shared <= SHARED[target]


@pytest.mark.parametrize("target", SHARED)
def test_512_dimensions_fit_forward(target):
    q, k, v = (leaf(1, 256, 2, 512).detach() for _ in "qkv")
    with capture.capture_launches(target) as cap:
        flash_attention(q, k, v, causal=True)
    (launch,) = cap.unique()
    (code,) = read([launch.compile()])
    assert code.shared <= SHARED[target]
    assert code.tensor_memory <= 512
    assert code.stack <= 16


def test_heads_of_8_times_an_odd_number_are_copied_wide():
    """40 numbers a head: 16 bytes a copy all the same."""
    q, k, v = (leaf(1, 256, 3, 40) for _ in "qkv")
    for launch in launches("sm80", lambda: flash_attention(q, k, v)):
        if launch.name != "rows_kernel":
            opcodes = capture.sass_ops(launch.compile())
            assert any(re.match(r"LDGSTS.*128", op) for op in opcodes), launch


# --- warp-specialised forms ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "warps", "causal", "D", "tensor"),
    [
        ("sm90", 12, False, 128, "HGMMA"),
        ("sm90", 12, True, 128, "HGMMA"),
        ("sm90", 12, True, 64, "HGMMA"),
        ("sm100", 20, True, 128, "UTCHMMA"),
        ("sm100", 12, False, 64, "UTCHMMA"),
        ("sm100", 12, True, 64, "UTCHMMA"),
    ],
)
def test_specialised_forms_compile_and_specialise(target, warps, causal, D, tensor):
    if target == "sm90" and triton.__version__.startswith("3.6."):
        pytest.skip("Triton 3.6 does not compile it: the plain kernel runs")
    q, k, v = (leaf(1, 512, 2, D).detach() for _ in "qkv")
    tiles = {f"forward: tile_of(forward, bfloat16 {D}, {D}, False, False)": {"specialised": True}}
    with _tuned.trial(tiles), capture.capture_launches(target) as cap:
        flash_attention(q, k, v, causal=causal)
    (launch,) = cap.unique()
    arch = launch.target.arch
    (found,) = compile_all([(launch, arch)], processes=1)
    assert refusals(found) == []  # a failure to compile has no code, and raises
    assert found.code.warps == warps  # some that copy and multiply beside those asked for
    assert set(found.code.tensor) == {tensor}
    assert found.code.count("USETMAXREG") > 0
    assert found.code.count("UTMALDG") >= 4
    assert found.code.stack <= 16
    assert found.code.registers <= 168


# --- what is off costs nothing ------------------------------------------------------------------


@triton.jit
def no_shape(score):
    return False


@triton.jit
def scores_alone(qk, rows, cols, slope, bias_ptr, S_q, S_k, scale, score):
    return qk, 1.0


@triton.jit
def head_without_options(b, h, H, score):
    return 0.0, 0, 0


@triton.jit
def nothing_dropped(x, rows, cols, head, seed, score):
    return x


def machine_code(call):
    found = {}
    for launch in launches("sm90", call):
        if launch.name != "rows_kernel":
            found[launch.name] = code_of(launch.compile().asm["cubin"])
    return found


def test_the_plain_machine_code_is_that_of_a_source_without_options(monkeypatch):
    """Softcap, ALiBi, bias, masks and dropout struck out: not a byte of the code changes."""
    q, k, v = (leaf(2, 512, 4, 64) for _ in "qkv")

    def call():
        return flash_attention(q, k, v, causal=True)

    plain = machine_code(call)
    assert set(plain) == {"_forward_kernel", "dkdv_kernel", "dq_kernel"}
    for module in (forward, backward):
        monkeypatch.setattr(module, "is_shaped", no_shape)
        monkeypatch.setattr(module, "shape_scores", scores_alone)
        monkeypatch.setattr(module, "head_of", head_without_options)
    monkeypatch.setattr(backward, "dropped", nothing_dropped)
    for module, name in (
        (forward, "_attend"),
        (backward, "weights"),
        (backward, "_gather_dkdv"),
        (backward, "_gather_dq"),
    ):  # afresh: a function remembers what it called
        monkeypatch.setattr(module, name, triton.jit(getattr(module, name).fn))
    for module, own, name in (
        (forward, forward, "_forward_kernel"),
        (gradients, backward, "dkdv_kernel"),
        (gradients, backward, "dq_kernel"),
    ):
        jit = triton.jit(do_not_specialize=["left", "right"])
        monkeypatch.setattr(module, name, jit(getattr(own, name).fn))
    assert machine_code(call) == plain
