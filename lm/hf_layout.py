"""How Hugging Face writes our models: fields of config.json, and the names of the weights.

GPT-2 keeps our names, its four matrices of a block transposed (Conv1D). Llama, Mistral (a window)
and Qwen3 (norms of queries and keys) hold queries, keys and values, and the gate and what it
multiplies, in matrices of their own. What none of them can say, such as an encoder, keeps our
names.
"""

from dataclasses import dataclass
from typing import Any, Literal

from .config import GPTConfig

Family = Literal["gpt2", "llama", "mistral", "qwen3", "fastlm"]

CLASSES: dict[Family, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "fastlm": "fastlm.lm.GPT",
}
_GPT2_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu_squared": "relu2"}
_GATED_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}
_SAME_AS = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}


def family_of(config: GPTConfig) -> Family:
    """The Hugging Face architecture that computes the same, or "fastlm"."""
    if config.post_norm or not config.causal:
        return "fastlm"
    if config.norm == "layer":
        plain = (
            config.position == "learned"
            and config.activation in _GPT2_ACTIVATIONS
            and config.bias
            and not config.qk_norm
            and config.window is None
            and config.kv_heads * config.head_width == config.n_embd
        )
        return "gpt2" if plain else "fastlm"
    if config.position != "rotary" or config.activation not in _GATED_ACTIVATIONS:
        return "fastlm"
    if config.qk_norm:
        return "fastlm" if config.bias else "qwen3"
    if config.window is not None:
        return "fastlm" if config.bias else "mistral"
    return "llama"


def to_fields(config: GPTConfig) -> dict[str, Any]:
    """The object of config.json."""
    family = family_of(config)
    fields: dict[str, Any] = {
        "model_type": family,
        "architectures": [CLASSES[family]],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "gpt2":
        fields |= {
            "n_positions": config.block_size,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_inner": config.inner,
            "activation_function": _GPT2_ACTIVATIONS[config.activation],
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
        }
    elif family != "fastlm":
        fields |= {
            "max_position_embeddings": config.block_size,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            "hidden_size": config.n_embd,
            "intermediate_size": config.inner,
            "hidden_act": _GATED_ACTIVATIONS[config.activation],
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "attention_bias": config.bias,
            "mlp_bias": config.bias,
            "attention_dropout": config.dropout,
        }
    if config.window is not None and family in ("mistral", "qwen3"):
        fields["sliding_window"] = config.window + 1  # theirs counts the query itself
        if family == "qwen3":
            fields |= {"use_sliding_window": True, "max_window_layers": 0}
    return fields | {"fastlm": config.to_dict()}


def from_fields(fields: dict[str, Any]) -> GPTConfig:
    """The config of an object of config.json, ours or Hugging Face's.

    Raises:
        ValueError: An architecture, or a variant of it, that ``GPT`` is not.
    """
    family = fields.get("model_type")
    if family == "fastlm":
        return GPTConfig.from_dict(_needed(fields, "fastlm"))
    own = GPTConfig.from_dict(fields["fastlm"]) if "fastlm" in fields else None
    if own is not None and to_fields(own).items() <= fields.items():
        return own  # else someone changed their fields since, and ours are of another time
    if family == "gpt2":
        return _from_gpt2(fields)
    if family in ("llama", "mistral", "qwen3"):
        return _from_llama(fields)
    raise ValueError(f"model_type must be one of {', '.join(CLASSES)}; got {family!r}")


def _from_gpt2(fields: dict[str, Any]) -> GPTConfig:
    _refuse(fields, "scale_attn_weights", True)
    _refuse(fields, "scale_attn_by_inverse_layer_idx", False)
    _refuse(fields, "add_cross_attention", False)
    n_embd = _needed(fields, "n_embd")
    dropouts = {fields.get(f"{place}_pdrop", 0.1) for place in ("resid", "embd", "attn")}
    return GPTConfig(
        vocab_size=_needed(fields, "vocab_size"),
        block_size=_needed(fields, "n_positions"),
        n_layer=_needed(fields, "n_layer"),
        n_head=_needed(fields, "n_head"),
        n_embd=n_embd,
        n_inner=fields.get("n_inner") or 4 * n_embd,
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        activation=_activation(fields, "activation_function", "gelu_new", _GPT2_ACTIVATIONS),
        dropout=max(dropouts),
        tie_weights=fields.get("tie_word_embeddings", True),
    )


def _from_llama(fields: dict[str, Any]) -> GPTConfig:
    family = fields["model_type"]
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rotary angles must be unscaled; got rope_type {kind!r}")
    _refuse(fields, "pretraining_tp", 1)
    if family != "llama":
        _refuse(fields, "attention_bias", False)
    bias = fields.get("attention_bias", False)
    if family == "llama" and fields.get("mlp_bias", False) != bias:
        raise ValueError(f"mlp_bias must equal attention_bias, {bias}; got {not bias}")
    n_head, hidden = _needed(fields, "num_attention_heads"), _needed(fields, "hidden_size")
    return GPTConfig(
        vocab_size=_needed(fields, "vocab_size"),
        block_size=_needed(fields, "max_position_embeddings"),
        n_layer=_needed(fields, "num_hidden_layers"),
        n_head=n_head,
        n_kv_head=fields.get("num_key_value_heads") or n_head,
        head_dim=fields.get("head_dim") or (128 if family == "qwen3" else None),
        n_embd=hidden,
        n_inner=_needed(fields, "intermediate_size"),
        norm="rms",
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        position="rotary",
        rope_theta=float(rope.get("rope_theta", fields.get("rope_theta", 10000.0))),
        activation=_activation(fields, "hidden_act", "silu", _GATED_ACTIVATIONS),
        bias=bias,
        qk_norm=family == "qwen3",
        window=_window(fields),
        dropout=fields.get("attention_dropout", 0.0),
        tie_weights=fields.get("tie_word_embeddings", False),
    )


def _window(fields: dict[str, Any]) -> int | None:
    """Keys to the left of a query; one number for all layers, or None."""
    size = fields.get("sliding_window")
    if fields["model_type"] == "llama" or size is None:
        return None
    if fields["model_type"] == "qwen3" and not fields.get("use_sliding_window", False):
        return None
    kinds = fields.get("layer_types")
    if kinds is None:  # older files say from which layer on
        after = fields.get("max_window_layers", 0) if fields["model_type"] == "qwen3" else 0
        kinds = ["sliding_attention"] if after == 0 else ["full_attention", "sliding_attention"]
    if len(set(kinds)) > 1:
        raise ValueError(f"layer_types must be one kind for all layers; got {sorted(set(kinds))}")
    return size - 1 if "sliding_attention" in kinds else None


def _needed(fields: dict[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise ValueError(f"{name} must be given; got none")
    return fields[name]


def _refuse(fields: dict[str, Any], name: str, only: object) -> None:
    if fields.get(name, only) != only:
        raise ValueError(f"{name} must be {only}; got {fields[name]!r}")


def _activation(fields: dict[str, Any], name: str, usual: str, known: dict[str, str]) -> Any:
    theirs = fields.get(name, usual)
    for ours, name_of_it in known.items():
        if name_of_it == _SAME_AS.get(theirs, theirs):
            return ours
    raise ValueError(f"{name} must be one of {', '.join(known.values())}; got {theirs!r}")


@dataclass(frozen=True)
class Stored:
    """How a file holds one of our parameters.

    Attributes:
        names: Of the tensors that make it up, one under the other.
        rows: Of each of them.
        transposed: Whether the file has it columns first.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False


def layout(config: GPTConfig, names: list[str]) -> dict[str, Stored]:
    """How a file of the config's family holds each of our parameters, ``names``.

    A tied head is the token table, and is not stored.
    """
    family = family_of(config)
    if config.tie_weights:
        names = [name for name in names if name != "lm_head.weight"]
    if family == "fastlm":
        return {name: Stored((name,)) for name in names}
    if family == "gpt2":
        return {name: _in_gpt2(name) for name in names}
    return {name: _in_llama(config, name) for name in names}


def _in_gpt2(name: str) -> Stored:
    if name == "lm_head.weight":
        return Stored((name,))
    conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return Stored((f"transformer.{name}",), transposed=conv1d)


_LLAMA_NAMES = {
    "wte": ("embed_tokens",),
    "ln_f": ("norm",),
    "ln_1": ("input_layernorm",),
    "ln_2": ("post_attention_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.down_proj",),
}


def _in_llama(config: GPTConfig, name: str) -> Stored:
    if name == "lm_head.weight":
        return Stored((name,))
    place, module = "model.", name
    if name.startswith("h."):
        _, layer, module = name.split(".", 2)
        place = f"model.layers.{layer}."
    kind = "bias" if name.endswith(".bias") else "weight"  # our q_norm and k_norm have no suffix
    module = module.removesuffix(f".{kind}")
    D = config.head_width
    rows = {
        "attn.c_attn": (config.n_head * D, config.kv_heads * D, config.kv_heads * D),
        "mlp.c_fc": (config.inner, config.inner),
    }
    theirs = tuple(f"{place}{part}.{kind}" for part in _LLAMA_NAMES[module])
    return Stored(theirs, rows.get(module, ()))
