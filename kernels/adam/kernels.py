"""The kernels of a step: scalars of each tensor, norm of the gradients, and the update.

All walk tensors through a table of addresses, a row of it a kind of tensor, a column a parameter.
"""

import triton
import triton.language as tl

# Rows of the table of tensors.
P_ROW, G_ROW, M_ROW, V_ROW, VMAX_ROW, MASTER_ROW = (tl.constexpr(i) for i in range(6))
EMA_ROW, STEP_ROW, NUMEL_ROW, GROUP_ROW, ID_ROW = (tl.constexpr(i) for i in range(6, 11))
# Columns of the scalars that the update reads.
_STEP_SIZE, _INV_SQRT_BC2, _DECAY, _C1, _C2 = (tl.constexpr(i) for i in range(5))
_EPS, _G_FACTOR, _GO, _T, _C_EMA = (tl.constexpr(i) for i in range(5, 10))
SCALARS = tl.constexpr(16)  # columns: a row is one 64-byte sector pair
# float64 numbers of a group: lr beta1 beta2 eps weight_decay sign decoupled ema_decay
HYPER = tl.constexpr(8)


@triton.jit
def prepare_kernel(
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
    step_ptrs = tl.load(table_ptr + NT * STEP_ROW + offs, mask=mask, other=0)
    step_ptrs = step_ptrs.to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptrs, mask=mask, other=0.0) + go
    tl.store(step_ptrs, step, mask=mask)

    group = hyper_ptr + tl.load(table_ptr + NT * GROUP_ROW + offs, mask=mask, other=0) * HYPER
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

    row = scalars_ptr + offs * SCALARS
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
def squares_kernel(
    table_ptr, chunks_ptr, squares_ptr,
    NT, chunks,
    G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of squares of the gradients: one a program, chunks dealt out in turn."""
    squares = tl.zeros([BLOCK], tl.float32)
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        tensor = tl.load(chunks_ptr + c * 2).to(tl.int64)
        start = tl.load(chunks_ptr + c * 2 + 1).to(tl.int64) * CHUNK
        g_ptr = _address(table_ptr, G_ROW, tensor, NT, G, ALIGNED) + start
        n = tl.minimum(tl.load(table_ptr + NT * NUMEL_ROW + tensor) - start, CHUNK).to(tl.int32)
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
def update_kernel(
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
    scalars = scalars_ptr + tensor * SCALARS
    if tl.load(scalars + _GO) != 0.0:
        step_size = tl.load(scalars + _STEP_SIZE)
        inv_sqrt_bc2 = tl.load(scalars + _INV_SQRT_BC2)
        decay = tl.load(scalars + _DECAY)
        c1 = tl.load(scalars + _C1)
        c2 = tl.load(scalars + _C2)
        eps = tl.load(scalars + _EPS)
        g_factor = tl.load(scalars + _G_FACTOR)
        p_ptr = _address(table_ptr, P_ROW, tensor, NT, P, ALIGNED) + start
        g_ptr = _address(table_ptr, G_ROW, tensor, NT, G, ALIGNED) + start
        m_ptr = _address(table_ptr, M_ROW, tensor, NT, S, ALIGNED) + start
        v_ptr = _address(table_ptr, V_ROW, tensor, NT, S, ALIGNED) + start
        vmax_ptr = v_ptr
        if AMSGRAD:
            vmax_ptr = _address(table_ptr, VMAX_ROW, tensor, NT, S, ALIGNED) + start
        master_ptr = p_ptr
        if MASTER == "fp32":
            master_ptr = _address(table_ptr, MASTER_ROW, tensor, NT, tl.float32, ALIGNED) + start
        if MASTER == "split":
            master_ptr = _address(table_ptr, MASTER_ROW, tensor, NT, tl.int16, ALIGNED) + start
        ema_ptr = p_ptr
        if EMA:
            ema_ptr = _address(table_ptr, EMA_ROW, tensor, NT, tl.float32, ALIGNED) + start
        c_ema = tl.load(scalars + _C_EMA)
        t = tl.load(scalars + _T).to(tl.int32).to(tl.uint32)
        number = tl.load(table_ptr + NT * ID_ROW + tensor).to(tl.uint32)
        n = tl.minimum(tl.load(table_ptr + NT * NUMEL_ROW + tensor) - start, CHUNK).to(tl.int32)
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
