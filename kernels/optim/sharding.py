"""What a step needs to know of DTensors: the part that is here, and who holds the others."""

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where the elements of a part stand in the whole tensor.

    Runs of ``run`` elements, ``pitch`` apart, from ``base`` on; of ``whole`` elements in all.
    ``groups`` are the processes that hold the other parts, one for each dimension of the mesh
    that shards the tensor.
    """

    base: int
    run: int
    pitch: int
    whole: int
    groups: tuple[Any, ...]


def is_dtensor(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor; the class is imported only where somebody else has done so."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """The part of a tensor that is in this process: it shares the memory."""
    return t._local_tensor if is_dtensor(t) else t  # type: ignore[attr-defined]


def misplaced(p: Tensor, others: list[Tensor]) -> str | None:
    """Why these tensors are not sharded alike, or None."""
    if not is_dtensor(p):
        return "a DTensor stands beside a plain tensor" if any(map(is_dtensor, others)) else None
    spec: Any = p
    if any(placement.is_partial() for placement in spec.placements):
        return "a parameter that is a partial sum"
    for t in others:
        if not is_dtensor(t):
            return "a DTensor stands beside a plain tensor"
        other: Any = t
        if other.device_mesh != spec.device_mesh or other.placements != spec.placements:
            return f"a tensor is placed {other.placements} and its parameter {spec.placements}"
    return None


def place_of(p: Any) -> Place | None:
    """Where the local part of a DTensor stands in the whole; None of a plain tensor.

    The indices are right for shards of one dimension, and of the first and one other; for the
    rest ``run`` is 0.
    """
    if not is_dtensor(p):
        return None
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements, shape = p.device_mesh, p.placements, p.shape
    groups = tuple(
        mesh.get_group(i) for i, placement in enumerate(placements) if placement.is_shard()
    )
    whole = p.numel()
    if any(placement.is_shard() and type(placement) is not Shard for placement in placements):
        return Place(0, 0, 0, whole, groups)  # strided: two meshes share one dimension unevenly
    sharded = {placement.dim for placement in placements if placement.is_shard()}
    last = max(sharded, default=0)
    if not sharded <= {0, last}:
        return Place(0, 0, 0, whole, groups)
    part, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    inner = math.prod(shape[last + 1 :])
    base = offset[last] * inner if shape else 0
    if last:
        base += offset[0] * math.prod(shape[1:])
    run = part[last] * inner if shape else 1
    pitch = shape[last] * inner if shape else 1
    return Place(base, max(run, 1), pitch, whole, groups)


def like(p: Any, part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The local part of a tensor of this shape, placed as ``p`` is."""
    if not is_dtensor(p):
        return part
    from torch.distributed.tensor import DTensor

    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def all_reduced(t: Tensor, groups: tuple[Any, ...]) -> None:
    """Sums over all processes that hold other parts."""
    for group in groups:
        torch.distributed.all_reduce(t, group=group)


def gathered(t: Tensor | None) -> Tensor | None:
    """The whole of a scalar that may be a DTensor, as GradScaler's are under FSDP2."""
    if t is not None and is_dtensor(t):
        whole: Tensor = t.full_tensor()  # type: ignore[attr-defined]
        return whole
    return t


# --- batches of matrices ------------------------------------------------------------------------


class _Deal(NamedTuple):
    """How the processes of a group, which hold parts of each matrix, share out whole ones."""

    group: Any
    rank: int
    dim: int  # of a matrix, in which it is cut
    lengths: list[int]  # of each process's part in that dimension
    counts: list[int]  # of matrices that each process has whole


def _deal(matrices: int, p: Any, turn: int) -> _Deal | None:
    """For a batch of matrices that are placed as ``p``; None where not one dimension cuts them.

    ``turn`` is the process that starts: matrices left over are one by one its and the next ones'.
    """
    from torch.distributed.tensor import Shard

    cuts = [i for i, placement in enumerate(p.placements) if placement.is_shard()]
    if len(cuts) != 1 or type(p.placements[cuts[0]]) is not Shard:
        return None
    mesh, dim = p.device_mesh, p.placements[cuts[0]].dim
    processes, whole = mesh.size(cuts[0]), p.shape[dim]
    longest = -(-whole // processes)
    lengths = [min(longest, max(0, whole - i * longest)) for i in range(processes)]
    each, left = divmod(matrices, processes)
    counts = [each + ((i - turn) % processes < left) for i in range(processes)]
    return _Deal(mesh.get_group(cuts[0]), mesh.get_local_rank(cuts[0]), dim, lengths, counts)


def whole_matrices(parts: Tensor, p: Any, turn: int) -> tuple[Tensor, int]:
    """Whole matrices of a batch of which every process has ``parts``, placed as ``p``.

    Those that are this process's to work on, from the one of that number on: its share, in one
    exchange; or all, where not one dimension of the mesh cuts them.
    """
    deal = _deal(len(parts), p, turn)
    if deal is None:
        return _gathered_batch(parts, p), 0
    mine, here = deal.counts[deal.rank], parts[0].numel()
    shapes = [(mine, *p.shape[: deal.dim], n, *p.shape[deal.dim + 1 :]) for n in deal.lengths]
    sizes = list(map(math.prod, shapes))
    found = parts.new_empty(sum(sizes))
    torch.distributed.all_to_all_single(
        found, parts.view(-1), sizes, [n * here for n in deal.counts], group=deal.group
    )
    blocks = [block.view(s) for block, s in zip(found.split(sizes), shapes, strict=True)]
    return torch.cat(blocks, deal.dim + 1), sum(deal.counts[: deal.rank])


def return_matrices(whole: Tensor, parts: Tensor, p: Any, turn: int) -> None:
    """Gives every process its part of what others have worked on; the way back."""
    deal = _deal(len(parts), p, turn)
    if deal is None:
        parts.copy_(_part_of_batch(whole, p))
        return
    here = parts[0].numel()
    blocks = [block.flatten() for block in whole.split(deal.lengths, deal.dim + 1)]
    torch.distributed.all_to_all_single(
        parts.view(-1), torch.cat(blocks), [n * here for n in deal.counts],
        [block.numel() for block in blocks], group=deal.group,
    )  # fmt: skip


def _behind_a_batch(p: Any) -> list[Any]:
    """The placements of a batch of tensors that are each placed as ``p``."""
    from torch.distributed.tensor import Shard

    return [Shard(t.dim + 1) if t.is_shard() else t for t in p.placements]


def _gathered_batch(parts: Tensor, p: Any) -> Tensor:
    """The whole of a batch of which every process has parts, placed as ``p``: one collective."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size([len(parts), *p.shape])
    strides = torch.empty(shape, device="meta").stride()
    placements = _behind_a_batch(p)
    batch = DTensor.from_local(
        parts, p.device_mesh, placements, run_check=False, shape=shape, stride=strides
    )
    return batch.full_tensor().contiguous()


def _part_of_batch(whole: Tensor, p: Any) -> Tensor:
    """This process's parts of a whole batch."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        whole.shape, p.device_mesh, _behind_a_batch(p)
    )
    for dim, (size, first) in enumerate(zip(shape, offset, strict=True)):
        whole = whole.narrow(dim, first if size else 0, size)
    return whole
