"""Fidelity + speed shim for Triton's interpreter, and a switch that runs it without TRITON_INTERPRET (original code).
tests/conftest.py:      import interp_shim; interp_shim.install()
in a test / fixture:    with interp_shim.interpreted(): op(cpu_tensor)      # kernels of a normally imported module
Checked with triton 3.6.0 (numpy < 2.4), 3.7.1, 3.8.0, 3.9.0."""
from __future__ import annotations
import contextlib, dataclasses, sys, types
import numpy as np, torch, triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime import interpreter as I
from triton.runtime.jit import JITFunction

from ._dispatch import cpu_runner

H, B = I.TensorHandle, I.InterpreterBuilder
_FP8 = {tl.float8e5: torch.float8_e5m2, tl.float8e4nv: torch.float8_e4m3fn}
_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "launch_cooperative_grid", "launch_pdl", "debug",
            "ptx_options", "ir_override", "sanitize_overflow", "extern_libs", "instrumentation_mode", "grid", "warmup"}

# ---------------------------------------------------------------------------------------------- number formats
def bf16_to_f32(u): return (np.asarray(u).astype(np.uint32) << 16).view(np.float32)

def f32_to_bf16(f, rtz=False):                     # nearest even; NaN stays NaN
    f = np.ascontiguousarray(f, np.float32); u = f.view(np.uint32)
    r = u if rtz else u + (np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1)))
    r = np.where(np.isnan(f), np.uint32(0x7FFF0000) | (u & np.uint32(0x80000000)), r)
    return (r >> np.uint32(16)).astype(np.uint16)

def to_tf32(f):
    f = np.ascontiguousarray(f, np.float32); u = f.view(np.uint32)
    return np.where(np.isfinite(f), (u + np.uint32(0x0FFF) + ((u >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000), u).view(np.float32)

def _bf(h): return h.dtype.scalar == tl.bfloat16
def _up(h): return H(bf16_to_f32(h.data), tl.float32) if _bf(h) else h
def _down(h): return H(f32_to_bf16(h.data), tl.bfloat16)
def _fp8_to_f32(h): return torch.from_numpy(np.ascontiguousarray(h.data)).view(_FP8[h.dtype.scalar]).float().numpy()
def _f32_to_fp8(f, d):
    t = torch.from_numpy(np.ascontiguousarray(f, np.float32)); m = torch.finfo(_FP8[d]).max
    return t.clamp(-m, m).to(_FP8[d]).view(torch.uint8).numpy()                # PTX cvt.satfinite

def install(emulate_tf32=False, check_int_overflow=False):
    if getattr(B, "_fastlm", False): return
    B._fastlm = True
    o_bin, o_un, o_fma, o_cast, o_f2f, o_rmw, o_print, o_dot = (B.binary_op, B.unary_op, B.create_fma, B.cast_impl,
        B.create_fp_to_fp, B.create_atomic_rmw, B.create_print, B.create_dot)

    def binary_op(self, l, r, op):
        if not (_bf(l) and _bf(r)): return o_bin(self, l, r, op)
        out = op(bf16_to_f32(l.data), bf16_to_f32(r.data))
        return H(out, tl.int1) if out.dtype == np.bool_ else H(f32_to_bf16(out), tl.bfloat16)
    B.binary_op = binary_op
    B.unary_op = lambda self, a, op: _down(o_un(self, _up(a), op)) if _bf(a) else o_un(self, a, op)
    B.create_minnumf = lambda self, l, r: self.binary_op(l, r, np.fmin)         # 3.6/3.7: NaN propagated, unlike the GPU
    B.create_maxnumf = lambda self, l, r: self.binary_op(l, r, np.fmax)

    def create_fma(self, x, y, z):                                              # one rounding, like the GPU
        if z.data.dtype == np.float64: return o_fma(self, x, y, z)
        a, b, c = (_up(t).data.astype(np.float64) for t in (x, y, z)); d = a * b + c
        return H(f32_to_bf16(d.astype(np.float32)), tl.bfloat16) if _bf(z) else H(d.astype(z.data.dtype), z.dtype.scalar)
    B.create_fma = create_fma

    def cast_impl(self, src, dst):
        s, d = src.dtype.scalar, dst.scalar
        if s == d: return src
        if s == tl.bfloat16: return _up(src) if d == tl.float32 else cast_impl(self, _up(src), dst)
        if d == tl.bfloat16: return _down(H(src.data.astype(np.float32), tl.float32))
        return o_cast(self, src, dst)
    B.cast_impl = cast_impl

    def create_fp_to_fp(self, src, dst, mode):
        s, d, rtz = src.dtype.scalar, dst.scalar, mode == I._ir.ROUNDING_MODE.RTZ
        if s in _FP8: return cast_impl(self, H(_fp8_to_f32(src), tl.float32), dst)
        if d in _FP8 and not rtz: return H(_f32_to_fp8(_up(src).data, d), d)
        if d == tl.bfloat16: return H(f32_to_bf16(src.data, rtz), d)
        return o_f2f(self, src, dst, mode)
    B.create_fp_to_fp = create_fp_to_fp
    B.get_bf16 = lambda self, v: H(f32_to_bf16(np.array([v], np.float32)), tl.bfloat16)

    def create_dot(self, a, b, d, prec, *rest):
        f = lambda h: _fp8_to_f32(h) if h.dtype.scalar in _FP8 else _up(h).data
        if not d.dtype.is_floating() or d.data.dtype == np.float64 or a.dtype.scalar in (tl.float8e4b15, tl.float8e4b8, tl.float8e5b16):
            return o_dot(self, a, b, d, prec, *rest)
        x, y = f(a).astype(np.float32, copy=False), f(b).astype(np.float32, copy=False)    # one BLAS sgemm, products exact
        if emulate_tf32 and a.dtype.scalar == tl.float32 and prec == I._ir.INPUT_PRECISION.TF32: x, y = to_tf32(x), to_tf32(y)
        out = np.matmul(x, y) + _up(d).data.astype(np.float32, copy=False)
        return H(f32_to_bf16(out), tl.bfloat16) if _bf(d) else H(out.astype(d.data.dtype, copy=False), d.dtype.scalar)
    B.create_dot = create_dot

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        if not _bf(val): return o_rmw(self, op, ptr, val, mask, sem, scope)
        A = I._ir.ATOMIC_OP; fn = {A.FADD: np.add, A.XCHG: lambda a, b: b}[op]
        shape = np.broadcast_shapes(ptr.data.shape, val.data.shape, mask.data.shape)
        p, v, m = (np.array(np.broadcast_to(t.data, shape)).reshape(-1) for t in (ptr, val, mask))
        old, one, z = np.zeros(p.size, np.uint16), np.ones(1, bool), np.zeros(1, np.uint16)
        for i in np.flatnonzero(m):
            old[i:i + 1] = I._interpreter.load(p[i:i + 1], one, z, np.dtype(np.uint16))
            I._interpreter.store(p[i:i + 1], f32_to_bf16(fn(bf16_to_f32(old[i:i + 1]), bf16_to_f32(v[i:i + 1]))), one)
        return H(old.reshape(shape), tl.bfloat16)
    B.create_atomic_rmw = create_atomic_rmw
    B.create_print = lambda self, p, h, vals, s: o_print(self, p, h, [_up(v) for v in vals], s)

    R, S = I.ReduceOps, I.ScanOps                                               # sum/max/argmax/cumsum of bf16 blocks
    def lift(fn):
        def down(self, t):
            if t.dtype.scalar != tl.float32: return t                            # indices
            u = f32_to_bf16(t.handle.data); return self.to_tensor(u if t.type.is_block() else u[0], tl.bfloat16)
        def inner(self, x, *a, **k):
            y0 = x[0] if isinstance(x, tuple) else x
            if y0.dtype.scalar != tl.bfloat16: return fn(self, x, *a, **k)
            y = fn(self, self.to_tensor(bf16_to_f32(y0.handle.data), tl.float32), *a, **k)
            return type(y)(down(self, t) for t in y) if isinstance(y, (list, tuple)) else down(self, y)
        return inner
    R.sum, R.min_max, S.cumsum, S.cumprod = lift(R.sum), lift(R.min_max), lift(S.cumsum), lift(S.cumprod)

    o_cvt = I._implicit_cvt                                                      # scalars typed as the launcher types them
    def implicit_cvt(a):
        if isinstance(a, bool): return tl.tensor(H(np.array([a], np.bool_), tl.int1), tl.int1)
        if isinstance(a, float): return tl.tensor(H(np.array([a], np.float32), tl.float32), tl.float32)
        return o_cvt(a)
    I._implicit_cvt = implicit_cvt

    # ---- strictness: what the compiler rejects and the interpreter silently gets wrong
    o_plt = I._patch_lang_tensor
    def patch_lang_tensor(tensor, scope):
        o_plt(tensor, scope)
        def strict_bool(self):
            if self.handle.data.size != 1:
                if sys._getframe(1).f_globals.get("__name__") in ("triton.language.semantic", "triton.language.core"): return True
                raise TypeError("truth value of a block: use &, |, ~ (not and/or/not/if/chained compare)")
            return bool(self.handle.data.reshape(-1)[0])
        scope.set_attr(tensor, "__bool__", strict_bool)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))   # 3.6 + numpy 2.4
    I._patch_lang_tensor = patch_lang_tensor
    o_grid = I.GridExecutor.__call__
    def grid_call(self, *a, **k):
        bad = set(k) - set(self.arg_names) - _OPTIONS
        if bad: raise KeyError(f"keyword arguments {sorted(bad)} unrecognised")
        if isinstance(self.grid, list): self.grid = tuple(self.grid)
        with np.errstate(all="ignore"): return o_grid(self, *a, **k)
    I.GridExecutor.__call__ = grid_call
    b = I.interpreter_builder
    b.codegen_fns["min_dot_size"] = lambda l, r: (1, 1, 32 if l.scalar.primitive_bitwidth == 8 else 16)
    # sanitize_overflow is on by default: ~6 extra ops per integer op, and the result is thrown away unless debug is on
    b.options = dataclasses.replace(b.options, sanitize_overflow=check_int_overflow, debug=check_int_overflow)

    # ---- speed: patch triton.language once per launch, not on every nested @jit call; always restore
    o_patch, everything, active = I._patch_lang, types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}), []
    class Scope:
        def __init__(self, inner): self.inner = inner
        def restore(self):
            if self.inner is not None: self.inner.restore(); active.pop()
    def patch_lang(fn):
        if active: return Scope(None)
        s = Scope(o_patch(everything)); active.append(s); return s
    def call(self, *a, **k):
        s = patch_lang(self.fn)
        try: return self.rewrite()(*a, **k)
        finally: s.restore()
    I._patch_lang, I.InterpretedFunction.__call__ = patch_lang, call
    o_np, cache = I._get_np_dtype, {}
    def get_np(t):
        if isinstance(t, (tl.block_type, tl.pointer_type)): return o_np(t)
        r = cache.get(t.name)
        if r is None: r = cache[t.name] = o_np(t)
        return r
    I._get_np_dtype = get_np

# ------------------------------------------------------------------------ interpreter without TRITON_INTERPRET
class _NoGpuDriver:                        # @autotune with several configs works: each trial runs, first config wins
    def get_benchmarker(self): return lambda f, quantiles=None, **_: (f(), [1.0] * 3)[1]
    def get_current_target(self): return triton.backends.compiler.GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, d=None): return 0
_memo = {}

@contextlib.contextmanager
def interpreted():
    install()
    def interp(f):
        if f.fn not in _memo: _memo[f.fn] = I.InterpretedFunction(f.fn)
        return _memo[f.fn]
    saved = JITFunction.__call__, JITFunction.run, driver._active, triton.knobs.runtime.interpret
    JITFunction.__call__ = lambda self, *a, **k: interp(self)(*a, **k)
    JITFunction.run = lambda self, *a, grid, warmup, **k: interp(self).run(*a, grid=grid, warmup=warmup, **k)
    triton.knobs.runtime.interpret = True
    driver.set_active(_NoGpuDriver())
    try:
        with cpu_runner("interpreter"): yield
    finally: JITFunction.__call__, JITFunction.run, driver._active, triton.knobs.runtime.interpret = saved
