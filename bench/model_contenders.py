"""Whole models that are timed beside each other: ours, nanoGPT's and those of transformers.

All hold the parameters of one model of ours, so that losses, gradients and logits must agree.
"""

import importlib.util
import io
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastlm.kernels import AdamW

if TYPE_CHECKING:
    from fastlm.lm import GPT, GPTConfig

OURS = ("fused", "eager", "compiled")
PEERS = ("transformers", "nanogpt", "nanogpt compiled")

_ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Draw(NamedTuple):
    """How generation chooses a token: temperature 0 the likeliest; top_k 0 of all."""

    temperature: float = 0.0
    top_k: int = 0


GREEDY = Draw()


class Contender(Protocol):
    """A model of some library, and what is asked of it."""

    module: Any

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy of (B, T) tokens in nats."""

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW as the library makes it."""

    def gradients(self) -> dict[str, Tensor]:
        """Those of the parameters by our names, in our layout."""

    def grow(self, prompts: Tensor, new: int, draw: Draw) -> Any:
        """Continues (B, T) prompts by ``new`` tokens."""

    def last_logits(self, ids: Tensor) -> Tensor:
        """(B, 1, vocab_size) of the last token, as generation computes them."""


def contender(name: str, model: "GPT", nanogpt: Path | None = None) -> Contender:
    """A contender with the parameters of ``model``.

    Args:
        name: Of ``OURS`` or ``PEERS``.
        model: Ours; the first three take it as it is.
        nanogpt: A clone of nanoGPT.

    Raises:
        NotImplementedError: The library is not here, or has no such model.
        ValueError: ``nanogpt`` is no clone of it.
    """
    if name in OURS:
        return Ours(model, fused=name == "fused", compiled=name == "compiled")
    if name == "transformers":
        return Transformers(model)
    if nanogpt is None:
        raise NotImplementedError(f"{name}: --nanogpt must say where a clone of it is")
    return NanoGPT(model, nanogpt, compiled=name == "nanogpt compiled")


def _compiled(module: nn.Module, wanted: bool) -> Callable[..., Any]:
    return torch.compile(module, dynamic=False) if wanted else module


class Ours:
    """``fastlm.lm.GPT``."""

    def __init__(self, model: "GPT", *, fused: bool, compiled: bool = False):
        self.module = model
        self._run = _compiled(model, compiled)
        self._adamw: Any = AdamW if fused else torch.optim.AdamW

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy."""
        return self._run(ids, targets)[1]

    def optimizer(self) -> torch.optim.Optimizer:
        """One fused step for all parameters."""
        return self._adamw(self.module.parameters(), fused=True, **_ADAMW)

    def gradients(self) -> dict[str, Tensor]:
        """As they are."""
        return _gradients(self.module)

    def grow(self, prompts: Tensor, new: int, draw: Draw) -> Any:
        """Behind a cache; past ``block_size`` with the last half block as a new prompt."""
        return self.module.generate(prompts, new, slide=True, **draw._asdict())

    def last_logits(self, ids: Tensor) -> Tensor:
        """Of one token behind a cache that holds all before it."""
        from fastlm.lm import KVCache

        weight = self.module.wte.weight
        B, T = ids.shape
        cache = KVCache(self.module.config, B, T, weight.device, weight.dtype)
        self.module(ids[:, :-1], cache=cache)
        return self.module(ids[:, -1:], cache=cache)[0]


class Transformers:
    """The model that ``transformers`` opens from the folder that ours is saved in."""

    def __init__(self, model: "GPT"):
        kind = transformers_class(model.config)
        self._ours = model
        weight = model.wte.weight
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self.module = kind.from_pretrained(folder, torch_dtype=weight.dtype).to(weight.device)
        self.module.train(model.training)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """By its own loss function."""
        return transformers_loss(self.module, ids, targets)

    def optimizer(self) -> torch.optim.Optimizer:
        """``adamw_torch_fused``, its Trainer's default."""
        return torch.optim.AdamW(self.module.parameters(), fused=True, **_ADAMW)

    def gradients(self) -> dict[str, Tensor]:
        """Transposed and joined, as the model's folder is read."""
        from fastlm.lm.hf_layout import layout

        theirs = _gradients(self.module)
        found = {}
        names = [name for name, _ in self._ours.named_parameters()]
        for name, stored in layout(self._ours.config, names).items():
            parts = [theirs[n].T if stored.transposed else theirs[n] for n in stored.names]
            found[name] = torch.cat(parts)
        return found

    def grow(self, prompts: Tensor, new: int, draw: Draw) -> Any:
        """Behind its cache."""
        if prompts.shape[1] + new > self._ours.config.block_size:
            raise NotImplementedError("transformers does not go on past n_positions")
        how = {"do_sample": True, **draw._asdict()} if draw.temperature else {"do_sample": False}
        return self.module.generate(
            prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0,
            min_new_tokens=new, max_new_tokens=new, **how,
        )  # fmt: skip

    def last_logits(self, ids: Tensor) -> Tensor:
        """Of the first token that its generation adds."""
        found = self.module.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=1, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return found.logits[0][:, None]


def transformers_class(config: "GPTConfig") -> Any:
    """The class of ``transformers`` that computes the same.

    Raises:
        NotImplementedError: It is not installed, or has none.
    """
    from fastlm.lm.hf_layout import CLASSES, family_of

    try:
        import transformers
    except ImportError:
        raise NotImplementedError("transformers is not installed") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = CLASSES[family_of(config)]
    if not hasattr(transformers, name):
        raise NotImplementedError(
            "transformers has no such model (without biases or with another activation, say)"
        )
    return getattr(transformers, name)


def transformers_loss(module: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """A model's own loss, told that the targets are shifted already."""
    return module(ids, labels=targets, shift_labels=targets, use_cache=False).loss


class NanoGPT:
    """The model of a clone of nanoGPT, by its own ``model.py``."""

    _PLAIN: Mapping[str, Any] = {
        "norm": "layer", "norm_eps": 1e-5, "position": "learned", "activation": "gelu",
        "qk_norm": False, "window": None, "tie_weights": True, "causal": True, "post_norm": False,
    }  # fmt: skip

    def __init__(self, model: "GPT", folder: Path, *, compiled: bool):
        config = model.config
        for name, value in self._PLAIN.items():
            if getattr(config, name) != value:
                raise NotImplementedError(
                    f"nanogpt has {name}={value!r}; the model has {getattr(config, name)!r}"
                )
        if (config.kv_heads, config.inner) != (config.n_head, 4 * config.n_embd):
            raise NotImplementedError("nanogpt has as many keys as queries, and 4 n_embd inside")
        theirs = _nanogpt(folder)
        shape = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
        with redirect_stdout(io.StringIO()):
            module = theirs.GPT(
                theirs.GPTConfig(dropout=0.0, **{name: getattr(config, name) for name in shape})
            )
        state = {_nano_name(name): t for name, t in model.state_dict().items()}
        module.load_state_dict(state)
        weight = model.wte.weight
        self.module: Any = module.to(weight.device, weight.dtype).train(model.training)
        self._run = _compiled(self.module, compiled)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy."""
        return self._run(ids, targets)[1]

    def optimizer(self) -> torch.optim.Optimizer:
        """By its own ``configure_optimizers``."""
        device = next(self.module.parameters()).device.type
        with redirect_stdout(io.StringIO()):
            return self.module.configure_optimizers(
                _ADAMW["weight_decay"], _ADAMW["lr"], _ADAMW["betas"], device
            )

    def gradients(self) -> dict[str, Tensor]:
        """Under our names."""
        theirs = _gradients(self.module)
        return {name.removeprefix("transformer."): g for name, g in theirs.items()}

    def grow(self, prompts: Tensor, new: int, draw: Draw) -> Any:
        """By its own ``generate``: all of the last ``block_size`` tokens again for each token."""
        if not draw.temperature:
            return self.module.generate(prompts, new, top_k=1)
        return self.module.generate(prompts, new, draw.temperature, draw.top_k or None)

    def last_logits(self, ids: Tensor) -> Tensor:
        """Of all tokens at once: it has no cache."""
        return self.module(ids)[0]


def _nano_name(ours: str) -> str:
    return ours if ours == "lm_head.weight" else f"transformer.{ours}"


def nanogpt_file(folder: Path) -> Path:
    """Where a clone of nanoGPT has its model. Raises ValueError where it has none."""
    file = folder / "model.py"
    if not file.is_file():
        raise ValueError(f"bench: --nanogpt must be a clone of nanoGPT; {file} is not there")
    return file


def _nanogpt(folder: Path) -> ModuleType:
    """``model.py`` of a clone, run as a module of its own."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt_file(folder))
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
