"""Known mistakes, put into the kernels one at a time: the suite must catch each.

A bug is one replacement in one kernel's source, and the test that has to fail with it. Where a
kernel changes so that the replacement no longer applies, the list must follow.
"""

import contextlib
import importlib
import inspect
import itertools
import linecache
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import test_activations
import test_adamw
import test_adamw_options
import test_add_norm
import test_attention
import test_attention_decode
import test_cross_entropy
import test_dropout
import test_embedding
import test_fp8_linear
import test_group_norm
import test_layer_norm
import test_lion
import test_muon
import test_ops
import test_optim_bytes
import test_rotary
import test_sampling
import test_softmax
import torch
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction

from fastlm.kernels import OPS, AdamW, _interpreter

_serial = itertools.count()


@dataclass(frozen=True)
class Bug:
    """One mistake, and the test that notices it.

    Attributes:
        op: The name in OPS whose cases the generic test runs on.
        kernel: ``module:function`` below fastlm.kernels.
        old: Text that stands exactly once in the kernel's source.
        new: What the mistake makes of it.
        caught_by: A test over OPS, run on the op's cases until one fails; or a plain test.
    """

    op: str
    kernel: str
    old: str
    new: str
    caught_by: Callable[..., None]

    def __str__(self) -> str:
        return f"{self.kernel}: {self.old.strip()} -> {self.new.strip() or 'nothing'}"


def mutated(bug: Bug):
    """The kernel's Python function with the mistake in it, and the original."""
    module_name, name = bug.kernel.split(":")
    original = getattr(importlib.import_module(f"fastlm.kernels.{module_name}"), name).fn
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(bug.old) == 1, f"{bug}: the text stands {source.count(bug.old)} times"
    source = source[source.index("def ") :].replace(bug.old, bug.new)
    filename = f"<seeded bug {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope = dict(original.__globals__)
    exec(compile(source, filename, "exec"), scope)
    function = scope[name]
    function.__globals__.update(original.__globals__)
    return function, original


@contextlib.contextmanager
def seeded(bug: Bug):
    """Inside the block the interpreter runs the mistaken kernel."""
    function, original = mutated(bug)
    before = _interpreter._memo.get(original)
    _interpreter._memo[original] = InterpretedFunction(function)
    try:
        yield
    finally:
        del _interpreter._memo[original]
        if before is not None:
            _interpreter._memo[original] = before


def cases(bug: Bug):
    """The arguments with which pytest would call the test, for this op only."""
    op, wanted = OPS[bug.op], inspect.signature(bug.caught_by).parameters
    if not wanted:
        yield {}
        return
    marks = [m.args for m in getattr(bug.caught_by, "pytestmark", ()) if m.name == "parametrize"]
    own = {names: values for names, values, *_ in marks if isinstance(names, str)}
    axes = {"size": op.sizes, "dtype": op.dtypes} | own | {"op": [op]}
    for values in itertools.product(*(axes[name] for name in wanted)):
        yield dict(zip(wanted, values, strict=True))


FLOAT64 = test_ops.test_matches_float64_by_the_contract
MEMORY = test_ops.test_reads_and_writes_only_its_tensors
STRIDES = test_ops.test_any_strides_give_the_same_answer
LARGE_LOGITS = test_attention.test_large_logits
TWO_TILES = test_attention.test_heads_of_two_tiles
PAGES = test_attention_decode.test_dtypes
HIDDEN_ROWS = test_attention.test_sdpa_rows_that_a_mask_hides_whole_are_zero
LEAST = test_attention.test_sdpa_masks_of_the_least_number
NAN_MASK = test_attention.test_sdpa_nan_in_a_mask_is_not_hidden
OWN_STRIDES = test_add_norm.test_each_tensor_has_its_own_strides
WIDE_DROPOUT = test_add_norm.test_dropout_of_narrow_and_of_wide_rows
SHIFT = test_softmax.test_a_shift_of_the_logits_costs_no_accuracy
INFINITIES = test_softmax.test_infinities_and_nan
DIMENSIONS = test_softmax.test_a_wide_dimension_that_is_not_the_last
CASTS = test_softmax.test_the_dtype_argument
OWN_HALVES = test_activations.test_halves_of_one_tensor_are_read_where_they_lie
MANY_RAGGED = test_rotary.test_many_ragged_sequences
OUTSIDE = test_rotary.test_a_position_outside_the_tables_gives_nan_and_reads_nothing
BLOCKS = test_dropout.test_around_whole_blocks
RUNS = test_embedding.test_runs_across_chunks
PADDING = test_embedding.test_the_padding_row_gets_no_gradient
MISSING = test_embedding.test_numbers_outside_the_table
STARTS = test_cross_entropy.test_rows_that_start_anywhere
NO_CLASS = test_cross_entropy.test_targets_outside_give_nan_and_read_nothing
CE_SHIFT = test_cross_entropy.test_a_shift_of_the_logits_costs_no_accuracy
CE_SHAPES = test_cross_entropy.test_shapes_of_every_kind
IGNORED = test_cross_entropy.test_ignored_rows_of_nan_cost_nothing
CHANNEL_MEANS = test_group_norm.test_channels_of_unlike_means
CODES = test_fp8_linear.test_codes_and_scales_are_the_references_to_the_bit
VOCABULARY = test_sampling.test_any_vocabulary
ARGMAX = test_sampling.test_greedy_is_argmax
KEPT = test_sampling.test_the_kept_set_is_the_sorted_references
SPECIAL_ROWS = test_sampling.test_special_rows
LARGE_MEAN = test_layer_norm.test_a_large_mean_costs_no_accuracy

LION_NAN = test_lion.test_a_nan_gradient_reaches_its_parameter
MUON = test_muon.test_follows_torchs
TILES = test_muon.test_symmetric_products_and_the_band_of_singular_values
BYTES = test_optim_bytes.test_bytes_are_the_nearest_to_the_float32_means
BYTES_NAN = test_optim_bytes.test_a_nan_takes_its_block_and_is_not_hidden
NEXT_STEP = test_optim_bytes.test_the_next_step_starts_from_the_bytes
PARTS = test_adamw_options.test_rounding_of_a_part_is_that_of_the_whole

# (kernel, what stands there, what the mistake makes of it, the test that notices)
LAYER_NORM = [
    ("_forward_kernel", "tl.where(mask, x - mean[:, None], 0.0)", "x - mean[:, None]", FLOAT64),
    ("_forward_kernel", "centred * centred, 1) / N", "centred * centred, 1) / BLOCK_N", FLOAT64),
    ("_forward_kernel", "tl.store(rstd_ptr + rows, rstd, mask=mask_m)", "", FLOAT64),
    ("_forward_kernel", "centred * centred, 1) / N", "x * x, 1) / N - mean * mean", LARGE_MEAN),
    ("_forward_kernel", "rows[:, None] * stride_xm", "rows[:, None] * N", STRIDES),
    ("_forward_kernel", "y, mask=mask)", "y, mask=mask_m[:, None])", MEMORY),
    ("_forward_kernel", "tl.load(x_ptrs, mask=mask, other=0.0)", "tl.load(x_ptrs)", MEMORY),
    ("_forward_wide_kernel", "delta * share * start", "delta * share", FLOAT64),
    ("_forward_wide_kernel", "size = tl.minimum(N - start, BLOCK_N)", "size = BLOCK_N", FLOAT64),
    ("_backward_kernel", "tl.cdiv(M, BLOCK_M)", "M // BLOCK_M", FLOAT64),
    ("_backward_kernel", "dbias += dy", "dbias += dy * xhat", FLOAT64),
    ("_backward_kernel", "dweight += dy * xhat", "dweight = dy * xhat", FLOAT64),
    ("_backward_kernel", "rows[:, None] * stride_dym", "rows[:, None] * stride_xm", STRIDES),
    ("_backward_kernel", "dweight_ptr + program * N", "dweight_ptr", MEMORY),
    ("_backward_wide_kernel", "- xhat * tl.load(mean_gx_ptr + row)", "", FLOAT64),
    ("_row_means_kernel", "g *= tl.load", "g += tl.load", FLOAT64),
]

# (op, kernel below fastlm.kernels.attention, ...): the ops share kernels, each by its own paths
FLASH, RAGGED, DECODE = "flash_attention", "flash_attention_varlen", "flash_attention_decode"
SDPA = "scaled_dot_product_attention"
ATTENTION = [
    (FLASH, "forward:_attend", "l_i = l_i * alpha[:, None] +", "l_i = l_i +", FLOAT64),
    (FLASH, "forward:_forward_kernel", "tl.sum(l_i, 1)", "tl.max(l_i, 1)", FLOAT64),
    (FLASH, "forward:_attend", "acc = acc * alpha[:, None]", "acc = acc * 1.0", FLOAT64),
    (FLASH, "forward:_forward_kernel", "LOWEST / tl.maximum(factor, 1.0)", "LOWEST * 2", FLOAT64),
    (FLASH, "forward:_attend", "qk = dot(q_rest, k, qk)", "pass", TWO_TILES),
    (FLASH, "forward:_forward_kernel", "h_kv = h // GROUP", "h_kv = h % (H // GROUP)", FLOAT64),
    (FLASH, "forward:_forward_kernel", "offs_m, lse, mask=mask_m)", "offs_m, lse)", MEMORY),
    (FLASH, "forward:_forward_kernel", "1.0 / l_safe, mask", "1.0, mask", FLOAT64),
    (FLASH, "forward:_forward_kernel", 'float("inf"), m_i)', "m_i, lse * LOG2_E)", LARGE_LOGITS),
    (FLASH, "_scores:seen_keys", "offs_n <= last", "offs_n < last", FLOAT64),
    (FLASH, "_scores:seen_queries", "offs_m <= offs_n", "offs_m < offs_n", FLOAT64),
    (FLASH, "_scores:key_range", "last + right + 1", "last + right", FLOAT64),
    (FLASH, "_scores:key_range", "first + right + 1", "last + right + 1", FLOAT64),
    (FLASH, "_scores:key_range", "first + left, 0", "last + left, 0", FLOAT64),
    (FLASH, "_scores:shape_scores", "tl.minimum(cols, S_k - 1)", "cols", MEMORY),
    (FLASH, "_scores:kept", "(zero + rows)", "zero", FLOAT64),
    (FLASH, "backward:rows_kernel", "minus_delta += tl.load", "minus_delta -= tl.load", FLOAT64),
    (SDPA, "backward:rows_kernel", 'lse == float("-inf")', "lse == 0.0", HIDDEN_ROWS),
    (SDPA, "_scores:shape_scores", "bias, least)", "bias, bias * LOG2_E)", LEAST),
    (SDPA, "_scores:shape_scores", ", propagate_nan=tl.PropagateNan.ALL", "", NAN_MASK),
    (FLASH, "backward:_gather_dkdv", "tl.fma(pT, dpT, pT * minus_delta[None, :])", "pT", FLOAT64),
    (FLASH, "backward:_gather_dkdv", "broadcast_to(minus_delta[None, :], ", "zeros(", FLOAT64),
    (FLASH, "backward:_gather_dq", "ds *= slack", "ds *= 1.0", FLOAT64),
    (FLASH, "backward:_gather_dq", "sums += tl.sum(p * dp, 1)", "sums += tl.sum(p, 1)", FLOAT64),
    (FLASH, "backward:_gather_dkdv", "start + HEADS * span", "start + span", FLOAT64),
    (FLASH, "bias:dbias_kernel", "tl.cdiv(S_q, BLOCK_M) if ONE_ROW", "1 if ONE_ROW", FLOAT64),
    (SDPA, "forward:_forward_kernel", "h * stride_qh", "h * stride_kh", MEMORY),
    (SDPA, "backward:dkdv_kernel", "(dk * scale)", "dk", FLOAT64),
    (SDPA, "backward:dq_kernel", "- 1 - pid", "- pid", MEMORY),
    (RAGGED, "_scores:locate", "+ middle <= t", "+ middle < t", FLOAT64),
    (RAGGED, "forward:_forward_kernel", "k_ptr += start_k * stride_kn", "pass", FLOAT64),
    (DECODE, "splits:_decode_kernel", "start = begin + split * share", "start = begin", FLOAT64),
    (DECODE, "splits:_decode_kernel", "n % PAGE + offs_n", "offs_n", PAGES),
    (DECODE, "splits:_decode_kernel", "cols < length", "cols < capacity", FLOAT64),
    (DECODE, "splits:_merge_kernel", 'other=float("-inf")', "other=0.0", FLOAT64),
]  # fmt: skip


def OVERFLOW():
    test_adamw.test_grad_scaler(overflow=True)


def GROUPS():
    test_adamw.test_groups_of_different_settings_share_the_launches(AdamW, torch.optim.AdamW)


ADAMW = [
    ("prepare_kernel", "tl.load(found_inf_ptr) == 0.0", "tl.load(found_inf_ptr) != 7.0", OVERFLOW),
    ("prepare_kernel", "1.0 / tl.sqrt(bias_correction2)", "1.0 / bias_correction2", FLOAT64),
    ("prepare_kernel", "kind != ADAM", "kind == 7.0", FLOAT64),
    ("prepare_kernel", "sign / tl.load", "sign * tl.load", OVERFLOW),
    ("prepare_kernel", "NT * HYPER_ROW + offs", "NT * HYPER_ROW + offs * 0", GROUPS),
    ("prepare_kernel", "mask = offs < NT", "mask = offs < BLOCK", MEMORY),
    ("_load", "mask=offs < n", "mask=offs < n + 1", MEMORY),
    ("_store", "mask=offs < n", "mask=offs <= n", MEMORY),
    ("_update", "m - c1 * m + c1 * g", "m + c1 * g", FLOAT64),
    ("_update", "tl.where((vmax >= v) | (vmax != vmax), vmax, v)", "v", FLOAT64),
    ("update_kernel", "whole = n // BLOCK * BLOCK", "whole = n // BLOCK", FLOAT64),
    ("update_kernel", "tl.load(scalars + _GO) != 0.0", "tl.load(scalars + _GO) >= 0.0", OVERFLOW),
    ("_agreeing", "* g > 0.0", "> 0.0", FLOAT64),
    ("_update", "tl.where(disagree, 0.0, u * agreement)", "tl.where(disagree, 0.0, u)", FLOAT64),
    ("_update", "disagree = u * g <= 0.0", "disagree = ~(u * g > 0.0)", LION_NAN),
]

# (op, kernel below fastlm.kernels.optim, ...)
OPTIMIZERS = [
    ("adamw_step", "rounding:encoded", "(size + _HALF) >>", "size >>", BYTES),
    ("adamw_step", "rounding:encoded", "tl.where(x > 0.0, 1, 0)", "0", BYTES),
    ("adamw_step", "rounding:encoded", "& 0x7FFFFFFF", "& 0x7F7FFFFF", BYTES_NAN),
    ("adamw_step", "rounding:decoded", "-x, x", "x, x", NEXT_STEP),
    ("adamw_step", "rounding:rounded_at_random_in_runs", "* pitch + i % run", "* pitch", PARTS),
    ("adamw_step", "rounding:rounded_at_random_in_runs", "place & 3", "i & 3", PARTS),
    ("lion_step", "kernels:_update", "m - c2 * m + c2 * g", "u", FLOAT64),
    ("lion_step", "kernels:_update", "tl.where(u < 0.0, -1.0, u)", "-1.0", LION_NAN),
    ("lion_step", "kernels:prepare_kernel", "kind == UNCORRECTED", "kind == 7.0", FLOAT64),
    ("muon_step", "kernels:prepare_kernel", "lr * lr_ratio", "lr", FLOAT64),
    ("muon_step", "kernels:_turned", "u = m - c1 * m + c1 * g", "u = m", MUON),
    ("muon_step", "kernels:sum_chunks_kernel", "+ CHUNK - 1) // CHUNK", ") // CHUNK", FLOAT64),
    ("muon_step", "newton_schulz:symmetric_kernel", "if row != col", "if row == col", TILES),
    ("muon_step", "newton_schulz:symmetric_kernel", "acc += b * tl.load", "acc += tl.load", TILES),
    ("muon_step", "newton_schulz:symmetric_kernel", "scale * scale", "scale", FLOAT64),
    ("muon_step", "newton_schulz:product_kernel", "acc += a * tl.load", "acc += tl.load", FLOAT64),
    ("muon_step", "newton_schulz:product_kernel", "& (cols < N)[None, :]", "", MEMORY),
]

RMS_NORM = [
    ("_forward_kernel", "tl.sum(x * x, 1) / N", "tl.sum(x * x, 1) / BLOCK_N", FLOAT64),
    ("_forward_kernel", "rows[:, None] * stride_xm", "rows[:, None] * N", STRIDES),
    ("_forward_kernel", "y, mask=mask)", "y, mask=mask_n[None, :])", MEMORY),
    ("_forward_wide_kernel", "squares += x * x", "squares = x * x", FLOAT64),
    ("_gain", "weight_offset + ", "", FLOAT64),
    ("_backward_kernel", "[:, None] * rstd / N", "[:, None] / N", FLOAT64),
    ("_backward_kernel", "g *= weight", "g = weight", FLOAT64),
    ("_backward_kernel", "dweight += dy", "dweight = dy", FLOAT64),
    ("_row_means_kernel", "row * stride_dym", "row * stride_xm", STRIDES),
    ("_backward_wide_kernel", "dx_ptr + row * N", "dx_ptr", FLOAT64),
]

ADD_LAYER_NORM = [
    ("_dropout", "x * scale", "x", FLOAT64),
    ("_dropout", "drawn >= threshold", "drawn >= threshold + threshold", FLOAT64),
    ("_dropout", "start // 4 + ", "", WIDE_DROPOUT),
    ("_forward_kernel", "tl.where(mask, new - mean[:, None], 0.0)", "new - mean[:, None]", FLOAT64),
    ("_forward_kernel", "rows[:, None] * stride_rm", "rows[:, None] * stride_xm", OWN_STRIDES),
    ("_forward_wide_kernel", "delta * delta * share * start", "0.0", FLOAT64),
    ("_means", "mean_g = tl.sum(g, 1) / N", "mean_g = tl.sum(g * xhat, 1) / N", FLOAT64),
    ("_row_means_kernel", "tl.load(rstd_ptr + row) / N", "1.0 / N", FLOAT64),
    ("_backward_kernel", "d += tl.load(dnew_ptrs", "d = tl.load(dnew_ptrs", FLOAT64),
    ("_backward_kernel", "rows[:, None] * stride_dnm", "rows[:, None] * stride_dym", OWN_STRIDES),
    ("_store_part", "part_ptr + program * N", "part_ptr", MEMORY),
]
ADD_RMS_NORM = [
    ("_forward_kernel", "tl.rsqrt(tl.sum(new * new, 1) / N + eps)", "tl.rsqrt(eps)", FLOAT64),
    ("_forward_wide_kernel", "deviations += tl.sum(new * new)", "deviations = eps", WIDE_DROPOUT),
    ("_means", "mean_gx = tl.sum(g * xhat, 1) / N", "mean_gx = tl.sum(g, 1) / N", FLOAT64),
]

SOFTMAX = [
    ("_forward_kernel", 'float("-inf")', "0.0", FLOAT64),
    ("_forward_kernel", "x -= tl.max(x, 1)[:, None]", "", SHIFT),
    ("_forward_kernel", "rows * stride_xm", "rows * stride_ym", STRIDES),
    ("_forward_wide_kernel", "d * exp(m - shift)", "d", FLOAT64),
    ("_forward_wide_kernel", 'tl.where(new_m == float("-inf"), 0.0, new_m)', "new_m", INFINITIES),
    ("_tile_rows", "program // tiles", "program * 0", DIMENSIONS),
    ("_backward_kernel", "rows * stride_dym", "rows * stride_ym", STRIDES),
    ("_backward_wide_kernel", "total += dy * ", "total = dy * ", FLOAT64),
    ("_load_float", ".to(dtype)", "", CASTS),
]
LOG_SOFTMAX = [
    ("_forward_wide_kernel", "x - m - tl.log(d)", "x - tl.log(d)", SHIFT),
    ("_gradient", "exp(y) * total", "total", FLOAT64),
]

GROUP_NORM = [
    ("_affine", "xhat += ", "xhat = ", FLOAT64),
    ("_forward_kernel", "row % GROUPS * CHANNELS", "row % GROUPS", FLOAT64),
    ("_forward_kernel", "tl.where(mask, x - mean, 0.0)", "x - mean", FLOAT64),
    ("_forward_wide_kernel", "mean += delta * share", "mean += delta", FLOAT64),
    ("_forward_wide_kernel", "delta * delta * share * seen", "0.0", CHANNEL_MEANS),
    ("_channel_sums_kernel", "groups = rows // CHANNELS", "groups = rows % CHANNELS", FLOAT64),
    ("_channel_sums_kernel", "tl.where(mask, dy * (x - mean), 0.0)", "dy * x", FLOAT64),
    ("_channel_sums_kernel", "& (cols < S)[None, :]", "", MEMORY),
    ("_backward_kernel", "row % GROUPS * CHANNELS", "row % GROUPS", FLOAT64),
    ("_backward_kernel", "xhat * mean_gx", "x * mean_gx", FLOAT64),
    ("_tile_of_a_row", "mask_c & (cols < S)", "mask_c", MEMORY),
    ("_backward_wide_kernel", "& (members < CHANNELS)", "", FLOAT64),
    ("_backward_wide_kernel", "(x - mean) * rstd * mean_gx", "(x - mean) * mean_gx", FLOAT64),
]

# (op, module and kernel, what stands there, what the mistake makes of it, the test that notices)
POINTWISE = [
    ("gelu", "activations:_normal", "1.0 - tail", "tail", FLOAT64),
    ("gelu", "activations:_normal", "tl.abs(x)", "x", FLOAT64),
    ("gelu", "activations:activation", "x * (0.3989422804014327 * bell)", "bell", FLOAT64),
    ("swiglu", "activations:_sigmoid", "e * more", "e", FLOAT64),
    ("cross_entropy", "_maths:reciprocal", "x * x", "x", FLOAT64),
    ("gelu", "activations:activation", "0.0, bend * (", "0.0, (", FLOAT64),
    ("gelu", "activations:activation", "0.07135481282553303", "0.0714", FLOAT64),
    ("gelu", "activations:_forward_kernel", "start + BLOCK <= n", "start < n", MEMORY),
    ("gelu", "activations:_backward_kernel", "dx_ptr + start + offs", "dx_ptr + offs", FLOAT64),
    ("relu_squared", "activations:activation", "2.0 * positive", "positive", FLOAT64),
    ("bias_gelu", "bias_gelu:_forward_kernel", "rows * stride_xm", "rows * N", STRIDES),
    ("bias_gelu", "bias_gelu:_backward_kernel", "dbias += ", "dbias = ", FLOAT64),
    ("bias_gelu", "bias_gelu:_backward_kernel", "rows * stride_dym", "rows * stride_xm", STRIDES),
    ("bias_gelu", "bias_gelu:_backward_kernel", "dbias_ptr + program * N", "dbias_ptr", MEMORY),
    ("rotary_embedding", "rotary:_positions", "candidate < SEQUENCES", "candidate > 0", MEMORY),
    ("rotary_embedding", "rotary:_positions", "(start <= tokens)", "(start < tokens)", FLOAT64),
    ("rotary_embedding", "rotary:_positions", "sequence) + offset", "sequence)", MANY_RAGGED),
    ("rotary_embedding", "rotary:_rotary_kernel", "& (positions < POSITIONS)", "", OUTSIDE),
    ("rotary_embedding", "rotary:_rotary_kernel", "sin = -sin", "sin = sin", FLOAT64),
    ("rotary_embedding", "rotary:_rotary_kernel", "tl.where(past, 0.0, sin)", "sin", FLOAT64),
    ("rotary_embedding", "rotary:_rotary_kernel", "tl.minimum(first + HEADS, H)", "H", MEMORY),
    ("rotary_embedding", "rotary:_rotary_kernel", "head * stride_xh", "head * stride_yh", STRIDES),
    ("rotary_embedding", "rotary:_rotary_kernel", "& (rest < D)", "", MEMORY),
    ("dropout", "dropout:_dropout_kernel", "x * scale, 0.0))", "x, 0.0))", BLOCKS),
    ("dropout", "dropout:_dropout_kernel", "counters = start // 4 + ", "counters = ", BLOCKS),
    ("dropout", "dropout:_dropout_kernel", ">= threshold", "< threshold", FLOAT64),
    ("dropout", "dropout:_dropout_kernel", "start + BLOCK <= n", "start < n", MEMORY),
    ("embedding", "embedding:_forward_kernel", "(rows >= 0) & (rows < V)", "(rows < V)", MISSING),
    (
        "embedding",
        "embedding:_forward_kernel",
        "rows[:, None] * stride_wv",
        "rows[:, None] * N",
        STRIDES,
    ),
    ("embedding", "embedding:_runs_kernel", "& (after != row)", "", RUNS),
    ("embedding", "embedding:_runs_kernel", "begins_chunk, 0, 1", "begins_chunk, 0, 0", RUNS),
    ("embedding", "embedding:_runs_kernel", "& (row != padding_idx)", "", PADDING),
    (
        "embedding",
        "embedding:_runs_kernel",
        "tokens[:, None] * stride_dyt",
        "tokens[:, None] * N",
        STRIDES,
    ),
    ("embedding", "embedding:_cut_runs_kernel", "& begins_here", "", MEMORY),
    ("embedding", "embedding:_cut_runs_kernel", "found == row", "found >= row", RUNS),
    ("embedding", "embedding:_cut_runs_kernel", "& ~begins_chunk, 1, 0", ", 1, 0", RUNS),
    ("swiglu", "activations:activation", "s + y * rest", "s + y * s", FLOAT64),
    ("swiglu", "glu:_tile_of", "program // blocks", "program", FLOAT64),
    ("swiglu", "glu:_tile_of", "& (col + BLOCK_N <= N)", "", MEMORY),
    ("swiglu", "glu:_forward_kernel", "rows * stride_um", "rows * stride_gm", OWN_HALVES),
    ("geglu", "glu:_backward_kernel", "dy * y, mask", "dy, mask", FLOAT64),
    ("geglu", "glu:_backward_kernel", "rows * stride_dum", "rows * N", FLOAT64),
]

CROSS_ENTROPY = [
    ("_join", "d * exp(m - shift)", "d", FLOAT64),
    ("_join", 'tl.where(new_m == float("-inf"), 0.0, new_m)', "new_m", STARTS),
    ("aligned_part", "row * stride", "row * V", STRIDES),
    ("aligned_part", "tl.maximum(V - lead, 0)", "V", MEMORY),
    ("_ends", "tl.minimum(lead, V)", "lead", STARTS),
    ("capped", "4.0 * e * r", "4.0 * e", FLOAT64),
    ("_reciprocal", "tl.join(r * d, r * c)", "tl.join(r * c, r * d)", FLOAT64),
    ("_mass", "* t + spread", "* t", CE_SHAPES),
    ("_gradient", "tl.where(cols == y, b, 0.0)", "0.0", FLOAT64),
    ("row_target", "(y >= 0) & (y < V)", "y < V", NO_CLASS),
    ("row_target", 'tl.where(exists, 1.0, float("nan"))', "1.0", NO_CLASS),
    ("row_target", "share *= tl.load(weight_ptr + y).to(tl.float32)", "pass", FLOAT64),
    ("row_loss", "log_d - (z_y - m)", "lse - z_y", CE_SHIFT),
    ("write_gradient", "tl.minimum(count, read)", "count", IGNORED),
    ("_reduce_kernel", "out /= total", "out /= M", FLOAT64),
    ("_backward_kernel", "row * stride_dxm", "row * V", STRIDES),
    ("_backward_kernel", "g /= tl.load(total_ptr)", "pass", FLOAT64),
    ("_backward_kernel", "a += tl.load(dlse_ptr", "a = tl.load(dlse_ptr", FLOAT64),
]
LINEAR_CROSS_ENTROPY = [
    ("chunks:_chunk_kernel", "tl.where(counts, a, 0.0)", "a", FLOAT64),
    ("tiles:_tile_at", "band * GROUP + rest % height", "rest % height", FLOAT64),
    ("tiles:_logits_of", "tl.minimum(cols, V - 1)", "cols", MEMORY),
    ("tiles:_logits_of", "offs_k < H - k", "offs_k < H", FLOAT64),
    ("tiles:_parts_kernel", "tl.minimum(V, (tile_n + 1) * BLOCK_N)", "V", MEMORY),
    ("tiles:_strip_kernel", "first + strip_cols", "strip_cols", FLOAT64),
    ("tiles:_strip_kernel", "b[:, None], 0.0", "0.0, 0.0", FLOAT64),
    ("tiles:_strip_kernel", "c[:, None] * w[None, :]", "c[:, None]", FLOAT64),
]
# (op, module and kernel, what stands there, what the mistake makes of it, the test that notices)
QUANTIZED = [
    ("int8_linear", "_weight_only:int8_to_float", "8388736.0", "8388608.0", FLOAT64),
    ("int8_linear", "_weight_only:_sum_shares_kernel", "y *= tl.load", "y += tl.load", FLOAT64),
    ("int8_linear", "int8_linear:_gemv_kernel", "tl.sum(acc1, 1)", "tl.sum(acc0, 1)", FLOAT64),
    ("int8_linear", "int8_linear:_tile_kernel", "k < K - start", "k < K", FLOAT64),
    ("int8_linear", "int8_linear:_tile_kernel", "tl.program_id(1) * share", "0", FLOAT64),
    ("int8_linear", "int8_linear:_dx_kernel", " * scale[:, None]", "", FLOAT64),
    ("int4_linear", "int4_linear:_nibble_to_float", "8388608.0 + zero", "8388616.0", FLOAT64),
    ("int4_linear", "int4_linear:_add_row", "k < K - HALF", "k < K", MEMORY),
    ("int4_linear", "int4_linear:_gemv_kernel", "first % HALF", "first", FLOAT64),
    ("int4_linear", "int4_linear:_tile_kernel", "q >> 4", "q & 15", FLOAT64),
    ("int4_linear", "int4_linear:_dx_kernel", "k < K - HALF", "k < K", MEMORY),
    ("fp8_linear", "fp8_linear:_tile_kernel", "n // BLOCK_K * stride_sw", "n // BLOCK_N", FLOAT64),
    ("fp8_linear", "fp8_linear:_tile_kernel", "block = start // BLOCK_K", "block = 0", FLOAT64),
    ("quantize_fp8", "fp8_linear:_quantize_kernel", "tl.abs(x)", "x", CODES),
    ("quantize_fp8", "fp8_linear:_quantize_kernel", "scale == 0.0", "scale < 0.0", CODES),
    ("sample", "sampling:_pick_kernel", "order > best", "order >= best", ARGMAX),
    ("sample", "sampling:_pick_kernel", "start // 4 + quads", "quads", VOCABULARY),
    ("sample", "sampling:_pick_kernel", "(first ^ _LARGEST)", "first", ARGMAX),
    ("sample", "sampling:_order", "(x + 0.0)", "x", SPECIAL_ROWS),
    ("sample", "sampling:_weight", "(x - largest) / temperature", "x - largest", KEPT),
    ("sample", "sampling:_highest_cut", "enough - 1", "enough", KEPT),
    ("sample", "sampling:_cut_kernel", "tl.minimum(floor, _order(largest))", "floor", KEPT),
]  # fmt: skip

BUGS = [
    *(Bug(*row) for row in QUANTIZED),
    *(Bug(op, f"attention.{kernel}", *rest) for op, kernel, *rest in ATTENTION),
    *(Bug(*row) for row in POINTWISE),
    *(Bug("cross_entropy", f"cross_entropy:{kernel}", *rest) for kernel, *rest in CROSS_ENTROPY),
    *(
        Bug("linear_cross_entropy", f"linear_cross_entropy.{kernel}", *rest)
        for kernel, *rest in LINEAR_CROSS_ENTROPY
    ),
    *(Bug("adamw_step", f"optim.kernels:{kernel}", *rest) for kernel, *rest in ADAMW),
    *(Bug(op, f"optim.{kernel}", *rest) for op, kernel, *rest in OPTIMIZERS),
    *(Bug("softmax", f"softmax:{kernel}", *rest) for kernel, *rest in SOFTMAX),
    *(Bug("log_softmax", f"softmax:{kernel}", *rest) for kernel, *rest in LOG_SOFTMAX),
    *(Bug("add_layer_norm", f"add_norm:{kernel}", *rest) for kernel, *rest in ADD_LAYER_NORM),
    *(Bug("add_rms_norm", f"add_norm:{kernel}", *rest) for kernel, *rest in ADD_RMS_NORM),
    *(Bug("rms_norm", f"rms_norm:{kernel}", *rest) for kernel, *rest in RMS_NORM),
    *(Bug("layer_norm", f"layer_norm:{kernel}", *rest) for kernel, *rest in LAYER_NORM),
    *(Bug("group_norm", f"group_norm:{kernel}", *rest) for kernel, *rest in GROUP_NORM),
    Bug("layer_norm", "_rows:_sum_parts_kernel", "(rows < P)[:, None] & ", "", MEMORY),
]


@pytest.mark.parametrize("bug", BUGS, ids=str)
@pytest.mark.usefixtures("kernels")
def test_the_suite_catches(bug):
    with seeded(bug):
        for arguments in cases(bug):
            try:
                bug.caught_by(**arguments)
            except (AssertionError, InterpreterError):
                return
    pytest.fail(f"no case of {bug.caught_by.__name__} failed")


def test_the_list_is_long_enough_and_covers_every_op():
    assert len(BUGS) >= 20
    assert {bug.op for bug in BUGS} == set(OPS)
