"""GGUF files of Llama models: weights out of their blocks, config and tokenizer out of their facts.

``GPT.from_pretrained("x.gguf").save_pretrained(folder)`` and
``load_tokenizer("x.gguf").save(folder)`` make a Hugging Face folder of one. The format is ggml's:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import GPTConfig
from .hf import fill, hollow
from .model import GPT
from .ops import Choice
from .tokenizer import HubTokenizer, library

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


def _halves(blocks: Tensor, begin: int) -> Tensor:
    """The float16 that stands at a byte of each block, as (blocks, 1) float32."""
    return blocks[:, begin : begin + 2].contiguous().view(torch.float16).float()


def _nibbles(blocks: Tensor, begin: int) -> Tensor:
    """32 numbers from 0 to 15 of each block: low halves of 16 bytes, then high ones."""
    packed = blocks[:, begin : begin + 16]
    return torch.cat((packed & 15, packed >> 4), 1).float()


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _halves(blocks, 0)


def _q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks, 2) - 8) * _halves(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks, 4) * _halves(blocks, 0) + _halves(blocks, 2)


# ggml's number of a kind: (weights a block, bytes a block, blocks as float32)
_KINDS: dict[int, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    0: (1, 4, lambda blocks: blocks.view(torch.float32)),
    1: (1, 2, lambda blocks: blocks.view(torch.float16).float()),
    2: (32, 18, _q4_0),
    3: (32, 20, _q4_1),
    8: (32, 34, _q8_0),
    30: (1, 2, lambda blocks: blocks.view(torch.bfloat16).float()),
}


@dataclass(frozen=True)
class _Stored:
    shape: tuple[int, ...]  # rows first, as PyTorch has it
    kind: int
    begin: int  # from the file's beginning, in bytes


class Gguf:
    """A GGUF file, mapped into memory.

    Attributes:
        facts: What it says of itself: numbers, strings and lists by name.
        tensors: Where each tensor lies.

    Raises:
        ValueError: Not a whole GGUF file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.data = np.memmap(self.path, np.uint8, "r")
            self.at = 0
            self.facts, self.tensors = self._header()
        except (OSError, ValueError, struct.error, OverflowError, KeyError) as error:
            raise ValueError(f"{path} must be a whole GGUF file; {error}") from None
        for name, stored in self.tensors.items():
            if stored.kind in _KINDS and stored.begin + self._size(stored) > len(self.data):
                raise ValueError(f"{path} must be a whole GGUF file; it ends before {name} does")

    def _header(self) -> tuple[dict[str, Any], dict[str, _Stored]]:
        if bytes(self.data[:4]) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version, tensors, facts = self._take("I"), self._take("Q"), self._take("Q")
        if version not in (2, 3):
            raise ValueError(f"its version must be 2 or 3; got {version}")
        said = {}
        for _ in range(facts):
            name = self._string()
            said[name] = self._value(self._take("I"))
        places = {}
        for _ in range(tensors):
            name = self._string()
            shape = tuple(self._take("Q") for _ in range(self._take("I")))[::-1]
            places[name] = _Stored(shape, self._take("I"), self._take("Q"))
        aligned = said.get("general.alignment", 32)
        begin = -(-self.at // aligned) * aligned
        return said, {n: _Stored(s.shape, s.kind, begin + s.begin) for n, s in places.items()}

    def _take(self, kind: str) -> Any:
        size = struct.calcsize("<" + kind)
        (value,) = struct.unpack("<" + kind, self.data[self.at : self.at + size].tobytes())
        self.at += size
        return value

    def _string(self) -> str:
        size = self._take("Q")
        if self.at + size > len(self.data):
            raise ValueError("it ends inside a string")
        text = self.data[self.at : self.at + size].tobytes().decode(errors="replace")
        self.at += size
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take(_NUMBERS[kind])
        inner, n = self._take("I"), self._take("Q")
        if n > len(self.data):
            raise ValueError("it ends inside a list")
        if inner not in _NUMBERS:
            return [self._value(inner) for _ in range(n)]
        dtype = np.dtype("<" + _NUMBERS[inner])
        values = self.data[self.at : self.at + n * dtype.itemsize].tobytes()
        self.at += n * dtype.itemsize
        return np.frombuffer(values, dtype).tolist()

    def _size(self, stored: _Stored) -> int:
        weights, size, _ = _KINDS[stored.kind]
        return math.prod(stored.shape) // weights * size

    def tensor(self, name: str) -> Tensor:
        """A tensor as float32.

        Raises:
            ValueError: There is none of the name, or it is of a kind that is not read.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path} must hold {name}; it does not")
        stored = self.tensors[name]
        if stored.kind not in _KINDS:
            raise ValueError(
                f"{self.path}: {name} must be F32, F16, BF16, Q4_0, Q4_1 or Q8_0; "
                f"got ggml type {stored.kind}"
            )
        _, size, expand = _KINDS[stored.kind]
        data = np.array(self.data[stored.begin : stored.begin + self._size(stored)])
        return expand(torch.from_numpy(data).view(-1, size)).reshape(stored.shape)

    def fact(self, name: str) -> Any:
        """A fact. Raises ValueError where it is not there."""
        if name not in self.facts:
            raise ValueError(f"{self.path} must say {name}; it does not")
        return self.facts[name]


def config_of(file: Gguf) -> GPTConfig:
    """The config of a Llama model.

    Raises:
        ValueError: Another architecture.
    """
    if file.fact("general.architecture") != "llama":
        kind = file.facts["general.architecture"]
        raise ValueError(f"{file.path}: architecture must be 'llama'; got {kind!r}")
    if file.facts.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in (
        file.tensors
    ):
        raise ValueError(f"{file.path}: rotary angles must be unscaled")
    heads = file.fact("llama.attention.head_count")
    return GPTConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        block_size=file.fact("llama.context_length"),
        n_layer=file.fact("llama.block_count"),
        n_head=heads,
        n_kv_head=file.facts.get("llama.attention.head_count_kv", heads),
        head_dim=file.facts.get("llama.rope.dimension_count"),
        n_embd=file.fact("llama.embedding_length"),
        n_inner=file.fact("llama.feed_forward_length"),
        norm="rms",
        norm_eps=float(f"{file.fact('llama.attention.layer_norm_rms_epsilon'):.7g}"),  # of float32
        position="rotary",
        rope_theta=file.facts.get("llama.rope.freq_base", 10000.0),
        activation="swiglu",
        bias=False,
        tie_weights="output.weight" not in file.tensors,
    )


def load(
    path: str | Path,
    ops: Choice | Mapping[str, Choice] = "fused",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> GPT:
    """The model of a GGUF file, in float32 unless ``dtype`` says otherwise.

    Raises:
        ValueError: Not a whole GGUF file of a Llama model, or weights of a kind that is not read.
    """
    file = Gguf(path)
    config = config_of(file)
    state = {name: part.to(dtype or part.dtype) for name, part in _weights(file, config).items()}
    return fill(hollow(config, ops), state, device, source=file.path)


def _weights(file: Gguf, config: GPTConfig) -> dict[str, Tensor]:
    """Our parameters, a tied head left out."""

    def turned(name: str, heads: int) -> Tensor:
        """Rows of queries or keys from ggml's order, where a pair to be turned are neighbours."""
        rows = file.tensor(name)
        return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)

    state = {
        "wte.weight": file.tensor("token_embd.weight"),
        "ln_f.weight": file.tensor("output_norm.weight"),
    }
    if not config.tie_weights:
        state["lm_head.weight"] = file.tensor("output.weight")
    for i in range(config.n_layer):
        theirs, ours = f"blk.{i}.", f"h.{i}."
        q = turned(f"{theirs}attn_q.weight", config.n_head)
        k = turned(f"{theirs}attn_k.weight", config.kv_heads)
        gate, up = (file.tensor(f"{theirs}ffn_{part}.weight") for part in ("gate", "up"))
        state |= {
            f"{ours}ln_1.weight": file.tensor(f"{theirs}attn_norm.weight"),
            f"{ours}attn.c_attn.weight": torch.cat((q, k, file.tensor(f"{theirs}attn_v.weight"))),
            f"{ours}attn.c_proj.weight": file.tensor(f"{theirs}attn_output.weight"),
            f"{ours}ln_2.weight": file.tensor(f"{theirs}ffn_norm.weight"),
            f"{ours}mlp.c_fc.weight": torch.cat((gate, up)),
            f"{ours}mlp.c_proj.weight": file.tensor(f"{theirs}ffn_down.weight"),
        }
    return state


def tokenizer_of(path: str | Path) -> HubTokenizer:
    """The tokenizer of a GGUF file: byte pairs, split as GPT-2 does or digit by digit besides.

    Raises:
        ValueError: Not a whole GGUF file, or a tokenizer of another kind.
    """
    file = Gguf(path)
    kind, split = file.fact("tokenizer.ggml.model"), file.facts.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or split not in ("gpt-2", "default", "smollm"):
        raise ValueError(
            f"{path}: its tokenizer must be byte pairs split as gpt-2 or smollm; "
            f"got {kind!r} split as {split!r}"
        )
    package = library(file.path)
    tokens = file.fact("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ", 1)) for pair in file.fact("tokenizer.ggml.merges")]
    inner = package.Tokenizer(package.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    bytes_ = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "smollm":
        digits = package.pre_tokenizers.Digits(individual_digits=True)
        bytes_ = package.pre_tokenizers.Sequence([digits, bytes_])
    inner.pre_tokenizer, inner.decoder = bytes_, package.decoders.ByteLevel()
    kinds = file.facts.get("tokenizer.ggml.token_type", [])
    controls = [t for t, kind in zip(tokens, kinds, strict=False) if kind == 3]
    inner.add_special_tokens(controls)
    end = file.facts.get("tokenizer.ggml.eos_token_id")
    template = file.facts.get("tokenizer.chat_template")
    return HubTokenizer(inner, None if end is None else tokens[end], template)
