"""The tables of a step in device memory, and its launches."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import G_ROW, SCALARS, STEP_ROW, prepare_kernel, squares_kernel, update_kernel

_CHUNK = 8192  # elements a program; unmeasured
_WARPS = 4
_NORM_PROGRAMS = 1024  # partial sums of the norm: the same on any device, so the norm is too
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class Row(NamedTuple):
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


def is_dense(t: Tensor) -> bool:
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


class Plan:
    """The tables of one set of tensors in device memory, kept as long as the tensors stay put."""

    def __init__(self, rows: Sequence[Row]):
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
                columns[i][STEP_ROW.value] = self.mirror.data_ptr() + 4 * k
        table = list(zip(*columns, strict=True))
        self.table = _uploaded(table, torch.int64, self.device)
        self.squares: Tensor | None = None
        self.norm: Tensor | None = None
        self.scalars = torch.empty(
            self.size, SCALARS.value, dtype=torch.float32, device=self.device
        )
        self.buckets = [
            self._bucket(kind, members)
            for kind, members in buckets.items()
            if any(n for _, n in members)
        ]

    def _laid_out(self, t: Tensor, like: Tensor, *, written: bool) -> Tensor:
        """The tensor itself where its memory is dense in the order of ``like``, or a copy."""
        if t.stride() == like.stride() and is_dense(like):
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
            "P": TRITON_DTYPES[p], "G": TRITON_DTYPES[g], "S": TRITON_DTYPES[s],
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
            self.table[G_ROW.value].copy_(row, non_blocking=True)
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
        prepare_kernel[(triton.cdiv(self.size, 128),)](
            self.table, self.hyper, self.scalars, grad_scale, found_inf, self.squares, self.norm,
            self.size, parts, 0.0 if max_norm is None else max_norm,
            HAS_SCALE=grad_scale is not None, HAS_FOUND=found_inf is not None,
            CLIPS=max_norm is not None, BLOCK=128, num_warps=4,
        )  # fmt: skip
        for bucket in self.buckets:
            update_kernel[(len(bucket.chunks),)](
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
            squares_kernel[(count,)](
                self.table, bucket.chunks, self.squares[first:],
                self.size, len(bucket.chunks), **constants, num_warps=_WARPS,
            )  # fmt: skip
            first += count
        return first
