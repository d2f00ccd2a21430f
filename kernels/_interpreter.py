"""Triton's interpreter, made exact: bfloat16 and float8 arithmetic, typed scalars, strictness.

Stock Triton (3.6 to 3.9) computes on bfloat16 blocks as if they were integers, truncates where the
hardware rounds to nearest even, and accepts programs that the compiler rejects or reads otherwise.
``install()`` mends this for the process; ``interpreted()`` also runs kernels of modules that were
imported without TRITON_INTERPRET, so one process can interpret a kernel and compile it.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import driver, interpreter
from triton.runtime.jit import JITFunction

from ._dispatch import cpu_runner
from ._interpreter_speed import be_quick

_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder
_FLOAT8 = {tl.float8e5: torch.float8_e5m2, tl.float8e4nv: torch.float8_e4m3fn}
_FLOAT8_ELSEWHERE = (tl.float8e4b15, tl.float8e4b8, tl.float8e5b16)
_LAUNCH_OPTIONS = {
    "num_warps",
    "num_stages",
    "num_ctas",
    "maxnreg",
    "enable_fp_fusion",
    "launch_cooperative_grid",
    "launch_pdl",
    "debug",
    "ptx_options",
    "ir_override",
    "sanitize_overflow",
    "extern_libs",
    "instrumentation_mode",
    "grid",
    "warmup",
}


# --- number formats -----------------------------------------------------------------------------


def bf16_to_f32(bits: Any) -> np.ndarray:
    """Float32 values of bfloat16 bit patterns in uint16."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: Any, truncate: bool = False) -> np.ndarray:
    """Bit patterns of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits
    if not truncate:
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = bits + (np.uint32(0x7FFF) + odd)
    nan = np.uint32(0x7FFF0000) | (bits & np.uint32(0x80000000))
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return (np.where(is_nan, nan, rounded) >> np.uint32(16)).astype(np.uint16)


def to_tf32(values: Any) -> np.ndarray:
    """Float32 values rounded to the 10 bits of mantissa that tf32 keeps."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(13)) & np.uint32(1)
    rounded = (bits + np.uint32(0x0FFF) + odd) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits).view(np.float32)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _up(handle: Any) -> Any:
    """A bfloat16 handle in float32; any other as it is."""
    return _Handle(bf16_to_f32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _down(handle: Any) -> Any:
    return _Handle(f32_to_bf16(handle.data), tl.bfloat16)


def _float8_to_f32(handle: Any) -> np.ndarray:
    bits = torch.from_numpy(np.ascontiguousarray(handle.data))
    return bits.view(_FLOAT8[handle.dtype.scalar]).float().numpy()


def _f32_to_float8(values: Any, dtype: Any) -> np.ndarray:
    floats = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    largest = torch.finfo(_FLOAT8[dtype]).max
    saturated = floats.clamp(-largest, largest)  # PTX: cvt.satfinite
    return saturated.to(_FLOAT8[dtype]).view(torch.uint8).numpy()


# --- installation -------------------------------------------------------------------------------


def install(emulate_tf32: bool = False, check_int_overflow: bool = False) -> None:
    """Makes the interpreter of this process exact and strict. A second call changes nothing.

    Args:
        emulate_tf32: Round the inputs of float32 products to tf32 where the kernel asks for it.
        check_int_overflow: Raise where a 32-bit product overflows, and honour device_assert.
    """
    if getattr(_Builder, "_fastlm", False):
        return
    _Builder._fastlm = True
    _mend_arithmetic()
    _mend_casts()
    _mend_products(emulate_tf32)
    _mend_atomics()
    _mend_reductions()
    _mend_scalars()
    _be_strict(check_int_overflow)
    be_quick()


def _mend_arithmetic() -> None:
    """Operators on bfloat16, NaN in minimum and maximum, and one rounding in fma."""
    stock_binary, stock_unary = _Builder.binary_op, _Builder.unary_op
    stock_fma, stock_print = _Builder.create_fma, _Builder.create_print

    def binary_op(self, left, right, op):
        if not (_is_bf16(left) and _is_bf16(right)):
            return stock_binary(self, left, right, op)
        out = op(bf16_to_f32(left.data), bf16_to_f32(right.data))
        if out.dtype == np.bool_:
            return _Handle(out, tl.int1)
        return _Handle(f32_to_bf16(out), tl.bfloat16)

    def unary_op(self, arg, op):
        if _is_bf16(arg):
            return _down(stock_unary(self, _up(arg), op))
        return stock_unary(self, arg, op)

    def create_fma(self, x, y, z):
        if z.data.dtype == np.float64:
            return stock_fma(self, x, y, z)
        a, b, c = (_up(t).data.astype(np.float64) for t in (x, y, z))
        exact = a * b + c  # the product of two float32 is exact in float64
        if _is_bf16(z):
            return _Handle(f32_to_bf16(exact.astype(np.float32)), tl.bfloat16)
        return _Handle(exact.astype(z.data.dtype), z.dtype.scalar)

    _Builder.binary_op = binary_op
    _Builder.unary_op = unary_op
    _Builder.create_fma = create_fma
    # Triton 3.6 and 3.7 propagate NaN here, GPUs do not.
    _Builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    _Builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    _Builder.create_print = lambda self, prefix, hexadecimal, values, signed: stock_print(
        self, prefix, hexadecimal, [_up(v) for v in values], signed
    )


def _mend_casts() -> None:
    """Conversions from and to bfloat16 and float8."""
    stock_cast, stock_float_cast = _Builder.cast_impl, _Builder.create_fp_to_fp

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        if source == tl.bfloat16:
            return _up(src) if target == tl.float32 else cast_impl(self, _up(src), dst_type)
        if target == tl.bfloat16:
            return _down(_Handle(src.data.astype(np.float32), tl.float32))
        return stock_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding):
        source, target = src.dtype.scalar, dst_type.scalar
        toward_zero = rounding == interpreter._ir.ROUNDING_MODE.RTZ
        if source in _FLOAT8:
            return cast_impl(self, _Handle(_float8_to_f32(src), tl.float32), dst_type)
        if target in _FLOAT8 and not toward_zero:
            return _Handle(_f32_to_float8(_up(src).data, target), target)
        if target == tl.bfloat16:
            return _Handle(f32_to_bf16(src.data, toward_zero), target)
        return stock_float_cast(self, src, dst_type, rounding)

    _Builder.cast_impl = cast_impl
    _Builder.create_fp_to_fp = create_fp_to_fp
    _Builder.get_bf16 = lambda self, value: _Handle(
        f32_to_bf16(np.array([value], np.float32)), tl.bfloat16
    )


def _mend_products(emulate_tf32: bool) -> None:
    """tl.dot: exact products, summed in float32, or of float32 in float64 and rounded once."""
    stock_dot = _Builder.create_dot

    def as_f32(handle):
        values = _float8_to_f32(handle) if handle.dtype.scalar in _FLOAT8 else _up(handle).data
        return values.astype(np.float32, copy=False)

    def create_dot(self, a, b, d, precision, *rest):
        integer_or_double = not d.dtype.is_floating() or d.data.dtype == np.float64
        if integer_or_double or a.dtype.scalar in _FLOAT8_ELSEWHERE:
            return stock_dot(self, a, b, d, precision, *rest)
        x, y = as_f32(a), as_f32(b)
        tf32 = interpreter._ir.INPUT_PRECISION.TF32
        if emulate_tf32 and a.dtype.scalar == tl.float32 and precision == tf32:
            x, y = to_tf32(x), to_tf32(y)
        if a.dtype.scalar == tl.float32:
            # a BLAS sums in an order that hangs on the shape and on the CPU; tensor cores do not
            x, y = x.astype(np.float64), y.astype(np.float64)
        product = np.matmul(x, y).astype(np.float32, copy=False)
        out = product + _up(d).data.astype(np.float32, copy=False)
        if _is_bf16(d):
            return _Handle(f32_to_bf16(out), tl.bfloat16)
        return _Handle(out.astype(d.data.dtype, copy=False), d.dtype.scalar)

    _Builder.create_dot = create_dot


def _mend_atomics() -> None:
    """Atomic addition and exchange of bfloat16."""
    stock_rmw = _Builder.create_atomic_rmw

    def create_atomic_rmw(self, op, ptr, value, mask, sem, scope):
        if not _is_bf16(value):
            return stock_rmw(self, op, ptr, value, mask, sem, scope)
        kinds = interpreter._ir.ATOMIC_OP
        combine: Any = {kinds.FADD: np.add, kinds.XCHG: lambda old, new: new}[op]
        shape = np.broadcast_shapes(ptr.data.shape, value.data.shape, mask.data.shape)
        pointers, values, wanted = (
            np.array(np.broadcast_to(t.data, shape)).reshape(-1) for t in (ptr, value, mask)
        )
        before = np.zeros(pointers.size, np.uint16)
        one, zero = np.ones(1, bool), np.zeros(1, np.uint16)
        memory = interpreter._interpreter
        for i in np.flatnonzero(wanted):
            lane = slice(i, i + 1)
            before[lane] = memory.load(pointers[lane], one, zero, np.dtype(np.uint16))
            after = combine(bf16_to_f32(before[lane]), bf16_to_f32(values[lane]))
            memory.store(pointers[lane], f32_to_bf16(after), one)
        return _Handle(before.reshape(shape), tl.bfloat16)

    _Builder.create_atomic_rmw = create_atomic_rmw


def _mend_reductions() -> None:
    """Sums, extrema and scans of bfloat16 blocks."""
    reduce, scan = interpreter.ReduceOps, interpreter.ScanOps

    def lifted(stock):
        def down(self, out):
            if out.dtype.scalar != tl.float32:  # the indices of an argmax
                return out
            bits = f32_to_bf16(out.handle.data)
            return self.to_tensor(bits if out.type.is_block() else bits[0], tl.bfloat16)

        def inner(self, given, *args, **kwargs):
            first = given[0] if isinstance(given, tuple) else given
            if first.dtype.scalar != tl.bfloat16:
                return stock(self, given, *args, **kwargs)
            wide = self.to_tensor(bf16_to_f32(first.handle.data), tl.float32)
            out = stock(self, wide, *args, **kwargs)
            if isinstance(out, (list, tuple)):
                return type(out)(down(self, t) for t in out)
            return down(self, out)

        return inner

    reduce.sum, reduce.min_max = lifted(reduce.sum), lifted(reduce.min_max)
    scan.cumsum, scan.cumprod = lifted(scan.cumsum), lifted(scan.cumprod)


def _mend_scalars() -> None:
    """Scalar arguments get the types that the launcher gives them."""
    stock_convert = interpreter._implicit_cvt

    def implicit_cvt(arg):
        if isinstance(arg, bool):
            return tl.tensor(_Handle(np.array([arg], np.bool_), tl.int1), tl.int1)
        if isinstance(arg, float):
            return tl.tensor(_Handle(np.array([arg], np.float32), tl.float32), tl.float32)
        return stock_convert(arg)

    interpreter._implicit_cvt = implicit_cvt


def _be_strict(check_int_overflow: bool) -> None:
    """Refuses what the compiler refuses and the interpreter silently gets wrong."""
    stock_patch_tensor = interpreter._patch_lang_tensor
    stock_call = interpreter.GridExecutor.__call__
    triton_itself = ("triton.language.semantic", "triton.language.core")

    def truth(self):
        if self.handle.data.size != 1:
            if sys._getframe(1).f_globals.get("__name__") in triton_itself:
                return True
            raise TypeError(
                "truth value of a block: use &, |, ~ (not and, or, not, if, chained comparison)"
            )
        return bool(self.handle.data.reshape(-1)[0])

    def index(self):  # Triton 3.6 with numpy 2.4
        return int(np.asarray(self.handle.data).reshape(-1)[0])

    def patch_lang_tensor(tensor, scope):
        stock_patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__bool__", truth)
        scope.set_attr(tensor, "__index__", index)

    def call(self, *args, **kwargs):
        unknown = set(kwargs) - set(self.arg_names) - _LAUNCH_OPTIONS
        if unknown:
            raise KeyError(f"keyword arguments {sorted(unknown)} unrecognised")
        if isinstance(self.grid, list):
            self.grid = tuple(self.grid)
        with np.errstate(all="ignore"):
            return stock_call(self, *args, **kwargs)

    def min_dot_size(left, right):
        return (1, 1, 32 if left.scalar.primitive_bitwidth == 8 else 16)

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.GridExecutor.__call__ = call
    builder = interpreter.interpreter_builder
    builder.codegen_fns["min_dot_size"] = min_dot_size
    # Stock checks every integer operation, six more operations each, and drops the result.
    builder.options = dataclasses.replace(
        builder.options, sanitize_overflow=check_int_overflow, debug=check_int_overflow
    )


# --- interpreter without TRITON_INTERPRET -------------------------------------------------------


class _NoGpuDriver:
    """Answers what autotuned kernels ask of a device: every trial runs, and all take as long."""

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def run_once(call, quantiles=None, **_):
            call()
            return [1.0] * 3

        return run_once

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


_memo: dict[Any, Any] = {}


def _interpreted_function(kernel: JITFunction) -> Any:
    if kernel.fn not in _memo:
        _memo[kernel.fn] = interpreter.InterpretedFunction(kernel.fn)
    return _memo[kernel.fn]


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside the block, kernels on CPU tensors run in the interpreter, exact and strict."""
    install()

    def call(self, *args, **kwargs):
        return _interpreted_function(self)(*args, **kwargs)

    def run(self, *args, grid, warmup, **kwargs):
        return _interpreted_function(self).run(*args, grid=grid, warmup=warmup, **kwargs)

    before = (
        JITFunction.__call__,
        JITFunction.run,
        driver._active,
        triton.knobs.runtime.interpret,
    )
    JITFunction.__call__, JITFunction.run = call, run
    triton.knobs.runtime.interpret = True
    driver.set_active(_NoGpuDriver())
    try:
        with cpu_runner("interpreter"):
            yield
    finally:
        (
            JITFunction.__call__,
            JITFunction.run,
            driver._active,
            triton.knobs.runtime.interpret,
        ) = before
