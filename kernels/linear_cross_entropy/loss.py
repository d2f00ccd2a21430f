"""The public function, its module, and its declaration."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import _dispatch
from .._dispatch import dispatched
from .._op import Inputs, Op
from ..cross_entropy import check_extensions, uncovered_classes
from .chunks import chunked
from .eager import chunks_of, reference
from .rows import rows_apart

# --- public -------------------------------------------------------------------------------------


def _unchunked(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk_size: int | None = None,
    impl: str = "chunked",
    process_group: Any = None,
) -> str | None:
    """Why a call takes all logits at once, in PyTorch's own ops, or None."""
    if input.dim() not in (1, 2) or linear_weight.dim() != 2:
        return f"input has {input.dim()} dimensions and linear_weight {linear_weight.dim()}"
    if input.numel() == 0 or linear_weight.numel() == 0:
        return "input or linear_weight is empty"
    if target.dtype != torch.int64 or target.shape != input.shape[:-1]:
        return f"target is {target.dtype} of shape {tuple(target.shape)}"
    if input.shape[-1] != linear_weight.shape[-1]:
        return "the last dimensions of input and linear_weight differ"
    classes = linear_weight.shape[0]
    if linear_bias is not None and tuple(linear_bias.shape) != (classes,):
        return f"linear_bias has shape {tuple(linear_bias.shape)}"
    if reduction not in ("none", "mean", "sum"):
        return f"reduction is {reduction!r}"
    autocast = torch.is_autocast_enabled(input.device.type)
    for name, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if t is not None and (t.device != input.device or not (t.dtype == input.dtype or autocast)):
            return f"{name} is {t.dtype} on {t.device}, input {input.dtype} on {input.device}"
    if not input.is_floating_point() or target.device != input.device:
        return f"input is {input.dtype} on {input.device}, target on {target.device}"
    given = [t for t in (input, linear_weight, target, linear_bias, weight) if t is not None]
    return _dispatch._foreign(given) or uncovered_classes(
        input.dtype, classes, target, weight, label_smoothing
    )


def _uncovered(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> str | None:
    if input.dtype not in OP.dtypes:
        return f"input is {input.dtype}"
    return _unchunked(input, linear_weight, target, **options)


def _checked(options: dict[str, Any]) -> None:
    """Refuses what PyTorch does not have where it is out of range."""
    check_extensions(
        "linear_cross_entropy", options.get("z_loss", 0.0), options.get("softcap", 0.0)
    )
    impl, rows = options.get("impl", "chunked"), options.get("chunk_size")
    if impl not in ("chunked", "recompute"):
        raise ValueError(
            f"linear_cross_entropy: impl must be 'chunked' or 'recompute'; got {impl!r}"
        )
    if rows is not None and rows < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size must be 1 or more; got {rows}")


def _eager(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The same steps in PyTorch's ops; all logits at once where a call needs that, or they fit."""
    _checked(options)
    reason = _unchunked(input, linear_weight, target, **options)
    plain = not any(n in options for n in ("chunk_size", "impl", "options", "process_group"))
    if plain and reason is None and input.device.type == "cpu":
        rows = input.reshape(-1, input.shape[-1])
        if len(chunks_of(rows, linear_weight.shape[0], None)) == 1:
            return reference(input, linear_weight, target, **options)
    if reason is None:
        return _in_parts(input, linear_weight, target, fused=False, **options)
    if options.get("process_group") is not None:
        raise ValueError(
            "linear_cross_entropy: process_group must come with class numbers and (V, H) weights; "
            f"got a call that takes all logits at once: {reason}"
        )
    return reference(input, linear_weight, target, **options)


def _in_parts(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    fused: bool,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk_size: int | None = None,
    impl: str = "chunked",
    process_group: Any = None,
) -> Tensor:
    dtype = input.dtype
    if torch.is_autocast_enabled(input.device.type):  # a product in half, a loss in float32
        half = torch.get_autocast_dtype(input.device.type)
        dtype = torch.promote_types(dtype, torch.float32)
        input, linear_weight = input.to(half), linear_weight.to(half)
        linear_bias = None if linear_bias is None else linear_bias.to(half)
    if options is not None and chunk_size is None:
        chunk_size = options.batch_chunk_size
    group = "" if process_group is None else process_group.group_name
    wanted = [
        t is not None and t.requires_grad and torch.is_grad_enabled()
        for t in (input, linear_weight, linear_bias)
    ]
    arguments = (
        input.reshape(-1, input.shape[-1]), linear_weight, linear_bias, target.reshape(-1), weight,
        -100 if ignore_index is None else ignore_index, label_smoothing, z_loss, softcap,
        chunk_size,
    )  # fmt: skip
    if impl == "recompute" or reduction == "none" or group:
        losses, shares, _, _ = rows_apart(*arguments, group, fused)
        if reduction == "none":
            return losses.to(dtype).reshape(target.shape)
        loss, share = losses.sum(), shares.sum()
    else:
        loss, share, *_ = chunked(*arguments, wanted, fused)
    if reduction == "mean":
        # Without a row that counts the loss is NaN and its gradient 0, as PyTorch.
        share = share.detach()
        mean = loss / torch.where(share == 0, 1.0, share)
        loss = torch.where(share == 0, float("nan"), mean)
    return loss.to(dtype)


@dispatched(eager=_eager, uncovered=_uncovered)
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk_size: int | None = None,
    impl: str = "chunked",
    process_group: Any = None,
) -> Tensor:
    """``cross_entropy(input @ linear_weight.T + linear_bias, target)``, logits never whole.

    Drop-in for ``F.linear_cross_entropy`` of torch 2.13; also where torch has none.

    Args:
        input: (N, H) or (H), float32, float16 or bfloat16.
        linear_weight: (V, H). (V, d1, ..., H) goes by PyTorch's ops, all logits at once.
        target: (N) or (), int64. Probabilities go by PyTorch's ops.
        linear_bias: (V).
        weight: (V), a factor of each class.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: Class number of rows that do not count; None is -100.
        label_smoothing: Share of the target spread over all classes, in [0, 1].
        options: A ``torch.nn.LinearCrossEntropyOptions``: its ``batch_chunk_size`` is
            ``chunk_size``. The rest does not apply: sums are float32, graphs may be retained.
        z_loss: As in ``cross_entropy``.
        softcap: As in ``cross_entropy``.
        chunk_size: Rows whose logits are held at once; by default 512 MiB of them, 64 on the CPU.
            Where the kernels recompute: columns that the backward holds, of 8192 rows at most; by
            default 32 MiB of them.
        impl: ``"chunked"``: gradients are computed with the loss, and kept. ``"recompute"``: no
            logits in the forward and nothing kept, for a third more operations.
            ``reduction="none"`` and ``process_group`` always recompute.
        process_group: Ranks that each hold the next V rows of the vocabulary: ``linear_weight``,
            ``linear_bias`` and ``weight`` are this rank's, as many rows on each; ``input`` and
            ``target``, with numbers in the whole vocabulary, are the same on all. Every rank gets
            the loss, its own dW, and the whole gradient of ``input``.

    Returns:
        The loss, the dtype of ``input``; float32 under autocast, whose products are in half
        precision. Gradients of the weights are summed in float32. Targets to ignore and outside
        [0, V): as in ``cross_entropy``.

    Raises:
        RuntimeError: What ``F.linear_cross_entropy`` raises, for shapes that do not fit.
        ValueError: An option of ours out of range; ``process_group`` for all logits at once.
    """
    _checked({"z_loss": z_loss, "softcap": softcap, "chunk_size": chunk_size, "impl": impl})
    return _in_parts(
        input, linear_weight, target, fused=True, linear_bias=linear_bias, weight=weight,
        reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
        options=options, z_loss=z_loss, softcap=softcap, chunk_size=chunk_size, impl=impl,
        process_group=process_group,
    )  # fmt: skip


class ProjectedLoss(nn.Module):
    """Parameters and fields of ``nn.LinearCrossEntropyLoss``, for versions of torch without it."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        super().__init__()
        width = num_classes
        for size in out_features:
            width *= size
        self.num_classes, self.out_features, self.reduction = num_classes, out_features, reduction
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.options = options
        self.register_buffer("weight", weight)
        self.linear = nn.Linear(in_features, width, bias=bias, device=device, dtype=dtype)


_Base: Any = getattr(nn, "LinearCrossEntropyLoss", ProjectedLoss)


class LinearCrossEntropyLoss(_Base):
    """``torch.nn.LinearCrossEntropyLoss`` over the fused ``linear_cross_entropy``.

    The same arguments, parameters and state_dict; with ``z_loss``, ``softcap``, ``chunk_size`` and
    ``impl`` of that function.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        chunk_size: int | None = None,
        impl: str = "chunked",
        **options: Any,
    ) -> None:
        super().__init__(in_features, num_classes, **options)
        self.extensions: dict[str, Any] = {
            "z_loss": z_loss,
            "softcap": softcap,
            "chunk_size": chunk_size,
            "impl": impl,
        }
        _checked(self.extensions)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of what the linear layer makes of ``input``."""
        linear, shape = self.linear, (self.num_classes, *self.out_features)
        return linear_cross_entropy(
            input,
            linear.weight.reshape(*shape, linear.in_features),
            target,
            linear_bias=None if linear.bias is None else linear.bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            **self.extensions,
        )


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    N: int,
    H: int,
    V: int,
    bias: bool = False,
    weighted: bool = False,
    **options: Any,
) -> Inputs:
    x = torch.randn(N, H, dtype=dtype, device=device)
    matrix = torch.randn(V, H, dtype=dtype, device=device) * (2 / H**0.5)
    target = torch.randint(0, V, (N,), device=device)
    target[N // 2 : N // 2 + N // 4] = -100
    inputs: Inputs = {
        "input": x.requires_grad_(),
        "linear_weight": matrix.requires_grad_(),
        "target": target,
        **options,
    }
    if bias:
        inputs["linear_bias"] = torch.randn(V, dtype=dtype, device=device).requires_grad_()
    if weighted:
        inputs["weight"] = torch.rand(V, dtype=dtype, device=device) + 0.5
    return inputs


OP = Op(
    fused=linear_cross_entropy,
    reference=reference,
    example=_example,
    sizes=(
        {"N": 1, "H": 1, "V": 1},
        {"N": 5, "H": 40, "V": 131, "bias": True, "label_smoothing": 0.1, "chunk_size": 3},
        {
            "N": 33,
            "H": 33,
            "V": 150,
            "bias": True,
            "weighted": True,
            "label_smoothing": 0.1,
            "softcap": 3.0,
            "z_loss": 1e-2,
            "impl": "recompute",
            "chunk_size": 64,
        },
    ),
    bench_sizes=(
        {"N": 8192, "H": 768, "V": 50257},
        {"N": 8192, "H": 768, "V": 50257, "impl": "recompute"},
        {"N": 8192, "H": 2048, "V": 32000, "impl": "recompute"},
    ),
    work=lambda input, linear_weight, **_: (
        input.nbytes + linear_weight.nbytes,
        2 * input.numel() * linear_weight.shape[0],
    ),
)
