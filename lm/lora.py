"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685): W x + alpha / rank B A x.

W is frozen; A (rank, in) and B (out, rank) are trained, from B = 0. A model with adapters keeps the
names of its own weights in ``state_dict`` and adds ``<linear>.lora_A`` and ``<linear>.lora_B``, for
example ``h.0.attn.c_attn.lora_A``.

Where one linear packs several (queries, keys and values in ``c_attn``, the two halves of a gated
``c_fc``), each part has its own A and B, as if they were apart: the A's lie on top of each other in
``lora_A`` (parts * rank, in), the B's in ``lora_B`` (rows of the parts, rank).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import GATED, GPTConfig, read_json
from .model import GPT

TARGETS = ("c_attn", "c_proj", "c_fc")
_WEIGHTS, _SETTINGS = "adapter.safetensors", "adapter.json"


class Part(NamedTuple):
    """Some output rows of a linear."""

    name: str  # empty where the linear packs nothing
    rows: int
    adapted: bool


class LoRALinear(nn.Linear):
    """A frozen linear and a trained low-rank change of some of its output rows.

    Args:
        linear: What it replaces; the parameters are shared, not copied.
        rank: Rows of each A.
        alpha: The change counts alpha / rank.
        dropout: Probability, of the adapters' input.
        parts: What the output packs, in order.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float,
        parts: Sequence[Part],
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.scale, self.dropout, self.parts = rank, alpha / rank, dropout, tuple(parts)
        adapted = [part.rows for part in self.parts if part.adapted]
        self.lora_A = nn.Parameter(linear.weight.new_empty(len(adapted) * rank, self.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(sum(adapted), rank))
        bound = 1 / math.sqrt(self.in_features)  # nn.Linear's own
        nn.init.uniform_(self.lora_A, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        down = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        ups = iter(zip(down.split(self.rank, -1), self._up(), strict=True))
        change = [
            F.linear(*next(ups)) if part.adapted else down.new_zeros(*down.shape[:-1], part.rows)
            for part in self.parts
        ]
        return F.linear(x, self.weight, self.bias) + self.scale * torch.cat(change, -1)

    def delta(self) -> Tensor:
        """The change of the weight: (out, in)."""
        pairs = iter(zip(self._up(), self.lora_A.split(self.rank), strict=True))
        change = [
            torch.mm(*next(pairs))
            if part.adapted
            else self.weight.new_zeros(part.rows, self.in_features)
            for part in self.parts
        ]
        return self.scale * torch.cat(change)

    def merged(self) -> nn.Linear:
        """A plain linear that gives the same."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.detach() + self.delta().detach())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach())
        return linear

    def _up(self) -> tuple[Tensor, ...]:
        return self.lora_B.split([part.rows for part in self.parts if part.adapted])


def apply_lora(
    model: GPT,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = TARGETS,
    dropout: float = 0.0,
) -> GPT:
    """Freezes a model and gives its linears adapters, in place.

    Args:
        model: Any ``GPT``, loaded or new.
        rank: Of each adapter.
        alpha: The change counts alpha / rank; None: 2 rank.
        targets: Names of linears, or ends of them: ``c_proj`` is the last linear of attention and
            of the feed-forward, ``attn.c_proj`` of attention alone. ``c_attn.q``, ``c_attn.k`` and
            ``c_attn.v`` are the parts of the packed linear.
        dropout: Probability, of the adapters' input.

    Returns:
        The model.

    Raises:
        ValueError: A target that is no linear of the model, adapters that are there already, or
            numbers out of range.
    """
    if rank < 1:
        raise ValueError(f"apply_lora: rank must be at least 1; got {rank}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"apply_lora: dropout must be in [0, 1); got {dropout}")
    if adapters(model):
        raise ValueError("apply_lora: model must have no adapters; merge_lora takes them in")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    linears.pop("lm_head", None)  # as a rule it is the token table
    chosen = _choose(model.config, linears, targets)
    alpha = 2.0 * rank if alpha is None else float(alpha)
    model.requires_grad_(False)
    for name, parts in chosen.items():
        _replace(model, name, LoRALinear(linears[name], rank, alpha, dropout, parts))
    return model


def merge_lora(model: GPT) -> GPT:
    """Adds every adapter to its weight, in place: a plain model again, all of it trained further.

    Returns:
        The model.

    Raises:
        ValueError: It has no adapters.
    """
    for name, linear in _required(model, "merge_lora").items():
        _replace(model, name, linear.merged())
    return model.requires_grad_(True)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The linears with adapters, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters alone: ``<linear>.lora_A`` and ``<linear>.lora_B``."""
    return {
        f"{name}.{key}": getattr(linear, key).detach()
        for name, linear in adapters(model).items()
        for key in ("lora_A", "lora_B")
    }


def save_lora(model: GPT, folder: str | Path) -> None:
    """Writes the adapters alone: ``adapter.safetensors``, and ``adapter.json`` with their settings.

    Raises:
        ValueError: The model has no adapters.
    """
    from safetensors.torch import save_file

    _required(model, "save_lora")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous() for name, t in lora_state_dict(model).items()}
    save_file(tensors, folder / _WEIGHTS)
    settings = {**_settings(model), "base": model.config.to_dict()}
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_lora(model: GPT, folder: str | Path) -> GPT:
    """Gives a model the adapters of a folder, in place.

    Returns:
        The model.

    Raises:
        ValueError: Files that are missing or damaged, or adapters of a model of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    settings = read_json(folder / _SETTINGS)
    missing = sorted({"rank", "alpha", "targets", "dropout", "base"} - set(settings))
    if missing:
        raise ValueError(f"{folder / _SETTINGS} must hold {missing[0]!r}")
    _check_base(model.config, settings.pop("base"), folder)
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / _WEIGHTS} must be a safetensors file; {error}") from None
    apply_lora(model, **settings)
    wanted = lora_state_dict(model)
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    expected = {name: tuple(t.shape) for name, t in wanted.items()}
    if found != expected:
        odd = sorted(set(found.items()) ^ set(expected.items()))[0]
        raise ValueError(f"{folder / _WEIGHTS} must hold what its settings say; see {odd}")
    model.load_state_dict(tensors, strict=False)
    return model


# --- which linears ------------------------------------------------------------------------------


def _choose(
    config: GPTConfig, linears: dict[str, nn.Linear], targets: Sequence[str]
) -> dict[str, list[Part]]:
    """The linears that a target names, and which of their parts."""
    if isinstance(targets, str) or not targets:
        raise ValueError(f"apply_lora: targets must be a list of names; got {targets!r}")
    unused = set(targets)
    chosen = {}
    for name, linear in linears.items():
        parts = []
        for part, rows in _parts(config, name, linear.out_features):
            hits = [t for t in targets if _names(t, name) or _names(t, f"{name}.{part}")]
            unused -= set(hits)
            parts.append(Part(part, rows, bool(hits)))
        if any(part.adapted for part in parts):
            chosen[name] = parts
    if unused:
        known = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(
            f"apply_lora: targets must be linears of the model, {', '.join(known)}, or "
            f"c_attn.q, c_attn.k, c_attn.v; got {sorted(unused)[0]!r}"
        )
    return chosen


def _names(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _parts(config: GPTConfig, name: str, rows: int) -> list[tuple[str, int]]:
    """What a linear packs: a name and the rows of each part."""
    if name.endswith("c_attn"):
        D = config.head_width
        kv = config.kv_heads * D
        return [("q", config.n_head * D), ("k", kv), ("v", kv)]
    if name.endswith("c_fc") and config.activation in GATED:
        return [("gate", rows // 2), ("up", rows // 2)]
    return [("", rows)]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    module.train(model.training)
    setattr(model.get_submodule(parent), last, module)


def _required(model: nn.Module, what: str) -> dict[str, LoRALinear]:
    found = adapters(model)
    if not found:
        raise ValueError(f"{what}: model must have adapters; apply_lora gives them")
    return found


def _settings(model: nn.Module) -> dict[str, Any]:
    """The arguments of ``apply_lora`` that give these adapters."""
    found = adapters(model)
    one = next(iter(found.values()))
    targets = [
        f"{name}.{part.name}" if part.name else name
        for name, linear in found.items()
        for part in linear.parts
        if part.adapted
    ]
    alpha = one.scale * one.rank
    return {"rank": one.rank, "alpha": alpha, "dropout": one.dropout, "targets": targets}


def _check_base(config: GPTConfig, base: dict[str, Any], folder: Path) -> None:
    """The shapes must agree; dropout may differ."""
    for name, value in config.to_dict().items():
        if name != "dropout" and base.get(name) != value:
            raise ValueError(
                f"{folder / _SETTINGS}: {name} of the model must be {base.get(name)!r}, as the "
                f"adapters were trained on; got {value!r}"
            )
