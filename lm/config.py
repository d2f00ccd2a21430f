"""What a model is made of: one frozen dataclass, and presets of it by name."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

Activation = Literal["gelu", "gelu_tanh", "relu_squared", "swiglu", "geglu"]
GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class GPTConfig:
    """The shape and the style of a model. The defaults are GPT-2's.

    Attributes:
        vocab_size: Tokens of the vocabulary.
        block_size: Most tokens of a sequence.
        n_layer: Blocks.
        n_head: Query heads a block.
        n_embd: Width of the residual stream.
        n_kv_head: Key and value heads (grouped-query attention); None: as many as n_head.
        head_dim: Width of a head; None: n_embd / n_head.
        n_inner: Width inside the feed-forward; None: 4 n_embd, or 8/3 n_embd if it is gated.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        norm_eps: Added to the variance.
        position: "learned" (a table), "rotary" or "none".
        rope_theta: Base of the rotary angles.
        activation: Of the feed-forward; "swiglu" and "geglu" are gated.
        bias: Whether linears and LayerNorms have biases.
        qk_norm: RMSNorm of each query and key head before attention (Qwen3).
        window: Keys that a query sees to its left, itself not counted; None: all.
        tie_weights: The head is the token table.
        dropout: Probability, of embeddings, attention weights and each branch.
        causal: A token sees itself and what comes before; False: all (an encoder).
        post_norm: Normalise after each addition (the Transformer of 2017) and not before.
    """

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int | None = None
    head_dim: int | None = None
    n_inner: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    position: Literal["learned", "rotary", "none"] = "learned"
    rope_theta: float = 10000.0
    activation: Activation = "gelu_tanh"
    bias: bool = True
    qk_norm: bool = False
    window: int | None = None
    tie_weights: bool = True
    dropout: float = 0.0
    causal: bool = True
    post_norm: bool = False

    def __post_init__(self) -> None:
        """Raises where the numbers make no model."""
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} must be at least 1; got {getattr(self, name)}")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: n_head must divide n_embd, {self.n_embd}; got {self.n_head}"
            )
        if self.kv_heads < 1 or self.n_head % self.kv_heads:
            raise ValueError(
                f"GPTConfig: n_kv_head must divide n_head, {self.n_head}; got {self.n_kv_head}"
            )
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(
                f"GPTConfig: head_dim must be even for rotary positions; got {self.head_width}"
            )
        for name, kind in get_type_hints(type(self)).items():
            if get_args(kind) and all(isinstance(a, str) for a in get_args(kind)):
                _check_choice(name, getattr(self, name), get_args(kind))
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"GPTConfig: dropout must be in [0, 1); got {self.dropout}")
        if self.window is not None and self.window < 0:
            raise ValueError(f"GPTConfig: window must be 0 or more; got {self.window}")

    @property
    def kv_heads(self) -> int:
        """Key and value heads a block."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_width(self) -> int:
        """Numbers a head."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def inner(self) -> int:
        """Width inside the feed-forward; gated ones are rounded up to a multiple of 64."""
        if self.n_inner is not None:
            return self.n_inner
        if self.activation in GATED:
            return -(-8 * self.n_embd // 3 // 64) * 64
        return 4 * self.n_embd

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "GPTConfig":
        """The inverse of ``to_dict``.

        Raises:
            ValueError: A name that is no field.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"GPTConfig: unknown field {unknown[0]!r}; fields are {sorted(known)}")
        return cls(**fields)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GPTConfig":
        """A config of ``PRESETS`` with some fields changed.

        Raises:
            ValueError: An unknown name, or fields that make no model.
        """
        _check_choice("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **changes})


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"GPTConfig: {name} must be one of {', '.join(choices)}; got {value!r}")


_LLAMA: dict[str, Any] = {
    "norm": "rms",
    "position": "rotary",
    "activation": "swiglu",
    "bias": False,
}

# "tiny" is the shape of nanoGPT's CPU example. Vocabularies of 256 are bytes.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128,
        "activation": "gelu", "bias": False,
    },
    "gpt2": {},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "llama-tiny": {
        **_LLAMA,
        "vocab_size": 256, "block_size": 64,
        "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 128,
    },
    "smollm2-135m": {
        **_LLAMA,
        "vocab_size": 49152, "block_size": 8192,
        "n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576, "n_inner": 1536,
        "rope_theta": 1e5,
    },
    "encoder-base": {
        "block_size": 512, "n_layer": 1, "n_head": 8, "n_embd": 512, "n_inner": 2048,
        "activation": "gelu", "dropout": 0.1, "causal": False, "post_norm": True,
    },
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: The file is missing, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file; {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(found).__name__}")
    return found
