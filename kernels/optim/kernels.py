"""The kernels of a step: scalars of each tensor, norm of the gradients, and the update.

All walk tensors through a table of addresses, a row of it a kind of tensor, a column a parameter.
"""

import triton
import triton.language as tl

from .rounding import (
    CODE_BLOCK,
    decoded,
    encoded,
    joined,
    rounded_at_random,
    rounded_at_random_in_runs,
    scale_places,
    split,
)

THREADS = tl.constexpr(128)  # of a program, in four warps

# Rows of the table of tensors. Of a matrix that Muon updates, V is where its direction goes, in
# bfloat16, to be orthogonalized and come back.
P_ROW, G_ROW, M_ROW, V_ROW, VMAX_ROW, MASTER_ROW = (tl.constexpr(i) for i in range(6))
EMA_ROW, M_SCALE_ROW, V_SCALE_ROW, STEP_ROW = (tl.constexpr(i) for i in range(6, 10))
NUMEL_ROW, HYPER_ROW, ID_ROW, CHUNK_ROW = (tl.constexpr(i) for i in range(10, 14))
# Where the elements stand in the whole of a tensor that is sharded.
BASE_ROW, RUN_ROW, PITCH_ROW, WHOLE_ROW = (tl.constexpr(i) for i in range(14, 18))
SLOT_ROW = tl.constexpr(18)  # among the sums over chunks: the matrices of a batch are neighbours
# Columns of the scalars that the update reads.
_STEP_SIZE, _INV_SQRT_BC2, _DECAY, _C1, _C2 = (tl.constexpr(i) for i in range(5))
_EPS, _G_FACTOR, _GO, _T, _C_EMA = (tl.constexpr(i) for i in range(5, 10))
SCALARS = tl.constexpr(16)  # columns: a row is one 64-byte sector pair
# float64 numbers: lr beta1 beta2 eps weight_decay sign kind ema_decay lr_ratio
HYPER = tl.constexpr(9)
# Kinds: weight decay in the gradient; off the weight; and without bias correction.
ADAM, ADAMW, UNCORRECTED = (tl.constexpr(i) for i in range(3))


@triton.jit
def prepare_kernel(  # noqa: PLR0915
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

    hyper = hyper_ptr + tl.load(table_ptr + NT * HYPER_ROW + offs, mask=mask, other=0) * HYPER
    lr = tl.load(hyper, mask=mask, other=0.0)
    beta1 = tl.load(hyper + 1, mask=mask, other=0.5)
    beta2 = tl.load(hyper + 2, mask=mask, other=0.5)
    eps = tl.load(hyper + 3, mask=mask, other=0.0)
    weight_decay = tl.load(hyper + 4, mask=mask, other=0.0)
    sign = tl.load(hyper + 5, mask=mask, other=1.0)
    kind = tl.load(hyper + 6, mask=mask, other=1.0)
    ema_decay = tl.load(hyper + 7, mask=mask, other=1.0)
    lr_ratio = tl.load(hyper + 8, mask=mask, other=1.0)
    t = tl.maximum(step, 1.0).to(tl.float64)  # a first step that is skipped leaves 0
    bias_correction1 = 1.0 - tl.exp(t * tl.log(beta1))
    bias_correction1 = tl.where(kind == UNCORRECTED, 1.0, bias_correction1)
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
    step_size = lr * lr_ratio / bias_correction1
    tl.store(row + _STEP_SIZE, step_size.to(tl.float32), mask=mask)
    tl.store(row + _INV_SQRT_BC2, (1.0 / tl.sqrt(bias_correction2)).to(tl.float32), mask=mask)
    decay = tl.where(kind != ADAM, lr * weight_decay, weight_decay)
    tl.store(row + _DECAY, decay.to(tl.float32), mask=mask)
    tl.store(row + _C1, (1.0 - beta1).to(tl.float32), mask=mask)
    tl.store(row + _C2, (1.0 - beta2).to(tl.float32), mask=mask)
    tl.store(row + _EPS, eps.to(tl.float32), mask=mask)
    tl.store(row + _G_FACTOR, factor.to(tl.float32), mask=mask)
    tl.store(row + _T, step, mask=mask)
    tl.store(row + _C_EMA, (1.0 - ema_decay).to(tl.float32), mask=mask)
    tl.store(row + _GO, go + tl.zeros([BLOCK], tl.float32), mask=mask)


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
def _load_state(
    ptr, scale_ptr, first, n,
    CODED: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A running mean as float32."""
    offs = first + tl.arange(0, BLOCK)
    if CODED:
        EACH: tl.constexpr = BLOCK // THREADS
        places = scale_places(first, BLOCK, EACH)
        if MASKED:
            codes = tl.load(ptr + offs, mask=offs < n, other=0)
            scale = tl.load(scale_ptr + places, mask=places * CODE_BLOCK < n, other=0.0)
        else:
            codes = tl.load(ptr + offs)
            scale = tl.load(scale_ptr + places)
        x = decoded(codes, scale, SIGNED, BLOCK, EACH)
    else:
        x = _load(ptr, offs, n, MASKED)
    return x


@triton.jit
def _store_state(
    ptr, scale_ptr, first, n, x,
    CODED: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offs = first + tl.arange(0, BLOCK)
    if CODED:
        EACH: tl.constexpr = BLOCK // THREADS
        places = scale_places(first, BLOCK, EACH)
        once = tl.arange(0, THREADS) % (CODE_BLOCK // EACH) == 0
        if MASKED:  # a gradient of 0 * inf beyond the end must not reach a scale
            x = tl.where(offs < n, x, 0.0)
        codes, scale = encoded(x, SIGNED, BLOCK, EACH)
        if MASKED:
            tl.store(ptr + offs, codes, mask=offs < n)
            tl.store(scale_ptr + places, scale, mask=(places * CODE_BLOCK < n) & once)
        else:
            tl.store(ptr + offs, codes)
            tl.store(scale_ptr + places, scale, mask=once)
    else:
        _store(ptr, offs, n, x, MASKED)


@triton.jit
def _load_weight(p_ptr, master_ptr, offs, n, MASTER: tl.constexpr, MASKED: tl.constexpr):
    """The float32 weight, from wherever it is kept."""
    if MASTER == "fp32":
        p = _load(master_ptr, offs, n, MASKED)
    elif MASTER == "split":
        if MASKED:
            high = tl.load(p_ptr + offs, mask=offs < n, other=0.0)
            low = tl.load(master_ptr + offs, mask=offs < n, other=0)
        else:
            high = tl.load(p_ptr + offs)
            low = tl.load(master_ptr + offs)
        p = joined(high, low)
    else:
        p = _load(p_ptr, offs, n, MASKED)
    return p


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
def sum_chunks_kernel(table_ptr, parts_ptr, sums_ptr, NT, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """One program adds up what another kernel left for each chunk of one tensor, in order."""
    tensor = tl.program_id(0)
    first = tl.load(table_ptr + NT * CHUNK_ROW + tensor)
    chunks = (tl.load(table_ptr + NT * NUMEL_ROW + tensor) + CHUNK - 1) // CHUNK
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, chunks.to(tl.int32), BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + first + offs, mask=offs < chunks, other=0.0)
    slot = tl.load(table_ptr + NT * SLOT_ROW + tensor)
    tl.store(sums_ptr + slot, tl.sum(total))


@triton.jit
def _agreeing(
    p_ptr, g_ptr, m_ptr, m_scale_ptr, master_ptr, first, n, decay, c1, g_factor,
    ALGORITHM: tl.constexpr, MASTER: tl.constexpr, CODED: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of the block, the elements whose update goes down their gradient: 1 each."""
    offs = first + tl.arange(0, BLOCK)
    g = _load(g_ptr, offs, n, MASKED) * g_factor
    if ALGORITHM == "adam":
        g += decay * _load_weight(p_ptr, master_ptr, offs, n, MASTER, MASKED)
    m = _load_state(m_ptr, m_scale_ptr, first, n, CODED, True, BLOCK, MASKED)
    agree = tl.where((m - c1 * m + c1 * g) * g > 0.0, 1.0, 0.0)
    if MASKED:
        agree = tl.where(offs < n, agree, 0.0)
    return agree


@triton.jit
def agreement_kernel(
    table_ptr, chunks_ptr, scalars_ptr, parts_ptr,
    NT,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, ALGORITHM: tl.constexpr,
    MASTER: tl.constexpr, CODED: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many elements of a chunk a cautious update moves (Liang et al. 2024, 2411.16085)."""
    chunk = chunks_ptr + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(chunk).to(tl.int64)
    number = tl.load(chunk + 1).to(tl.int64)
    start = number * CHUNK
    scalars = scalars_ptr + tensor * SCALARS
    decay = tl.load(scalars + _DECAY)
    c1 = tl.load(scalars + _C1)
    g_factor = tl.load(scalars + _G_FACTOR)
    p_ptr = _address(table_ptr, P_ROW, tensor, NT, P, ALIGNED) + start
    g_ptr = _address(table_ptr, G_ROW, tensor, NT, G, ALIGNED) + start
    m_ptr = _address(table_ptr, M_ROW, tensor, NT, S, ALIGNED) + start
    m_scale_ptr = _address(table_ptr, M_SCALE_ROW, tensor, NT, tl.float32, ALIGNED)
    m_scale_ptr += start // CODE_BLOCK
    master_ptr = p_ptr
    if MASTER == "fp32":
        master_ptr = _address(table_ptr, MASTER_ROW, tensor, NT, tl.float32, ALIGNED) + start
    if MASTER == "split":
        master_ptr = _address(table_ptr, MASTER_ROW, tensor, NT, tl.int16, ALIGNED) + start
    n = tl.minimum(tl.load(table_ptr + NT * NUMEL_ROW + tensor) - start, CHUNK).to(tl.int32)
    whole = n // BLOCK * BLOCK
    agree = tl.zeros([BLOCK], tl.float32)
    for first in range(0, whole, BLOCK):
        agree += _agreeing(
            p_ptr, g_ptr, m_ptr, m_scale_ptr, master_ptr, first, n, decay, c1, g_factor,
            ALGORITHM, MASTER, CODED, BLOCK, False,
        )  # fmt: skip
    if whole < n:
        agree += _agreeing(
            p_ptr, g_ptr, m_ptr, m_scale_ptr, master_ptr, whole, n, decay, c1, g_factor,
            ALGORITHM, MASTER, CODED, BLOCK, True,
        )  # fmt: skip
    part = tl.load(table_ptr + NT * CHUNK_ROW + tensor) + number
    tl.store(parts_ptr + part, tl.sum(agree))


@triton.jit
def _turned(
    g_ptr, m_ptr, m_scale_ptr, u_ptr, first, n, c1, g_factor,
    NESTEROV: tl.constexpr, CODED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Moves the momentum of a block, writes its direction, and gives the direction's squares."""
    offs = first + tl.arange(0, BLOCK)
    g = _load(g_ptr, offs, n, MASKED) * g_factor
    m = _load_state(m_ptr, m_scale_ptr, first, n, CODED, True, BLOCK, MASKED)
    m = m - c1 * m + c1 * g
    _store_state(m_ptr, m_scale_ptr, first, n, m, CODED, True, BLOCK, MASKED)
    u = m
    if NESTEROV:
        u = m - c1 * m + c1 * g
    u = u.to(tl.bfloat16)
    _store(u_ptr, offs, n, u, MASKED)
    u = u.to(tl.float32)
    return u * u


@triton.jit
def momentum_kernel(
    table_ptr, chunks_ptr, scalars_ptr, parts_ptr,
    NT,
    G: tl.constexpr, S: tl.constexpr, NESTEROV: tl.constexpr, CODED: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program moves the momentum of one chunk of a matrix, and leaves its direction."""
    chunk = chunks_ptr + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(chunk).to(tl.int64)
    number = tl.load(chunk + 1).to(tl.int64)
    start = number * CHUNK
    scalars = scalars_ptr + tensor * SCALARS
    if tl.load(scalars + _GO) != 0.0:
        c1 = tl.load(scalars + _C1)
        g_factor = tl.load(scalars + _G_FACTOR)
        g_ptr = _address(table_ptr, G_ROW, tensor, NT, G, ALIGNED) + start
        m_ptr = _address(table_ptr, M_ROW, tensor, NT, S, ALIGNED) + start
        u_ptr = _address(table_ptr, V_ROW, tensor, NT, tl.bfloat16, ALIGNED) + start
        m_scale_ptr = _address(table_ptr, M_SCALE_ROW, tensor, NT, tl.float32, ALIGNED)
        m_scale_ptr += start // CODE_BLOCK
        n = tl.minimum(tl.load(table_ptr + NT * NUMEL_ROW + tensor) - start, CHUNK).to(tl.int32)
        whole = n // BLOCK * BLOCK
        squares = tl.zeros([BLOCK], tl.float32)
        for first in range(0, whole, BLOCK):
            squares += _turned(
                g_ptr, m_ptr, m_scale_ptr, u_ptr, first, n, c1, g_factor,
                NESTEROV, CODED, BLOCK, False,
            )  # fmt: skip
        if whole < n:
            squares += _turned(
                g_ptr, m_ptr, m_scale_ptr, u_ptr, whole, n, c1, g_factor,
                NESTEROV, CODED, BLOCK, True,
            )  # fmt: skip
        part = tl.load(table_ptr + NT * CHUNK_ROW + tensor) + number
        tl.store(parts_ptr + part, tl.sum(squares))


@triton.jit
def _update(  # noqa: C901
    p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, m_scale_ptr, v_scale_ptr, master_ptr, ema_ptr,
    start, first, n, base, run, pitch,
    step_size, inv_sqrt_bc2, decay, c1, c2, eps, g_factor, c_ema, agreement, seed, t, number,
    ALGORITHM: tl.constexpr, CODED: tl.constexpr, AMSGRAD: tl.constexpr, CAUTIOUS: tl.constexpr,
    MASTER: tl.constexpr, RANDOM: tl.constexpr,
    EMA: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offs = first + tl.arange(0, BLOCK)
    p = _load_weight(p_ptr, master_ptr, offs, n, MASTER, MASKED)
    g = _load(g_ptr, offs, n, MASKED) * g_factor
    if ALGORITHM == "adam":
        g += decay * p
    else:
        p -= decay * p
    u = g  # Muon: a direction that has been orthogonalized
    if ALGORITHM != "muon":
        m = _load_state(m_ptr, m_scale_ptr, first, n, CODED, True, BLOCK, MASKED)
        # x - c x + c g, not beta x + c g: the float32 beta and c would not sum to 1, 1.3e-5 in v
        u = m - c1 * m + c1 * g
        disagree = u * g <= 0.0  # false for NaN, which therefore stays
        if ALGORITHM == "lion":
            m = m - c2 * m + c2 * g
            u = tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, u))
        else:
            m = u
            v = _load_state(v_ptr, v_scale_ptr, first, n, CODED, False, BLOCK, MASKED)
            v = v - c2 * v + c2 * (g * g)
            largest = v
            if AMSGRAD:
                vmax = _load(vmax_ptr, offs, n, MASKED)
                # NaN stays, as torch.maximum
                largest = tl.where((vmax >= v) | (vmax != vmax), vmax, v)
                _store(vmax_ptr, offs, n, largest, MASKED)
            _store_state(v_ptr, v_scale_ptr, first, n, v, CODED, False, BLOCK, MASKED)
            u = tl.div_rn(m, tl.sqrt_rn(largest) * inv_sqrt_bc2 + eps)
        _store_state(m_ptr, m_scale_ptr, first, n, m, CODED, True, BLOCK, MASKED)
        if CAUTIOUS:
            u = tl.where(disagree, 0.0, u * agreement)
    p -= step_size * u
    if EMA:
        ema = _load(ema_ptr, offs, n, MASKED)
        _store(ema_ptr, offs, n, ema - c_ema * ema + c_ema * p, MASKED)
    if MASTER == "split":
        high, low = split(p)
        _store(p_ptr, offs, n, high, MASKED)
        _store(master_ptr, offs, n, low, MASKED)
    else:
        if MASTER == "fp32":
            _store(master_ptr, offs, n, p, MASKED)
        if RANDOM == "quads":
            p = rounded_at_random(p, base + start + first, seed, t, number, BLOCK)
        if RANDOM == "runs":
            p = rounded_at_random_in_runs(
                p, start + first, base, run, pitch, seed, t, number, BLOCK
            )
        _store(p_ptr, offs, n, p, MASKED)


@triton.jit
def update_kernel(  # noqa: C901, PLR0915
    table_ptr, chunks_ptr, scalars_ptr, agreeing_ptr,
    NT, seed,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
    ALGORITHM: tl.constexpr, CODED: tl.constexpr, AMSGRAD: tl.constexpr, CAUTIOUS: tl.constexpr,
    MASTER: tl.constexpr, RANDOM: tl.constexpr,
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
        if ALGORITHM == "muon":
            g_factor = 1.0  # the momentum took it
        p_ptr = _address(table_ptr, P_ROW, tensor, NT, P, ALIGNED) + start
        g_ptr = _address(table_ptr, V_ROW if ALGORITHM == "muon" else G_ROW, tensor, NT, G, ALIGNED)
        g_ptr += start
        m_ptr = p_ptr
        v_ptr = p_ptr
        vmax_ptr = p_ptr
        if ALGORITHM != "muon":
            m_ptr = _address(table_ptr, M_ROW, tensor, NT, S, ALIGNED) + start
            if ALGORITHM != "lion":
                v_ptr = _address(table_ptr, V_ROW, tensor, NT, S, ALIGNED) + start
        if AMSGRAD:
            vmax_ptr = _address(table_ptr, VMAX_ROW, tensor, NT, S, ALIGNED) + start
        m_scale_ptr = p_ptr
        v_scale_ptr = p_ptr
        if CODED:
            m_scale_ptr = _address(table_ptr, M_SCALE_ROW, tensor, NT, tl.float32, ALIGNED)
            m_scale_ptr += start // CODE_BLOCK
            v_scale_ptr = _address(table_ptr, V_SCALE_ROW, tensor, NT, tl.float32, ALIGNED)
            v_scale_ptr += start // CODE_BLOCK
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
        base = tl.load(table_ptr + NT * BASE_ROW + tensor)
        run = tl.load(table_ptr + NT * RUN_ROW + tensor)
        pitch = tl.load(table_ptr + NT * PITCH_ROW + tensor)
        agreement = 1.0
        if CAUTIOUS:
            elements = tl.load(table_ptr + NT * WHOLE_ROW + tensor).to(tl.float32)
            slot = tl.load(table_ptr + NT * SLOT_ROW + tensor)
            agreement = 1.0 / tl.maximum(tl.load(agreeing_ptr + slot) / elements, 1e-3)
        n = tl.minimum(tl.load(table_ptr + NT * NUMEL_ROW + tensor) - start, CHUNK).to(tl.int32)
        # A mask that depends on loaded data would force scalar accesses: only the end has one.
        whole = n // BLOCK * BLOCK
        for first in range(0, whole, BLOCK):
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, m_scale_ptr, v_scale_ptr,
                master_ptr, ema_ptr, start, first, n, base, run, pitch,
                step_size, inv_sqrt_bc2, decay, c1, c2, eps, g_factor, c_ema, agreement,
                seed, t, number,
                ALGORITHM, CODED, AMSGRAD, CAUTIOUS, MASTER, RANDOM, EMA, BLOCK, False,
            )  # fmt: skip
        if whole < n:
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, m_scale_ptr, v_scale_ptr,
                master_ptr, ema_ptr, start, whole, n, base, run, pitch,
                step_size, inv_sqrt_bc2, decay, c1, c2, eps, g_factor, c_ema, agreement,
                seed, t, number,
                ALGORITHM, CODED, AMSGRAD, CAUTIOUS, MASTER, RANDOM, EMA, BLOCK, True,
            )  # fmt: skip
