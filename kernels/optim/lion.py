"""Lion: the sign of a running mean of the gradient (Chen et al. 2023, 2302.06675).

One step for a gradient g, negated under ``maximize``:

    p = p - lr * weight_decay * p
    p = p - lr * sign(exp_avg + (1 - beta1) * (g - exp_avg))
    exp_avg = exp_avg + (1 - beta2) * (g - exp_avg)

Cost, bound by memory, in bytes a parameter and step: float32 20, bfloat16 throughout 10, bfloat16
with an 8-bit exp_avg 8.06.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._dispatch import dispatched
from .._op import Inputs, Op
from .._register import torch_op
from .fused import Fused, StateDtype, advance, uncovered_tensors, unscaled
from .kernels import UNCORRECTED
from .plan import Plan, Row


@torch.no_grad()
def reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    """A step of a for-loop over the tensors."""
    for p, g, m, step in zip(params, grads, exp_avgs, state_steps, strict=True):
        step += 1
        g = -g if maximize else g
        p.mul_(1 - lr * weight_decay)
        p -= lr * m.lerp(g, 1 - beta1).sign()
        m.lerp_(g, 1 - beta2)


# --- launch -------------------------------------------------------------------------------------


def _fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool,
    lr_tensor: Tensor | None,
) -> None:
    return None


@torch_op("lion_step", fake=_fake, mutates=("params", "exp_avgs", "state_steps"))
def _step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool,
    lr_tensor: Tensor | None,
) -> None:
    lists = (params, grads, exp_avgs, state_steps)
    rows = [
        Row(p, g, m, None, None, step, 0, "lion", i)
        for i, (p, g, m, step) in enumerate(zip(*lists, strict=True))
    ]
    plan = Plan(rows)
    plan.take_gradients(grads)
    sign, kind = -1.0 if maximize else 1.0, float(UNCORRECTED.value)
    hyper = [[lr, beta1, beta2, 0.0, weight_decay, sign, kind, 0.0, 1.0]]
    plan.set_hyper(hyper, [] if lr_tensor is None else [(0, 0, lr_tensor)])
    plan.run(None, None)
    advance([state_steps[i] for i in plan.host_steps], None)


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    state_steps: list[Tensor],
    **_: Any,
) -> str | None:
    lists = (params, grads, exp_avgs)
    if any(len(tensors) != len(params) for tensors in (*lists, state_steps)):
        return "the lists differ in length"
    if any(p.device != params[0].device for p in params):
        return "the parameters are on several devices"
    reasons = (uncovered_tensors(*tensors) for tensors in zip(*lists, strict=True))
    return next((reason for reason in reasons if reason), None)


@dispatched(eager=reference, uncovered=_uncovered)
def lion_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    """One step of Lion in place on lists of tensors; arguments as of ``adamw_step``.

    Args:
        params: float32, float16 or bfloat16 of any shape and strides, on one device.
        grads: Of the shapes of ``params``; left as they are.
        exp_avgs: Running means of the gradients, of the shapes of ``params``.
        state_steps: One 0-dimensional float32 step count each, advanced by 1.
        lr: Learning rate; a tensor of one element on the device is read there.
        beta1: Share of ``exp_avgs`` in the update.
        beta2: Decay of ``exp_avgs``.
        weight_decay: Decoupled, times ``lr``.
        maximize: Ascends.
    """
    on_device = isinstance(lr, Tensor)
    _step(
        params, grads, exp_avgs, state_steps, 0.0 if on_device else float(lr), beta1, beta2,
        weight_decay, maximize, lr if on_device else None,
    )  # fmt: skip


class Lion(Fused):
    """Lion whose step takes a constant number of launches; options as of ``AdamW``.

    Args:
        params: As torch.optim.AdamW.
        lr: Learning rate; a third to a tenth of AdamW's.
        betas: Share of the running mean in the update, and its decay.
        weight_decay: Times ``lr``; three to ten times AdamW's.
        maximize: Ascends.
        capturable: Keeps the steps on the device, for CUDA graphs; see ``Adam``.
        fused: None takes the kernel where it can; True also keeps the steps on the device and lets
            GradScaler hand over its scale; False is a loop in PyTorch.
        max_grad_norm: As AdamW, with all that follow.
        state_dtype: Of the running mean.
        master: float32 weights beside half-precision parameters.
        rounding: Of bfloat16 parameters.
        seed: Of that rounding.
        ema_decay: Keeps an average of the weights.
        cautious: Leaves out the elements that would go up their gradient.

    Raises:
        ValueError: A number outside its range, in the words of torch.optim.AdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype | None = None,
        master: Literal["fp32", "split"] | None = None,
        rounding: Literal["stochastic"] | None = None,
        seed: int | None = None,
        ema_decay: float | None = None,
        cautious: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {
            "lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize,
            "capturable": capturable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._set_options(
            max_grad_norm=max_grad_norm, state_dtype=state_dtype, master=master,
            rounding=rounding, seed=seed, ema_decay=ema_decay, cautious=cautious,
        )  # fmt: skip

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "lion"

    def _begin_state(self, group: dict[str, Any], p: Tensor) -> None:
        assert p.grad is not None
        if p.grad.is_sparse:
            raise RuntimeError("Lion does not support sparse gradients")
        self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _eager_step(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        grads = unscaled([p.grad for p in params if p.grad is not None], grad_scale, found_inf)
        if grads is not None:
            reference(
                params, grads, [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["step"] for p in params], lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"],
                maximize=group["maximize"],
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
        "state_steps": [torch.tensor(float(i), device=device) for i in range(len(shapes))],
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.1,
    } | options


OP = Op(
    fused=lion_step,
    reference=reference,
    example=_example,
    sizes=(
        {"shapes": ((1,),)},
        {"shapes": ((33, 17), (5,), (0,), (), (3, 400))},
        {"shapes": ((40, 20),), "maximize": True},
    ),
    bench_sizes=({"shapes": 12 * ((2304, 768), (768,))},),
    work=lambda params, grads, **_: (
        sum(4 * p.nbytes for p in params) + sum(g.nbytes for g in grads),
        9 * sum(p.numel() for p in params),
    ),
)
