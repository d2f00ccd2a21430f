r"""Rows of a table by their number, with a gradient that is the same from run to run.

Forward: y[t] = weight[input[t]]. Backward: dweight[v] = sum of dy[t] over the t with input[t] = v.

PyTorch's GPU backward adds with atomics, or in half precision. Here the tokens are sorted, stably,
and runs of equal ones are summed in float32 in a fixed order: a run is cut where a chunk of _CHUNK
sorted tokens ends, so that one frequent token does not hold up the rest, and a second kernel sums
the parts of the runs that were cut.

Cost: the forward reads a row and writes it for each token. The backward reads dy once, writes the
table once for its zeros and once more for the rows that occur. Saved for the backward: input.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ._dispatch import dispatched
from ._launch import rows_of
from ._op import Inputs, Op
from ._register import torch_op
from ._tuned import tunable


def reference(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Embedding in eager PyTorch."""
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    input_ptr, weight_ptr, y_ptr,
    stride_wv, T, N, V,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program copies BLOCK_N columns of BLOCK_T rows."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = tokens < T
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = mask_t[:, None] & (cols < N)[None, :]
    rows = tl.load(input_ptr + tokens, mask=mask_t, other=0).to(tl.int64)
    exists = mask & ((rows >= 0) & (rows < V))[:, None]  # a row outside the table reads as NaN
    ptrs = weight_ptr + rows[:, None] * stride_wv + cols[None, :]
    y = tl.load(ptrs, mask=exists, other=float("nan"))
    tl.store(y_ptr + tokens[:, None] * N + cols[None, :], y, mask=mask)


@triton.jit
def _runs_kernel(
    sorted_ptr, order_ptr, dy_ptr, parts_ptr, dweight_ptr,
    stride_dyt, T, N, V, padding_idx,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program at the head of a run in its chunk sums the run: whole, or its part of one.

    A part that begins a chunk is row 2 c of parts, one that is cut at the chunk's end 2 c + 1.
    """
    head = tl.program_id(0).to(tl.int64)
    row = tl.load(sorted_ptr + head)
    before = tl.load(sorted_ptr + head - 1, mask=head > 0, other=-1)
    begins_chunk = head % CHUNK == 0
    wanted = (row >= 0) & (row < V) & (row != padding_idx)
    if wanted & (begins_chunk | (before != row)):
        offs = tl.arange(0, CHUNK)
        end = tl.minimum((head // CHUNK + 1) * CHUNK, T)
        chunk = tl.load(sorted_ptr + head + offs, mask=offs < end - head, other=-1)
        length = tl.sum((chunk == row).to(tl.int32), 0)  # sorted: equal ones are neighbours
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = cols < N
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, length, BLOCK_T):
            places = start + tl.arange(0, BLOCK_T)
            mask_t = places < length
            tokens = tl.load(order_ptr + head + places, mask=mask_t, other=0).to(tl.int64)
            dy_ptrs = dy_ptr + tokens[:, None] * stride_dyt + cols[None, :]
            dy = tl.load(dy_ptrs, mask=mask_t[:, None] & mask_n[None, :], other=0.0)
            total += dy.to(tl.float32)
        part = tl.sum(total, 0)
        after = tl.load(sorted_ptr + head + length, mask=head + length < T, other=-1)
        if (before != row) & (after != row):
            tl.store(dweight_ptr + row * N + cols, part, mask=mask_n)
        else:
            place = 2 * (head // CHUNK) + tl.where(begins_chunk, 0, 1)
            tl.store(parts_ptr + place * N + cols, part, mask=mask_n)


@triton.jit
def _cut_runs_kernel(
    sorted_ptr, parts_ptr, dweight_ptr,
    T, N, V, padding_idx,
    CHUNK: tl.constexpr, SEARCH_STEPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The program of the chunk where a run begins that goes on in the next sums its parts."""
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    last = first + CHUNK - 1  # the grid leaves out the last chunk: another follows this one
    row = tl.load(sorted_ptr + last)
    begins_chunk = tl.load(sorted_ptr + first) == row
    before = tl.load(sorted_ptr + first - 1, mask=chunk > 0, other=-1)
    begins_here = ~(begins_chunk & (before == row))
    wanted = (row >= 0) & (row < V) & (row != padding_idx)
    if wanted & begins_here & (tl.load(sorted_ptr + last + 1) == row):
        # The last chunk that begins inside the run, by bisection.
        final = chunk
        for i in tl.static_range(SEARCH_STEPS):
            candidate = final + (1 << (SEARCH_STEPS - 1 - i))
            exists = candidate * CHUNK < T
            found = tl.load(sorted_ptr + candidate * CHUNK, mask=exists, other=-1)
            final = tl.where(found == row, candidate, final)
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = cols < N
        total = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
        for start in range(chunk, final + 1, BLOCK_C):
            chunks = start + tl.arange(0, BLOCK_C)
            places = 2 * chunks + tl.where((chunks == chunk) & ~begins_chunk, 1, 0)
            mask = (chunks <= final)[:, None] & mask_n[None, :]
            ptrs = parts_ptr + places[:, None] * N + cols[None, :]
            total += tl.load(ptrs, mask=mask, other=0.0)
        tl.store(dweight_ptr + row * N + cols, tl.sum(total, 0), mask=mask_n)


# --- launch -------------------------------------------------------------------------------------

_CHUNK = 64  # sorted tokens that one program sums at most; unmeasured


@tunable("BLOCK_N", "num_warps")
def _columns(N: int) -> dict[str, int]:
    return {"BLOCK_N": min(triton.next_power_of_2(N), 1024), "num_warps": 4}


def _forward_fake(input: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    return weight.new_empty(*input.shape, weight.shape[1])


def _backward_fake(dy: Tensor, input: Tensor, rows: int, padding_idx: int) -> Tensor:
    return dy.new_empty(rows, dy.shape[-1])


@torch_op("embedding_backward", fake=_backward_fake)
def _backward(dy: Tensor, input: Tensor, rows: int, padding_idx: int) -> Tensor:
    dweight = _backward_fake(dy, input, rows, padding_idx).zero_()
    if dy.numel() == 0:
        return dweight
    T, N = input.numel(), dy.shape[-1]
    dy = rows_of(dy, N)
    numbers, order = input.reshape(-1).long().sort(stable=True)
    chunks, tile = triton.cdiv(T, _CHUNK), _columns(N)
    blocks = triton.cdiv(N, tile["BLOCK_N"])
    parts = dy.new_empty(2 * chunks, N, dtype=torch.float32)
    _runs_kernel[(T, blocks)](
        numbers, order, dy, parts, dweight,
        dy.stride(0), T, N, rows, padding_idx,
        CHUNK=_CHUNK, BLOCK_T=4, **tile,
    )  # fmt: skip
    if chunks > 1:
        _cut_runs_kernel[(chunks - 1, blocks)](
            numbers, parts, dweight,
            T, N, rows, padding_idx,
            CHUNK=_CHUNK, SEARCH_STEPS=(chunks - 1).bit_length(), BLOCK_C=4, **tile,
        )  # fmt: skip
    return dweight


def _save(ctx, inputs, output):
    input, weight, ctx.padding_idx = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(input)


def _gradients(ctx, dy):
    (input,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        dense = torch.ops.aten.embedding_dense_backward
        return None, dense(dy, input, ctx.rows, ctx.padding_idx, False), None
    return None, _backward(dy, input, ctx.rows, ctx.padding_idx), None


@torch_op("embedding", fake=_forward_fake, setup_context=_save, backward=_gradients)
def _forward(input: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    y = _forward_fake(input, weight, padding_idx)
    if y.numel() == 0:
        return y
    V, N = weight.shape
    weight = rows_of(weight, N)
    T, tile = input.numel(), _columns(N)
    block_t = max(2048 // tile["BLOCK_N"], 1)
    _forward_kernel[(triton.cdiv(T, block_t), triton.cdiv(N, tile["BLOCK_N"]))](
        input.contiguous(), weight, y,
        weight.stride(0), T, N, V,
        BLOCK_T=block_t, **tile,
    )  # fmt: skip
    return y


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> str | None:
    if input.dtype not in (torch.int32, torch.int64):
        return f"input is {input.dtype}"
    if weight.dtype not in OP.dtypes or weight.dim() != 2:
        return f"weight is {weight.dtype} of {weight.dim()} dimensions"
    if weight.device != input.device:
        return f"weight is on {weight.device} and input on {input.device}"
    if padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]:
        return f"padding_idx is {padding_idx}"
    if max_norm is not None or scale_grad_by_freq or sparse:
        return "max_norm, scale_grad_by_freq or sparse is given"
    return None


@dispatched(eager=reference, uncovered=_uncovered)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of ``weight`` by their number; drop-in for ``F.embedding``.

    Args:
        input: Any shape, int32 or int64, in [0, V).
        weight: (V, N) float32, float16 or bfloat16.
        padding_idx: A row that gets no gradient; negative counts from the end.
        max_norm: As ``norm_type``, ``scale_grad_by_freq`` and ``sparse``: by PyTorch, if given.
        norm_type: Of ``max_norm``.
        scale_grad_by_freq: Divide a row's gradient by how often it occurs.
        sparse: Give a sparse gradient.

    Returns:
        (*input.shape, N), the dtype of ``weight``. A number outside the table gives a row of NaN
        and no gradient; PyTorch stops the GPU there. The gradient is summed in float32, and the
        same to the bit from run to run.

    Raises:
        RuntimeError: What ``F.embedding`` raises, for dtypes and dimensions that do not fit.
    """
    row = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return _forward(input, weight, row)


class Embedding(nn.Embedding):
    """``torch.nn.Embedding`` over the fused ``embedding``: the same arguments and state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the table that ``input`` numbers."""
        return embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    T: int,
    V: int,
    N: int,
    padding_idx: int | None = None,
    kind: torch.dtype = torch.int64,
) -> Inputs:
    weight = torch.randn(V, N, dtype=dtype, device=device).requires_grad_()
    # As in text, a few numbers make up most of the tokens.
    numbers = (V * torch.rand(T, device=device) ** 4).to(kind)
    return {"input": numbers, "weight": weight, "padding_idx": padding_idx}


OP = Op(
    fused=embedding,
    reference=reference,
    example=_example,
    sizes=(
        {"T": 1, "V": 1, "N": 1},
        {"T": 7, "V": 5, "N": 40, "padding_idx": 0, "kind": torch.int32},
        {"T": 200, "V": 3, "N": 9, "padding_idx": -1},
    ),
    bench_sizes=tuple({"T": 16384, "V": 50304, "N": n} for n in (768, 2048, 4096)),
    work=lambda input, weight, **_: (
        input.nbytes + 2 * input.numel() * weight.shape[1] * weight.element_size(),
        0,
    ),
)
