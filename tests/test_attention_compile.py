"""What the attention kernels compile to, with no GPU: the gates that keep them fast."""

import re
from collections import Counter

import pytest
import torch

from fastlm.bench import capture
from fastlm.kernels import flash_attention, flash_attention_decode, flash_attention_varlen

SHARED = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "sm120": 101376}
TENSOR_CORE = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA", "sm120": "HMMA"}


def leaf(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype).requires_grad_()


def launches(target, call):
    """Each kernel that the call and its backward launch, once."""
    with capture.capture_launches(target) as cap:
        out = call()
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    return cap.unique()


def instructions(compiled):
    """Opcodes of the whole kernel in order, and where each backward jump lands."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        listing = capture._tool("nvdisasm", "-c", str(cubin))
    opcodes, labels, jumps = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(opcodes)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            if jump := re.search(r"`\((\.L\w+)\)", code[2]):
                jumps.append((jump[1], len(opcodes)))
            opcodes.append(code[1])
    return opcodes, [(labels[to], at) for to, at in jumps if labels.get(to, at) < at]


def main_loop(opcodes, loops):
    """Opcode counts of the shortest loop that holds exponentials: the one without a mask."""
    bodies = [Counter(op.split(".")[0] if not op.startswith("MUFU") else op for op in opcodes[a:b])
              for a, b in loops]  # fmt: skip
    softmax = [body for body in bodies if body["MUFU.EX2"] >= 8]
    return min(softmax, key=lambda body: body.total())


@pytest.fixture(autouse=True)
def fresh_memory_is_left_alone(nan_in_fresh_memory):
    """Nothing runs here, and large tensors need not be filled."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("target", SHARED)
def test_the_plain_kernels(target, D):
    """No spill in a main loop, no exponential twice, tensor cores, wide copies, no lack of memory.

    These four go wrong without a word: 32 registers with everything spilled, wgmma that waits for
    itself, exponentials that threads repeat, more tensor or shared memory than there is.
    """
    q, k, v = (leaf(1, 1024, 4, D) for _ in "qkv")
    found = launches(target, lambda: flash_attention(q, k, v, causal=True))
    assert len(found) == 4
    for launch in found:
        if launch.name == "rows_kernel":
            continue
        compiled = launch.compile()
        facts = capture.resources(compiled)
        opcodes, loops = instructions(compiled)
        loop = main_loop(opcodes, loops)
        meta, threads = launch.meta, 32 * facts["warps"]
        assert facts["regs"] > 32, launch
        assert facts["shared"] <= SHARED[target], launch
        assert (facts["tmem"] or 0) <= 512, launch
        assert loop["STL"] + loop["LDL"] == 0, launch
        share = meta["BLOCK_M"] * meta["BLOCK_N"] / threads
        assert loop["MUFU.EX2"] <= share + 8, launch
        assert loop["WARPGROUP"] <= 12, launch
        assert any(op.startswith(TENSOR_CORE[target]) for op in opcodes), launch
        assert any(re.match(r"UTMALDG|LDGSTS.*128", op) for op in opcodes), launch
        assert not any(op.startswith(("DFMA", "DADD", "DMUL")) for op in opcodes), launch


OPTIONS = {
    "window": {"window_size": (127, 0)},
    "softcap": {"softcap": 30.0},
    "alibi": {"alibi_slopes": torch.ones(1, 4)},
    "bias": {"bias": leaf(1, 4, 1024, 1024)},
    "mask": {"bias": torch.ones(1024, 1024, dtype=torch.bool)},
    "sinks": {"sinks": leaf(4)},
    "dropout": {"dropout_p": 0.1},
    "blocks": {"block_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)},
}
OPTIONS["all"] = {k: v for option in OPTIONS.values() for k, v in option.items()}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_compiles(option):
    """The interpreter takes code that the compiler refuses."""
    q, k, v = leaf(1, 1024, 4, 64), leaf(1, 1024, 2, 64), leaf(1, 1024, 2, 64)
    for launch in launches("sm90", lambda: flash_attention(q, k, v, **OPTIONS[option])):
        assert launch.compile().metadata.shared <= SHARED["sm90"]


CALLS = {
    "one query": lambda: flash_attention(
        leaf(1, 1, 4, 64), leaf(1, 100, 4, 64), leaf(1, 100, 4, 64)
    ),
    "one key": lambda: flash_attention(leaf(1, 9, 4, 64), leaf(1, 1, 4, 64), leaf(1, 1, 4, 64)),
    "odd D": lambda: flash_attention(leaf(1, 99, 3, 59), leaf(1, 99, 3, 59), leaf(1, 99, 3, 59)),
    "wide v": lambda: flash_attention(leaf(1, 99, 1, 64), leaf(1, 99, 1, 64), leaf(1, 99, 1, 128)),
    "192 and 128": lambda: flash_attention(
        leaf(1, 256, 2, 192), leaf(1, 256, 2, 192), leaf(1, 256, 2, 128), causal=True
    ),
    "float32": lambda: flash_attention(*(leaf(1, 99, 1, 64, dtype=torch.float32) for _ in "qkv")),
    "ragged": lambda: flash_attention_varlen(
        *(leaf(99, 2, 64) for _ in "qkv"),
        *(torch.tensor([0, 40, 99], dtype=torch.int32) for _ in "qk"),
        causal=True,
        window_size=(30, -1),
    ),
    "decode": lambda: flash_attention_decode(
        torch.empty(2, 1, 8, 64).bfloat16(),
        *(torch.empty(2, 4096, 2, 64).bfloat16() for _ in "kv"),
        cache_seqlens=torch.ones(2, dtype=torch.int32),
    ),
    "paged int8 decode": lambda: flash_attention_decode(
        torch.empty(2, 1, 8, 64).bfloat16(),
        *(torch.empty(99, 64, 2, 64).to(torch.int8) for _ in "kv"),
        cache_seqlens=torch.ones(2, dtype=torch.int32),
        block_table=torch.zeros(2, 64, dtype=torch.int32),
        k_scale=0.1,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_special_launches_compile(name):
    """An argument of 1, sizes that no tile divides, unequal dimensions, other dtypes."""
    for launch in launches("sm80", CALLS[name]):
        assert launch.compile().metadata.shared <= SHARED["sm80"]


def test_heads_of_8_times_an_odd_number_are_copied_wide():
    """40 numbers a head: 16 bytes a copy all the same."""
    q, k, v = (leaf(1, 256, 3, 40) for _ in "qkv")
    for launch in launches("sm80", lambda: flash_attention(q, k, v)):
        if launch.name != "rows_kernel":
            opcodes = capture.sass_ops(launch.compile())
            assert any(re.match(r"LDGSTS.*128", op) for op in opcodes), launch
