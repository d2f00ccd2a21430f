"""Warp-specialised forms of the forward kernel: warps that copy, that multiply, that exponentiate.

Which forms there are is what Triton 3.7.1 compiles. On sm_100 each loop of the plain kernel. On
sm_90 a kernel of one loop (two end in an assertion of NVGPUWarpSpecialization), on 4 warps (8 are
silently left as they are), of 128 queries that two groups of consumers share, with tiles of two
dimensions through descriptors that the kernel makes itself; in one loop every tile is masked where
there is a band. No card has timed them: all are off, and ``fastlm bench tune`` tries them. One that
does not compile gives way to the plain kernel, and is not tried again.
"""

import contextvars
import warnings
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from ._tiles import Tile, block_d_of, described, gpu_class

_WIDEST = 128  # head dimension; beyond, tensor memory and registers do not hold the roles' tiles


class Form(NamedTuple):
    """How the kernel is specialised.

    Attributes:
        one_loop: One loop over all tiles, through descriptors made on the device.
        whole: That loop masks nothing: every query sees every key, and the tiles have no tail.
    """

    one_loop: bool
    whole: bool

    def options(self, tile: Tile) -> dict[str, int]:
        """Keyword arguments of a launch."""
        options = {**tile.options(), "SPECIALISED": True, "ONE_LOOP": self.one_loop}
        if self.one_loop:
            options["num_warps"] = 4
        return options | {"WHOLE": self.whole, "TMA": not self.one_loop}


def form_of(
    tile: Tile,
    q: Tensor,
    k_tiles: TensorDescriptor,
    v_tiles: TensorDescriptor,
    right: int | None,
) -> Form | None:
    """The form of plain attention, with no left side to its band; None: none compiles.

    ``k_tiles`` and ``v_tiles`` are k and v as ``described``.
    """
    block_d = block_d_of(q.shape[3])
    if max(block_d, v_tiles.block_shape[3]) > _WIDEST or tile.m < 128:
        return None
    if gpu_class(q) == "blackwell":
        return Form(one_loop=False, whole=False)
    S_k = k_tiles.shape[1]
    # of one row the stride is free, and a descriptor would check it
    if tile.m != 128 or min(q.shape[1], S_k) == 1 or described(q, tile.m, block_d) is None:
        return None
    return Form(one_loop=True, whole=right is None and S_k % tile.n == 0)


_refused: set[Hashable] = set()


def launched(key: Hashable, q: Tensor, launch: Callable[[], object]) -> bool:
    """Whether ``launch`` ran; False where its kernel does not compile, now or when last asked.

    Args:
        key: Of what is compiled, beside what q says.
        q: On the device where it runs; the kernel's own descriptors want memory there.
        launch: Compiles and launches the kernel.
    """
    key = (gpu_class(q), q.dtype, key)
    if key in _refused:
        return False

    def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=q.device)

    context = contextvars.copy_context()  # the user's own allocator stays as it is
    context.run(triton.set_allocator, scratch)
    try:
        context.run(launch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TritonError) as error:  # whatever a pass, ptxas or the part's limits say
        _refused.add(key)
        warnings.warn(
            f"flash_attention: Triton {triton.__version__} does not compile the warp-specialised "
            f"kernel ({type(error).__name__}: {error}); the plain one runs",
            stacklevel=2,
        )
        return False
    return True
