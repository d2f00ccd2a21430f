r"""Adam and AdamW, every tensor of a model in two launches.

Kingma & Ba 2015, https://arxiv.org/abs/1412.6980; Loshchilov & Hutter 2019,
https://arxiv.org/abs/1711.05101.

One step t for a gradient g (negated under ``maximize``), with s the gradient scale:

    g = g / s                            p = p - lr * weight_decay * p          (AdamW)
                                         g = g + weight_decay * p               (Adam)
    exp_avg    = exp_avg    + (1 - beta1) * (g   - exp_avg)
    exp_avg_sq = exp_avg_sq + (1 - beta2) * (g^2 - exp_avg_sq)
    p = p - lr / (1 - beta1^t) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)

``amsgrad`` divides by the largest exp_avg_sq so far. Scalars are computed in float64, elements in
float32 and rounded once, so float16 and bfloat16 results are closer to float64 than eager's.

The first kernel advances the steps and writes each tensor's scalars; the second walks all tensors
through a table of addresses in chunks of equal size. Learning rates, betas and steps live in
device memory: a schedule neither recompiles nor synchronises.

Cost, bound by memory, in bytes a parameter and step (p and g, states, extras):

    float32                                            28
    bfloat16 throughout, torch's default for it        14
    bfloat16, state_dtype=float32, stochastic          22
    bfloat16, state_dtype=float32, master="split"      26
    bfloat16, state_dtype=float32, master="fp32"       32
    amsgrad +8 (float32 states); ema_decay +8; max_grad_norm + the gradient read once more
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.optimizer import ParamsT

from . import _dispatch
from ._dispatch import dispatched
from ._op import Inputs, Op
from ._register import torch_op


def reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    decoupled_weight_decay: bool = True,
) -> None:
    """A step of PyTorch's for-loop over the tensors."""
    if found_inf is not None and found_inf.item():
        return
    if grad_scale is not None:
        grads = [g / grad_scale for g in grads]
    with torch.no_grad():
        torch_adam(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
            foreach=False, fused=False, amsgrad=amsgrad, beta1=beta1, beta2=beta2, lr=lr,
            weight_decay=weight_decay, eps=eps, maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip


# --- kernels ------------------------------------------------------------------------------------

# Rows of the table of tensors, and columns of the scalars that the update reads.
_P, _G, _M, _V, _VMAX, _MASTER, _EMA, _STEP, _NUMEL, _GROUP, _ID = (
    tl.constexpr(i) for i in range(11)
)
_STEP_SIZE, _INV_SQRT_BC2, _DECAY, _C1, _C2, _EPS, _G_FACTOR, _GO, _T, _C_EMA = (
    tl.constexpr(i) for i in range(10)
)
_SCALARS = tl.constexpr(16)  # columns: a row is one 64-byte sector pair
_HYPER = tl.constexpr(
    8
)  # float64 numbers of a group: lr beta1 beta2 eps weight_decay sign decoupled


@triton.jit
def _prepare_kernel(
    table_ptr, hyper_ptr, scalars_ptr, grad_scale_ptr, found_inf_ptr, squares_ptr, norm_ptr,
    NT, parts, max_norm,
    HAS_SCALE: tl.constexpr, HAS_FOUND: tl.constexpr, CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advances the step of each tensor and writes its float32 scalars, computed in float64."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < NT
    go = 1.0
    if HAS_FOUND:
        go = tl.where(tl.load(found_inf_ptr) == 0.0, 1.0, 0.0)
    step_ptrs = tl.load(table_ptr + NT * _STEP + offs, mask=mask, other=0)
    step_ptrs = step_ptrs.to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptrs, mask=mask, other=0.0) + go
    tl.store(step_ptrs, step, mask=mask)

    group = hyper_ptr + tl.load(table_ptr + NT * _GROUP + offs, mask=mask, other=0) * _HYPER
    lr = tl.load(group, mask=mask, other=0.0)
    beta1 = tl.load(group + 1, mask=mask, other=0.5)
    beta2 = tl.load(group + 2, mask=mask, other=0.5)
    eps = tl.load(group + 3, mask=mask, other=0.0)
    weight_decay = tl.load(group + 4, mask=mask, other=0.0)
    sign = tl.load(group + 5, mask=mask, other=1.0)
    decoupled = tl.load(group + 6, mask=mask, other=1.0)
    ema_decay = tl.load(group + 7, mask=mask, other=1.0)
    t = tl.maximum(step, 1.0).to(tl.float64)  # a first step that is skipped leaves 0
    bias_correction1 = 1.0 - tl.exp(t * tl.log(beta1))
    bias_correction2 = 1.0 - tl.exp(t * tl.log(beta2))
    factor = sign
    if HAS_SCALE:
        factor = sign / tl.load(grad_scale_ptr).to(tl.float64)
    if CLIPS:
        squares = tl.zeros([BLOCK], tl.float64)
        for first in range(0, parts, BLOCK):
            part = first + tl.arange(0, BLOCK)
            squares += tl.load(squares_ptr + part, mask=part < parts, other=0.0).to(tl.float64)
        norm = tl.sqrt(tl.sum(squares))
        if HAS_SCALE:
            norm /= tl.abs(tl.load(grad_scale_ptr).to(tl.float64))
        clip = max_norm / (norm + 1e-6)
        factor *= tl.where(clip >= 1.0, 1.0, clip)  # a NaN stays, as in clip_grad_norm_
        if tl.program_id(0) == 0:
            tl.store(norm_ptr, norm.to(tl.float32))

    row = scalars_ptr + offs * _SCALARS
    tl.store(row + _STEP_SIZE, (lr / bias_correction1).to(tl.float32), mask=mask)
    tl.store(row + _INV_SQRT_BC2, (1.0 / tl.sqrt(bias_correction2)).to(tl.float32), mask=mask)
    decay = tl.where(decoupled != 0.0, lr * weight_decay, weight_decay)
    tl.store(row + _DECAY, decay.to(tl.float32), mask=mask)
    tl.store(row + _C1, (1.0 - beta1).to(tl.float32), mask=mask)
    tl.store(row + _C2, (1.0 - beta2).to(tl.float32), mask=mask)
    tl.store(row + _EPS, eps.to(tl.float32), mask=mask)
    tl.store(row + _G_FACTOR, factor.to(tl.float32), mask=mask)
    tl.store(row + _T, step, mask=mask)
    tl.store(row + _C_EMA, (1.0 - ema_decay).to(tl.float32), mask=mask)
    tl.store(row + _GO, go + tl.zeros([BLOCK], tl.float32), mask=mask)


@triton.jit
def _squares_kernel(
    table_ptr, chunks_ptr, squares_ptr,
    NT, chunks,
    G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of squares of the gradients: one a program, chunks dealt out in turn."""
    squares = tl.zeros([BLOCK], tl.float32)
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        tensor = tl.load(chunks_ptr + c * 2).to(tl.int64)
        start = tl.load(chunks_ptr + c * 2 + 1).to(tl.int64) * CHUNK
        g_ptr = _address(table_ptr, _G, tensor, NT, G, ALIGNED) + start
        n = tl.minimum(tl.load(table_ptr + NT * _NUMEL + tensor) - start, CHUNK).to(tl.int32)
        whole = n // BLOCK * BLOCK
        for first in range(0, whole, BLOCK):
            g = _load(g_ptr, first + tl.arange(0, BLOCK), n, False)
            squares += g * g
        if whole < n:
            g = _load(g_ptr, whole + tl.arange(0, BLOCK), n, True)
            squares += g * g
    tl.store(squares_ptr + tl.program_id(0), tl.sum(squares))


@triton.jit
def _rounded_at_random(x, first, seed, t, tensor, BLOCK: tl.constexpr):
    """One of the two bfloat16 neighbours of x, the nearer the likelier; NaN and inf stay.

    The random bits depend on the seed, the element's index, the step and the parameter alone.
    """
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    low = quad.to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, (quad >> 32).to(tl.uint32), zero + t, zero + tensor)
    # Four numbers a call, for the four neighbours that one thread holds: none is moved.
    noise = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK]) & 0xFFFF
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000  # a NaN of all ones would wrap to -0
    bits = tl.where(finite, (bits + noise) & 0xFFFF0000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _joined(high, low):
    """The float32 that a bfloat16 and its 16-bit remainder make."""
    bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (bits + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _split(x):
    """The nearest bfloat16, and what it lacks as a signed 16-bit integer."""
    bits = x.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    high = (bits + 0x8000) >> 16
    low = tl.where(finite, bits - (high << 16), 0)
    near = high.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.where(finite, near, x.to(tl.bfloat16)), low.to(tl.int16)


@triton.jit
def _address(table_ptr, ROW: tl.constexpr, tensor, NT, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(table_ptr + NT * ROW + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)  # of the pointer, not of the integer: Triton 3.7 drops that
    return ptr


@triton.jit
def _load(ptr, offs, n, MASKED: tl.constexpr):
    """As float32; beyond n, where a mask is needed, 0."""
    if MASKED:
        x = tl.load(ptr + offs, mask=offs < n, other=0.0)
    else:
        x = tl.load(ptr + offs)
    return x.to(tl.float32)


@triton.jit
def _store(ptr, offs, n, x, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + offs, x.to(ptr.dtype.element_ty), mask=offs < n)
    else:
        tl.store(ptr + offs, x.to(ptr.dtype.element_ty))


@triton.jit
def _update(
    p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, master_ptr, ema_ptr, start, first, n,
    step_size, inv_sqrt_bc2, decay, c1, c2, eps, g_factor, c_ema, seed, t, tensor,
    DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr, MASTER: tl.constexpr, RANDOM: tl.constexpr,
    EMA: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offs = first + tl.arange(0, BLOCK)
    if MASTER == "fp32":
        p = _load(master_ptr, offs, n, MASKED)
    elif MASTER == "split":
        if MASKED:
            high = tl.load(p_ptr + offs, mask=offs < n, other=0.0)
            low = tl.load(master_ptr + offs, mask=offs < n, other=0)
        else:
            high = tl.load(p_ptr + offs)
            low = tl.load(master_ptr + offs)
        p = _joined(high, low)
    else:
        p = _load(p_ptr, offs, n, MASKED)
    g = _load(g_ptr, offs, n, MASKED) * g_factor
    m = _load(m_ptr, offs, n, MASKED)
    v = _load(v_ptr, offs, n, MASKED)
    if DECOUPLED:
        p -= decay * p
    else:
        g += decay * p
    # x - c x + c g, not beta x + c g: the float32 beta and c would not sum to 1, 1.3e-5 in v
    m = m - c1 * m + c1 * g
    v = v - c2 * v + c2 * (g * g)
    largest = v
    if AMSGRAD:
        vmax = _load(vmax_ptr, offs, n, MASKED)
        largest = tl.where((vmax >= v) | (vmax != vmax), vmax, v)  # NaN stays, as torch.maximum
        _store(vmax_ptr, offs, n, largest, MASKED)
    p -= step_size * tl.div_rn(m, tl.sqrt_rn(largest) * inv_sqrt_bc2 + eps)
    if EMA:
        ema = _load(ema_ptr, offs, n, MASKED)
        _store(ema_ptr, offs, n, ema - c_ema * ema + c_ema * p, MASKED)
    if MASTER == "split":
        high, low = _split(p)
        _store(p_ptr, offs, n, high, MASKED)
        _store(master_ptr, offs, n, low, MASKED)
    else:
        if MASTER == "fp32":
            _store(master_ptr, offs, n, p, MASKED)
        if RANDOM:
            p = _rounded_at_random(p, start + first, seed, t, tensor, BLOCK)
        _store(p_ptr, offs, n, p, MASKED)
    _store(m_ptr, offs, n, m, MASKED)
    _store(v_ptr, offs, n, v, MASKED)


@triton.jit
def _update_kernel(
    table_ptr, chunks_ptr, scalars_ptr,
    NT, seed,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
    DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr, MASTER: tl.constexpr, RANDOM: tl.constexpr,
    EMA: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates one chunk of one tensor."""
    chunk = chunks_ptr + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(chunk).to(tl.int64)
    start = tl.load(chunk + 1).to(tl.int64) * CHUNK
    scalars = scalars_ptr + tensor * _SCALARS
    if tl.load(scalars + _GO) != 0.0:
        step_size = tl.load(scalars + _STEP_SIZE)
        inv_sqrt_bc2 = tl.load(scalars + _INV_SQRT_BC2)
        decay = tl.load(scalars + _DECAY)
        c1 = tl.load(scalars + _C1)
        c2 = tl.load(scalars + _C2)
        eps = tl.load(scalars + _EPS)
        g_factor = tl.load(scalars + _G_FACTOR)
        p_ptr = _address(table_ptr, _P, tensor, NT, P, ALIGNED) + start
        g_ptr = _address(table_ptr, _G, tensor, NT, G, ALIGNED) + start
        m_ptr = _address(table_ptr, _M, tensor, NT, S, ALIGNED) + start
        v_ptr = _address(table_ptr, _V, tensor, NT, S, ALIGNED) + start
        vmax_ptr = v_ptr
        if AMSGRAD:
            vmax_ptr = _address(table_ptr, _VMAX, tensor, NT, S, ALIGNED) + start
        master_ptr = p_ptr
        if MASTER == "fp32":
            master_ptr = _address(table_ptr, _MASTER, tensor, NT, tl.float32, ALIGNED) + start
        if MASTER == "split":
            master_ptr = _address(table_ptr, _MASTER, tensor, NT, tl.int16, ALIGNED) + start
        ema_ptr = p_ptr
        if EMA:
            ema_ptr = _address(table_ptr, _EMA, tensor, NT, tl.float32, ALIGNED) + start
        c_ema = tl.load(scalars + _C_EMA)
        t = tl.load(scalars + _T).to(tl.int32).to(tl.uint32)
        number = tl.load(table_ptr + NT * _ID + tensor).to(tl.uint32)
        n = tl.minimum(tl.load(table_ptr + NT * _NUMEL + tensor) - start, CHUNK).to(tl.int32)
        # A mask that depends on loaded data would force scalar accesses: only the end has one.
        whole = n // BLOCK * BLOCK
        for first in range(0, whole, BLOCK):
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, master_ptr, ema_ptr, start, first, n,
                step_size, inv_sqrt_bc2, decay, c1, c2, eps, g_factor, c_ema, seed, t, number,
                DECOUPLED, AMSGRAD, MASTER, RANDOM, EMA, BLOCK, False,
            )  # fmt: skip
        if whole < n:
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, master_ptr, ema_ptr, start, whole, n,
                step_size, inv_sqrt_bc2, decay, c1, c2, eps, g_factor, c_ema, seed, t, number,
                DECOUPLED, AMSGRAD, MASTER, RANDOM, EMA, BLOCK, True,
            )  # fmt: skip


# --- launch -------------------------------------------------------------------------------------

_CHUNK = 8192  # elements a program; unmeasured
_WARPS = 4
_NORM_PROGRAMS = 1024  # partial sums of the norm: the same on any device, so the norm is too
_TRITON = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class _Row(NamedTuple):
    """One parameter of a plan: its tensors, and the hyper-parameters' row."""

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    vmax: Tensor | None
    step: Tensor
    group: int
    decoupled: bool
    number: int  # its place in the optimizer, which seeds its rounding
    master: Tensor | None = None  # float32 weights, or the int16 half that bfloat16 lacks
    stochastic: bool = False
    ema: Tensor | None = None  # float32


class _Bucket(NamedTuple):
    """The launch of the tensors that one compiled kernel can share."""

    chunks: Tensor
    constants: dict[str, Any]


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill memory without gaps or overlaps, in any order of dimensions."""
    return t.is_contiguous() or torch._prims_common.is_non_overlapping_and_dense_or_false(t)


def _uploaded(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values in device memory, without waiting for the device."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "AdamW: a CUDA graph needs the tensors of the step before it: take an uncaptured step "
            "first, keep the gradients (zero_grad(set_to_none=False)), and give lr as a tensor"
        )
    pinned = torch.tensor(values, dtype=dtype, pin_memory=True)
    return pinned.to(device, non_blocking=True)  # the host allocator waits before it reuses pinned


class _Plan:
    """The tables of one set of tensors in device memory, kept as long as the tensors stay put."""

    def __init__(self, rows: Sequence[_Row]):
        self.device = rows[0].p.device
        self.size = len(rows)
        self.copied_in: list[tuple[Tensor, Tensor]] = []
        self.copied_out: list[tuple[Tensor, Tensor]] = []
        self.grad_copies: list[tuple[int, Tensor]] = []  # of those laid out unlike the parameter
        self.grad_dtypes = [row.g.dtype for row in rows]
        self.grad_strides = [row.g.stride() for row in rows]
        self.host_steps: list[int] = []
        self.host_hyper: list[list[float]] = []
        self.grad_addresses: list[int] = []
        columns: list[list[int]] = []
        buckets: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
        for i, row in enumerate(rows):
            p = self._laid_out(row.p, row.p, written=True)
            m, v = (self._laid_out(t, p, written=True) for t in (row.m, row.v))
            vmax, master, ema = (
                None if t is None else self._laid_out(t, p, written=True)
                for t in (row.vmax, row.master, row.ema)
            )
            same = row.g.stride() == p.stride()
            g = row.g if same else torch.empty_like(p, dtype=row.g.dtype)
            if not same:
                self.grad_copies.append((i, g))
            if row.step.device != self.device or row.step.dtype != torch.float32:
                self.host_steps.append(i)
            addresses = [0 if t is None else t.data_ptr() for t in (p, g, m, v, vmax, master, ema)]
            self.grad_addresses.append(addresses[1])
            columns.append([*addresses, row.step.data_ptr(), p.numel(), row.group, row.number])
            aligned = all(a % 16 == 0 for a in addresses)
            masters = None if master is None else "fp32" if master.is_floating_point() else "split"
            stochastic = row.stochastic and p.dtype == torch.bfloat16 and masters != "split"
            flags = (row.decoupled, vmax is not None, masters, stochastic, ema is not None, aligned)
            kind = (p.dtype, g.dtype, m.dtype, *flags)
            buckets.setdefault(kind, []).append((i, p.numel()))

        # Steps that the kernel cannot reach (on the host, as torch keeps them) have a copy it can.
        self.mirror: Tensor | None = None
        if self.host_steps:
            values = [float(rows[i].step) for i in self.host_steps]
            self.mirror = _uploaded(values, torch.float32, self.device)
            for k, i in enumerate(self.host_steps):
                columns[i][_STEP.value] = self.mirror.data_ptr() + 4 * k
        table = list(zip(*columns, strict=True))
        self.table = _uploaded(table, torch.int64, self.device)
        self.squares: Tensor | None = None
        self.norm: Tensor | None = None
        self.scalars = torch.empty(
            self.size, _SCALARS.value, dtype=torch.float32, device=self.device
        )
        self.buckets = [
            self._bucket(kind, members)
            for kind, members in buckets.items()
            if any(n for _, n in members)
        ]

    def _laid_out(self, t: Tensor, like: Tensor, *, written: bool) -> Tensor:
        """The tensor itself where its memory is dense in the order of ``like``, or a copy."""
        if t.stride() == like.stride() and _is_dense(like):
            return t
        work = torch.empty_like(like, dtype=t.dtype)
        self.copied_in.append((work, t))
        if written:
            self.copied_out.append((t, work))
        return work

    def _bucket(self, kind: tuple[Any, ...], members: list[tuple[int, int]]) -> _Bucket:
        p, g, s, decoupled, amsgrad, master, stochastic, ema, aligned = kind
        chunks = [(i, c) for i, n in members for c in range(triton.cdiv(n, _CHUNK))]
        # Four elements a thread where dtypes differ: eight would pass through shared memory.
        plain = p == g == s and master is None and not (stochastic or ema)
        elements = 8 if plain and p.itemsize == 2 else 4
        constants = {
            "P": _TRITON[p], "G": _TRITON[g], "S": _TRITON[s],
            "DECOUPLED": decoupled, "AMSGRAD": amsgrad, "MASTER": master, "RANDOM": stochastic,
            "EMA": ema, "ALIGNED": aligned,
            "CHUNK": _CHUNK, "BLOCK": elements * 32 * _WARPS, "num_warps": _WARPS,
        }  # fmt: skip
        return _Bucket(_uploaded(chunks, torch.int32, self.device), constants)

    def take_gradients(self, grads: Sequence[Tensor]) -> bool:
        """Points the table at these gradients; False where one differs in more than its address."""
        try:
            if list(map(Tensor.stride, grads)) != self.grad_strides:
                return False
        except RuntimeError:  # a sparse one has no strides
            return False
        if [g.dtype for g in grads] != self.grad_dtypes:
            return False
        addresses = list(map(Tensor.data_ptr, grads))
        for i, copy in self.grad_copies:
            copy.copy_(grads[i])
            addresses[i] = copy.data_ptr()
        if addresses != self.grad_addresses:
            if any((a ^ b) & 15 for a, b in zip(addresses, self.grad_addresses, strict=True)):
                return False
            row = _uploaded(addresses, torch.int64, self.device)
            self.table[_G.value].copy_(row, non_blocking=True)
            self.grad_addresses = addresses
        return True

    def set_hyper(self, rows: list[list[float]], tensors: list[tuple[int, int, Tensor]]) -> None:
        """Gives the groups' numbers; those that live on the device are copied there."""
        if rows != self.host_hyper:
            self.hyper = _uploaded(rows, torch.float64, self.device)
            self.host_hyper = rows
        for row, column, value in tensors:
            self.hyper[row, column].copy_(value.squeeze(), non_blocking=True)

    def run(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        """Takes one step: a launch that prepares, and one for each combination of dtypes.

        Clipping takes one more for each, before; the norm of the gradients is then in ``norm``.
        """
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            self._launch(grad_scale, found_inf, max_norm, seed)

    def _launch(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_norm: float | None,
        seed: int,
    ) -> None:
        for work, t in self.copied_in:
            work.copy_(t)
        parts = self._sum_squares() if max_norm is not None else 0
        _prepare_kernel[(triton.cdiv(self.size, 128),)](
            self.table, self.hyper, self.scalars, grad_scale, found_inf, self.squares, self.norm,
            self.size, parts, 0.0 if max_norm is None else max_norm,
            HAS_SCALE=grad_scale is not None, HAS_FOUND=found_inf is not None,
            CLIPS=max_norm is not None, BLOCK=128, num_warps=4,
        )  # fmt: skip
        for bucket in self.buckets:
            _update_kernel[(len(bucket.chunks),)](
                self.table, bucket.chunks, self.scalars, self.size, seed, **bucket.constants
            )
        for t, work in self.copied_out:
            t.copy_(work)

    def _sum_squares(self) -> int:
        """Partial sums of the gradients' squares, and how many; in a fixed order on any device."""
        programs = [min(len(bucket.chunks), _NORM_PROGRAMS) for bucket in self.buckets]
        if self.squares is None:
            self.squares = torch.empty(sum(programs), dtype=torch.float32, device=self.device)
        self.norm = torch.empty((), dtype=torch.float32, device=self.device)
        first = 0
        for bucket, count in zip(self.buckets, programs, strict=True):
            constants = {
                name: bucket.constants[name] for name in ("G", "ALIGNED", "CHUNK", "BLOCK")
            }
            _squares_kernel[(count,)](
                self.table, bucket.chunks, self.squares[first:],
                self.size, len(bucket.chunks), **constants, num_warps=_WARPS,
            )  # fmt: skip
            first += count
        return first


def _fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    return None


_WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")


@torch_op("adamw_step", fake=_fake, mutates=_WRITTEN)
def _step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    largest: Sequence[Tensor | None] = max_exp_avg_sqs if amsgrad else [None] * len(params)
    rows = [
        _Row(p, g, m, v, vmax, step, 0, decoupled, i)
        for i, (p, g, m, v, vmax, step) in enumerate(zip(*lists, largest, state_steps, strict=True))
    ]
    plan = _Plan(rows)
    plan.take_gradients(grads)
    hyper = [
        [lr, beta1, beta2, eps, weight_decay, -1.0 if maximize else 1.0, float(decoupled), 0.0]
    ]
    plan.set_hyper(hyper, [] if lr_tensor is None else [(0, 0, lr_tensor)])
    plan.run(grad_scale, found_inf)
    _advance([state_steps[i] for i in plan.host_steps], found_inf)


def _advance(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Counts the step on the host, where the kernel did not."""
    if steps and (found_inf is None or not found_inf.item()):
        torch._foreach_add_(steps, 1)


# --- public -------------------------------------------------------------------------------------


def _uncovered_tensors(*tensors: Tensor) -> str | None:
    """Why the kernel does not update a parameter with these tensors, the parameter first."""
    p = tensors[0]
    if any(t.dtype != tensors[2].dtype for t in tensors[3:]):
        return "the states differ in dtype"
    for t in tensors:
        if t.dtype not in _TRITON:
            return f"a tensor is {t.dtype}"
        if t.device != p.device:
            return f"a tensor is on {t.device} and its parameter on {p.device}"
        if t.shape != p.shape:
            return f"a tensor has shape {tuple(t.shape)}, not its parameter's {tuple(p.shape)}"
        if t.layout is not torch.strided:
            return f"a tensor has layout {t.layout}"
        if (
            any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True))
            and t is not tensors[1]
        ):
            return "elements of a tensor share memory"
    return None


def _uncovered(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    amsgrad: bool = False,
    **_: Any,
) -> str | None:
    lists = [params, grads, exp_avgs, exp_avg_sqs] + ([max_exp_avg_sqs] if amsgrad else [])
    if any(len(tensors) != len(params) for tensors in (*lists, state_steps)):
        return "the lists differ in length"
    if any(p.device != params[0].device for p in params):
        return "the parameters are on several devices"
    reasons = (_uncovered_tensors(*tensors) for tensors in zip(*lists, strict=True))
    return next((reason for reason in reasons if reason), None)


def _all_suit_torch_fused(lists: list[list[Tensor]]) -> bool:
    """Whether torch's fused CPU kernel is right: it takes any strides for the parameter's."""
    params, steps = lists[0], lists[5]
    elements = [tensors for tensors in lists[1:5] if tensors]
    return (
        len(set(map(id, params))) == len(params)  # it would count both steps before the first
        and all(p.device.type == "cpu" and p.is_floating_point() for p in params)
        and all(step.dtype == torch.float32 for step in steps)
        and all(_alike(params, tensors) for tensors in elements)
        and all(map(_is_dense, params))
    )


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether both lists have the same shapes, strides, dtypes and devices."""
    try:
        return all(
            list(map(fact, some)) == list(map(fact, others))
            for fact in (Tensor.size, Tensor.stride, _DTYPE, _DEVICE)
        )
    except RuntimeError:  # sparse tensors have no strides
        return False


_DTYPE, _DEVICE = operator.attrgetter("dtype"), operator.attrgetter("device")


@torch_op("adamw_step_eager", fake=_fake, mutates=_WRITTEN)
def _eager_op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """PyTorch's fused kernel where it is right and leaves the gradients alone, else its loop."""
    given = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    lists = [list(tensors) for tensors in given]
    one_dtype = all(p.dtype == params[0].dtype for p in params)
    unscaled = grad_scale is None and found_inf is None
    step: Callable[..., Any] = reference
    options: dict[str, Any] = {}
    if unscaled and one_dtype and _all_suit_torch_fused(lists):
        torch._foreach_add_(lists[5], 1)
        step = torch._fused_adamw_ if decoupled else torch._fused_adam_
    else:
        options = {
            "decoupled_weight_decay": decoupled, "grad_scale": grad_scale, "found_inf": found_inf
        }  # fmt: skip
    with torch.no_grad():
        step(
            *lists,
            lr=lr if lr_tensor is None else lr_tensor,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=amsgrad,
            maximize=maximize,
            **options,
        )


def _eager(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    **options: Any,
) -> None:
    if params:
        lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        _eager_op(*_arguments(*lists, **options))


def _arguments(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    decoupled_weight_decay: bool = True,
) -> tuple[Any, ...]:
    """The public function's arguments as the operators take them."""
    on_device = isinstance(lr, Tensor)
    return (
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs if amsgrad else [], state_steps,
        0.0 if on_device else float(lr), beta1, beta2, eps, weight_decay,
        amsgrad, maximize, decoupled_weight_decay,
        lr if on_device else None, grad_scale, found_inf,
    )  # fmt: skip


@dispatched(eager=_eager, uncovered=_uncovered)
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    decoupled_weight_decay: bool = True,
) -> None:
    """One step of AdamW in place on lists of tensors; the arguments of torch.optim.adamw.adamw.

    Args:
        params: float32, float16 or bfloat16 of any shape and strides, on one device.
        grads: Of the shapes of ``params``; left as they are.
        exp_avgs: Running means of the gradients, of the shapes of ``params``.
        exp_avg_sqs: Running means of their squares.
        max_exp_avg_sqs: The largest of those so far, for ``amsgrad``; else empty.
        state_steps: One 0-dimensional float32 step count each, advanced by 1. On the parameters'
            device the kernel advances them; elsewhere the host does.
        lr: Learning rate; a tensor of one element on the device is read there.
        beta1: Decay of ``exp_avgs``.
        beta2: Decay of ``exp_avg_sqs``.
        weight_decay: Decoupled, or added to the gradient (``decoupled_weight_decay=False``).
        eps: Added to the root of the bias-corrected ``exp_avg_sqs``.
        amsgrad: Divides by the largest ``exp_avg_sqs`` so far.
        maximize: Ascends.
        grad_scale: One float32 that the gradients are divided by.
        found_inf: One float32; other than 0, nothing changes.
        decoupled_weight_decay: False gives Adam.

    Raises:
        RuntimeError: What torch.optim.adamw.adamw raises, for tensors that do not fit.
    """
    _step(
        *_arguments(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=amsgrad,
            maximize=maximize, grad_scale=grad_scale, found_inf=found_inf,
            decoupled_weight_decay=decoupled_weight_decay,
        )
    )  # fmt: skip


class _Planned(NamedTuple):
    """What a step launches, and all that this choice depends on but the gradients' addresses."""

    settings: list[Any]
    params: list[Tensor]  # of all groups
    has_grad: list[bool]
    states: list[dict[str, Any]]  # of all parameters that have one
    plans: list[tuple[_Plan, list[int]]]  # one a device, with its places among all parameters
    written: list[Tensor]  # the parameters that the plans write
    written_states: list[dict[str, Any]]
    addresses: list[int]
    host_steps: list[Tensor]  # of each plan whose steps are on the host, all of them in one vector
    versions: list[int]  # of host_steps: another one says that somebody wrote to them
    eager: list[list[Tensor]]  # of each group, the parameters that are left to PyTorch


def _addresses(params: list[Tensor], states: list[dict[str, Any]]) -> list[int]:
    """Where the parameters and their states lie, and how many elements the parameters have."""
    found = list(map(Tensor.data_ptr, params))
    found += map(Tensor.numel, params)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        found += map(Tensor.data_ptr, [s[name] for s in states])
    for name in ("max_exp_avg_sq", "master", "ema"):
        found += [s[name].data_ptr() for s in states if name in s]
    return found


def _same(some: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(map(operator.is_, some, others))


class _Fused(torch.optim.Adam):
    """The step that Adam and AdamW share."""

    _planned: _Planned | None = None
    _last_grad_norm: Tensor | None = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler asks. torch's flag is an attribute of the instance, which a deepcopy loses.
        return all(group["fused"] for group in self.param_groups)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Lets torch's constructor set what the groups already say."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, in place.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, or None.
        """
        getattr(self, _HEALTH_CHECK)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if torch.compiler.is_compiling() and not any(o in self.defaults for o in _OPTIONS):
                self._traced_step()
            else:
                self._take_step()
        return loss

    @torch._disable_dynamo
    def _take_step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        planned = self._planned
        if planned is None or not self._still_holds(planned, params, grads):
            planned = self._planned = self._make_plan(params, grads)
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        max_norm = self._max_grad_norm()
        if max_norm is not None and not planned.plans:
            grad_scale = self._clipping_scale(
                [g for g in grads if g is not None], grad_scale, max_norm
            )
        if planned.plans:
            numbers, on_device = self._hyper()
            for plan, _ in planned.plans:
                plan.set_hyper(numbers, on_device)
                scale, inf = _moved(grad_scale, plan.device), _moved(found_inf, plan.device)
                plan.run(scale, inf, max_norm, self.param_groups[0].get("seed") or 0)
                if max_norm is not None:
                    self._last_grad_norm = plan.norm
            torch.autograd.graph.increment_version(planned.written)
            for i, steps in enumerate(planned.host_steps):
                _advance([steps], found_inf)
                planned.versions[i] = steps._version
        for group, left in zip(self.param_groups, planned.eager, strict=True):
            if left:
                self._eager_step(group, left, grad_scale, found_inf)

    def _max_grad_norm(self) -> float | None:
        values = {group.get("max_grad_norm") for group in self.param_groups}
        if len(values) > 1:
            raise ValueError(
                f"{type(self).__name__}: max_grad_norm must be the same in all groups; got {values}"
            )
        return values.pop()

    def _clipping_scale(
        self, grads: list[Tensor], grad_scale: Tensor | None, max_norm: float
    ) -> Tensor | None:
        """What divides the gradients on PyTorch's path, so that their norm is at most max_norm."""
        if not grads:
            return grad_scale
        norm = torch.nn.utils.get_total_norm([g.float() for g in grads])
        if grad_scale is not None:
            norm = norm / grad_scale
        self._last_grad_norm = norm
        scale = 1 / (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return scale if grad_scale is None else scale * grad_scale

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The norm of all gradients at the last step, before clipping, on their device.

        None before the first step, and where ``max_grad_norm`` is None.
        """
        return self._last_grad_norm

    def _set_options(self, **options: Any) -> None:
        """Keeps what was asked beyond torch's arguments in the groups; nothing where not asked."""
        name = type(self).__name__
        max_norm = options["max_grad_norm"]
        if max_norm is not None and not max_norm > 0.0:
            raise ValueError(f"{name}: max_grad_norm must be positive; got {max_norm}")
        ema_decay = options["ema_decay"]
        if ema_decay is not None and not 0.0 < ema_decay < 1.0:
            raise ValueError(f"{name}: ema_decay must be between 0 and 1; got {ema_decay}")
        for option, allowed in (
            ("state_dtype", (None, torch.float32, torch.bfloat16)),
            ("master", (None, "fp32", "split")),
            ("rounding", (None, "stochastic")),
        ):
            if options[option] not in allowed:
                raise ValueError(
                    f"{name}: {option} must be one of {allowed}; got {options[option]!r}"
                )
        if options["master"] == "split" and options["rounding"]:
            raise ValueError(f'{name}: rounding must be None beside master="split", which is exact')
        asked = {option: value for option, value in options.items() if value is not None}
        self.defaults.update(asked)
        for group in self.param_groups:
            for option, value in asked.items():
                group.setdefault(option, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of torch's has none of these
            for option in _OPTIONS:
                if option in self.defaults:
                    group.setdefault(option, self.defaults[option])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads torch's state_dict or this class's.

        torch casts states to their parameter's dtype. A state that was saved in float32, in
        ``state_dtype``, or as a master weight keeps its bits where this optimizer holds it so.
        """
        kept: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, given: kept.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        ids = [i for group in kept["param_groups"] for i in group["params"]]
        places = [(group, p) for group in self.param_groups for p in group["params"]]
        for i, (group, p) in zip(ids, places, strict=True):
            given, state = kept["state"].get(i, {}), self.state.get(p, {})
            if not state:
                continue
            for name, value in given.items():
                own = name in ("master", "ema")
                dtype = value.dtype if own else group.get("state_dtype")
                if name in _STATES and dtype is not None:
                    state[name] = value.to(p.device, dtype, copy=True)
            self._add_extras(group, p, state)

    def _settings(self) -> list[Any]:
        flags = [tuple([group[name] for name in _FLAGS]) for group in self.param_groups]
        flags += [tuple([group.get(name) for name in _BEYOND_TORCH]) for group in self.param_groups]
        flags.append((self.param_groups[0].get("max_grad_norm") is None,))
        return [_dispatch._backend, _dispatch._cpu_runner, *flags]

    def _still_holds(
        self, planned: _Planned, params: list[Tensor], grads: list[Tensor | None]
    ) -> bool:
        """Whether the plan is right for these tensors; then its tables hold the gradients."""
        present = cast(list[Tensor], grads)  # at a plan's places none is missing
        return (
            len(params) == len(planned.params)
            and len(self.state) == len(planned.states)
            and _same(params, planned.params)
            and _same(self.state.values(), planned.states)
            and [g is not None for g in grads] == planned.has_grad
            and self._settings() == planned.settings
            and _addresses(planned.written, planned.written_states) == planned.addresses
            and [steps._version for steps in planned.host_steps] == planned.versions
            and all(
                plan.take_gradients(
                    present if len(grads) == plan.size else [present[i] for i in places]
                )
                for plan, places in planned.plans
            )
        )

    def _lists(self, group: dict[str, Any], params: list[Tensor]) -> tuple[list[Any], bool]:
        """Parameters with gradients, gradients and states; torch's method makes the states."""
        for p in params:
            if p.grad is not None and not self.state.get(p) and not p.grad.is_sparse:
                self._make_state(group, p)
        lists: list[Any] = [[] for _ in range(6)]
        has_complex = self._init_group({**group, "params": params}, *lists)
        return lists, has_complex

    def _make_state(self, group: dict[str, Any], p: Tensor) -> None:
        """What torch would not make: states of another dtype, and master weights."""
        if not any(group.get(name) for name in _BEYOND_TORCH):
            return
        self._init_group({**group, "params": [p]}, *([] for _ in range(6)))
        state, dtype = self.state[p], group.get("state_dtype")
        for name in _STATES[:3]:
            if dtype is not None and name in state:
                state[name] = state[name].to(dtype)
        self._add_extras(group, p, state)

    def _add_extras(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        """Master weights and the average, where the group asks for them and they are missing."""
        master = group.get("master") if p.dtype in (torch.bfloat16, torch.float16) else None
        if master == "split" and p.dtype != torch.bfloat16:
            name = type(self).__name__
            raise ValueError(f'{name}: master="split" must be used with bfloat16; got {p.dtype}')
        kind = {"fp32": torch.float32, "split": torch.int16, None: None}[master]
        if "master" in state and state["master"].dtype != kind:
            del state["master"]
        if kind is not None and "master" not in state:
            whole = kind == torch.float32
            state["master"] = (
                p.detach().to(kind, copy=True) if whole else torch.zeros_like(p, dtype=kind)
            )
        if group.get("ema_decay") is None:
            state.pop("ema", None)
        elif "ema" not in state:
            state["ema"] = p.detach().to(torch.float32, copy=True)

    def _make_plan(self, params: list[Tensor], grads: list[Tensor | None]) -> _Planned:
        rows: dict[torch.device, list[tuple[int, _Row]]] = {}
        eager: list[list[Tensor]] = []
        places = {p: i for i, p in enumerate(params)}
        repeated = len(places) < len(params)
        for i, group in enumerate(self.param_groups):
            (found, found_grads, m, v, vmax, steps), _ = self._lists(group, group["params"])
            eager.append([])
            for k, p in enumerate(found):
                largest = vmax[k] if group["amsgrad"] else None
                states = [m[k], v[k]] + ([largest] if group["amsgrad"] else [])
                reason = self._uncovered(group, p, found_grads[k], states, repeated)
                if reason is None:
                    row = _Row(
                        p, found_grads[k], m[k], v[k], largest, steps[k], i,
                        group["decoupled_weight_decay"], places[p], self.state[p].get("master"),
                        group.get("rounding") == "stochastic", self.state[p].get("ema"),
                    )  # fmt: skip
                    rows.setdefault(p.device, []).append((places[p], row))
                elif _dispatch._backend == "triton" or any(group.get(o) for o in _BEYOND_TORCH):
                    name = type(self).__name__
                    asked = 'backend "triton"'
                    if _dispatch._backend != "triton":
                        asked = next(f"{o}={group[o]!r}" for o in _BEYOND_TORCH if group.get(o))
                    raise RuntimeError(f"{name}: {asked} cannot run this step: {reason}")
                else:
                    eager[-1].append(p)
        max_norm = self._max_grad_norm()
        if max_norm is not None and len(rows) + any(eager) > 1:  # the norm is of all gradients
            eager = [
                [p for p in group["params"] if p.grad is not None] for group in self.param_groups
            ]
            rows = {}
        plans, host_steps = [], []
        for members in rows.values():
            plan = _Plan([row for _, row in members])
            plan.take_gradients([row.g for _, row in members])
            plans.append((plan, [place for place, _ in members]))
            if plan.host_steps:
                together = torch.stack([members[j][1].step for j in plan.host_steps])
                for j, step in zip(plan.host_steps, together.unbind(), strict=True):
                    self.state[members[j][1].p]["step"] = step
                host_steps.append(together)
        written = [row.p for members in rows.values() for _, row in members]
        written_states = [self.state[p] for p in written]
        return _Planned(
            settings=self._settings(),
            params=params,
            has_grad=[g is not None for g in grads],
            states=list(self.state.values()),
            plans=plans,
            written=written,
            written_states=written_states,
            addresses=_addresses(written, written_states),
            host_steps=host_steps,
            versions=[steps._version for steps in host_steps],
            eager=eager,
        )

    def _uncovered(
        self, group: dict[str, Any], p: Tensor, g: Tensor, states: list[Tensor], repeated: bool
    ) -> str | None:
        """Why PyTorch updates this parameter, or None."""
        if _dispatch._backend == "torch":
            return 'the backend is "torch"'
        for name, value in (("fused", False), ("foreach", True), ("differentiable", True)):
            if group[name] is value:
                return f"{name}={value}"
        if repeated:
            return "a parameter stands in the groups twice"
        return (
            _dispatch.nowhere_to_run(p)
            or _dispatch._foreign([p, g, *states])
            or _uncovered_tensors(p, g, *states)
        )

    def _hyper(self) -> tuple[list[list[float]], list[tuple[int, int, Tensor]]]:
        """The groups' numbers, and those among them that only the device knows."""
        numbers, on_device = [], []
        for i, group in enumerate(self.param_groups):
            row = [group["lr"], *group["betas"], group["eps"], group["weight_decay"]]
            for j, x in enumerate(row):
                if isinstance(x, Tensor):
                    if x.is_cuda:
                        on_device.append((i, j, x))
                    row[j] = 0.0 if x.is_cuda else float(x)
            row += [-1.0 if group["maximize"] else 1.0, float(group["decoupled_weight_decay"])]
            row.append(group.get("ema_decay") or 0.0)
            numbers.append(row)
        return numbers, on_device

    def _eager_step(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """PyTorch's step of these parameters of the group."""
        lists, has_complex = self._lists(group, params)
        fused, foreach = group["fused"], group["foreach"]
        torch_chooses = fused is False or foreach or group["differentiable"]
        on_cpu = bool(lists[0]) and lists[0][0].device.type == "cpu"
        if on_cpu and not torch_chooses and (fused or not group["capturable"]):
            fused = _all_suit_torch_fused(lists)
        # Clipping leaves the gradients alone, where torch's fused step would write them.
        if group.get("max_grad_norm") is not None or (not fused and not torch_chooses):
            if found_inf is not None and found_inf.item():
                return
            if grad_scale is not None:
                lists[1] = [g / grad_scale for g in lists[1]]
            grad_scale = found_inf = None
        betas = [float(b) if fused else b for b in group["betas"]]
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps = lists
        torch_adam(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            state_steps,
            amsgrad=group["amsgrad"],
            has_complex=has_complex,
            beta1=betas[0],
            beta2=betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            foreach=foreach,
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=fused,
            grad_scale=grad_scale,
            found_inf=found_inf,
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )
        if fused and params[0].device.type == "cpu":  # torch 2.13 leaves them as they were
            torch.autograd.graph.increment_version(lists[0])

    def _traced_step(self) -> None:
        """The step as torch.compile sees it: one operator a group."""
        for group in self.param_groups:
            lists, _ = self._lists(group, group["params"])
            if lists[0]:
                adamw_step(
                    *lists,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=group["amsgrad"],
                    maximize=group["maximize"],
                    grad_scale=getattr(self, "grad_scale", None),
                    found_inf=getattr(self, "found_inf", None),
                    decoupled_weight_decay=group["decoupled_weight_decay"],
                )


_BEYOND_TORCH = (
    "state_dtype",
    "master",
    "rounding",
    "ema_decay",
)  # what torch's own step cannot do
_OPTIONS = (*_BEYOND_TORCH, "seed", "max_grad_norm")
_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "ema")


_HEALTH_CHECK = next(  # torch 2.13 renamed it
    name
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    if hasattr(torch.optim.Optimizer, name)
)
_FLAGS = ("amsgrad", "foreach", "fused", "differentiable", "decoupled_weight_decay")


def _moved(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else t.to(device, non_blocking=True)


class Adam(_Fused):
    """``torch.optim.Adam`` whose step takes a constant number of launches.

    The arguments, defaults, errors, hooks and ``state_dict`` are torch's, and a checkpoint of
    either continues in the other. ``fused=None`` takes the Triton kernel where it can and torch's
    own step elsewhere; ``fused=True`` also keeps the steps on the device and lets GradScaler hand
    over its scale, in which case the gradients stay scaled (torch's fused step unscales them in
    place); ``fused=False`` and ``foreach=True`` are torch's. float64, complex and sparse tensors
    and ``differentiable=True`` are left to torch.

    Args:
        params: As torch.optim.Adam.
        lr: As torch.optim.Adam, with all before max_grad_norm.
        betas: Decays of the running means of the gradient and its square.
        eps: Added to the denominator.
        weight_decay: Added to the gradient; AdamW takes it off the weight.
        amsgrad: Divides by the largest mean so far.
        foreach: True is torch's.
        maximize: Ascends.
        capturable: Keeps the steps on the device, for CUDA graphs.
        differentiable: True is torch's.
        fused: Above.
        max_grad_norm: Scales the gradients within the step so that the norm of all of them,
            accumulated in float32, is at most this. The gradients themselves stay as they are.
        state_dtype: torch.float32 or torch.bfloat16 for the running means; None is the
            parameter's dtype, as torch.
        master: "fp32" keeps float32 weights beside half-precision parameters; "split" keeps the
            16 bits that bfloat16 parameters lack of float32, to the same result in 2 bytes less.
        rounding: "stochastic" rounds bfloat16 parameters to either neighbour at random, without
            bias; the same for the same seed, step, parameter and element. None: to the nearest.
        seed: Of that rounding; default 0.
        ema_decay: Keeps an average of each weight in float32, ``state[p]["ema"]``, that starts at
            the weight and moves by ``1 - ema_decay`` of the distance at each step.

    Raises:
        ValueError: What torch.optim.Adam raises, in its words; an option outside the above.
        RuntimeError: From ``step``: state_dtype, master or rounding where no kernel can run.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        master: Literal["fp32", "split"] | None = None,
        rounding: Literal["stochastic"] | None = None,
        seed: int | None = None,
        ema_decay: float | None = None,
    ) -> None:
        torch.optim.Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach,
            maximize=maximize, capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        self._set_options(
            max_grad_norm=max_grad_norm, state_dtype=state_dtype, master=master,
            rounding=rounding, seed=seed, ema_decay=ema_decay,
        )  # fmt: skip


class AdamW(_Fused, torch.optim.AdamW):
    """``torch.optim.AdamW`` whose step takes a constant number of launches; see ``Adam``."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        master: Literal["fp32", "split"] | None = None,
        rounding: Literal["stochastic"] | None = None,
        seed: int | None = None,
        ema_decay: float | None = None,
    ) -> None:
        torch.optim.AdamW.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach,
            maximize=maximize, capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._set_options(
            max_grad_norm=max_grad_norm, state_dtype=state_dtype, master=master,
            rounding=rounding, seed=seed, ema_decay=ema_decay,
        )  # fmt: skip


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[tuple[int, ...]],
    **options: Any,
) -> Inputs:
    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    return {
        "params": [noise(s) for s in shapes],
        "grads": [noise(s) for s in shapes],
        "exp_avgs": [noise(s) for s in shapes],
        "exp_avg_sqs": [noise(s).abs() + 0.25 for s in shapes],
        "max_exp_avg_sqs": [noise(s).abs() + 0.5 for s in shapes] if options.get("amsgrad") else [],
        "state_steps": [torch.tensor(3.0 + i, device=device) for i in range(len(shapes))],
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": 0.1,
        "eps": 1e-8,
    } | options


_GPT2 = (
    ((50257, 768), (1024, 768))
    + 12
    * (
        (768,), (768,), (2304, 768), (2304,), (768, 768), (768,),
        (768,), (768,), (3072, 768), (3072,), (768, 3072), (768,),
    )
    + ((768,), (768,))
)  # fmt: skip

OP = Op(
    fused=adamw_step,
    reference=reference,
    example=_example,
    sizes=(
        {"shapes": ((1,),)},
        {"shapes": ((33, 17), (5,), (0,), (), (3, 400), (7, 3, 2))},
        {"shapes": ((130, 65), (3,)), "amsgrad": True},
        {"shapes": ((40, 20),), "decoupled_weight_decay": False, "maximize": True},
    ),
    bench_sizes=({"shapes": _GPT2},),
    work=lambda params, grads, **_: (
        sum(6 * p.nbytes + g.nbytes for p, g in zip(params, grads, strict=True)),
        15 * sum(p.numel() for p in params),
    ),
)
