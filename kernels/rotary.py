r"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

Forward, for the token at position p and pair i of a head's first R = 2 cos.shape[1] numbers:

    y1 = x1 cos[p, i] - x2 sin[p, i]        y2 = x1 sin[p, i] + x2 cos[p, i]

where the pair is (x[i], x[i + R / 2]), as in Llama, or, interleaved, (x[2 i], x[2 i + 1]), as in
GPT-J. What lies past R stays as it is. The rotation is orthogonal: its backward is the same with
-sin, and so is the backward of that.

Cost: x is read and y written once, bound by memory; a program reads cos and sin once for several
heads. In place, what lies past R is not touched. Saved for the backward: cos and sin.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import dispatched
from ._op import Inputs, Op
from ._register import torch_op
from ._tuned import tunable


def _must(name: str, rule: str, got: object) -> ValueError:
    return ValueError(f"rotary_embedding: {name} must {rule}; got {got}")


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if cos.dim() != 2 or cos.shape[1] == 0 or 2 * cos.shape[1] > x.shape[-1]:
        rule = f"have shape (positions, R / 2) with 2 <= R <= {x.shape[-1]}, the last of x"
        raise _must("cos", rule, tuple(cos.shape))
    if sin.shape != cos.shape:
        raise _must("sin", f"have the shape of cos, {tuple(cos.shape)}", tuple(sin.shape))


def _check_offsets(x: Tensor, cos: Tensor, offsets: int | Tensor, sequences: int) -> None:
    if isinstance(offsets, Tensor):
        if offsets.shape != (sequences,) or offsets.dtype not in (torch.int32, torch.int64):
            got = f"shape {tuple(offsets.shape)}, {offsets.dtype}"
            raise _must("offsets", f"be an int or hold {sequences} integers, one a sequence", got)
    elif offsets < 0:
        raise _must("offsets", "be at least 0", offsets)


def _check(
    x: Tensor, cos: Tensor, sin: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None
) -> None:
    """Raises ValueError for shapes that do not fit, without a look at device data."""
    if x.dim() not in ((3,) if cu_seqlens is not None else (3, 4)):
        shape = "(total, H, D) beside cu_seqlens" if cu_seqlens is not None else "(B, S, H, D)"
        raise _must("x", f"have shape {shape}", tuple(x.shape))
    _check_tables(x, cos, sin)
    if cu_seqlens is not None and (
        cu_seqlens.dim() != 1
        or cu_seqlens.numel() < 2
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        got = f"shape {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}"
        raise _must("cu_seqlens", "hold the B + 1 integers where sequences start and end", got)
    sequences = x.shape[0] if x.dim() == 4 else 1 if cu_seqlens is None else len(cu_seqlens) - 1
    _check_offsets(x, cos, offsets, sequences)
    known = cu_seqlens is None and not isinstance(offsets, Tensor)
    if known and offsets + x.shape[-3] > cos.shape[0]:
        rule = f"hold the {offsets + x.shape[-3]} positions up to the end of x"
        raise _must("cos", rule, tuple(cos.shape))


def _tables(
    x: Tensor, cos: Tensor, sin: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The cosines and sines of every token: (..., S, 1, R / 2), identity past the sequences."""
    tokens = torch.arange(x.shape[-3], device=x.device)
    if cu_seqlens is None:
        shift = offsets[:, None] if isinstance(offsets, Tensor) and x.dim() == 4 else offsets
        positions = tokens + shift
        return cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
    sequence = torch.searchsorted(cu_seqlens[1:].to(tokens), tokens, right=True)
    past = sequence == len(cu_seqlens) - 1
    sequence = sequence.where(~past, 0)
    shift = offsets[sequence] if isinstance(offsets, Tensor) else offsets
    positions = (tokens - cu_seqlens[sequence] + shift).where(~past, 0)
    past = past[:, None, None]
    return (
        cos[positions].unsqueeze(-2).masked_fill(past, 1),
        sin[positions].unsqueeze(-2).masked_fill(past, 0),
    )


def reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Rotary position embedding in eager PyTorch."""
    _check(x, cos, sin, offsets, cu_seqlens)
    kind = torch.promote_types(x.dtype, torch.float32)
    c, s = (t.to(kind) for t in _tables(x, cos, sin, offsets, cu_seqlens))
    R = 2 * cos.shape[1]
    rotated = x[..., :R].to(kind)
    one, two = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.split(R // 2, -1)
    pair = (one * c - two * s, one * s + two * c)
    y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    y = torch.cat((y.to(x.dtype), x[..., R:]), -1)
    return x.copy_(y) if inplace else y


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _positions(
    tokens, sequence, offset, offsets_ptr, cu_seqlens_ptr, SEQUENCES,
    HAS_OFFSETS: tl.constexpr, IS_RAGGED: tl.constexpr, SEARCH_STEPS: tl.constexpr,
):  # fmt: skip
    """The tokens' positions in the tables; -1 for one that belongs to no sequence."""
    if IS_RAGGED:
        # The last sequence that starts at or before the token, by bisection.
        sequence = tl.zeros_like(tokens)
        for i in tl.static_range(SEARCH_STEPS):
            candidate = sequence + (1 << (SEARCH_STEPS - 1 - i))
            exists = candidate < SEQUENCES
            start = tl.load(cu_seqlens_ptr + candidate, mask=exists, other=0)
            sequence = tl.where(exists & (start <= tokens), candidate, sequence)
        positions = tokens - tl.load(cu_seqlens_ptr + sequence) + offset
        if HAS_OFFSETS:
            positions += tl.load(offsets_ptr + sequence)
        positions = tl.where(tokens < tl.load(cu_seqlens_ptr + SEQUENCES), positions, -1)
    else:
        positions = tokens + offset
        if HAS_OFFSETS:
            positions += tl.load(offsets_ptr + sequence)
    return positions


@triton.jit(do_not_specialize=["offset"])
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, offsets_ptr, cu_seqlens_ptr,
    stride_xb, stride_xs, stride_xh, stride_yb, stride_ys, stride_yh, stride_cos, stride_sin,
    S, H, D, R_HALF, POSITIONS, SEQUENCES, offset,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    IS_RAGGED: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_S tokens of one sequence, and HEADS of their heads in turn."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(S, BLOCK_S)
    batch = program // tiles
    tokens = program % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = tokens < S
    pairs = tl.arange(0, BLOCK_R)
    mask = mask_s[:, None] & (pairs < R_HALF)[None, :]

    positions = _positions(
        tokens, batch, offset, offsets_ptr, cu_seqlens_ptr, SEQUENCES,
        HAS_OFFSETS, IS_RAGGED, SEARCH_STEPS,
    )  # fmt: skip
    # Outside the tables there is no angle: NaN, and no read. Between sequences nothing turns.
    known = mask & ((positions >= 0) & (positions < POSITIONS))[:, None]
    nowhere = float("nan")
    cos_ptrs = cos_ptr + positions[:, None] * stride_cos + pairs[None, :]
    sin_ptrs = sin_ptr + positions[:, None] * stride_sin + pairs[None, :]
    cos = tl.load(cos_ptrs, mask=known, other=nowhere).to(tl.float32)
    sin = tl.load(sin_ptrs, mask=known, other=nowhere).to(tl.float32)
    if IS_RAGGED:
        past = (tokens >= tl.load(cu_seqlens_ptr + SEQUENCES))[:, None]
        cos = tl.where(past, 1.0, cos)
        sin = tl.where(past, 0.0, sin)
    if CONJUGATE:
        sin = -sin

    x_ptr += batch * stride_xb + tokens[:, None] * stride_xs
    y_ptr += batch * stride_yb + tokens[:, None] * stride_ys
    first = tl.program_id(1).to(tl.int64) * HEADS
    for head in range(first, tl.minimum(first + HEADS, H)):
        x_ptrs = x_ptr + head * stride_xh
        y_ptrs = y_ptr + head * stride_yh
        if INTERLEAVED:
            both = tl.arange(0, 2 * BLOCK_R)[None, :]
            mask_both = mask_s[:, None] & (both < 2 * R_HALF)
            x = tl.load(x_ptrs + both, mask=mask_both, other=0.0).to(tl.float32)
            x1, x2 = tl.split(tl.reshape(x, [BLOCK_S, BLOCK_R, 2]))
            y = tl.join(x1 * cos - x2 * sin, x1 * sin + x2 * cos)
            tl.store(y_ptrs + both, tl.reshape(y, [BLOCK_S, 2 * BLOCK_R]), mask=mask_both)
        else:
            one = pairs[None, :]
            two = R_HALF + one
            x1 = tl.load(x_ptrs + one, mask=mask, other=0.0).to(tl.float32)
            x2 = tl.load(x_ptrs + two, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptrs + one, x1 * cos - x2 * sin, mask=mask)
            tl.store(y_ptrs + two, x1 * sin + x2 * cos, mask=mask)
        if BLOCK_REST > 0:
            rest = 2 * R_HALF + tl.arange(0, BLOCK_REST)[None, :]
            mask_rest = mask_s[:, None] & (rest < D)
            x = tl.load(x_ptrs + rest, mask=mask_rest, other=0.0)
            tl.store(y_ptrs + rest, x, mask=mask_rest)


# --- launch -------------------------------------------------------------------------------------


@tunable("HEADS", "BLOCK_S", "num_warps")
def _tile(block_r: int, most: int) -> dict[str, int]:
    """Positions, at most ``most``, and heads that share their cosines and sines; unmeasured."""
    return {"HEADS": 8, "BLOCK_S": min(max(1024 // block_r, 1), most), "num_warps": 4}


def _launch(
    x: Tensor,
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    offset: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    if x.numel() == 0:
        return
    x_strides, y_strides = ((0,) * (4 - t.dim()) + t.stride() for t in (x, y))
    B = x.shape[0] if x.dim() == 4 else 1
    S, H, D = x.shape[-3:]
    R_half = cos.shape[1]
    cos, sin = (t if t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
    sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    block_r = triton.next_power_of_2(R_half)
    tile = _tile(block_r, triton.next_power_of_2(S))
    rest = 0 if y is x else D - 2 * R_half
    _rotary_kernel[(B * triton.cdiv(S, tile["BLOCK_S"]), triton.cdiv(H, tile["HEADS"]))](
        x, cos, sin, y,
        None if offsets is None else offsets.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        *x_strides[:3], *y_strides[:3], cos.stride(0), sin.stride(0),
        S, H, D, R_half, cos.shape[0], sequences, offset,
        INTERLEAVED=interleaved, CONJUGATE=conjugate, HAS_OFFSETS=offsets is not None,
        IS_RAGGED=cu_seqlens is not None, SEARCH_STEPS=max(sequences - 1, 0).bit_length(),
        BLOCK_R=block_r, BLOCK_REST=triton.next_power_of_2(rest) if rest else 0, **tile,
    )  # fmt: skip


def _last_stride_1(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rotate_fake(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    offset: int,
    interleaved: bool,
    conjugate: bool,
) -> Tensor:
    return torch.empty_like(_last_stride_1(x))


def _save(ctx, inputs, output):
    _, *tensors, ctx.offset, ctx.interleaved, ctx.conjugate = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):
    rotation = (*ctx.saved_tensors, ctx.offset, ctx.interleaved, not ctx.conjugate)
    return _rotate(dy, *rotation), *(None,) * 7


@torch_op("rotary", fake=_rotate_fake, setup_context=_save, backward=_gradients)
def _rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    offset: int,
    interleaved: bool,
    conjugate: bool,
) -> Tensor:
    x = _last_stride_1(x)
    y = torch.empty_like(x)
    _launch(x, y, cos, sin, offsets, cu_seqlens, offset, interleaved, conjugate)
    return y


@torch_op("rotary_", fake=lambda *_: None, mutates=("x",))
def _rotate_in_place(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    offset: int,
    interleaved: bool,
) -> None:
    _launch(x, x, cos, sin, offsets, cu_seqlens, offset, interleaved, False)


class _InPlace(torch.autograd.Function):
    """Autograd of _rotate_in_place: torch.library has none for operators that write."""

    @staticmethod
    def forward(ctx, x, *rotation):
        *tensors, ctx.offset, ctx.interleaved = rotation
        ctx.save_for_backward(*tensors)
        ctx.mark_dirty(x)
        _rotate_in_place(x, *rotation)
        return x

    @staticmethod
    def backward(ctx, dy):
        return _rotate(dy, *ctx.saved_tensors, ctx.offset, ctx.interleaved, True), *(None,) * 6


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
) -> str | None:
    for name, t in (("x", x), ("cos", cos), ("sin", sin)):
        if t.dtype not in OP.dtypes:
            return f"{name} is {t.dtype}"
    others = {"cos": cos, "sin": sin, "offsets": offsets, "cu_seqlens": cu_seqlens}
    for name, other in others.items():
        if isinstance(other, Tensor) and other.device != x.device:
            return f"{name} is on {other.device} and x on {x.device}"
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "cos or sin wants a gradient"
    if inplace and (x.stride(-1) != 1 or 0 in x.stride()):
        return "in place on an x whose last stride is not 1, or that repeats its numbers"
    return None


@dispatched(eager=reference, uncovered=_uncovered)
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Turns each pair of numbers of a query or key by its position's angle (Su et al. 2021).

    Args:
        x: (B, S, H, D), or (S, H, D) for one sequence, or (total, H, D) beside ``cu_seqlens``;
            float32, float16 or bfloat16, any strides.
        cos: (positions, R / 2) of the angles, any of the dtypes, R <= D; only the first R of D
            numbers turn. The arithmetic is float32 whatever the dtypes.
        sin: As ``cos``.
        interleaved: Pairs are neighbours, as in GPT-J; default is i and i + R / 2, as in Llama.
        offsets: The position of the first token: an int, or (B,) int32 or int64, one a sequence.
        cu_seqlens: (B + 1,) int32 or int64: sequence b is tokens ``cu_seqlens[b]`` to
            ``cu_seqlens[b + 1]``. Tokens past the last sequence stay as they are.
        inplace: Write the result over ``x`` and give that back. Not for a leaf that wants a
            gradient.

    Returns:
        The shape and dtype of ``x``. A position outside the tables, which only ``cu_seqlens`` and
        offsets in a tensor can hide from the check, gives NaN.

    Raises:
        ValueError: A shape or an integer dtype outside the above, or too few positions.
    """
    _check(x, cos, sin, offsets, cu_seqlens)
    tensors = (cos, sin, offsets if isinstance(offsets, Tensor) else None, cu_seqlens)
    offset = 0 if isinstance(offsets, Tensor) else offsets
    if not inplace:
        return _rotate(x, *tensors, offset, interleaved, False)
    if not (torch.is_grad_enabled() and x.requires_grad):
        _rotate_in_place(x, *tensors, offset, interleaved)
        return x
    if torch.compiler.is_compiling():  # Dynamo does not trace mark_dirty
        return x.copy_(_rotate(x, *tensors, offset, interleaved, False))
    return _InPlace.apply(x, *tensors, offset, interleaved)


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    S: int,
    H: int,
    D: int,
    B: int = 2,
    R: int | None = None,
    interleaved: bool = False,
    ragged: bool = False,
) -> Inputs:
    x = torch.randn(B, S, H, D, dtype=dtype, device=device)
    positions = torch.arange(S + 4, device=device)[:, None]
    angles = positions * 1e4 ** -torch.linspace(0, 1, (R or D) // 2, device=device)
    inputs: Inputs = {"interleaved": interleaved}
    if ragged:  # a sequence without a token, and tokens past the last one
        x = x.flatten(0, 1)
        ends = (0, S // 2, S // 2, S // 2 + S - 1)
        inputs["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
        inputs["offsets"] = torch.tensor([2, 0, 3], device=device)
    return {"x": x.requires_grad_(), "cos": angles.cos(), "sin": angles.sin()} | inputs


OP = Op(
    fused=rotary_embedding,
    reference=reference,
    example=_example,
    sizes=(
        {"S": 1, "H": 1, "D": 2},
        {"S": 9, "H": 3, "D": 32, "R": 20},
        {"S": 7, "H": 2, "D": 16, "interleaved": True},
        {"S": 11, "H": 9, "D": 24, "R": 16, "ragged": True},
    ),
    bench_sizes=tuple(
        {"B": 4, "S": 4096, "H": h, "D": 128, "interleaved": i}
        for h, i in ((32, False), (32, True), (8, False))
    ),
    work=lambda x, cos, sin, **_: (2 * x.nbytes + cos.nbytes + sin.nbytes, 3 * x.numel()),
)
