"""One step as a function of lists of tensors, torch.optim.adamw.adamw's twin."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from .._dispatch import dispatched
from .._op import Inputs, Op
from .._register import torch_op
from .fused import advance, uncovered_tensors
from .kernels import ADAM, ADAMW
from .plan import Plan, Row, is_dense


def reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    decoupled_weight_decay: bool = True,
    max_grad_norm: float | None = None,
    cautious: bool = False,
) -> None:
    """A step of PyTorch's for-loop over the tensors."""
    if found_inf is not None and found_inf.item():
        return
    if grad_scale is not None:
        grads = [g / grad_scale for g in grads]
    if max_grad_norm is not None and grads:
        norm = torch.nn.utils.get_total_norm([g.float() for g in grads])
        grads = [g * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) for g in grads]
    if cautious:
        _cautious_step(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, lr=lr, beta1=beta1,
            beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=amsgrad, maximize=maximize,
            decoupled=decoupled_weight_decay,
        )  # fmt: skip
        return
    with torch.no_grad():
        torch_adam(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
            foreach=False, fused=False, amsgrad=amsgrad, beta1=beta1, beta2=beta2, lr=lr,
            weight_decay=weight_decay, eps=eps, maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip


@torch.no_grad()
def _cautious_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
) -> None:
    """AdamW with the mask of Liang et al. 2024, which PyTorch does not have."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, state_steps)
    for i, (p, g, m, v, step) in enumerate(zip(*lists, strict=True)):
        step += 1
        g = -g if maximize else g.clone()
        if decoupled:
            p.mul_(1 - lr * weight_decay)
        else:
            g += weight_decay * p
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        largest = v
        if amsgrad:
            largest = torch.maximum(max_exp_avg_sqs[i], v, out=max_exp_avg_sqs[i])
        denominator = (largest / (1 - beta2 ** step.item())).sqrt() + eps
        agrees = (m * g > 0).to(p.dtype)
        share = agrees.mean(dtype=torch.float32).clamp(min=1e-3)
        p -= (lr / (1 - beta1 ** step.item()) / share).to(p.dtype) * agrees * m / denominator


# --- launch -------------------------------------------------------------------------------------


def _fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float | None,
    cautious: bool,
) -> None:
    return None


_WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")


@torch_op("adamw_step", fake=_fake, mutates=_WRITTEN)
def _step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float | None,
    cautious: bool,
) -> None:
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    largest: Sequence[Tensor | None] = max_exp_avg_sqs if amsgrad else [None] * len(params)
    algorithm = "adamw" if decoupled else "adam"
    rows = [
        Row(p, g, m, v, vmax, step, 0, algorithm, i, cautious=cautious)
        for i, (p, g, m, v, vmax, step) in enumerate(zip(*lists, largest, state_steps, strict=True))
    ]
    plan = Plan(rows)
    plan.take_gradients(grads)
    kind = float((ADAMW if decoupled else ADAM).value)
    sign = -1.0 if maximize else 1.0
    hyper = [[lr, beta1, beta2, eps, weight_decay, sign, kind, 0.0, 1.0]]
    plan.set_hyper(hyper, [] if lr_tensor is None else [(0, 0, lr_tensor)])
    plan.run(grad_scale, found_inf, max_grad_norm)
    advance([state_steps[i] for i in plan.host_steps], found_inf)


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    amsgrad: bool = False,
    **_: Any,
) -> str | None:
    lists = [params, grads, exp_avgs, exp_avg_sqs] + ([max_exp_avg_sqs] if amsgrad else [])
    if any(len(tensors) != len(params) for tensors in (*lists, state_steps)):
        return "the lists differ in length"
    if any(p.device != params[0].device for p in params):
        return "the parameters are on several devices"
    reasons = (uncovered_tensors(*tensors) for tensors in zip(*lists, strict=True))
    return next((reason for reason in reasons if reason), None)


def all_suit_torch_fused(lists: list[list[Tensor]]) -> bool:
    """Whether torch's fused CPU kernel is right: it takes any strides for the parameter's."""
    params, steps = lists[0], lists[5]
    elements = [tensors for tensors in lists[1:5] if tensors]
    return (
        len(set(map(id, params))) == len(params)  # it would count both steps before the first
        and all(p.device.type == "cpu" and p.is_floating_point() for p in params)
        and all(step.dtype == torch.float32 for step in steps)
        and all(_alike(params, tensors) for tensors in elements)
        and all(map(is_dense, params))
    )


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether both lists have the same shapes, strides, dtypes and devices."""
    try:
        return all(
            list(map(fact, some)) == list(map(fact, others))
            for fact in (Tensor.size, Tensor.stride, _DTYPE, _DEVICE)
        )
    except RuntimeError:  # sparse tensors have no strides
        return False


_DTYPE, _DEVICE = operator.attrgetter("dtype"), operator.attrgetter("device")


@torch_op("adamw_step_eager", fake=_fake, mutates=_WRITTEN)
def _eager_op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float | None,
    cautious: bool,
) -> None:
    """PyTorch's fused kernel where it is right and leaves the gradients alone, else its loop."""
    given = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    lists = [list(tensors) for tensors in given]
    one_dtype = all(p.dtype == params[0].dtype for p in params)
    as_given = grad_scale is None and found_inf is None and max_grad_norm is None and not cautious
    step: Callable[..., Any] = reference
    options: dict[str, Any] = {}
    if as_given and one_dtype and all_suit_torch_fused(lists):
        torch._foreach_add_(lists[5], 1)
        step = torch._fused_adamw_ if decoupled else torch._fused_adam_
    else:
        options = {
            "decoupled_weight_decay": decoupled, "grad_scale": grad_scale, "found_inf": found_inf,
            "max_grad_norm": max_grad_norm, "cautious": cautious,
        }  # fmt: skip
    with torch.no_grad():
        step(
            *lists,
            lr=lr if lr_tensor is None else lr_tensor,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=amsgrad,
            maximize=maximize,
            **options,
        )


def _eager(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    **options: Any,
) -> None:
    if params:
        lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        _eager_op(*_arguments(*lists, **options))


def _arguments(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    decoupled_weight_decay: bool = True,
    max_grad_norm: float | None = None,
    cautious: bool = False,
) -> tuple[Any, ...]:
    """The public function's arguments as the operators take them."""
    if max_grad_norm is not None and not max_grad_norm > 0.0:
        raise ValueError(f"adamw_step: max_grad_norm must be positive; got {max_grad_norm}")
    on_device = isinstance(lr, Tensor)
    return (
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs if amsgrad else [], state_steps,
        0.0 if on_device else float(lr), beta1, beta2, eps, weight_decay,
        amsgrad, maximize, decoupled_weight_decay,
        lr if on_device else None, grad_scale, found_inf, max_grad_norm, cautious,
    )  # fmt: skip


@dispatched(eager=_eager, uncovered=_uncovered)
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    decoupled_weight_decay: bool = True,
    max_grad_norm: float | None = None,
    cautious: bool = False,
) -> None:
    """One step of AdamW in place on lists of tensors; the arguments of torch.optim.adamw.adamw.

    Args:
        params: float32, float16 or bfloat16 of any shape and strides, on one device.
        grads: Of the shapes of ``params``; left as they are.
        exp_avgs: Running means of the gradients, of the shapes of ``params``.
        exp_avg_sqs: Running means of their squares.
        max_exp_avg_sqs: The largest of those so far, for ``amsgrad``; else empty.
        state_steps: One 0-dimensional float32 step count each, advanced by 1. On the parameters'
            device the kernel advances them; elsewhere the host does.
        lr: Learning rate; a tensor of one element on the device is read there.
        beta1: Decay of ``exp_avgs``.
        beta2: Decay of ``exp_avg_sqs``.
        weight_decay: Decoupled, or added to the gradient (``decoupled_weight_decay=False``).
        eps: Added to the root of the bias-corrected ``exp_avg_sqs``.
        amsgrad: Divides by the largest ``exp_avg_sqs`` so far.
        maximize: Ascends.
        grad_scale: One float32 that the gradients are divided by.
        found_inf: One float32; other than 0, nothing changes.
        decoupled_weight_decay: False gives Adam.
        max_grad_norm: Scales the gradients so that the norm of all of them is at most this;
            positive. torch.optim.adamw.adamw has no such argument.
        cautious: Leaves out the elements that would go up their gradient, and scales the others of
            a tensor up by as much (https://arxiv.org/abs/2411.16085). Nor has it this one.

    Raises:
        ValueError: ``max_grad_norm`` is not positive.
        RuntimeError: What torch.optim.adamw.adamw raises, for tensors that do not fit.
    """
    _step(
        *_arguments(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=amsgrad,
            maximize=maximize, grad_scale=grad_scale, found_inf=found_inf,
            decoupled_weight_decay=decoupled_weight_decay, max_grad_norm=max_grad_norm,
            cautious=cautious,
        )
    )  # fmt: skip


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[tuple[int, ...]],
    **options: Any,
) -> Inputs:
    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    return {
        "params": [noise(s) for s in shapes],
        "grads": [noise(s) for s in shapes],
        "exp_avgs": [noise(s) for s in shapes],
        "exp_avg_sqs": [noise(s).abs() + 0.25 for s in shapes],
        "max_exp_avg_sqs": [noise(s).abs() + 0.5 for s in shapes] if options.get("amsgrad") else [],
        "state_steps": [torch.tensor(3.0 + i, device=device) for i in range(len(shapes))],
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": 0.1,
        "eps": 1e-8,
    } | options


_GPT2 = (
    ((50257, 768), (1024, 768))
    + 12
    * (
        (768,), (768,), (2304, 768), (2304,), (768, 768), (768,),
        (768,), (768,), (3072, 768), (3072,), (768, 3072), (768,),
    )
    + ((768,), (768,))
)  # fmt: skip

OP = Op(
    fused=adamw_step,
    reference=reference,
    example=_example,
    sizes=(
        {"shapes": ((1,),)},
        {"shapes": ((33, 17), (5,), (0,), (), (3, 400), (7, 3, 2))},
        {"shapes": ((130, 65), (3,)), "amsgrad": True},
        {"shapes": ((40, 20),), "decoupled_weight_decay": False, "maximize": True},
        {"shapes": ((60, 30), (7,)), "max_grad_norm": 0.5},
        {"shapes": ((130, 70), (7,), (0,)), "cautious": True},
    ),
    bench_sizes=({"shapes": _GPT2}, {"shapes": _GPT2, "max_grad_norm": 1.0}),
    work=lambda params, grads, max_grad_norm=None, cautious=False, **_: (
        sum((6 + bool(cautious)) * p.nbytes for p in params)
        + sum(g.nbytes for g in grads) * (1 + bool(max_grad_norm) + bool(cautious)),
        15 * sum(p.numel() for p in params),
    ),
)
