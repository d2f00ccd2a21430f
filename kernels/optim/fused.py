"""``Fused``: the step that all optimizers here share, and what they keep beyond torch's."""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import _dispatch
from .kernels import ADAM, ADAMW, UNCORRECTED
from .plan import FLOATS, Iteration, Plan, Row, is_dense
from .rounding import CODE_BLOCK, decoded_tensor, encoded_tensor
from .sharding import gathered, is_dtensor, like, local, misplaced, place_of

StateDtype = torch.dtype | Literal["8bit"]

# What the kernels keep for each parameter, by algorithm: names of running means in the state.
MOMENTS = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "muon": ("momentum_buffer",),
}
_UNSIGNED = ("exp_avg_sq", "max_exp_avg_sq")
_LEAST_CODED = 4096  # elements: what is smaller costs nothing in float32

# What torch's own steps cannot do, and all options beyond torch's.
_BEYOND_TORCH = ("state_dtype", "master", "rounding", "ema_decay", "cautious")
_PRECISION = ("state_dtype", "master")
OPTIONS = (*_BEYOND_TORCH, "seed", "max_grad_norm")
FLAGS = ("amsgrad", "foreach", "fused", "differentiable", "decoupled_weight_decay", *_BEYOND_TORCH)

_HEALTH_CHECK = next(  # torch 2.13 renamed it
    name
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    if hasattr(torch.optim.Optimizer, name)
)

_params_of = operator.itemgetter("params")
_grad_of = operator.attrgetter("grad")


class _Planned(NamedTuple):
    """What a step launches, and all that this choice depends on but the gradients' addresses."""

    settings: list[Any]
    params: list[Tensor]  # of all groups
    has_grad: list[bool]
    states: list[dict[str, Any]]  # of all parameters that have one
    plans: list[tuple[Plan, list[int]]]  # one a device, with its places among all parameters
    hyper: list[tuple[int, float]]  # groups, and what multiplies their learning rates
    sharded: bool  # whether a parameter is a DTensor
    written: list[Tensor]  # the parameters that the plans write
    tensors: list[Iterable[Tensor]]  # of each one's state, whatever is in it by then
    addresses: list[int]
    host_steps: list[Tensor]  # of each plan whose steps are on the host, all of them in one vector
    versions: list[int]  # of host_steps: another one says that somebody wrote to them
    eager: list[list[Tensor]]  # of each group, the parameters that are left to PyTorch


class _Tensors:
    """The tensors of a state in which there is something else."""

    def __init__(self, state: dict[str, Any]):
        self.state = state

    def __iter__(self) -> Iterator[Tensor]:
        return (t for t in self.state.values() if isinstance(t, Tensor))


def _locals(tensors: Iterable[Tensor], sharded: bool) -> Iterable[Tensor]:
    return map(local, tensors) if sharded else tensors


def _same(some: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(map(operator.is_, some, others))


def uncovered_tensors(*tensors: Tensor, coded: bool = False) -> str | None:
    """Why the kernel does not update a parameter with these tensors, the parameter first."""
    p = tensors[0]
    if any(t.dtype != tensors[2].dtype for t in tensors[3:]):
        return "the states differ in dtype"
    for i, t in enumerate(tensors):
        if t.dtype not in FLOATS and not (coded and i > 1 and t.dtype == torch.uint8):
            return f"a tensor is {t.dtype}"
        if t.device != p.device:
            return f"a tensor is on {t.device} and its parameter on {p.device}"
        if t.shape != p.shape:
            return f"a tensor has shape {tuple(t.shape)}, not its parameter's {tuple(p.shape)}"
        if t.layout is not torch.strided:
            return f"a tensor has layout {t.layout}"
        if i != 1 and any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True)):
            return "elements of a tensor share memory"
    return None


def _hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step with its hooks and its range in a profile: torch's wrapper, where it has a use.

    Where nobody watches it costs 27 us of a step of 190 (torch 2.13), most of it for the range. A
    class that overrides the step has been wrapped by torch itself, and its hooks have run.
    """
    watched = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        optimizer = args[0]
        if not (
            torch.compiler.is_compiling()
            or torch.autograd._profiler_enabled()
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return step(*args, **kwargs)
        overridden = getattr(type(optimizer).step, "__code__", None) is watched.__code__
        return (step if overridden else watched)(*args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # torch wraps what is not
    return wrapper


class Fused(torch.optim.Optimizer):
    """The step that Adam, AdamW, Lion and Muon share."""

    _planned: _Planned | None = None
    _last_grad_norm: Tensor | None = None
    _flags: tuple[str, ...] = FLAGS  # of a group: a plan is made for their values

    # --- what each optimizer says of itself -----------------------------------------------------

    def _algorithm(self, group: dict[str, Any]) -> str:
        """Which of ``MOMENTS`` updates the group."""
        raise NotImplementedError

    def _begin_state(self, group: dict[str, Any], p: Tensor) -> None:
        """Makes the state that torch would; raises what torch would."""
        raise NotImplementedError

    def _eager_step(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """PyTorch's step of these parameters of the group."""
        raise NotImplementedError

    def _lr_ratio(self, group: dict[str, Any], p: Tensor) -> float:
        """What multiplies the learning rate of this parameter."""
        return 1.0

    def _iteration(self, group: dict[str, Any]) -> Iteration | None:
        """How the group's matrices are orthogonalized."""
        return None

    def _traced_step(self) -> bool:
        """The step as torch.compile sees it, if there is one."""
        return False

    # --- the step -------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler asks. torch's flag is an attribute of the instance, which a deepcopy loses.
        return all(group["fused"] for group in self.param_groups)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Lets torch's constructor set what the groups already say."""

    @_hooked
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
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            if not (torch.compiler.is_compiling() and self._traced_step()):
                self._take_step()
        return loss

    @torch._disable_dynamo
    def _take_step(self) -> None:
        params = list(chain.from_iterable(map(_params_of, self.param_groups)))
        grads = list(map(_grad_of, params))
        planned = self._planned
        if planned is None or not self._still_holds(planned, params, grads):
            planned = self._planned = self._make_plan(params, grads)
        grad_scale = gathered(getattr(self, "grad_scale", None))
        found_inf = gathered(getattr(self, "found_inf", None))
        max_norm = self._max_grad_norm()
        if max_norm is not None and not planned.plans:
            grad_scale = self._clipping_scale(
                [g for g in grads if g is not None], grad_scale, max_norm
            )
        if planned.plans:
            numbers, on_device = self._hyper(planned.hyper)
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
        norm: float | None = self.param_groups[0].get("max_grad_norm")
        for group in self.param_groups:
            if group.get("max_grad_norm") != norm:
                raise ValueError(
                    f"{type(self).__name__}: max_grad_norm must be the same in all groups; got "
                    f"{[g.get('max_grad_norm') for g in self.param_groups]}"
                )
        return norm

    def _clipping_scale(
        self, grads: list[Tensor], grad_scale: Tensor | None, max_norm: float
    ) -> Tensor | None:
        """What divides the gradients on PyTorch's path, so that their norm is at most max_norm."""
        if not grads:
            return grad_scale
        norm = gathered(torch.nn.utils.get_total_norm([g.float() for g in grads]))
        assert norm is not None
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

    def _hyper(
        self, rows: list[tuple[int, float]]
    ) -> tuple[list[list[float]], list[tuple[int, int, Tensor]]]:
        """The rows of hyper-parameters, and those numbers that only the device knows."""
        numbers, on_device = [], []
        for i, (place, ratio) in enumerate(rows):
            group = self.param_groups[place]
            algorithm = self._algorithm(group)
            betas = (group["momentum"], 0.0) if algorithm == "muon" else group["betas"]
            row = [group["lr"], *betas, group.get("eps", 0.0), group["weight_decay"]]
            for j, x in enumerate(row):
                if isinstance(x, Tensor):
                    if _on_device(x):
                        on_device.append((i, j, x))
                    row[j] = 0.0 if _on_device(x) else float(x)
            row += [-1.0 if group.get("maximize") else 1.0, _KINDS[algorithm]]
            row += [group.get("ema_decay") or 0.0, ratio]
            numbers.append(row)
        return numbers, on_device

    # --- when the plan holds --------------------------------------------------------------------

    def _settings(self) -> list[Any]:
        flags = [tuple(map(group.get, self._flags)) for group in self.param_groups]
        first = self.param_groups[0]
        clips = first.get("max_grad_norm") is not None
        return [_dispatch._backend, _dispatch._cpu_runner, clips, first.get("seed"), *flags]

    def _still_holds(
        self, planned: _Planned, params: list[Tensor], grads: list[Tensor | None]
    ) -> bool:
        """Whether the plan is right for these tensors; then its tables hold the gradients."""
        sharded = planned.sharded
        try:
            if not (
                len(params) == len(planned.params)
                and len(self.state) == len(planned.states)
                and _same(params, planned.params)
                and _same(self.state.values(), planned.states)
                and self._settings() == planned.settings
                and _addresses(planned.written, planned.tensors, sharded) == planned.addresses
                and [steps._version for steps in planned.host_steps] == planned.versions
                and (
                    len(planned.written) == len(params)  # each gradient is looked at below
                    or [g is not None for g in grads] == planned.has_grad
                )
            ):
                return False
            for plan, places in planned.plans:
                present: Any = grads if len(grads) == plan.size else [grads[i] for i in places]
                if not plan.take_gradients(list(_locals(present, sharded))):
                    return False
        except TypeError:  # where a tensor was is None by now, or a number
            return False
        return True

    def _make_plan(self, params: list[Tensor], grads: list[Tensor | None]) -> _Planned:
        rows: dict[torch.device, list[tuple[int, Row]]] = {}
        eager: list[list[Tensor]] = []
        hyper: dict[tuple[int, float], int] = {}
        places = {p: i for i, p in enumerate(params)}
        repeated = len(places) < len(params)
        for i, group in enumerate(self.param_groups):
            eager.append([])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state_of(group, p)
                reason = self._uncovered(group, p, state, repeated)
                if reason is None:
                    key = (i, self._lr_ratio(group, p))
                    row = self._row(group, p, state, hyper.setdefault(key, len(hyper)), places[p])
                    rows.setdefault(row.p.device, []).append((places[p], row))
                else:
                    self._check_torch_may(group, reason)
                    eager[-1].append(p)
        max_norm = self._max_grad_norm()
        if max_norm is not None and len(rows) + any(eager) > 1:  # the norm is of all gradients
            eager = [
                [p for p in group["params"] if p.grad is not None] for group in self.param_groups
            ]
            rows = {}
        plans: list[tuple[Plan, list[int]]] = []
        host_steps: list[Tensor] = []
        for members in rows.values():
            plan = Plan([row for _, row in members])
            plan.take_gradients([row.g for _, row in members])
            plans.append((plan, [place for place, _ in members]))
            if plan.host_steps:
                host_steps.append(self._joined_steps(plan, [params[i] for i, _ in members]))
        written = [params[place] for members in rows.values() for place, _ in members]
        sharded = any(map(is_dtensor, written))
        tensors: list[Iterable[Tensor]] = []
        for state in map(self.state.__getitem__, written):
            whole = all(isinstance(t, Tensor) for t in state.values())
            tensors.append(state.values() if whole else _Tensors(state))
        return _Planned(
            settings=self._settings(),
            params=params,
            has_grad=[g is not None for g in grads],
            states=list(self.state.values()),
            plans=plans,
            hyper=list(hyper),
            sharded=sharded,
            written=written,
            tensors=tensors,
            addresses=_addresses(written, tensors, sharded),
            host_steps=host_steps,
            versions=[steps._version for steps in host_steps],
            eager=eager,
        )

    def _joined_steps(self, plan: Plan, params: list[Tensor]) -> Tensor:
        """Makes the counts that the kernels cannot reach views of one vector, to count all."""
        states = [self.state[params[i]] for i in plan.host_steps]
        together = torch.stack([state["step"] for state in states])
        for state, step in zip(states, together.unbind(), strict=True):
            state["step"] = step
        return together

    def _check_torch_may(self, group: dict[str, Any], reason: str) -> None:
        """Raises where PyTorch's step is not what was asked for."""
        asked = [f"{option}={group[option]!r}" for option in _BEYOND_TORCH if group.get(option)]
        if _dispatch._backend == "triton":
            asked = ['backend "triton"']
        if asked:
            raise RuntimeError(f"{type(self).__name__}: {asked[0]} cannot run this step: {reason}")

    def _row(
        self, group: dict[str, Any], p: Tensor, state: dict[str, Any], hyper: int, number: int
    ) -> Row:
        """A parameter's row of the plan."""
        algorithm = self._algorithm(group)
        names = [_kept(state, name) for name in MOMENTS[algorithm]]
        if group.get("amsgrad"):
            names.append("max_exp_avg_sq")

        def get(name: str) -> Any:
            return local(state[name]) if name in state else None

        m, v, vmax = ([get(name) for name in names] + [None, None])[:3]
        assert p.grad is not None
        return Row(
            local(p), local(p.grad), m, v, vmax, state["step"], hyper, algorithm, number,
            master=get("master"), stochastic=group.get("rounding") == "stochastic",
            ema=get("ema"), m_scale=get(f"{MOMENTS[algorithm][0]}_scale"),
            v_scale=get("exp_avg_sq_scale"), cautious=bool(group.get("cautious")),
            iteration=self._iteration(group), place=place_of(p),
            sharded=p if algorithm == "muon" and is_dtensor(p) else None,
        )  # fmt: skip

    def _uncovered(
        self, group: dict[str, Any], p: Tensor, state: dict[str, Any], repeated: bool
    ) -> str | None:
        """Why PyTorch updates this parameter, or None."""
        if _dispatch._backend == "torch":
            return 'the backend is "torch"'
        for name, value in (("fused", False), ("foreach", True), ("differentiable", True)):
            if group.get(name) is value:
                return f"{name}={value}"
        if repeated:
            return "a parameter stands in the groups twice"
        names = [_kept(state, name) for name in MOMENTS[self._algorithm(group)]]
        if group.get("amsgrad"):
            names.append("max_exp_avg_sq")
        tensors = [p, p.grad, *(state[name] for name in names)]
        reason = misplaced(p, tensors[1:])
        if reason is None and group.get("rounding") and p.dtype == torch.bfloat16:
            place = place_of(p)
            if place is not None and not place.run:
                reason = f"no index of an element is known for placements {p.placements}"  # type: ignore[attr-defined]
        if self._algorithm(group) == "muon":
            reason = reason or _unfit_matrix(group, p)
        tensors = list(map(local, tensors))
        return (
            reason
            or _dispatch.nowhere_to_run(tensors[0])
            or _dispatch._foreign(tensors)
            or uncovered_tensors(*tensors, coded=True)
        )

    # --- states ---------------------------------------------------------------------------------

    def _state_of(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """The parameter's state, made as the group asks for it if there is none."""
        assert p.grad is not None
        if p.grad.is_sparse or not self.state.get(p):
            self._begin_state(group, p)
            self._finish_state(group, p, self.state[p])
        return self.state[p]

    def _new_step(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """A count of 0 where torch.optim.Adam would have it."""
        on_device = group.get("fused") or group.get("capturable")
        return torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")

    def _finish_state(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        """Gives running means their dtype, and adds master weights and the average of weights."""
        if "step" not in state:  # torch's Muon counts none
            state["step"] = self._new_step(group, p)
        self._convert_means(group, p, state)
        self._add_extras(group, p, state)

    def _convert_means(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        """Gives running means the dtype that the group asks for, or bytes."""
        asked = group.get("state_dtype")
        asked_or_own = p.dtype if asked is None else torch.float32 if asked == "8bit" else asked
        for name in MOMENTS[self._algorithm(group)]:
            if asked == "8bit" and _fits_bytes(p):
                if name in state:
                    state |= _as_bytes(name, p, state.pop(name))
            elif f"{name}_codes" in state:
                state[name] = _from_bytes(name, p, state).to(asked_or_own)
            if name in state and asked is not None:
                state[name] = state[name].to(asked_or_own)
        if "max_exp_avg_sq" in state and asked not in (None, "8bit"):
            state["max_exp_avg_sq"] = state["max_exp_avg_sq"].to(asked)

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
            ("state_dtype", (None, torch.float32, torch.bfloat16, "8bit")),
            ("master", (None, "fp32", "split")),
            ("rounding", (None, "stochastic")),
        ):
            if options[option] not in allowed:
                raise ValueError(
                    f"{name}: {option} must be one of {allowed}; got {options[option]!r}"
                )
        if options["master"] == "split" and options["rounding"]:
            raise ValueError(f'{name}: rounding must be None beside master="split", which is exact')
        if options["state_dtype"] == "8bit" and any(g.get("amsgrad") for g in self.param_groups):
            raise ValueError(f'{name}: amsgrad must be False beside state_dtype="8bit"')
        asked = {
            option: value
            for option, value in options.items()
            if value is not None and value is not False
        }
        self.defaults.update(asked)
        for group in self.param_groups:
            for option, value in asked.items():
                group.setdefault(option, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of torch's has none of these
            for option in OPTIONS:
                if option in self.defaults:
                    group.setdefault(option, self.defaults[option])

    def torch_state_dict(self) -> dict[str, Any]:
        """``state_dict`` as torch.optim's optimizer of this name loads it, and this one too.

        Running means that are bytes are in float32 here, and become the same bytes when they are
        loaded with ``state_dtype="8bit"``. What torch keeps nowhere is left out: master weights,
        the average of the weights, and the options that ask for them. torch's optimizer, when it
        loads, casts running means to the dtype of their parameters.
        """
        found = self.state_dict()
        params = chain.from_iterable(map(_params_of, self.param_groups))
        numbers = chain.from_iterable(map(_params_of, found["param_groups"]))
        states = found["state"] = dict(found["state"])
        for i, p in zip(numbers, params, strict=True):
            if i in states:
                state = states[i] = dict(states[i])
                for name in [name for name in state if name.endswith("_codes")]:
                    mean = name.removesuffix("_codes")
                    state[mean] = _from_bytes(mean, p, state)
                for name in ("master", "ema"):
                    state.pop(name, None)
        found["param_groups"] = [
            {name: value for name, value in group.items() if name not in OPTIONS}
            for group in found["param_groups"]
        ]
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads torch's state_dict or this class's, of any precision.

        torch casts states to their parameter's dtype. A state that was saved in float32, in
        ``state_dtype``, or as a master weight keeps its bits where this optimizer holds it so:
        ``state_dtype`` and ``master`` stay this optimizer's own, and all else is loaded.
        """
        own = [{name: g.get(name) for name in _PRECISION} for g in self.param_groups]
        kept: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, given: kept.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for group, precision in zip(self.param_groups, own, strict=True):
            for name, value in precision.items():
                group.pop(name, None)
                if value is not None:
                    group[name] = value
        ids = [i for group in kept["param_groups"] for i in group["params"]]
        places = [(group, p) for group in self.param_groups for p in group["params"]]
        for i, (group, p) in zip(ids, places, strict=True):
            given, state = kept["state"].get(i, {}), self.state.get(p, {})
            if not state:
                continue
            means = MOMENTS[self._algorithm(group)]
            exact = {f"{name}{part}" for name in means for part in ("_codes", "_scale")}
            exact |= {"master", "ema"}
            if group.get("state_dtype") is not None:
                exact |= {*means, "max_exp_avg_sq"}
            for name in exact & given.keys():
                state[name] = given[name].to(p.device, copy=True)
            self._finish_state(group, p, state)


_KINDS = {
    "adam": float(ADAM.value),
    "adamw": float(ADAMW.value),
    "lion": float(UNCORRECTED.value),
    "muon": float(UNCORRECTED.value),
}


def _addresses(params: list[Tensor], states: list[Iterable[Tensor]], sharded: bool) -> list[int]:
    """Where the parameters and the tensors of their states lie."""
    tensors = chain(params, chain.from_iterable(states))
    return list(map(Tensor.data_ptr, _locals(tensors, sharded)))


def advance(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Counts the step on the host, where the kernel did not."""
    if steps and (found_inf is None or not found_inf.item()):
        torch._foreach_add_(steps, 1)


def unscaled(
    grads: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
) -> list[Tensor] | None:
    """The gradients over GradScaler's scale; None where a step is to be left out."""
    if found_inf is not None and found_inf.item():
        return None
    return grads if grad_scale is None else [g / grad_scale for g in grads]


def _on_device(x: Tensor) -> bool:
    """Whether reading the number would wait for the device."""
    return x.is_cuda


def _moved(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else t.to(device, non_blocking=True)


def _unfit_matrix(group: dict[str, Any], p: Tensor) -> str | None:
    """Why the iteration of the kernels cannot be Muon's, or None."""
    if group["ns_steps"] < 1:
        return f"ns_steps={group['ns_steps']}"
    if is_dtensor(p) and not local(p).is_contiguous():
        return "a part of a DTensor that is not contiguous"
    return None


def _kept(state: dict[str, Any], name: str) -> str:
    """The name under which a running mean is in the state: its own, or of its bytes."""
    codes = f"{name}_codes"
    return codes if codes in state else name


def _row_length(p: Tensor) -> int:
    return p.numel() // p.shape[0]


def _fits_bytes(p: Tensor) -> bool:
    """Whether running means of this parameter are kept as bytes: if it is large.

    Of a sharded one, blocks of bytes must not reach from one process into another.
    """
    if p.numel() < _LEAST_CODED:
        return False
    if not is_dtensor(p):
        return True
    from torch.distributed.tensor import Replicate, Shard

    placements = p.placements  # type: ignore[attr-defined]
    whole_rows = all(t == Shard(0) or t == Replicate() for t in placements)
    return whole_rows and _row_length(p) % CODE_BLOCK.value == 0


def _as_bytes(name: str, p: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """A running mean as bytes and scales; of whole rows of blocks the scales are sharded as p."""
    part, here = local(mean), local(p)
    if part.stride() != here.stride() or not is_dense(part):
        part = torch.empty_like(here, dtype=torch.float32).copy_(part)
    codes, scale = encoded_tensor(part, signed=name not in _UNSIGNED)
    shape: tuple[int, ...] = tuple(scale.shape)
    if _row_length(p) % CODE_BLOCK.value == 0:
        shape = (p.shape[0], _row_length(p) // CODE_BLOCK.value)
        scale = scale.view(here.shape[0], shape[1])
    return {
        f"{name}_codes": like(p, codes, tuple(p.shape)),
        f"{name}_scale": like(p, scale, shape),
    }


def _from_bytes(name: str, p: Tensor, state: dict[str, Any]) -> Tensor:
    """The running mean that the bytes and scales in the state stand for; they are taken out."""
    codes, scale = state.pop(f"{name}_codes"), state.pop(f"{name}_scale")
    mean = decoded_tensor(local(codes), local(scale), signed=name not in _UNSIGNED)
    return like(p, mean, tuple(p.shape))
