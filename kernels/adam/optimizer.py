"""``Adam`` and ``AdamW``: torch.optim's classes with the fused step."""

import operator
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.optimizer import ParamsT

from .. import _dispatch
from .plan import Plan, Row
from .step import adamw_step, advance, all_suit_torch_fused, uncovered_tensors


class _Planned(NamedTuple):
    """What a step launches, and all that this choice depends on but the gradients' addresses."""

    settings: list[Any]
    params: list[Tensor]  # of all groups
    has_grad: list[bool]
    states: list[dict[str, Any]]  # of all parameters that have one
    plans: list[tuple[Plan, list[int]]]  # one a device, with its places among all parameters
    written: list[Tensor]  # the parameters that the plans write
    written_states: list[dict[str, Any]]
    addresses: list[int]
    host_steps: list[Tensor]  # of each plan whose steps are on the host, all of them in one vector
    versions: list[int]  # of host_steps: another one says that somebody wrote to them
    eager: list[list[Tensor]]  # of each group, the parameters that are left to PyTorch


def _addresses(params: list[Tensor], states: list[dict[str, Any]]) -> list[int]:
    """Where the parameters and their states lie, and how many elements the parameters have."""
    found = list(map(Tensor.data_ptr, params))
    found += map(Tensor.numel, params)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        found += map(Tensor.data_ptr, [s[name] for s in states])
    for name in ("max_exp_avg_sq", "master", "ema"):
        found += [s[name].data_ptr() for s in states if name in s]
    return found


def _same(some: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(map(operator.is_, some, others))


class _Fused(torch.optim.Adam):
    """The step that Adam and AdamW share."""

    _planned: _Planned | None = None
    _last_grad_norm: Tensor | None = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler asks. torch's flag is an attribute of the instance, which a deepcopy loses.
        return all(group["fused"] for group in self.param_groups)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Lets torch's constructor set what the groups already say."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, in place.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, or None.
        """
        getattr(self, _HEALTH_CHECK)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if torch.compiler.is_compiling() and not any(o in self.defaults for o in _OPTIONS):
                self._traced_step()
            else:
                self._take_step()
        return loss

    @torch._disable_dynamo
    def _take_step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        planned = self._planned
        if planned is None or not self._still_holds(planned, params, grads):
            planned = self._planned = self._make_plan(params, grads)
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        max_norm = self._max_grad_norm()
        if max_norm is not None and not planned.plans:
            grad_scale = self._clipping_scale(
                [g for g in grads if g is not None], grad_scale, max_norm
            )
        if planned.plans:
            numbers, on_device = self._hyper()
            for plan, _ in planned.plans:
                plan.set_hyper(numbers, on_device)
                scale, inf = _moved(grad_scale, plan.device), _moved(found_inf, plan.device)
                plan.run(scale, inf, max_norm, self.param_groups[0].get("seed") or 0)
                if max_norm is not None:
                    self._last_grad_norm = plan.norm
            torch.autograd.graph.increment_version(planned.written)
            for i, steps in enumerate(planned.host_steps):
                advance([steps], found_inf)
                planned.versions[i] = steps._version
        for group, left in zip(self.param_groups, planned.eager, strict=True):
            if left:
                self._eager_step(group, left, grad_scale, found_inf)

    def _max_grad_norm(self) -> float | None:
        values = {group.get("max_grad_norm") for group in self.param_groups}
        if len(values) > 1:
            raise ValueError(
                f"{type(self).__name__}: max_grad_norm must be the same in all groups; got {values}"
            )
        return values.pop()

    def _clipping_scale(
        self, grads: list[Tensor], grad_scale: Tensor | None, max_norm: float
    ) -> Tensor | None:
        """What divides the gradients on PyTorch's path, so that their norm is at most max_norm."""
        if not grads:
            return grad_scale
        norm = torch.nn.utils.get_total_norm([g.float() for g in grads])
        if grad_scale is not None:
            norm = norm / grad_scale
        self._last_grad_norm = norm
        scale = 1 / (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return scale if grad_scale is None else scale * grad_scale

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The norm of all gradients at the last step, before clipping, on their device.

        None before the first step, and where ``max_grad_norm`` is None.
        """
        return self._last_grad_norm

    def _set_options(self, **options: Any) -> None:
        """Keeps what was asked beyond torch's arguments in the groups; nothing where not asked."""
        name = type(self).__name__
        max_norm = options["max_grad_norm"]
        if max_norm is not None and not max_norm > 0.0:
            raise ValueError(f"{name}: max_grad_norm must be positive; got {max_norm}")
        ema_decay = options["ema_decay"]
        if ema_decay is not None and not 0.0 < ema_decay < 1.0:
            raise ValueError(f"{name}: ema_decay must be between 0 and 1; got {ema_decay}")
        for option, allowed in (
            ("state_dtype", (None, torch.float32, torch.bfloat16)),
            ("master", (None, "fp32", "split")),
            ("rounding", (None, "stochastic")),
        ):
            if options[option] not in allowed:
                raise ValueError(
                    f"{name}: {option} must be one of {allowed}; got {options[option]!r}"
                )
        if options["master"] == "split" and options["rounding"]:
            raise ValueError(f'{name}: rounding must be None beside master="split", which is exact')
        asked = {option: value for option, value in options.items() if value is not None}
        self.defaults.update(asked)
        for group in self.param_groups:
            for option, value in asked.items():
                group.setdefault(option, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of torch's has none of these
            for option in _OPTIONS:
                if option in self.defaults:
                    group.setdefault(option, self.defaults[option])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads torch's state_dict or this class's.

        torch casts states to their parameter's dtype. A state that was saved in float32, in
        ``state_dtype``, or as a master weight keeps its bits where this optimizer holds it so.
        """
        kept: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, given: kept.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        ids = [i for group in kept["param_groups"] for i in group["params"]]
        places = [(group, p) for group in self.param_groups for p in group["params"]]
        for i, (group, p) in zip(ids, places, strict=True):
            given, state = kept["state"].get(i, {}), self.state.get(p, {})
            if not state:
                continue
            for name, value in given.items():
                own = name in ("master", "ema")
                dtype = value.dtype if own else group.get("state_dtype")
                if name in _STATES and dtype is not None:
                    state[name] = value.to(p.device, dtype, copy=True)
            self._add_extras(group, p, state)

    def _settings(self) -> list[Any]:
        flags = [tuple([group[name] for name in _FLAGS]) for group in self.param_groups]
        flags += [tuple([group.get(name) for name in _BEYOND_TORCH]) for group in self.param_groups]
        flags.append((self.param_groups[0].get("max_grad_norm") is None,))
        return [_dispatch._backend, _dispatch._cpu_runner, *flags]

    def _still_holds(
        self, planned: _Planned, params: list[Tensor], grads: list[Tensor | None]
    ) -> bool:
        """Whether the plan is right for these tensors; then its tables hold the gradients."""
        present = cast(list[Tensor], grads)  # at a plan's places none is missing
        return (
            len(params) == len(planned.params)
            and len(self.state) == len(planned.states)
            and _same(params, planned.params)
            and _same(self.state.values(), planned.states)
            and [g is not None for g in grads] == planned.has_grad
            and self._settings() == planned.settings
            and _addresses(planned.written, planned.written_states) == planned.addresses
            and [steps._version for steps in planned.host_steps] == planned.versions
            and all(
                plan.take_gradients(
                    present if len(grads) == plan.size else [present[i] for i in places]
                )
                for plan, places in planned.plans
            )
        )

    def _lists(self, group: dict[str, Any], params: list[Tensor]) -> tuple[list[Any], bool]:
        """Parameters with gradients, gradients and states; torch's method makes the states."""
        for p in params:
            if p.grad is not None and not self.state.get(p) and not p.grad.is_sparse:
                self._make_state(group, p)
        lists: list[Any] = [[] for _ in range(6)]
        has_complex = self._init_group({**group, "params": params}, *lists)
        return lists, has_complex

    def _make_state(self, group: dict[str, Any], p: Tensor) -> None:
        """What torch would not make: states of another dtype, and master weights."""
        if not any(group.get(name) for name in _BEYOND_TORCH):
            return
        self._init_group({**group, "params": [p]}, *([] for _ in range(6)))
        state, dtype = self.state[p], group.get("state_dtype")
        for name in _STATES[:3]:
            if dtype is not None and name in state:
                state[name] = state[name].to(dtype)
        self._add_extras(group, p, state)

    def _add_extras(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        """Master weights and the average, where the group asks for them and they are missing."""
        master = group.get("master") if p.dtype in (torch.bfloat16, torch.float16) else None
        if master == "split" and p.dtype != torch.bfloat16:
            name = type(self).__name__
            raise ValueError(f'{name}: master="split" must be used with bfloat16; got {p.dtype}')
        kind = {"fp32": torch.float32, "split": torch.int16, None: None}[master]
        if "master" in state and state["master"].dtype != kind:
            del state["master"]
        if kind is not None and "master" not in state:
            whole = kind == torch.float32
            state["master"] = (
                p.detach().to(kind, copy=True) if whole else torch.zeros_like(p, dtype=kind)
            )
        if group.get("ema_decay") is None:
            state.pop("ema", None)
        elif "ema" not in state:
            state["ema"] = p.detach().to(torch.float32, copy=True)

    def _make_plan(self, params: list[Tensor], grads: list[Tensor | None]) -> _Planned:
        rows: dict[torch.device, list[tuple[int, Row]]] = {}
        eager: list[list[Tensor]] = []
        places = {p: i for i, p in enumerate(params)}
        repeated = len(places) < len(params)
        for i, group in enumerate(self.param_groups):
            (found, found_grads, m, v, vmax, steps), _ = self._lists(group, group["params"])
            eager.append([])
            for k, p in enumerate(found):
                largest = vmax[k] if group["amsgrad"] else None
                states = [m[k], v[k]] + ([largest] if group["amsgrad"] else [])
                reason = self._uncovered(group, p, found_grads[k], states, repeated)
                if reason is None:
                    row = Row(
                        p, found_grads[k], m[k], v[k], largest, steps[k], i,
                        group["decoupled_weight_decay"], places[p], self.state[p].get("master"),
                        group.get("rounding") == "stochastic", self.state[p].get("ema"),
                    )  # fmt: skip
                    rows.setdefault(p.device, []).append((places[p], row))
                elif _dispatch._backend == "triton" or any(group.get(o) for o in _BEYOND_TORCH):
                    name = type(self).__name__
                    asked = 'backend "triton"'
                    if _dispatch._backend != "triton":
                        asked = next(f"{o}={group[o]!r}" for o in _BEYOND_TORCH if group.get(o))
                    raise RuntimeError(f"{name}: {asked} cannot run this step: {reason}")
                else:
                    eager[-1].append(p)
        max_norm = self._max_grad_norm()
        if max_norm is not None and len(rows) + any(eager) > 1:  # the norm is of all gradients
            eager = [
                [p for p in group["params"] if p.grad is not None] for group in self.param_groups
            ]
            rows = {}
        plans, host_steps = [], []
        for members in rows.values():
            plan = Plan([row for _, row in members])
            plan.take_gradients([row.g for _, row in members])
            plans.append((plan, [place for place, _ in members]))
            if plan.host_steps:
                together = torch.stack([members[j][1].step for j in plan.host_steps])
                for j, step in zip(plan.host_steps, together.unbind(), strict=True):
                    self.state[members[j][1].p]["step"] = step
                host_steps.append(together)
        written = [row.p for members in rows.values() for _, row in members]
        written_states = [self.state[p] for p in written]
        return _Planned(
            settings=self._settings(),
            params=params,
            has_grad=[g is not None for g in grads],
            states=list(self.state.values()),
            plans=plans,
            written=written,
            written_states=written_states,
            addresses=_addresses(written, written_states),
            host_steps=host_steps,
            versions=[steps._version for steps in host_steps],
            eager=eager,
        )

    def _uncovered(
        self, group: dict[str, Any], p: Tensor, g: Tensor, states: list[Tensor], repeated: bool
    ) -> str | None:
        """Why PyTorch updates this parameter, or None."""
        if _dispatch._backend == "torch":
            return 'the backend is "torch"'
        for name, value in (("fused", False), ("foreach", True), ("differentiable", True)):
            if group[name] is value:
                return f"{name}={value}"
        if repeated:
            return "a parameter stands in the groups twice"
        return (
            _dispatch.nowhere_to_run(p)
            or _dispatch._foreign([p, g, *states])
            or uncovered_tensors(p, g, *states)
        )

    def _hyper(self) -> tuple[list[list[float]], list[tuple[int, int, Tensor]]]:
        """The groups' numbers, and those among them that only the device knows."""
        numbers, on_device = [], []
        for i, group in enumerate(self.param_groups):
            row = [group["lr"], *group["betas"], group["eps"], group["weight_decay"]]
            for j, x in enumerate(row):
                if isinstance(x, Tensor):
                    if x.is_cuda:
                        on_device.append((i, j, x))
                    row[j] = 0.0 if x.is_cuda else float(x)
            row += [-1.0 if group["maximize"] else 1.0, float(group["decoupled_weight_decay"])]
            row.append(group.get("ema_decay") or 0.0)
            numbers.append(row)
        return numbers, on_device

    def _eager_step(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """PyTorch's step of these parameters of the group."""
        lists, has_complex = self._lists(group, params)
        fused, foreach = group["fused"], group["foreach"]
        torch_chooses = fused is False or foreach or group["differentiable"]
        on_cpu = bool(lists[0]) and lists[0][0].device.type == "cpu"
        if on_cpu and not torch_chooses and (fused or not group["capturable"]):
            fused = all_suit_torch_fused(lists)
        # Clipping leaves the gradients alone, where torch's fused step would write them.
        if group.get("max_grad_norm") is not None or (not fused and not torch_chooses):
            if found_inf is not None and found_inf.item():
                return
            if grad_scale is not None:
                lists[1] = [g / grad_scale for g in lists[1]]
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

    def _traced_step(self) -> None:
        """The step as torch.compile sees it: one operator a group."""
        for group in self.param_groups:
            lists, _ = self._lists(group, group["params"])
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


_BEYOND_TORCH = (
    "state_dtype",
    "master",
    "rounding",
    "ema_decay",
)  # what torch's own step cannot do
_OPTIONS = (*_BEYOND_TORCH, "seed", "max_grad_norm")
_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "ema")


_HEALTH_CHECK = next(  # torch 2.13 renamed it
    name
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    if hasattr(torch.optim.Optimizer, name)
)
_FLAGS = ("amsgrad", "foreach", "fused", "differentiable", "decoupled_weight_decay")


def _moved(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else t.to(device, non_blocking=True)


class Adam(_Fused):
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
        capturable: Keeps the steps on the device, for CUDA graphs.
        differentiable: True is torch's.
        fused: Above.
        max_grad_norm: Scales the gradients within the step so that the norm of all of them,
            accumulated in float32, is at most this. The gradients themselves stay as they are.
        state_dtype: torch.float32 or torch.bfloat16 for the running means; None is the
            parameter's dtype, as torch.
        master: "fp32" keeps float32 weights beside half-precision parameters; "split" keeps the
            16 bits that bfloat16 parameters lack of float32, to the same result in 2 bytes less.
        rounding: "stochastic" rounds bfloat16 parameters to either neighbour at random, without
            bias; the same for the same seed, step, parameter and element. None: to the nearest.
        seed: Of that rounding; default 0.
        ema_decay: Keeps an average of each weight in float32, ``state[p]["ema"]``, that starts at
            the weight and moves by ``1 - ema_decay`` of the distance at each step.

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
        state_dtype: torch.dtype | None = None,
        master: Literal["fp32", "split"] | None = None,
        rounding: Literal["stochastic"] | None = None,
        seed: int | None = None,
        ema_decay: float | None = None,
    ) -> None:
        torch.optim.Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach,
            maximize=maximize, capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        self._set_options(
            max_grad_norm=max_grad_norm, state_dtype=state_dtype, master=master,
            rounding=rounding, seed=seed, ema_decay=ema_decay,
        )  # fmt: skip


class AdamW(_Fused, torch.optim.AdamW):
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
        state_dtype: torch.dtype | None = None,
        master: Literal["fp32", "split"] | None = None,
        rounding: Literal["stochastic"] | None = None,
        seed: int | None = None,
        ema_decay: float | None = None,
    ) -> None:
        torch.optim.AdamW.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach,
            maximize=maximize, capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._set_options(
            max_grad_norm=max_grad_norm, state_dtype=state_dtype, master=master,
            rounding=rounding, seed=seed, ema_decay=ema_decay,
        )  # fmt: skip
