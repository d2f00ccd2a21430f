"""Functions of float32 numbers that spend nothing on sizes which their arguments do not have."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """2^(x log2 e): ``tl.exp`` spends three more instructions on results below 2^-126, 0 here."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def reciprocal(x):
    """1 / x of 1 or more, 0 from 2^64 on; a division spends six instructions more on other x."""
    return tl.rsqrt(x * x)
