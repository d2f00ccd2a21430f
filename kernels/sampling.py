r"""The next token of each row of logits: greedy, or drawn, of all tokens or of the likeliest.

A token is drawn by the Gumbel trick: with g_i = -log(-log u_i), argmax_i(x_i + temperature g_i) has
the distribution softmax(x / temperature), and takes one pass over the logits. u_i is Philox keyed
by the row's seed, its offset and i, so a row's token does not depend on the batch it is in.

Filters keep a likeliest part of the tokens, cut at a logit: equal logits stay or go together. The
cut is found by its bits, the highest first, with a pass over the row for every two bits: exact,
with no sort. Cost: the logits once, bound by memory; top-k and top-p each read them 8 (bfloat16) to
16 times (float32) more, from the cache.
"""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import dispatched
from ._launch import multiprocessors, rows_of
from ._op import Inputs, Op
from ._philox import as_seed, draw, words_of
from ._register import torch_op
from ._tuned import tunable

_LARGEST = tl.constexpr(2**31 - 1)
_LEAST = tl.constexpr(-(2**31))
_SERIES_BELOW = 2.0**-5
_JUST_BELOW_ONE = 1 - 2.0**-24
_GROUP = 64
_FEW = 2**12
_HEAD = 2**10

# Gumbel noise is -log(e) with e = -log(1 - v), of v = word / 2^32 rather than of 1 - v: the tokens
# that win have a small e, and float32 is fine near 0 and coarse near 1.


def _noise(words: Tensor) -> Tensor:
    """Gumbel noise of unsigned words, as the kernels compute it."""
    v = (words.float() * 2.0**-32 + 2.0**-33).clamp(max=_JUST_BELOW_ONE)
    series = v * (1 + v * (0.5 + v * (1 / 3 + v * 0.25)))
    return -torch.where(v < _SERIES_BELOW, series, -(1 - v).log()).log()


def _noise_of(seeds: Tensor, steps: Tensor, V: int) -> Tensor:
    """The noise of each row's V tokens: (B, V)."""
    quads = torch.arange(triton.cdiv(V, 4), device=steps.device)
    words = words_of(seeds[:, None], (steps[:, None] << 32) + quads)
    return _noise(words.reshape(len(steps), -1)[:, :V])


@functools.lru_cache(maxsize=4)
def _noise_of_group(seeds: tuple[int, ...], group: int, V: int) -> Tensor:
    """The noise of _GROUP offsets in turn, on a CPU: (_GROUP, B, V)."""
    steps = torch.arange(_GROUP).repeat_interleave(len(seeds)) + group * _GROUP
    return _noise_of(torch.tensor(seeds).repeat(_GROUP), steps, V).view(_GROUP, len(seeds), V)


def _noise_at(seeds: Tensor, steps: Tensor, V: int) -> Tensor:
    """As ``_noise_of``; on a CPU, the next offsets' noise with the first's, and kept.

    There some thousand words take as long as a few hundred, and generation will ask for them.
    """
    few = steps.device.type == "cpu" and 0 < steps.numel() * V <= _FEW
    if few and not torch.compiler.is_compiling() and type(steps) is Tensor:
        asked = steps.tolist()
        if asked.count(asked[0]) == len(asked):
            return _noise_of_group(tuple(seeds.tolist()), asked[0] // _GROUP, V)[asked[0] % _GROUP]
    return _noise_of(seeds, steps, V)


def _rows_setting(value: float | Tensor, dtype: torch.dtype, logits: Tensor) -> Tensor:
    """One value a row, (B,) on the device of the logits."""
    B = logits.shape[0]
    if isinstance(value, Tensor):
        return value.to(logits.device, dtype).expand(B).contiguous()
    return torch.full((B,), value, dtype=dtype, device=logits.device)


def _in_rows(value: float | Tensor, dtype: torch.dtype, logits: Tensor) -> float | Tensor:
    """A value a row, (B, 1), or the number that it is: which spares a CPU an operation."""
    return _rows_setting(value, dtype, logits)[:, None] if isinstance(value, Tensor) else value


def _seeds(seed: int | Tensor | None, logits: Tensor) -> Tensor:
    """One seed a row: row b of a batch with one seed draws by seed + b."""
    if isinstance(seed, Tensor) and seed.dim():
        return _rows_setting(seed, torch.int64, logits)
    return as_seed(seed, logits.device) + torch.arange(logits.shape[0], device=logits.device)


def _check(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    seed: int | Tensor | None,
    offset: int | Tensor,
) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"sample: logits must be (B, V) floating point; "
            f"got {tuple(logits.shape)} {logits.dtype}"
        )
    limits = {
        "temperature": (temperature, math.inf, "a number from 0 on"),
        "top_k": (top_k, math.inf, "a whole number from 0 on"),
        "top_p": (top_p, 1, "a number from 0 to 1"),
        "min_p": (min_p, 1, "a number from 0 to 1"),
        "offset": (offset, 2**31 - 1, "a whole number from 0 to 2**31 - 1"),
    }
    for name, (value, largest, rule) in limits.items():
        if not isinstance(value, Tensor) and not 0 <= value <= largest:
            raise ValueError(f"sample: {name} must be {rule}; got {value}")
    given = {name: value for name, (value, _, _) in limits.items()} | {"seed": seed}
    for name, setting in given.items():
        if isinstance(setting, Tensor) and tuple(setting.shape) not in ((), (1,), logits.shape[:1]):
            raise ValueError(
                f"sample: {name} must be one value or ({logits.shape[0]},), one a row; "
                f"got {tuple(setting.shape)}"
            )


def _is_off(value: float | Tensor, off: float) -> bool:
    """Whether a filter certainly keeps every token."""
    return not isinstance(value, Tensor) and value == off


def _keeps_all(top_k: int | Tensor, top_p: float | Tensor, min_p: float | Tensor) -> bool:
    """Whether every filter is certainly off."""
    return _is_off(top_k, 0) and _is_off(top_p, 1.0) and _is_off(min_p, 0.0)


def reference(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> Tensor:
    """The same draw in eager PyTorch, by sorting: the same token where no two scores are close."""
    _check(logits, temperature, top_k, top_p, min_p, seed, offset)
    return _drawn(logits, temperature, top_k, top_p, min_p, seed, offset, _noise_of)


def _eager(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> Tensor:
    """The same: of the likeliest tokens alone, or with noise drawn ahead, where that is as good."""
    _check(logits, temperature, top_k, top_p, min_p, seed, offset)
    settings = temperature, top_k, top_p, min_p, seed, offset
    tokens = _drawn_of_head(logits, *settings) if _has_head(logits, temperature) else None
    return _drawn(logits, *settings, _noise_at) if tokens is None else tokens


def _has_head(logits: Tensor, temperature: float | Tensor) -> bool:
    """Whether a few of the tokens may be all that a filter leaves, and can be looked at."""
    return (
        logits.device.type == "cpu"
        and logits.numel() > 0
        and logits.shape[1] > _FEW
        and not isinstance(temperature, Tensor)
        and temperature > 0
        and type(logits) is Tensor
        and not torch.compiler.is_compiling()
    )


def _drawn_of_head(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    seed: int | Tensor | None,
    offset: int | Tensor,
) -> Tensor | None:
    """As ``_drawn``, by the _HEAD largest logits of each row; None where those may not be enough.

    For a vocabulary of 50,000 this is a seventh of the time on a CPU: no sort, little noise.
    """
    if _keeps_all(top_k, top_p, min_p):
        return None
    x = logits.detach().float()
    head, tokens = x.topk(_HEAD, 1)
    total = None
    if _is_off(top_k, 0):
        total = ((x - head[:, :1]) / temperature).exp().sum(1, keepdim=True)
    floor = _floor(head, temperature, top_k, top_p, min_p, total)
    if not bool(((head[:, -1:] < floor) & head[:, :1].isfinite()).all()):
        return None
    kept = head >= floor
    most = int(kept.sum(1).max())
    head, tokens, kept = head[:, :most], tokens[:, :most], kept[:, :most]
    seeds, steps = _seeds(seed, logits)[:, None], _rows_setting(offset, torch.int64, logits)
    words = words_of(seeds, (steps[:, None] << 32) + (tokens >> 2))
    noise = _noise(words.gather(2, (tokens & 3)[:, :, None])[:, :, 0])
    best = (head + temperature * noise).masked_fill(~kept, -math.inf).argmax(1, keepdim=True)
    return tokens.gather(1, best)[:, 0]


def _drawn(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    seed: int | Tensor | None,
    offset: int | Tensor,
    noise_of: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    x = logits.detach().float()
    if _is_off(temperature, 0.0):
        return x.argmax(1)
    degrees = _in_rows(temperature, torch.float32, logits)
    steps, seeds = _rows_setting(offset, torch.int64, logits), _seeds(seed, logits)
    scores = x + degrees * noise_of(seeds, steps, x.shape[1])
    if not _keeps_all(top_k, top_p, min_p):
        kept = kept_tokens(x, degrees, top_k, top_p, min_p)
        scores = scores.masked_fill(~kept, -math.inf)
    return scores.argmax(1)


def kept_tokens(
    x: Tensor,
    degrees: float | Tensor,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Tensor:
    """Which of the float32 logits (B, V) the filters keep at temperatures ``degrees`` (B, 1)."""
    if _keeps_all(top_k, top_p, min_p):
        return torch.ones_like(x, dtype=torch.bool)
    floor = _floor(x.sort(1, descending=True).values, degrees, top_k, top_p, min_p)
    return (x >= floor) | x.isnan()


def _floor(
    ordered: Tensor,
    degrees: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    total: Tensor | None = None,
) -> Tensor:
    """The least logit that is kept of each row: (B, 1).

    Args:
        ordered: The row's logits from the largest on, or the first of them.
        degrees: Temperatures.
        top_k: Of ``sample``.
        top_p: Of ``sample``.
        min_p: Of ``sample``.
        total: (B, 1): the row's sum of exp((x - largest) / degrees), if ``ordered`` is not all.
    """
    N = ordered.shape[1]
    largest, floor = ordered[:, :1], ordered[:, -1:]
    if isinstance(top_k, Tensor):
        k = _rows_setting(top_k, torch.int64, ordered)[:, None]
        floor = torch.where(k > 0, ordered.gather(1, k.clamp(1, N) - 1), floor)
    elif int(top_k):
        last = min(int(top_k), N)
        floor = ordered[:, last - 1 : last]
    if not _is_off(top_p, 1.0):
        p = _in_rows(top_p, torch.float32, ordered)
        weights = torch.where(ordered == largest, 1.0, ((ordered - largest) / degrees).exp())
        mass = (weights * (ordered >= floor)).cumsum(1)
        reached = mass >= p * (mass[:, -1:] if total is None else total)
        cut = ordered.gather(1, reached.to(torch.uint8).argmax(1, keepdim=True))
        if total is not None:
            cut = torch.where(reached[:, -1:], cut, floor)
        floor = torch.where(p < 1, cut, floor) if isinstance(p, Tensor) else cut
    if not _is_off(min_p, 0.0):
        share = _rows_setting(min_p, torch.float32, ordered)[:, None]
        cut = largest + degrees * share.log()
        if isinstance(degrees, Tensor):
            cut = torch.where(degrees > 0, cut, largest)
        floor = torch.where(share > 0, floor.maximum(cut), floor)
    return floor


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _order(x):
    """Integers in the order of float32 numbers; NaN above all, -0 with 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, _LARGEST, bits ^ ((bits >> 31) & _LARGEST))


@triton.jit
def _gumbel(words):
    """Gumbel noise of int32 words, read as unsigned."""
    v = words.to(tl.uint32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    v = tl.minimum(v + 1.1641532182693481e-10, 0.99999994)
    series = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * 0.25)))
    return -tl.log(tl.where(v < 0.03125, series, -tl.log(1.0 - v)))


@triton.jit
def _weight(x, largest, temperature, MASS: tl.constexpr):
    """A token's share of the probability, 1 for the likeliest; or 1 for each token."""
    if MASS:
        return tl.where(x == largest, 1.0, tl.exp((x - largest) / temperature))
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _weigh(
    x_ptr, V, cuts, floor, largest, temperature,
    MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight of the tokens from each of four cuts on, summed over lanes at the end only."""
    cols = tl.arange(0, BLOCK)
    total = tl.zeros([4, BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        mask = cols < V - start
        x = tl.load(x_ptr + start + cols, mask=mask, other=float("-inf")).to(tl.float32)
        order = _order(x)
        weight = tl.where(mask & (order >= floor), _weight(x, largest, temperature, MASS), 0.0)
        total += tl.where(order[None, :] >= cuts[:, None], weight[None, :], 0.0)
    return tl.sum(total, 1)


@triton.jit
def _highest_cut(
    x_ptr, V, target, floor, largest, temperature,
    MASS: tl.constexpr, LOWEST_BIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest cut whose tokens still weigh target, two bits a turn from the top.

    A sum in one order grows with its terms in floating point too, so the weights fall as cuts rise.
    """
    cut = tl.full((), _LEAST, tl.int32)
    for turn in range((32 - LOWEST_BIT) // 2):
        cuts = cut + (tl.arange(0, 4) << (30 - 2 * turn))
        weights = _weigh(x_ptr, V, cuts, floor, largest, temperature, MASS, BLOCK)
        enough = tl.sum((weights >= target).to(tl.int32), 0)
        cut += tl.maximum(enough - 1, 0) << (30 - 2 * turn)
    return cut


@triton.jit
def _cut_kernel(
    x_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, cut_ptr,
    stride_xb, V,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
    LOWEST_BIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program finds the order of the least logit that its row's filters keep."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xb
    temperature = tl.load(temperature_ptr + row)
    cols = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        x = tl.load(x_ptr + start + cols, mask=cols < V - start, other=float("-inf"))
        largest = tl.maximum(largest, x.to(tl.float32))
    largest = tl.max(largest, 0)
    floor = tl.full((), _LEAST, tl.int32)
    if HAS_TOP_K:
        k = tl.load(top_k_ptr + row)
        target = tl.minimum(k, V).to(tl.float32)
        cut = _highest_cut(x_ptr, V, target, floor, largest, temperature, False, LOWEST_BIT, BLOCK)
        floor = tl.where(k > 0, cut, floor)
    if HAS_TOP_P:
        p = tl.load(top_p_ptr + row)
        everything = tl.full([4], _LEAST, tl.int32)
        total = _weigh(x_ptr, V, everything, floor, largest, temperature, True, BLOCK)
        target = p * tl.max(total, 0)
        cut = _highest_cut(x_ptr, V, target, floor, largest, temperature, True, LOWEST_BIT, BLOCK)
        floor = tl.where(p < 1.0, tl.maximum(cut, floor), floor)
    if HAS_MIN_P:
        share = tl.load(min_p_ptr + row)
        cut = tl.where(temperature > 0.0, largest + temperature * tl.log(share), largest)
        floor = tl.where(share > 0.0, tl.maximum(_order(cut), floor), floor)
    tl.store(cut_ptr + row, tl.minimum(floor, _order(largest)))  # the likeliest always stays


@triton.jit
def _pick_kernel(
    x_ptr, temperature_ptr, seed_ptr, offset_ptr, cut_ptr, best_ptr, token_ptr,
    stride_xb, V, share,
    GREEDY: tl.constexpr, FILTERED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program finds the best of its share of a row: score in the high word, then the first."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xb
    cols = tl.arange(0, BLOCK)
    quads = tl.arange(0, BLOCK // 4)
    best = tl.full([BLOCK], _LEAST, tl.int32)
    place = tl.zeros([BLOCK], tl.int32)
    temperature = 0.0
    seed = tl.zeros((), tl.int64)
    counter = tl.zeros((), tl.int64)
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row)
        seed = tl.load(seed_ptr + row)
        counter = tl.load(offset_ptr + row) << 32
    cut = tl.full((), _LEAST, tl.int32)
    if FILTERED:
        cut = tl.load(cut_ptr + row)
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, V), BLOCK):
        mask = cols < V - start
        x = tl.load(x_ptr + start + cols, mask=mask, other=float("-inf")).to(tl.float32)
        kept = mask
        if FILTERED:
            kept = mask & (_order(x) >= cut)
        if not GREEDY:
            words = tl.reshape(draw(seed, counter + start // 4 + quads), [BLOCK])
            x += temperature * _gumbel(words)
        order = _order(x)
        better = kept & (order > best)  # not >=: the first of equals stays
        best = tl.where(better, order, best)
        place = tl.where(better, start + cols, place)
    most = tl.max(best, 0)
    first = tl.min(tl.where(best == most, place, _LARGEST), 0)
    if WHOLE:
        tl.store(token_ptr + row, first.to(tl.int64))
    else:
        packed = (most.to(tl.int64) << 32) | (first ^ _LARGEST).to(
            tl.int64
        )  # the first is the most
        tl.store(best_ptr + row * tl.num_programs(1) + tl.program_id(1), packed)


@triton.jit
def _best_kernel(best_ptr, token_ptr, SHARES, BLOCK: tl.constexpr):
    """A program takes the best of its row's shares."""
    row = tl.program_id(0).to(tl.int64)
    shares = tl.arange(0, BLOCK)
    best = tl.load(best_ptr + row * SHARES + shares, mask=shares < SHARES, other=-(2**63))
    tl.store(token_ptr + row, (tl.max(best, 0) & _LARGEST) ^ _LARGEST)


# --- launch -------------------------------------------------------------------------------------

_LOWEST_BIT = {torch.float32: 0, torch.float16: 12, torch.bfloat16: 16}  # lower ones are constant


@tunable("BLOCK", "num_warps")
def _pick_tile(V: int) -> dict[str, int]:
    return {"BLOCK": 2048, "num_warps": 8}  # unmeasured


@tunable("BLOCK", "num_warps")
def _cut_tile(V: int) -> dict[str, int]:
    return {"BLOCK": 4096, "num_warps": 16}  # unmeasured


def _shares(B: int, blocks: int, device: torch.device) -> int:
    """Into how many shares to cut a row, so that B rows fill the GPU; no token depends on it."""
    if device.type == "cpu" and _dispatch._cpu_runner == "interpreter":
        return min(2, blocks)  # a short test must see a share that is not the first
    return max(1, min(blocks, 2 * multiprocessors(device) // B, 64))


def _fake(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


@torch_op("sample", fake=_fake)
def _sample(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """Settings are (B,); None switches a filter off, and a temperature of None is greedy."""
    tokens = _fake(logits, temperature, top_k, top_p, min_p, seed, offset)
    B, V = logits.shape
    if B == 0:
        return tokens
    x = rows_of(logits, V)
    filters = {"TOP_K": top_k, "TOP_P": top_p, "MIN_P": min_p}
    filtered = any(t is not None for t in filters.values())
    cuts = tokens.new_empty(B if filtered else 0, dtype=torch.int32)
    if filtered:
        _cut_kernel[(B,)](
            x, temperature, top_k, top_p, min_p, cuts,
            x.stride(0), V,
            LOWEST_BIT=_LOWEST_BIT[x.dtype],
            **{f"HAS_{name}": t is not None for name, t in filters.items()}, **_cut_tile(V),
        )  # fmt: skip
    tile = _pick_tile(V)
    blocks = triton.cdiv(V, tile["BLOCK"])
    share = triton.cdiv(blocks, _shares(B, blocks, x.device))
    shares = triton.cdiv(blocks, share)
    best = tokens.new_empty(B, shares if shares > 1 else 0)
    _pick_kernel[(B, shares)](
        x, temperature, seed, offset, cuts, best, tokens,
        x.stride(0), V, share * tile["BLOCK"],
        GREEDY=temperature is None, FILTERED=filtered, WHOLE=shares == 1, **tile,
    )  # fmt: skip
    if shares > 1:
        _best_kernel[(B,)](best, tokens, shares, BLOCK=triton.next_power_of_2(shares), num_warps=1)
    return tokens


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> str | None:
    _check(logits, temperature, top_k, top_p, min_p, seed, offset)
    if logits.dtype not in OP.dtypes:
        return f"logits is {logits.dtype}"
    return "there are no tokens" if logits.shape[1] == 0 else None


@dispatched(eager=_eager, uncovered=_uncovered)
def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> Tensor:
    """One token a row, drawn from ``softmax(logits / temperature)`` or of its likeliest part.

    Each setting is a number, or a tensor (B,) with one a row. The filters apply in this order, each
    to what is left, and cut between different logits only: equal ones stay or go together.

    Args:
        logits: (B, V) float32, float16 or bfloat16; any strides, any V. -inf is never drawn beside
            a finite logit. The noise is added in float32: past 1e4 its steps are 1e-3 and more.
        temperature: 0 takes the largest logit, the first of equals, as ``torch.argmax``.
        top_k: Keep the k largest logits, and what equals the k-th; 0: all.
        top_p: Keep the likeliest tokens that together have at least this probability; 1: all.
        min_p: Keep tokens of at least this share of the likeliest one's probability; 0: all.
        seed: Rows of one seed draw alike. A single seed stands for seed + b in row b. None draws it
            from PyTorch's generator.
        offset: Position in the sequence, below 2**31: the next step of the same seed.

    Returns:
        (B,) int64. A row depends on its own logits, seed and settings alone, to the bit. A row with
        NaN gives the first NaN, a row of only -inf token 0.

    Raises:
        ValueError: Shapes or settings outside the above; values in tensors are not read.
        IndexError: What ``torch.argmax`` raises where V is 0.
    """
    if _is_off(temperature, 0.0):
        return _sample(logits.detach(), None, None, None, None, None, None)
    return _sample(
        logits.detach(),
        _rows_setting(temperature, torch.float32, logits),
        None if _is_off(top_k, 0) else _rows_setting(top_k, torch.int32, logits),
        None if _is_off(top_p, 1.0) else _rows_setting(top_p, torch.float32, logits),
        None if _is_off(min_p, 0.0) else _rows_setting(min_p, torch.float32, logits),
        _seeds(seed, logits),
        _rows_setting(offset, torch.int64, logits),
    )


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype, device: torch.device, B: int, V: int, seed: int = 7, **settings: object
) -> Inputs:
    logits = 3 * torch.randn(B, V, dtype=dtype, device=device)
    return {"logits": logits, "seed": seed} | settings


_FILTERS = {"top_k": 50, "top_p": 0.9, "min_p": 0.02}
OP = Op(
    fused=sample,
    reference=reference,
    example=_example,
    sizes=(
        {"B": 1, "V": 1},
        {"B": 2, "V": 1500, "temperature": 0.7, "offset": 5} | _FILTERS,
        {"B": 2, "V": 2100, "temperature": 0.0},
    ),
    bench_sizes=(
        {"B": 1, "V": 128256, "temperature": 0.0},
        {"B": 1, "V": 128256},
        {"B": 64, "V": 50304},
        {"B": 64, "V": 128256} | _FILTERS,
    ),
    work=lambda logits, **_: (logits.nbytes + 8 * logits.shape[0], 0),
)
