"""How a float32 becomes what memory keeps: at random, in two halves, or as a byte of a block."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements that share a scale: in registers of half a warp or of a whole one, so that finding the
# largest of them needs no shared memory.
CODE_BLOCK = tl.constexpr(128)
# A byte is a small float: three bits of fraction, and as many of exponent as are left. 1.0 is the
# largest code, so a block's largest element is kept exactly.
_FRACTION = 3
_ONE = tl.constexpr(127 << _FRACTION)
_DROPPED = tl.constexpr(23 - _FRACTION)
_HALF = tl.constexpr(1 << (22 - _FRACTION))
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


# --- at random ----------------------------------------------------------------------------------


@triton.jit
def _with_noise(x, noise):
    """A bfloat16 neighbour of x, as float32; NaN and inf stay."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000  # a NaN of all ones would wrap to -0
    bits = tl.where(finite, (bits + (noise & 0xFFFF)) & 0xFFFF0000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rounded_at_random(x, first, seed, t, number, BLOCK: tl.constexpr):
    """One of the two bfloat16 neighbours of x, the nearer the likelier.

    The random bits depend on the seed, the element's index, the step and the parameter alone.
    ``first``, the index of the first element, is a multiple of 4.
    """
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    low = quad.to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, (quad >> 32).to(tl.uint32), zero + t, zero + number)
    # Four numbers a call, for the four neighbours that one thread holds: none is moved.
    noise = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])
    return _with_noise(x, noise)


@triton.jit
def rounded_at_random_in_runs(x, first, base, run, pitch, seed, t, number, BLOCK: tl.constexpr):
    """The same for a part of a tensor: runs of ``run`` elements, ``pitch`` apart in the whole.

    Four times the Philox calls, since the neighbours in a thread may be of two quads.
    """
    i = first + tl.arange(0, BLOCK)
    place = base + i // run * pitch + i % run
    quad = place >> 2
    low = quad.to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, (quad >> 32).to(tl.uint32), zero + t, zero + number)
    word = place & 3
    noise = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))
    return _with_noise(x, noise)


# --- in two halves ------------------------------------------------------------------------------


@triton.jit
def joined(high, low):
    """The float32 that a bfloat16 and its 16-bit remainder make."""
    bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (bits + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """The nearest bfloat16, and what it lacks as a signed 16-bit integer."""
    bits = x.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    high = (bits + 0x8000) >> 16
    low = tl.where(finite, bits - (high << 16), 0)
    near = high.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.where(finite, near, x.to(tl.bfloat16)), low.to(tl.int16)


# --- as a byte of a block -----------------------------------------------------------------------


@triton.jit
def scale_places(first, BLOCK: tl.constexpr, EACH: tl.constexpr):
    """For each thread, which holds EACH codes of a block, the number of their scale.

    Scales that each thread loads for itself pass through no shared memory.
    """
    return (first + tl.arange(0, BLOCK // EACH) * EACH) // CODE_BLOCK


@triton.jit
def decoded(codes, scale, SIGNED: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr):
    """Float32 of one byte each and the scales at ``scale_places``."""
    codes = codes.to(tl.int32)
    if SIGNED:
        size = codes & 0x7F
        bits = (size + (_ONE - 127)) << _DROPPED
    else:
        size = codes
        bits = (size + (_ONE - 255)) << _DROPPED
    x = tl.where(size == 0, 0.0, bits.to(tl.float32, bitcast=True))
    if SIGNED:
        x = tl.where(codes > 127, -x, x)
    x = tl.reshape(x, [BLOCK // EACH, EACH]) * scale[:, None]
    return tl.reshape(x, [BLOCK])


@triton.jit
def encoded(x, SIGNED: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr):
    """The nearest byte of each element, and the scales; what is not 0 and unsigned gets no 0.

    An exp_avg_sq that vanished beside an exp_avg that did not would make a step of 1 / eps.
    A block with a NaN has a NaN for scale, and is NaN when it is decoded.
    """
    BLOCKS: tl.constexpr = BLOCK // CODE_BLOCK
    x = tl.reshape(x, [BLOCKS, CODE_BLOCK // EACH, EACH])
    # As integers, of which a NaN is the largest: tl.max of floats would drop it.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.max(tl.max(bits, 2), 1).to(tl.float32, bitcast=True)
    scale = scale[:, None] + tl.zeros([1, CODE_BLOCK // EACH], tl.float32)
    inverse = tl.where(scale >= _TINY, 1.0 / scale, 0.0)
    size = (tl.abs(x) * inverse[:, :, None]).to(tl.int32, bitcast=True)
    size = (size + _HALF) >> _DROPPED
    if SIGNED:
        codes = tl.minimum(tl.maximum(size - (_ONE - 127), 0), 127)
        codes = tl.where(x < 0.0, codes + 128, codes)
    else:
        least = tl.where(x > 0.0, 1, 0)
        codes = tl.minimum(tl.maximum(size - (_ONE - 255), least), 255)
    scale = tl.where(scale < _TINY, 0.0, scale)
    return tl.reshape(codes, [BLOCK]).to(tl.uint8), tl.reshape(scale, [BLOCK // EACH])


def decoded_tensor(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """``decoded`` in PyTorch, of whole tensors in the order of memory."""
    flat = codes.as_strided((codes.numel(),), (1,)).to(torch.int32)
    size, most = (flat & 127, 127) if signed else (flat, 255)
    x = ((size + (_ONE.value - most)) << _DROPPED.value).view(torch.float32)
    x = x.masked_fill(size == 0, 0.0)
    if signed:
        x = torch.where(flat > 127, -x, x)
    scales = scale.flatten().repeat_interleave(CODE_BLOCK.value)[: flat.numel()]
    found = torch.empty_like(codes, dtype=torch.float32)
    found.as_strided((flat.numel(),), (1,)).copy_(x * scales)
    return found


def encoded_tensor(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """``encoded`` in PyTorch, of a dense tensor in the order of memory; the scales are flat."""
    n, block = x.numel(), CODE_BLOCK.value
    flat = x.as_strided((n,), (1,)).float()
    blocks = torch.nn.functional.pad(flat, (0, -n % block)).view(-1, block)
    scale = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(1).view(torch.float32)
    inverse = torch.where(scale >= _TINY.value, 1.0 / scale, 0.0)
    size = (blocks.abs() * inverse[:, None]).view(torch.int32)
    size = (size + _HALF.value) >> _DROPPED.value
    if signed:
        found = (size - (_ONE.value - 127)).clamp(0, 127)
        # The kernel writes -0 for what is too small below 0; it never has a -0 to write.
        found = torch.where(blocks.signbit(), found + 128, found)
    else:
        found = (size - (_ONE.value - 255)).clamp(0, 255)
        found = torch.where(blocks > 0.0, found.clamp(min=1), found)
    codes = torch.empty_like(x, dtype=torch.uint8)
    codes.as_strided((n,), (1,)).copy_(found.view(-1)[:n])
    return codes, torch.where(scale < _TINY.value, 0.0, scale)
