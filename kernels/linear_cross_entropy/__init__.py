r"""Cross-entropy of x Wᵀ + bias without the logits of all rows in memory.

``impl="chunked"`` takes some rows at a time: a product of matrices gives their logits, one kernel
turns these into losses and, in place, into ds, the gradient of the sum of losses by them (see
``cross_entropy.py``), and two more products give dx and add to dW, in float32. So all the work is
done in the forward; the backward multiplies by what arrives: 6 NHV floating-point operations and
8 to 10 bytes a logit. Kept for the backward: dx, and dW in float32.

``impl="recompute"`` keeps no logits and no gradients, only 12 bytes a row, for 8 NHV operations;
its backward works through a strip of 32 MiB, whatever N and V are (see ``tiles.py``). It also
serves ``reduction="none"``, whose gradient is not known in the forward, and a vocabulary that is
spread over processes: there each rank holds some rows of W, maxima and sums of all ranks are joined
once, and dx is summed over ranks in the backward.

Where no kernel runs, PyTorch's ops take the same steps with the same bound on memory.
"""

from .loss import LinearCrossEntropyLoss, linear_cross_entropy

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy"]
