"""Functions that Hugging Face's modules call, and the fused ops that do what they do.

Attention calls a function of its file, and so gets a forward whose file has another function under
that name; no file is changed. A causal language model asks itself for its loss function.
"""

import functools
import inspect
from contextlib import nullcontext
from types import CellType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._probe import Candidate, Forward, device_of, difference
from .cross_entropy import cross_entropy
from .rotary import rotary_embedding

_ROTATE = "apply_rotary_pos_emb"  # what Hugging Face's attention calls


def _with_global(function: Any, name: str, value: object) -> Any:
    """A function like this one, under the same decorators, for which a global is another.

    Raises:
        LookupError: A decorator does not keep what it decorates where it can be replaced.
    """
    inner = getattr(function, "__wrapped__", None)
    scope, cells = function.__globals__, function.__closure__ or ()
    if inner is None:
        scope = {**scope, name: value}
    else:
        twin = CellType(_with_global(inner, name, value))
        held = cells
        cells = tuple(twin if cell.cell_contents is inner else cell for cell in held)
        if cells == held:
            raise LookupError("its forward is under a decorator that hides it")
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    if inner is not None:
        copy.__dict__["__wrapped__"] = twin.cell_contents
    return copy


def _rotation(theirs: Forward, partial: bool) -> Forward:
    """Turns queries and keys with tables whose halves are equal, as ``theirs`` does.

    partial: Whether that leaves alone what lies past the width of the tables.
    """

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any
    ) -> Any:
        R, batch = cos.shape[-1], cos.shape[0]
        narrower = q.shape[-1] > R
        usual = not (rest or more) and cos.dim() == 3 and q.dim() == k.dim() == 4
        if not usual or batch not in (1, q.shape[0]) or q.shape[-1] < R or narrower > partial:
            return theirs(q, k, cos, sin, *rest, **more)
        if not q.dtype == k.dtype == cos.dtype:  # the result would be wider than its argument
            return theirs(q, k, cos, sin)
        cos, sin = (t[..., : R // 2].flatten(0, 1) for t in (cos, sin))
        offsets: Any = 0
        if batch > 1:  # a table for each sequence, one after another
            offsets = torch.arange(batch, device=q.device) * (len(cos) // batch)
        return tuple(
            rotary_embedding(x.transpose(1, 2), cos, sin, offsets=offsets).transpose(1, 2)
            for x in (q, k)
        )

    return apply_rotary_pos_emb


def _halves_are_equal(model: nn.Module) -> bool:
    """Whether the model's tables of cosines and sines repeat their first half."""
    found = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    for module in found:
        x, positions = torch.zeros(1, 1), torch.arange(5)[None]
        try:
            with torch.no_grad():
                tables = module.forward(x.to(device_of(module)), positions.to(device_of(module)))
            halves = [t.chunk(2, -1) for t in tables]
        except Exception:  # whatever a stranger's forward raises
            return False
        if len(halves) != 2 or not all(torch.equal(*half) for half in halves):
            return False
    return bool(found)


def _joined(rotate: Forward, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat(rotate(q, k, cos, sin), 1)


def _rotates_otherwise(theirs: Forward, width: int) -> str | None:
    """How ``theirs`` differs from ours on heads of 16 numbers, of which ``width`` turn, or None."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 16, generator=generator) for heads in (3, 1))
    ours = _rotation(theirs, partial=width < 16)
    for batch in (1, 2):
        angles = torch.randn(batch, 5, width // 2, generator=generator).repeat(1, 1, 2)
        reason = difference(
            functools.partial(_joined, ours),
            functools.partial(_joined, theirs),
            (q, k, angles.cos(), angles.sin()),
        )
        if reason is not None:
            return reason
    return None


def rotary(module: nn.Module, model: nn.Module) -> Candidate | str | None:
    """Attention that calls a function of its file to turn its queries and keys."""
    forward = type(module).forward
    plain: Any = inspect.unwrap(forward)
    theirs = getattr(plain, "__globals__", {}).get(_ROTATE)
    if theirs is None or _ROTATE not in plain.__code__.co_names:
        return None
    if "forward" in module.__dict__:
        return "its forward is already replaced"
    if not _halves_are_equal(model):
        return "the model has no tables of cosines whose halves are equal"
    reason = _rotates_otherwise(theirs, 16)
    if reason is not None:
        return reason
    ours = _rotation(theirs, partial=_rotates_otherwise(theirs, 8) is None)
    try:
        return Candidate("rotary_embedding", _with_global(forward, _ROTATE, ours))
    except LookupError as error:
        return str(error.args[0])


def _causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Hugging Face's loss of a causal language model; its logits are not copied into float32."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    device = logits.device.type
    half = logits.itemsize == 2 and torch.amp.is_autocast_available(device)
    if not half:
        logits = logits.float()
    # Under autocast the loss is float32 whatever the logits are, and the kernel reads these.
    with torch.autocast(device) if half else nullcontext():
        loss = cross_entropy(
            logits.view(-1, vocab_size),
            shift_labels.reshape(-1).to(logits.device),
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
    assert isinstance(loss, Tensor)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def loss(module: nn.Module, model: nn.Module) -> Candidate | str | None:
    """A causal language model of Hugging Face's, whose loss is a function that can be set."""
    if not isinstance(getattr(type(module), "loss_function", None), property):
        return None
    if not type(module).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return None
    if "_loss_function" in module.__dict__:
        return "its loss function is already replaced"
    theirs: Any = module.loss_function
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, 11, generator=generator)
    labels = torch.tensor([[1, -100, 10, 0, 3], [2, 2, -100, -100, 7]])
    shifted = {"shift_labels": labels.clamp(min=0), "ignore_index": 2}
    options: dict[str, Any]
    for options in ({}, {"num_items_in_batch": 7}, shifted):
        reason = difference(_causal_lm_loss, theirs, (logits, labels), vocab_size=11, **options)
        if reason is not None:
            return reason
    return Candidate("cross_entropy", _causal_lm_loss, "_loss_function")
