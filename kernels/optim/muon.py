"""Muon: momentum of a matrix, orthogonalized (Jordan et al. 2024; torch.optim.Muon).

One step for the gradient g of a matrix p:

    momentum_buffer = momentum_buffer + (1 - momentum) * (g - momentum_buffer)
    u = g + momentum * (momentum_buffer - g)                        (nesterov; else the buffer)
    p = p - lr * weight_decay * p - lr * ratio(p.shape) * orthogonalized(u)

All matrices move their momentum in one launch and take their update in another; between them those
of one shape go through the iteration of ``newton_schulz`` together, 3 launches each of ns_steps.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr
from torch.optim._muon import muon as torch_muon
from torch.optim.optimizer import ParamsT

from .._dispatch import dispatched
from .._op import Inputs, Op
from .._register import torch_op
from .adam import lists_of, torchs_step
from .fused import FLAGS, Fused, StateDtype, uncovered_tensors, unscaled
from .kernels import UNCORRECTED
from .plan import Iteration, Plan, Row

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ADJUSTMENTS = [
    name
    for name in ("original", "match_rms_adamw", "spectral_unclamped")
    if _adjust_lr(1.0, name, torch.Size((4, 1))) != 1.0  # the last is of torch 2.14
]


@torch.no_grad()
def reference(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_bufs: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
    ns_steps: int = 5,
    eps: float = 1e-7,
    adjust_lr_fn: str | None = None,
) -> None:
    """A step of a for-loop over the matrices, in float64 where they are: PyTorch's is bfloat16."""
    a, b, c = ns_coefficients
    for p, g, buffer in zip(params, grads, momentum_bufs, strict=True):
        buffer.lerp_(g, 1 - momentum)
        u = g.lerp(buffer, momentum) if nesterov else buffer
        x = u if u.dtype == torch.float64 else u.bfloat16()
        x = x.T if p.shape[0] > p.shape[1] else x
        x = x / x.norm().clamp(min=eps)
        for _ in range(ns_steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        x = x.T if p.shape[0] > p.shape[1] else x
        p.mul_(1 - lr * weight_decay)
        p.add_(x, alpha=-_adjust_lr(lr, adjust_lr_fn, p.shape))


# --- launch -------------------------------------------------------------------------------------


def _fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_bufs: Sequence[Tensor],
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: Sequence[float],
    ns_steps: int,
    eps: float,
    adjust_lr_fn: str | None,
) -> None:
    return None


@torch_op("muon_step", fake=_fake, mutates=("params", "momentum_bufs"))
def _step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_bufs: Sequence[Tensor],
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: Sequence[float],
    ns_steps: int,
    eps: float,
    adjust_lr_fn: str | None,
) -> None:
    a, b, c = ns_coefficients
    iteration = Iteration(nesterov, (a, b, c), ns_steps, eps)
    steps = torch.zeros(len(params), device=params[0].device)
    ratios = [_adjust_lr(1.0, adjust_lr_fn, p.shape) for p in params]
    rows = [
        Row(p, g, m, None, None, step, i, "muon", i, iteration=iteration)
        for i, (p, g, m, step) in enumerate(zip(params, grads, momentum_bufs, steps, strict=True))
    ]
    plan = Plan(rows)
    plan.take_gradients(grads)
    kind = float(UNCORRECTED.value)
    plan.set_hyper(
        [[lr, momentum, 0.0, 0.0, weight_decay, 1.0, kind, 0.0, ratio] for ratio in ratios], []
    )
    plan.run(None, None)


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_bufs: list[Tensor],
    *,
    ns_steps: int = 5,
    **_: Any,
) -> str | None:
    lists = (params, grads, momentum_bufs)
    if any(len(tensors) != len(params) for tensors in lists):
        return "the lists differ in length"
    if any(p.device != params[0].device for p in params):
        return "the parameters are on several devices"
    if any(p.ndim != 2 for p in params):
        return "a parameter is not a matrix"
    if ns_steps < 1:
        return f"ns_steps={ns_steps}"
    reasons = (uncovered_tensors(*tensors) for tensors in zip(*lists, strict=True))
    return next((reason for reason in reasons if reason), None)


def _eager(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_bufs: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
    ns_steps: int = 5,
    eps: float = 1e-7,
    adjust_lr_fn: str | None = None,
) -> None:
    with torch.no_grad():
        torch_muon(
            params, grads, momentum_bufs, lr=lr, weight_decay=weight_decay, momentum=momentum,
            nesterov=nesterov, ns_coefficients=ns_coefficients, ns_steps=ns_steps, eps=eps,
            adjust_lr_fn=adjust_lr_fn, has_complex=any(map(torch.is_complex, params)),
        )  # fmt: skip


@dispatched(eager=_eager, uncovered=_uncovered)
def muon_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_bufs: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
    ns_steps: int = 5,
    eps: float = 1e-7,
    adjust_lr_fn: str | None = None,
) -> None:
    """One step of Muon in place on lists of matrices; the arguments of torch.optim's.

    Args:
        params: (rows, columns) float32, float16 or bfloat16 of any strides, on one device.
        grads: Of the shapes of ``params``; left as they are.
        momentum_bufs: Running means of the gradients.
        lr: Learning rate.
        weight_decay: Decoupled, times ``lr``.
        momentum: Decay of ``momentum_bufs``.
        nesterov: Looks one gradient ahead.
        ns_coefficients: Of the iteration.
        ns_steps: Iterations.
        eps: The least norm that a direction is divided by.
        adjust_lr_fn: "original" (None) multiplies the rate by the root of rows / columns where that
            is over 1, "match_rms_adamw" by 0.2 times the root of the longer side, and
            "spectral_unclamped" (torch 2.14) by the root of rows / columns whatever it is.
    """
    _step(
        params, grads, momentum_bufs, float(lr), weight_decay, momentum, nesterov,
        list(ns_coefficients), ns_steps, eps, adjust_lr_fn,
    )  # fmt: skip


class Muon(Fused):
    """``torch.optim.Muon`` that takes every parameter of a model.

    Matrices are orthogonalized, and everything else is updated by AdamW in the same launches. A
    group may say which it wants with ``use_muon``: True or False for all its parameters, and where
    it says nothing it is split in two by the rule that parameters of two dimensions are matrices.
    Embeddings and the last layer have two dimensions too, and train better by AdamW: give them a
    group of their own with ``"use_muon": False`` and its ``lr``, ``betas``, ``eps`` and
    ``weight_decay``.

    The arguments, defaults, errors and ``state_dict`` of matrices are torch's, and a checkpoint
    of theirs continues in either.

    Of DTensors that one dimension of the mesh shards, as under FSDP2 and HSDP, the matrices of a
    shape are dealt out over that dimension: each travels in bfloat16 to one process, which
    orthogonalizes it, and back in parts. A process receives 4 / W bytes for an element of a matrix,
    where to gather it would be 2, and does 1 / W of the products. Replicas each do the same work.
    Of matrices that two dimensions shard, every process gathers and orthogonalizes all.

    Args:
        params: As torch.optim.Muon, but of any shapes.
        lr: As torch.optim.Muon, with all before adamw_lr.
        weight_decay: Times ``lr``.
        momentum: Decay of the running mean of the gradient.
        nesterov: Looks one gradient ahead.
        ns_coefficients: Of the iteration.
        eps: The least norm that a direction is divided by.
        ns_steps: Iterations.
        adjust_lr_fn: "original" (None), "match_rms_adamw", which fits a rate found for AdamW, or
            with torch 2.14 "spectral_unclamped".
        adamw_lr: Learning rate of what is no matrix; None is ``lr``.
        adamw_betas: As torch.optim.AdamW.
        adamw_eps: As torch.optim.AdamW.
        adamw_weight_decay: None is ``weight_decay``.
        capturable: Keeps the steps on the device, for CUDA graphs; see ``Adam``.
        fused: As ``AdamW``; False is torch's.
        max_grad_norm: As ``AdamW``, with all that follow.
        state_dtype: Of the running means of both kinds.
        master: float32 weights beside half-precision parameters.
        rounding: Of bfloat16 parameters.
        seed: Of that rounding.
        ema_decay: Keeps an average of the weights.

    Raises:
        ValueError: What torch.optim.Muon raises, in its words; an option outside the above.
    """

    _flags = (*FLAGS, "nesterov", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn", "use_muon")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype | None = None,
        master: Literal["fp32", "split"] | None = None,
        rounding: Literal["stochastic"] | None = None,
        seed: int | None = None,
        ema_decay: float | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Learning rate should be >= 0 but is: {lr}")
        if not momentum >= 0.0:
            raise ValueError(f"momentum should be >= 0 but is: {momentum}")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight decay should be >= 0 but is: {weight_decay}")
        if adjust_lr_fn is not None and adjust_lr_fn not in _ADJUSTMENTS:
            raise ValueError(f"Adjust learning rate function {adjust_lr_fn} is not supported")
        if ns_steps >= 100:
            raise ValueError("Number of steps must be less than 100 for computational efficiency")
        if len(ns_coefficients) != 3:
            raise ValueError("Coefficients must be a tuple of exactly 3 values")
        adamw = {
            "adamw_lr": adamw_lr, "adamw_betas": adamw_betas, "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
        }  # fmt: skip
        torch.optim.AdamW([torch.zeros(1)], **_of_adamw(adamw))  # for its errors
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn, "capturable": capturable, "fused": fused, **adamw,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._set_options(
            max_grad_norm=max_grad_norm, state_dtype=state_dtype, master=master,
            rounding=rounding, seed=seed, ema_decay=ema_decay, cautious=False,
        )  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, or two where it holds matrices and others and says nothing of them."""
        given = param_group["params"] if isinstance(param_group, dict) else None
        if isinstance(given, Tensor):
            given = [given]
        if given is None or isinstance(given, set) or "use_muon" in param_group:
            self._add_one(param_group)
            return
        parts: tuple[list[Any], list[Any]] = ([], [])
        for named in (given := list(given)):
            p = named[1] if isinstance(named, tuple) else named
            parts[0 if isinstance(p, Tensor) and p.ndim == 2 else 1].append(named)
        for use_muon, part in zip((True, False), parts, strict=True):
            if part or not (given or use_muon):
                own = {} if use_muon else _of_adamw(self.defaults)
                own |= {"betas": param_group["betas"]} if "betas" in param_group else {}
                self._add_one({**param_group, **own, "params": part, "use_muon": use_muon})

    def _add_one(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and not param_group["use_muon"]:
            param_group = {**_of_adamw(self.defaults), **_ADAMW_FLAGS, **param_group}
        super().add_param_group(param_group)
        if self.param_groups[-1]["use_muon"]:
            for p in self.param_groups[-1]["params"]:
                if p.ndim != 2:
                    del self.param_groups[-1]
                    raise ValueError(
                        "Muon only supports 2D parameters whereas we found a parameter with size: "
                        f'{p.size()}; "use_muon" must be False in its group'
                    )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of torch's
            group.setdefault("use_muon", True)
            for name in ("capturable", "fused"):
                group.setdefault(name, self.defaults[name])

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "muon" if group["use_muon"] else "adamw"

    def _lr_ratio(self, group: dict[str, Any], p: Tensor) -> float:
        return _adjust_lr(1.0, group["adjust_lr_fn"], p.shape) if group["use_muon"] else 1.0

    def _iteration(self, group: dict[str, Any]) -> Iteration | None:
        if not group["use_muon"]:
            return None
        return Iteration(
            group["nesterov"], tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"]
        )

    def _begin_state(self, group: dict[str, Any], p: Tensor) -> None:
        assert p.grad is not None
        if not group["use_muon"]:
            lists_of(self, group, [p])
            return
        if torch.is_complex(p):
            raise RuntimeError("Muon does not support complex parameters")
        if p.grad.is_sparse:
            raise RuntimeError("Muon does not support sparse gradients")
        self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)

    def _eager_step(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if not group["use_muon"]:
            torchs_step(self, group, params, grad_scale, found_inf)
            return
        grads = unscaled([p.grad for p in params if p.grad is not None], grad_scale, found_inf)
        if grads is None:
            return
        names = ("weight_decay", "momentum", "nesterov", "ns_coefficients", "ns_steps", "eps")
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        _eager(
            params, grads, buffers, lr=group["lr"], adjust_lr_fn=group["adjust_lr_fn"],
            **{name: group[name] for name in names},
        )  # fmt: skip
        torch._foreach_add_([self.state[p]["step"] for p in params], 1)


_ADAMW_FLAGS = {
    "amsgrad": False, "maximize": False, "foreach": None, "differentiable": False,
    "decoupled_weight_decay": True,
}  # fmt: skip


def _of_adamw(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are AdamW's, under its names."""
    names = ("lr", "betas", "eps", "weight_decay")
    given = {name: options[f"adamw_{name}"] for name in names}
    return {name: value for name, value in given.items() if value is not None}


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    **options: Any,
) -> Inputs:
    def noise(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    return {
        "params": [noise(s) for s in shapes],
        "grads": [noise(s) for s in shapes],
        "momentum_bufs": [noise(s) for s in shapes],
        "lr": 1e-1,
        "weight_decay": 0.1,
        "momentum": 0.95,
    } | options


def _multiply_adds(rows: int, columns: int) -> int:
    """Of one iteration, whose two symmetric products cost half."""
    M, N = sorted((rows, columns))
    return (3 * M * M * N + M**3) // 2


OP = Op(
    fused=muon_step,
    reference=reference,
    example=_example,
    sizes=(
        {"shapes": ((1, 1),), "ns_steps": 1},
        {"shapes": ((9, 30), (0, 3), (9, 30), (40, 20)), "ns_steps": 2},
        {"shapes": ((131, 140),), "ns_steps": 1, "nesterov": False, "adjust_lr_fn": "original"},
    ),
    bench_sizes=({"shapes": 12 * ((2304, 768), (768, 768), (3072, 768), (768, 3072))},),
    work=lambda params, grads, momentum_bufs, ns_steps=5, **_: (
        sum(2 * t.nbytes for t in (*params, *momentum_bufs)) + sum(g.nbytes for g in grads),
        sum(2 * ns_steps * _multiply_adds(*p.shape) for p in params),
    ),
)
