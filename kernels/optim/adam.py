"""``Adam`` and ``AdamW``: torch.optim's classes with the fused step."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.optimizer import ParamsT

from .fused import OPTIONS, Fused, StateDtype, unscaled
from .step import adamw_step, all_suit_torch_fused


def lists_of(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], params: list[Tensor]
) -> tuple[list[Any], bool]:
    """Parameters with gradients, gradients and states; torch's method makes the states."""
    lists: list[Any] = [[] for _ in range(6)]
    has_complex = torch.optim.Adam._init_group(
        optimizer,  # type: ignore[arg-type]
        {**group, "params": params},
        *lists,
    )
    return lists, has_complex


def torchs_step(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    params: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """PyTorch's step of these parameters of the group."""
    lists, has_complex = lists_of(optimizer, group, params)
    fused, foreach = group["fused"], group["foreach"]
    torch_chooses = fused is False or foreach or group["differentiable"]
    on_cpu = bool(lists[0]) and lists[0][0].device.type == "cpu"
    if on_cpu and not torch_chooses and (fused or not group["capturable"]):
        fused = all_suit_torch_fused(lists)
    # Clipping leaves the gradients alone, where torch's fused step would write them.
    if group.get("max_grad_norm") is not None or (not fused and not torch_chooses):
        grads = unscaled(lists[1], grad_scale, found_inf)
        if grads is None:
            return
        lists[1] = grads
        grad_scale = found_inf = None
    betas = [float(b) if fused else b for b in group["betas"]]
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps = lists
    torch_adam(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        state_steps,
        amsgrad=group["amsgrad"],
        has_complex=has_complex,
        beta1=betas[0],
        beta2=betas[1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        foreach=foreach,
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        fused=fused,
        grad_scale=grad_scale,
        found_inf=found_inf,
        decoupled_weight_decay=group["decoupled_weight_decay"],
    )
    if fused and params[0].device.type == "cpu":  # torch 2.13 leaves them as they were
        torch.autograd.graph.increment_version(lists[0])


class _AdamStep(Fused):
    """What Adam and AdamW share."""

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "adamw" if group["decoupled_weight_decay"] else "adam"

    def _begin_state(self, group: dict[str, Any], p: Tensor) -> None:
        lists_of(self, group, [p])

    def _eager_step(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        torchs_step(self, group, params, grad_scale, found_inf)

    def _traced_step(self) -> bool:
        """The step as torch.compile sees it: one operator a group."""
        if any(option in self.defaults for option in OPTIONS):
            return False
        for group in self.param_groups:
            lists, _ = lists_of(self, group, group["params"])
            if lists[0]:
                adamw_step(
                    *lists,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=group["amsgrad"],
                    maximize=group["maximize"],
                    grad_scale=getattr(self, "grad_scale", None),
                    found_inf=getattr(self, "found_inf", None),
                    decoupled_weight_decay=group["decoupled_weight_decay"],
                )
        return True


class Adam(_AdamStep, torch.optim.Adam):
    """``torch.optim.Adam`` whose step takes a constant number of launches.

    The arguments, defaults, errors, hooks and ``state_dict`` are torch's, and a checkpoint of
    either continues in the other. ``fused=None`` takes the Triton kernel where it can and torch's
    own step elsewhere; ``fused=True`` also keeps the steps on the device and lets GradScaler hand
    over its scale, in which case the gradients stay scaled (torch's fused step unscales them in
    place); ``fused=False`` and ``foreach=True`` are torch's. float64, complex and sparse tensors
    and ``differentiable=True`` are left to torch.

    Args:
        params: As torch.optim.Adam.
        lr: As torch.optim.Adam, with all before max_grad_norm.
        betas: Decays of the running means of the gradient and its square.
        eps: Added to the denominator.
        weight_decay: Added to the gradient; AdamW takes it off the weight.
        amsgrad: Divides by the largest mean so far.
        foreach: True is torch's.
        maximize: Ascends.
        capturable: Keeps the steps on the device, for CUDA graphs. Take a step before the capture;
            parameters, gradients (``zero_grad(set_to_none=False)``) and states must stay where they
            are, and which parameters have gradients, until it is captured again. A replay reads lr
            where it is a tensor on the device, to be written in place; max_grad_norm as captured;
            other numbers as of the last step outside a graph.
        differentiable: True is torch's.
        fused: Above.
        max_grad_norm: Scales the gradients within the step so that the norm of all of them,
            accumulated in float32, is at most this. The gradients themselves stay as they are.
        state_dtype: torch.float32 or torch.bfloat16 for the running means; None is the
            parameter's dtype, as torch. "8bit": a byte an element and a float32 for each 128, as
            small floats relative to their largest; of parameters with less than 4096 elements,
            and of shards that would cut blocks, float32. torch's optimizer loads them from
            ``torch_state_dict()``.
        master: "fp32" keeps float32 weights beside half-precision parameters; "split" keeps the
            16 bits that bfloat16 parameters lack of float32, to the same result in 2 bytes less.
        rounding: "stochastic" rounds bfloat16 parameters to either neighbour at random, without
            bias; the same for the same seed, step, parameter and element. None: to the nearest.
        seed: Of that rounding; default 0.
        ema_decay: Keeps an average of each weight in float32, ``state[p]["ema"]``, that starts at
            the weight and moves by ``1 - ema_decay`` of the distance at each step.
        cautious: Leaves out the elements that would go up their gradient, and scales the others of
            a tensor up by as much (Liang et al. 2024, https://arxiv.org/abs/2411.16085).

    Raises:
        ValueError: What torch.optim.Adam raises, in its words; an option outside the above.
        RuntimeError: From ``step``: state_dtype, master or rounding where no kernel can run.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype | None = None,
        master: Literal["fp32", "split"] | None = None,
        rounding: Literal["stochastic"] | None = None,
        seed: int | None = None,
        ema_decay: float | None = None,
        cautious: bool = False,
    ) -> None:
        torch.optim.Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach,
            maximize=maximize, capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        self._set_options(
            max_grad_norm=max_grad_norm, state_dtype=state_dtype, master=master,
            rounding=rounding, seed=seed, ema_decay=ema_decay, cautious=cautious,
        )  # fmt: skip


class AdamW(_AdamStep, torch.optim.AdamW):
    """``torch.optim.AdamW`` whose step takes a constant number of launches; see ``Adam``."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype | None = None,
        master: Literal["fp32", "split"] | None = None,
        rounding: Literal["stochastic"] | None = None,
        seed: int | None = None,
        ema_decay: float | None = None,
        cautious: bool = False,
    ) -> None:
        torch.optim.AdamW.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach,
            maximize=maximize, capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._set_options(
            max_grad_norm=max_grad_norm, state_dtype=state_dtype, master=master,
            rounding=rounding, seed=seed, ema_decay=ema_decay, cautious=cautious,
        )  # fmt: skip
