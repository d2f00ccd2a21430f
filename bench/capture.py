"""capture_launches(target): run real Triton host code without a GPU, record every kernel launch, compile for any target.

    with capture_launches("sm90") as cap:
        my_op(torch.empty(4096, 4096, device="meta"))          # CPU, meta and FakeTensor inputs all work
    for l in cap.launches:                                     # one per config for autotuned kernels
        ck = l.compile()                                       # or l.compile("sm100"); cached by Triton on disk
        print(l, resources(ck))

How: (1) a stub driver is made active, so target/device/stream/benchmarker lookups need no CUDA; (2) JITFunction._do_compile
is replaced, so everything the real launcher does before compiling (binder, native_specialize_impl, option parsing,
heuristics, autotune pruning and hooks, the grid callable) has really run, and what comes out is exact.  Nothing is launched:
outputs are not written.  Works with triton 3.6, 3.7, 3.8, 3.9.  Needs a process in which TRITON_INTERPRET is *not* set.
Self-test: python aot_capture.py
"""
from __future__ import annotations
import contextlib, dataclasses, functools, os, re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from fastlm.kernels._dispatch import cpu_runner

# opt-in shared memory per block (bytes) and SM count, as the driver would report them
_PROPS = {80: (166912, 108), 86: (101376, 84), 89: (101376, 128), 90: (232448, 132), 100: (232448, 148), 120: (101376, 170)}
# launch options a caller may set; all other CUDAOptions fields are derived from the target
_USER_OPTIONS = ("num_warps", "num_ctas", "num_stages", "maxnreg", "enable_fp_fusion", "launch_cooperative_grid", "launch_pdl",
                 "ptx_options", "ir_override", "debug", "sanitize_overflow", "instrumentation_mode")


def as_target(t) -> GPUTarget:
    return t if isinstance(t, GPUTarget) else GPUTarget("cuda", int(str(t).removeprefix("sm_").removeprefix("sm")), 32)


@dataclasses.dataclass
class Launch:
    kernel: JITFunction
    signature: dict
    constexprs: dict            # {(index path): value}
    attrs: dict                 # {(index path): [['tt.divisibility', 16]]}
    options: dict
    target: GPUTarget
    grid: tuple | None = None
    phase: str = "launch"       # 'launch' | 'tune' (an autotuner trial) | 'warmup'

    @property
    def name(self): return self.kernel.fn.__name__

    @property
    def meta(self):             # constexprs by parameter name
        n = self.kernel.arg_names
        return {n[k[0]]: v for k, v in self.constexprs.items() if len(k) == 1}

    def key(self):
        return (self.kernel.fn, str(self.signature), str(self.constexprs), str(self.attrs), str(self.options))

    def compile(self, target=None, **override):
        t = as_target(target) if target is not None else self.target
        src = self.kernel.ASTSource(self.kernel, dict(self.signature), dict(self.constexprs), dict(self.attrs))
        return triton.compile(src, target=t, options={**self.options, **override})

    def __str__(self):
        o = {k: v for k, v in self.options.items() if k in ("num_warps", "num_stages", "num_ctas", "maxnreg")}
        return f"{self.name}[{self.grid}] {self.phase} {self.meta} {o}"


class Capture:
    def __init__(self, target): self.target, self.launches, self._tuning = target, [], 0

    def unique(self):
        seen = {}
        for l in self.launches: seen.setdefault(l.key(), l)
        return list(seen.values())

    def compile_all(self, target=None): return [(l, l.compile(target)) for l in self.unique()]


class _Utils:
    def __init__(self, arch): self.arch = arch
    def get_device_properties(self, device):
        smem, sms = _PROPS.get(self.arch, _PROPS[90])
        return {"max_shared_mem": smem, "multiprocessor_count": sms, "warpSize": 32, "max_num_regs": 65536,
                "sm_clock_rate": 1_000_000, "mem_clock_rate": 1_000_000, "mem_bus_width": 4096}


class _Driver:                  # duck-types triton.backends.driver.DriverBase
    def __init__(self, target, cap):
        self.target, self.cap, self.utils = target, cap, _Utils(target.arch)
        self.device = ("capture", id(self))                 # hashable, unique: private entry in every device_caches
    def get_current_target(self): return self.target
    def get_current_device(self): return self.device
    def set_current_device(self, d): pass
    def get_current_stream(self, d=None): return 0
    def get_device_capability(self, d=None): return divmod(self.target.arch, 10)
    def get_active_torch_device(self):
        import torch
        return torch.device("cpu")
    def get_device_interface(self): raise RuntimeError("no device under capture_launches")
    def get_empty_cache_for_benchmark(self): return None
    def clear_cache(self, c): pass
    def get_benchmarker(self): return self.bench
    def bench(self, call, quantiles=None, **_):             # run each trial once: that records it
        self.cap._tuning += 1
        try: call()
        finally: self.cap._tuning -= 1
        return [1.0] * (len(quantiles) if quantiles else 1)


class _Recorded:                # stands in for CompiledKernel inside JITFunction.run
    function = packed_metadata = None
    def __init__(self, launch): self._l = launch
    def launch_metadata(self, *a): return None
    def run(self, g0, g1, g2, *_): self._l.grid = (int(g0), int(g1), int(g2))
    def _init_handles(self): pass
    @functools.cached_property
    def _ck(self): return self._l.compile()
    n_regs = property(lambda s: resources(s._ck)["regs"])   # for host code that sizes a persistent grid from kernel.warmup()
    n_spills = property(lambda s: resources(s._ck)["spill_stores"])
    metadata = property(lambda s: s._ck.metadata)
    asm = property(lambda s: s._ck.asm)


@contextlib.contextmanager
def capture_launches(target="sm90"):
    if triton.knobs.runtime.interpret:
        raise RuntimeError("capture_launches needs a process without TRITON_INTERPRET")
    target = as_target(target)
    cap = Capture(target)
    drv, kept = _Driver(target, cap), {}
    prev, o_do, o_tune = driver._active, JITFunction._do_compile, Autotuner.run

    def do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        kept[id(self)] = self
        base = type(options)()                                                   # defaults
        opts = {k: getattr(options, k) for k in _USER_OPTIONS
                if hasattr(options, k) and getattr(options, k) != getattr(base, k)}
        l = Launch(self, dict(signature), dict(constexprs), dict(attrs), opts, target,
                   phase="warmup" if warmup else "tune" if cap._tuning else "launch")
        cap.launches.append(l)
        return _Recorded(l)                                                      # never stored in the kernel cache

    def tune(self, *a, **k):                                                     # leave no fake timings behind
        saved, had = self.cache, self.__dict__.pop("do_bench", None)
        self.cache, self.__dict__["do_bench"] = {}, drv.bench
        cr, self.cache_results = self.cache_results, False
        try: return o_tune(self, *a, **k)
        finally:
            self.cache, self.cache_results = saved, cr
            del self.__dict__["do_bench"]
            if had is not None: self.__dict__["do_bench"] = had

    JITFunction._do_compile, Autotuner.run = do_compile, tune
    driver.set_active(drv)
    try:
        with cpu_runner("compiler"): yield cap
    finally:
        JITFunction._do_compile, Autotuner.run, driver._active = o_do, o_tune, prev
        for f in kept.values(): f.device_caches.pop(drv.device, None)


# ---- static facts about a compiled kernel ---------------------------------------------------------------------------
_BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def _tool(name, *args):
    return subprocess.run([os.path.join(_BIN, name), *args], capture_output=True, text=True, check=True).stdout


@functools.lru_cache(None)
def _by_hash(h): return {}


def resources(ck) -> dict:
    """regs/thread, stack, static shared (cuobjdump -res-usage), dynamic shared + tmem (metadata), spill bytes (ptxas -v)."""
    memo = _by_hash(ck.hash)
    if "res" in memo: return memo["res"]
    with tempfile.TemporaryDirectory() as d:
        cubin, ptx = os.path.join(d, "k.cubin"), os.path.join(d, "k.ptx")
        open(cubin, "wb").write(ck.asm["cubin"]); open(ptx, "w").write(ck.asm["ptx"])
        u = _tool("cuobjdump", "-res-usage", cubin)
        g = lambda f: int(re.search(rf"{f}:(\d+)", u).group(1))
        arch = ck.metadata.target.arch
        from triton.backends.nvidia.compiler import get_ptxas
        v = subprocess.run([get_ptxas(arch).path, "-v", "--regAllocOptLevel=2", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}", ptx, "-o", os.devnull],
                           capture_output=True, text=True).stderr
        s = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", v)
    memo["res"] = dict(regs=g("REG"), stack=g("STACK"), local=g("LOCAL"), shared=ck.metadata.shared,
                       tmem=getattr(ck.metadata, "tmem_size", None), warps=ck.metadata.num_warps,
                       spill_stores=int(s.group(1)) if s else None, spill_loads=int(s.group(2)) if s else None)
    return memo["res"]


def sass_ops(ck) -> dict:
    """Counter of SASS opcodes, from nvdisasm."""
    import collections
    memo = _by_hash(ck.hash)
    if "ops" not in memo:
        with tempfile.TemporaryDirectory() as d:
            f = os.path.join(d, "k.cubin"); open(f, "wb").write(ck.asm["cubin"])
            t = _tool("nvdisasm", "-c", f)
        memo["ops"] = collections.Counter(m.group(1) for m in re.finditer(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", t, re.M))
    return memo["ops"]


if __name__ == "__main__":
    import importlib.util, sys, textwrap, torch
    src = textwrap.dedent('''
        import torch, triton, triton.language as tl
        @triton.autotune(configs=[triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((512, 2), (1024, 4), (4096, 8))], key=["n"],
                         prune_configs_by={"early_config_prune": lambda cs, a, **k: [c for c in cs if c.kwargs["BLOCK"] <= 2048]})
        @triton.heuristics({"EVEN": lambda a: a["n"] % a["BLOCK"] == 0})
        @triton.jit
        def bias_act(X, B, O, scale, n, HAS_B: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
            i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            m = i < n
            x = tl.load(X + i) if EVEN else tl.load(X + i, mask=m, other=0.0)
            if B is not None:
                x += tl.load(B + i, mask=m, other=0.0)
            tl.store(O + i, x * scale, mask=m)
        def op(x, b=None, scale=0.5):
            o = torch.empty_like(x)
            bias_act[lambda m: (triton.cdiv(x.numel(), m["BLOCK"]),)](x, b, o, scale, x.numel(), HAS_B=b is not None)
            return o
    ''')
    d = tempfile.mkdtemp(); p = os.path.join(d, "demo_host.py"); open(p, "w").write(src)
    spec = importlib.util.spec_from_file_location("demo_host", p); demo = importlib.util.module_from_spec(spec); spec.loader.exec_module(demo)
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(): fk = torch.empty(4096, dtype=torch.float16)
    for what, x, b in (("cpu bf16, bias None", torch.ones(4096, dtype=torch.bfloat16), None),
                       ("meta fp32, bias given", torch.empty(5000, device="meta"), torch.empty(5000, device="meta")),
                       ("cpu view off by one element, bias None", torch.ones(4097)[1:], None),
                       ("fake fp16, bias None", fk, None)):
        with capture_launches("sm90") as cap: demo.op(x, b)
        print(f"== {what}")
        for l in cap.launches: print("  ", l, l.signature, l.attrs)
        for l, ck in cap.compile_all():
            print("     sm90 ", resources(ck), "vector loads:", {k: v for k, v in sass_ops(ck).items() if k.startswith("LDG")})
        print("     sm100", resources(cap.launches[-1].compile("sm100")))
    assert not demo.bias_act.cache and "do_bench" not in demo.bias_act.__dict__
