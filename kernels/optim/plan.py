"""The tables of a step in device memory, and its launches."""

from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .kernels import (
    G_ROW,
    SCALARS,
    SLOT_ROW,
    STEP_ROW,
    agreement_kernel,
    momentum_kernel,
    prepare_kernel,
    squares_kernel,
    sum_chunks_kernel,
    update_kernel,
)
from .launch import Repeated
from .newton_schulz import orthogonalize
from .sharding import Place, all_reduced, return_matrices, whole_matrices

_CHUNK = 8192  # elements a program; unmeasured
_WARPS = 4
_NORM_PROGRAMS = 1024  # partial sums of the norm: the same on any device, so the norm is too
FLOATS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_TRITON_DTYPES = {**FLOATS, torch.uint8: tl.uint8}


class Iteration(NamedTuple):
    """How a matrix is orthogonalized."""

    nesterov: bool
    coefficients: tuple[float, float, float]
    steps: int
    eps: float


class Row(NamedTuple):
    """One parameter of a plan: its tensors, or this process's part of them, and settings."""

    p: Tensor
    g: Tensor
    m: Tensor  # exp_avg, or the momentum; uint8 where it has scales
    v: Tensor | None
    vmax: Tensor | None
    step: Tensor
    hyper: int  # its row among the hyper-parameters
    algorithm: str  # "adam", "adamw", "lion" or "muon"
    number: int  # its place in the optimizer, which seeds its rounding
    master: Tensor | None = None  # float32 weights, or the int16 half that bfloat16 lacks
    stochastic: bool = False
    ema: Tensor | None = None  # float32
    m_scale: Tensor | None = None  # float32, one for CODE_BLOCK bytes of m
    v_scale: Tensor | None = None
    cautious: bool = False
    iteration: Iteration | None = None  # of "muon"
    place: Place | None = None  # where it stands in the whole tensor, if it is a part
    sharded: Tensor | None = None  # the DTensor of which "muon" needs the whole


class _Kind(NamedTuple):
    """What one compiled kernel is made for."""

    p: torch.dtype
    g: torch.dtype
    s: torch.dtype
    algorithm: str
    amsgrad: bool
    cautious: bool
    nesterov: bool
    master: str | None
    random: str | None
    ema: bool
    aligned: bool
    groups: tuple[Any, ...]  # over whose processes squares are summed

    def elements(self, *dtypes: torch.dtype, extras: bool) -> int:
        """Elements a thread: 16 bytes of half precision where nothing wider stands beside it.

        Four where dtypes differ: eight would pass through shared memory.
        """
        return 8 if len(set(dtypes)) == 1 and dtypes[0].itemsize == 2 and not extras else 4

    @property
    def block(self) -> int:
        """Elements that the update takes at a time."""
        extras = bool(self.master or self.random or self.ema)
        return 32 * _WARPS * self.elements(self.p, self.g, self.s, extras=extras)


class _Bucket(NamedTuple):
    """The launches of the tensors that one compiled kernel can share."""

    kind: _Kind
    chunks: Tensor  # a program each
    squares: Repeated
    turn: Repeated | None  # the kernel whose sums over chunks the update needs
    update: Repeated


class _Batch(NamedTuple):
    """Matrices of one shape, whose directions stand one behind the other."""

    directions: Tensor  # (matrices, rows, columns) bfloat16, of the rows that are here
    first: int  # of their slots
    iteration: Iteration
    like: Tensor | None  # a DTensor placed as each is


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill memory without gaps or overlaps, in any order of dimensions."""
    return t.is_contiguous() or torch._prims_common.is_non_overlapping_and_dense_or_false(t)


def _to_send(values: Tensor, device: torch.device) -> Tensor:
    """The host's values, where the device can copy them from without anyone waiting."""
    if device.type != "cuda":
        return values
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step: a CUDA graph needs the tensors of the step before it: take an uncaptured step "
            "first, keep the gradients (zero_grad(set_to_none=False)), and give lr as a tensor"
        )
    return values.pin_memory()  # the host allocator waits before it reuses this


def _uploaded(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values in device memory, without waiting for the device."""
    return _to_send(torch.tensor(values, dtype=dtype), device).to(device, non_blocking=True)


_LOW_BITS = bytes(i & 15 for i in range(256))


def _alignments(addresses: "array[int]") -> bytes:
    """Each address modulo 16: of its low byte, the first on every host of an NVIDIA GPU."""
    return addresses.tobytes()[:: addresses.itemsize].translate(_LOW_BITS)


def _pointer(t: Tensor | None) -> tuple[torch.dtype, bool] | None:
    """What a kernel is compiled for of a tensor that is not the plan's."""
    return None if t is None else (t.dtype, t.data_ptr() % 16 == 0)


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
        self.grads_contiguous = all(row.g.is_contiguous() for row in rows)
        self.host_steps: list[int] = []
        self.host_hyper: list[list[float]] = []
        self.grad_addresses: list[int] = []
        self.squares: Tensor | None = None
        self.norm: Tensor | None = None
        self.groups = list(dict.fromkeys(r.place.groups if r.place else () for r in rows))
        self.batches, directions = self._batches(rows)

        columns: list[list[int]] = []
        members: dict[_Kind, list[tuple[int, int]]] = {}
        self.chunks = 0
        for i, row in enumerate(rows):
            addresses, kind = self._row(i, row, directions.get(i))
            n = row.p.numel()
            place = row.place or Place(0, n, n, n, ())
            columns.append(
                [*addresses, row.step.data_ptr(), n, row.hyper, row.number, self.chunks,
                 *place[:4], i]
            )  # fmt: skip
            members.setdefault(kind, []).append((i, n))
            self.chunks += -(-n // _CHUNK)

        # Steps that the kernel cannot reach (on the host, as torch keeps them) have a copy it can.
        self.mirror: Tensor | None = None
        if self.host_steps:
            values = [float(rows[i].step) for i in self.host_steps]
            self.mirror = _uploaded(values, torch.float32, self.device)
            for k, i in enumerate(self.host_steps):
                columns[i][STEP_ROW.value] = self.mirror.data_ptr() + 4 * k
        for slot, i in enumerate(
            [*directions, *(i for i in range(len(rows)) if i not in directions)]
        ):
            columns[i][SLOT_ROW.value] = slot
        table = list(zip(*columns, strict=True))
        self.table = _uploaded(table, torch.int64, self.device)
        self.grad_row = self.table[G_ROW.value]
        self.grad_alignments = _alignments(array("q", self.grad_addresses))
        self.scalars = torch.empty(
            self.size, SCALARS.value, dtype=torch.float32, device=self.device
        )
        self.buckets = [
            self._bucket(kind, tensors)
            for kind, tensors in members.items()
            if any(n for _, n in tensors)
        ]
        self.prepares: dict[Any, Repeated] = {}
        self.sum_chunks = Repeated(
            sum_chunks_kernel, self.size, CHUNK=_CHUNK, BLOCK=256, num_warps=_WARPS
        )
        self.sums: Tensor | None = None
        if any(kind.cautious or kind.algorithm == "muon" for kind in members):
            self.parts = torch.empty(self.chunks, dtype=torch.float32, device=self.device)
            self.sums = torch.empty(self.size, dtype=torch.float32, device=self.device)
        self.shared_slots: list[tuple[tuple[Any, ...], Tensor]] = []  # sums over processes
        for groups in self.groups if self.sums is not None else ():
            slots = [
                columns[i][SLOT_ROW.value]
                for i, row in enumerate(rows)
                if row.place and row.place.groups == groups
            ]
            if groups:
                self.shared_slots.append((groups, _uploaded(slots, torch.int64, self.device)))

    def _batches(self, rows: Sequence[Row]) -> tuple[list[_Batch], dict[int, Tensor]]:
        """Room for the directions of the matrices, those of one shape together."""
        alike: dict[Any, list[int]] = {}
        for i, row in enumerate(rows):
            if row.iteration is not None and (row.p.numel() or row.sharded is not None):
                # A matrix and its transpose share their memory, and the iteration does not mind.
                columns_first = row.p.stride(0) < row.p.stride(1) and is_dense(row.p)
                here = tuple(row.p.T.shape if columns_first else row.p.shape)
                t: Any = row.sharded
                whole = None if t is None else (t.shape, t.device_mesh, t.placements)
                alike.setdefault((here, whole, row.iteration), []).append(i)
        batches: list[_Batch] = []
        directions: dict[int, Tensor] = {}
        for (here, _, iteration), members in alike.items():
            room = torch.empty(len(members), *here, dtype=torch.bfloat16, device=self.device)
            batches.append(_Batch(room, len(directions), iteration, rows[members[0]].sharded))
            directions |= dict(zip(members, room.unbind(), strict=True))
        return batches, directions

    def _row(self, i: int, row: Row, direction: Tensor | None) -> tuple[list[int], _Kind]:
        """The addresses of a parameter's tensors, and the kind of kernel that it needs."""
        p = self._laid_out(row.p, row.p)
        m = self._laid_out(row.m, p)
        v, vmax, master, ema = (
            None if t is None else self._laid_out(t, p)
            for t in (row.v, row.vmax, row.master, row.ema)
        )
        same = row.g.stride() == p.stride()
        g = row.g if same else torch.empty_like(p, dtype=row.g.dtype)
        if not same:
            self.grad_copies.append((i, g))
        if row.step.device != self.device or row.step.dtype != torch.float32:
            self.host_steps.append(i)
        tensors = (p, g, m, direction if row.iteration else v, vmax, master, ema)
        addresses = [0 if t is None else t.data_ptr() for t in (*tensors, row.m_scale, row.v_scale)]
        self.grad_addresses.append(addresses[G_ROW.value])
        masters = None if master is None else "fp32" if master.is_floating_point() else "split"
        random = None
        if row.stochastic and p.dtype == torch.bfloat16 and masters != "split":
            whole = row.place is None or (row.place.base % 4 == 0 and row.place.run >= p.numel())
            random = "quads" if whole else "runs"
        return addresses, _Kind(
            p.dtype, g.dtype, m.dtype, row.algorithm, vmax is not None, row.cautious,
            row.iteration is not None and row.iteration.nesterov, masters, random,
            ema is not None, all(a % 16 == 0 for a in addresses),
            row.place.groups if row.place else (),
        )  # fmt: skip

    def _laid_out(self, t: Tensor, like: Tensor) -> Tensor:
        """The tensor itself where its memory is dense in the order of ``like``, or a copy."""
        if t.stride() == like.stride() and is_dense(like):
            return t
        work = torch.empty_like(like, dtype=t.dtype)
        self.copied_in.append((work, t))
        self.copied_out.append((t, work))
        return work

    def _bucket(self, kind: _Kind, members: list[tuple[int, int]]) -> _Bucket:
        chunks = [(i, c) for i, n in members for c in range(-(-n // _CHUNK))]
        muon = kind.algorithm == "muon"
        constants = {
            "P": _TRITON_DTYPES[kind.p], "S": _TRITON_DTYPES[kind.s],
            "G": tl.bfloat16 if muon else _TRITON_DTYPES[kind.g],
            "ALGORITHM": kind.algorithm, "CODED": kind.s == torch.uint8 and not muon,
            "AMSGRAD": kind.amsgrad, "CAUTIOUS": kind.cautious, "MASTER": kind.master,
            "RANDOM": kind.random, "EMA": kind.ema, "ALIGNED": kind.aligned,
            "CHUNK": _CHUNK, "BLOCK": kind.block, "num_warps": _WARPS,
        }  # fmt: skip
        return _Bucket(
            kind, _uploaded(chunks, torch.int32, self.device),
            self._squares(kind, len(chunks)), self._turn(kind, len(chunks)),
            Repeated(update_kernel, len(chunks), **constants),
        )  # fmt: skip

    def _squares(self, kind: _Kind, chunks: int) -> Repeated:
        """What sums the gradients' squares."""
        return Repeated(
            squares_kernel, min(chunks, _NORM_PROGRAMS),
            G=_TRITON_DTYPES[kind.g], ALIGNED=kind.aligned, CHUNK=_CHUNK,
            BLOCK=32 * _WARPS * kind.elements(kind.g, extras=False), num_warps=_WARPS,
        )  # fmt: skip

    def _turn(self, kind: _Kind, chunks: int) -> Repeated | None:
        """What counts for a cautious update, or turns gradients into Muon's directions."""
        shared: dict[str, Any] = {
            "G": _TRITON_DTYPES[kind.g], "S": _TRITON_DTYPES[kind.s],
            "CODED": kind.s == torch.uint8, "ALIGNED": kind.aligned, "CHUNK": _CHUNK,
            "num_warps": _WARPS,
        }  # fmt: skip
        if kind.cautious:
            return Repeated(
                agreement_kernel, chunks, P=_TRITON_DTYPES[kind.p], ALGORITHM=kind.algorithm,
                MASTER=kind.master, BLOCK=kind.block, **shared,
            )  # fmt: skip
        if kind.algorithm == "muon":
            elements = kind.elements(kind.g, kind.s, torch.bfloat16, extras=False)
            block = 32 * _WARPS * elements
            return Repeated(momentum_kernel, chunks, NESTEROV=kind.nesterov, BLOCK=block, **shared)
        return None

    def take_gradients(self, grads: Sequence[Tensor]) -> bool:
        """Points the table at these gradients; False where one differs in more than its address."""
        try:
            if self.grads_contiguous:
                if not all(map(Tensor.is_contiguous, grads)):
                    return False
            elif list(map(Tensor.stride, grads)) != self.grad_strides:
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
            row = array("q", addresses)  # half the time of torch.tensor (2.13)
            if _alignments(row) != self.grad_alignments:  # a kernel may count on them
                return False
            sent = _to_send(torch.frombuffer(row, dtype=torch.int64), self.device)
            self.grad_row.copy_(sent, non_blocking=True)
            self.grad_addresses = addresses
        return True

    def set_hyper(self, rows: list[list[float]], tensors: list[tuple[int, int, Tensor]]) -> None:
        """Gives the hyper-parameters; those that live on the device are copied there."""
        if rows != self.host_hyper:
            sent = torch.tensor(rows, dtype=torch.float64)
            if not self.host_hyper:
                self.hyper = torch.empty_like(sent, device=self.device)
            # In place: a CUDA graph of an earlier step reads them too.
            self.hyper.copy_(_to_send(sent, self.device), non_blocking=True)
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
        A plan's steps have one seed.
        A cautious update counts first, in one more and one for all.
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
        squares = self._sum_squares() if max_norm is not None else None
        parts = 0 if squares is None else len(squares)
        key = (_pointer(grad_scale), _pointer(found_inf), max_norm is None)
        if key not in self.prepares:
            self.prepares[key] = Repeated(
                prepare_kernel, -(-self.size // 128), HAS_SCALE=grad_scale is not None,
                HAS_FOUND=found_inf is not None, CLIPS=max_norm is not None,
                BLOCK=128, num_warps=4,
            )  # fmt: skip
        self.prepares[key](
            self.table, self.hyper, self.scalars, grad_scale, found_inf, squares, self.norm,
            self.size, parts, float(max_norm or 0.0),
        )  # fmt: skip
        if self.sums is not None:
            self._sum_chunks(self.sums)
        for bucket in self.buckets:
            sums = self.sums if bucket.kind.cautious else None
            bucket.update(self.table, bucket.chunks, self.scalars, sums, self.size, seed)
        for t, work in self.copied_out:
            t.copy_(work)

    def _sum_squares(self) -> Tensor:
        """Partial sums of the gradients' squares, in a fixed order on any device.

        Parts of sharded tensors are summed over all processes, in one reduction for each mesh.
        """
        programs = [bucket.squares.programs for bucket in self.buckets]
        if self.squares is None:
            self.squares = torch.empty(sum(programs), dtype=torch.float32, device=self.device)
        self.norm = torch.empty((), dtype=torch.float32, device=self.device)
        ends: list[int] = []
        for bucket, count in zip(self.buckets, programs, strict=True):
            first = ends[-1] if ends else 0
            sums = self.squares[first:]
            bucket.squares(self.table, bucket.chunks, sums, self.size, len(bucket.chunks))
            ends.append(first + count)
        if self.groups == [()]:
            return self.squares
        totals = torch.zeros(len(self.groups), dtype=torch.float64, device=self.device)
        for bucket, count, end in zip(self.buckets, programs, ends, strict=True):
            total = totals[self.groups.index(bucket.kind.groups)]
            total += self.squares[end - count : end].sum(dtype=torch.float64)
        for i, groups in enumerate(self.groups):
            all_reduced(totals[i], groups)
        return totals

    def _sum_chunks(self, sums: Tensor) -> None:
        """Counts for cautious updates; and directions of matrices, orthogonalized."""
        for bucket in self.buckets:
            if bucket.turn is not None:
                bucket.turn(self.table, bucket.chunks, self.scalars, self.parts, self.size)
        self.sum_chunks(self.table, self.parts, sums, self.size)
        for groups, slots in self.shared_slots:
            shared_sums = sums[slots]
            all_reduced(shared_sums, groups)
            sums[slots] = shared_sums
        for batch in self.batches:
            _, coefficients, steps, eps = batch.iteration
            squares = sums[batch.first : batch.first + len(batch.directions)]
            if batch.like is None:
                orthogonalize(batch.directions, squares, coefficients, steps, eps)
            else:
                given = (batch.directions, batch.like, batch.first)
                whole, first = whole_matrices(*given)
                if len(whole):
                    mine = squares[first : first + len(whole)]
                    orthogonalize(whole, mine, coefficients, steps, eps)
                return_matrices(whole, *given)
