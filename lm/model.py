"""A GPT: GPT-2, Llama or a 2017 encoder by its config, on fused kernels or eager PyTorch.

The residual stream flows beside the branches: a block takes a branch's output and the stream, adds
and normalises both in one kernel (``add_layer_norm``), and hands on the next pair. Tokens are
(B, T), or (total,) for sequences of any lengths packed end to end beside ``cu_seqlens``.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cache import KVCache
from .config import GATED, GPTConfig
from .ops import Choice, resolve


@dataclass(frozen=True)
class Place:
    """Where the tokens of a call stand: in a batch, in packed sequences, or behind a cache."""

    positions: Tensor  # of each token in its sequence
    begin: int | Tensor  # of the first one, where they follow each other
    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor | None
    cache: KVCache | None
    lengths: Tensor | None  # of each sequence of the cache, this call's tokens counted


class Norm(nn.Module):
    """LayerNorm or RMSNorm over n_embd, alone or behind an addition."""

    def __init__(self, config: GPTConfig, ops: SimpleNamespace):
        super().__init__()
        self.ops, self.eps, self.dropout = ops, config.norm_eps, config.dropout
        self.layer = config.norm == "layer"
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if self.layer and config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The norm of ``x``."""
        weight = self.weight
        if self.layer:
            return self.ops.layer_norm(x, weight.shape, weight, self.bias, self.eps)
        return self.ops.rms_norm(x, weight.shape, weight, self.eps)

    def add(self, branch: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of ``dropout(branch) + stream``, and that sum."""
        weight, p = self.weight, self.dropout if self.training else 0.0
        if self.layer:
            return self.ops.add_layer_norm(
                branch, stream, weight.shape, weight, self.bias, self.eps, dropout_p=p
            )
        return self.ops.add_rms_norm(branch, stream, weight.shape, weight, self.eps, dropout_p=p)


class Attention(nn.Module):
    """Grouped-query attention, its queries, keys and values from one product."""

    def __init__(self, config: GPTConfig, ops: SimpleNamespace, layer: int):
        super().__init__()
        self.config, self.ops, self.layer = config, ops, layer
        H, H_kv, D = config.n_head, config.kv_heads, config.head_width
        self.c_attn = nn.Linear(config.n_embd, (H + 2 * H_kv) * D, bias=config.bias)
        self.c_proj = nn.Linear(H * D, config.n_embd, bias=config.bias)
        self.q_norm = nn.Parameter(torch.ones(D)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(D)) if config.qk_norm else None

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """(..., T, n_embd) to the same."""
        config = self.config
        H, H_kv, D = config.n_head, config.kv_heads, config.head_width
        q, k, v = self.c_attn(x).unflatten(-1, (H + 2 * H_kv, D)).split((H, H_kv, H_kv), -2)
        if config.qk_norm:
            q = self.ops.rms_norm(q, (D,), self.q_norm, config.norm_eps)
            k = self.ops.rms_norm(k, (D,), self.k_norm, config.norm_eps)
        if config.position == "rotary":
            turn = {"offsets": place.begin, "cu_seqlens": place.cu_seqlens}
            q = self.ops.rotary_embedding(q, place.cos, place.sin, **turn)
            k = self.ops.rotary_embedding(k, place.cos, place.sin, **turn)
        return self.c_proj(self.attend(q, k, v, place).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
        """Attention over this call's keys, and the cache's before them."""
        config, cache = self.config, place.cache
        options: dict[str, Any] = {"causal": config.causal}
        if config.window is not None:
            options["window_size"] = (config.window, -1)
        if cache is not None:
            cache.write(self.layer, place.positions, k, v)
            if cache.most:
                keys, values = cache.seen(self.layer, q.shape[1])
                return self.ops.flash_attention_decode(
                    q, keys, values, cache_seqlens=place.lengths, **options
                )
        if self.training and config.dropout:
            options["dropout_p"] = config.dropout
        if place.cu_seqlens is None:
            return self.ops.flash_attention(q, k, v, **options)
        return self.ops.flash_attention_varlen(
            q, k, v, place.cu_seqlens, place.cu_seqlens, **options
        )


class MLP(nn.Module):
    """The feed-forward: one activation, or a gated one whose two halves come from one product."""

    def __init__(self, config: GPTConfig, ops: SimpleNamespace):
        super().__init__()
        self.ops, self.activation = ops, config.activation
        gated = config.activation in GATED
        self.c_fc = nn.Linear(config.n_embd, config.inner * (1 + gated), bias=config.bias)
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_embd) to the same."""
        x = self.c_fc(x)
        match self.activation:
            case "gelu":
                x = self.ops.gelu(x)
            case "gelu_tanh":
                x = self.ops.gelu(x, approximate="tanh")
            case gated_or_squared:
                x = getattr(self.ops, gated_or_squared)(x)
        return self.c_proj(x)


class Block(nn.Module):
    """Attention and feed-forward: each an addition to the stream."""

    def __init__(self, config: GPTConfig, ops: SimpleNamespace, layer: int):
        super().__init__()
        self.post_norm = config.post_norm
        self.ln_1 = Norm(config, ops)
        self.attn = Attention(config, ops, layer)
        self.ln_2 = Norm(config, ops)
        self.mlp = MLP(config, ops)

    def forward(self, branch: Tensor | None, stream: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """The last branch's output and the stream to the next such pair."""
        if self.post_norm:  # the stream is normalised itself, and no branch is left over
            stream, _ = self.ln_1.add(self.attn(stream, place), stream)
            stream, _ = self.ln_2.add(self.mlp(stream), stream)
            return stream, stream
        if branch is None:
            x = self.ln_1(stream)
        else:
            x, stream = self.ln_1.add(branch, stream)
        x, stream = self.ln_2.add(self.attn(x, place), stream)
        return self.mlp(x), stream


class GPT(nn.Module):
    """The model: token table, blocks, head.

    Args:
        config: Its shape and style.
        ops: ``"fused"``, ``"eager"``, or a mapping from an op's name to either: resolved here,
            once. Parameters are the same whatever it says.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, ops: Choice | Mapping[str, Choice] = "fused"):
        super().__init__()
        self.config, self.ops = config, resolve(ops)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        learned = config.position == "learned"
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if learned else None
        self.h = nn.ModuleList(Block(config, self.ops, i) for i in range(config.n_layer))
        self.ln_f = None if config.post_norm else Norm(config, self.ops)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.checkpoint_activations = False  # recompute blocks in the backward, to save memory
        self.begin = 0  # where a call's tokens stand, if sequences are cut over processes
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), what adds to the stream smaller by its depth."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 1:
                nn.init.ones_(p)
            else:
                depth = 2 * self.config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(depth))

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits, or the loss without logits ever in memory.

        Args:
            ids: (B, T) int64 tokens, or (total,) beside ``cu_seqlens``.
            targets: The shape of ``ids``: the token that should follow each; -100 counts for
                nothing.
            cache: Holds what came before ``ids``, and takes them in.
            cu_seqlens: (sequences + 1,) int32: where packed sequences begin and end.
            reduction: Of the loss: "mean", "sum" or "none".

        Returns:
            (logits, None), logits (..., T, vocab_size); or (None, loss) where there are targets.

        Raises:
            ValueError: Tokens of a wrong shape or dtype, or more than ``block_size`` of them.
        """
        x = self.hidden(ids, cache=cache, cu_seqlens=cu_seqlens)
        if targets is None:
            return self.lm_head(x), None
        loss = self.ops.linear_cross_entropy(
            x.flatten(0, -2), self.lm_head.weight, targets.flatten(), reduction=reduction
        )
        return None, loss

    def hidden(
        self, ids: Tensor, *, cache: KVCache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """What the head reads: (..., T, n_embd)."""
        place = self.place(ids, cache, cu_seqlens)
        stream = self.ops.embedding(ids, self.wte.weight)
        if self.wpe is not None:
            stream = stream + self.ops.embedding(place.positions, self.wpe.weight)
        stream = self.ops.dropout(stream, self.config.dropout, self.training)
        branch: Tensor | None = None
        for block in self.h:
            if self.checkpoint_activations and self.training:
                branch, stream = checkpoint(block, branch, stream, place, use_reentrant=False)
            else:
                branch, stream = block(branch, stream, place)
        if cache is not None:
            cache.grow(ids.shape[1])
        if self.ln_f is None or branch is None:
            return stream
        return self.ln_f.add(branch, stream)[0]

    def place(self, ids: Tensor, cache: KVCache | None, cu_seqlens: Tensor | None) -> Place:
        """Where the tokens stand. Raises where they cannot be the model's input."""
        check_ids(ids, self.config.block_size, cache, cu_seqlens)
        begin, lengths = self.begin if cache is None else cache.begin, None
        if cache is not None:
            positions, lengths = cache.positions(ids.shape[1]), cache.lengths + ids.shape[1]
        elif cu_seqlens is None:
            positions = begin + torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        else:
            index = torch.arange(ids.shape[0], device=ids.device)
            starts = cu_seqlens.long()
            positions = index - starts[torch.searchsorted(starts, index, right=True) - 1]
        return Place(positions, begin, self.cos, self.sin, cu_seqlens, cache, lengths)

    def generate(self, ids: Any, max_new_tokens: int | None = None, **options) -> list[Tensor]:
        """Continues prompts: see ``fastlm.lm.generate``."""
        from .generate import generate

        return generate(self, ids, max_new_tokens, **options)

    def stream(self, ids: Any, max_new_tokens: int | None = None, **options) -> Iterator[int]:
        """The new tokens of one prompt as they are drawn: see ``fastlm.lm.generate``."""
        from .generate import stream

        return stream(self, ids, max_new_tokens, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that ``from_pretrained`` and Hugging Face's ``transformers`` open."""
        from .hf import save

        save(self, folder)

    @staticmethod
    def from_pretrained(
        folder: str | Path,
        ops: Choice | Mapping[str, Choice] = "fused",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "GPT":
        """The model of a folder that we or ``transformers`` saved, in evaluation mode.

        Args:
            folder: Holds config.json and model.safetensors, or the latter's shards; or a .gguf file
                of a Llama model.
            ops: As ``GPT``.
            device: Where its parameters go.
            dtype: Of its parameters; None: as stored.

        Raises:
            ValueError: A file that is missing, damaged, of another format or another model.
        """
        from . import gguf, hf

        load = gguf.load if str(folder).endswith(".gguf") else hf.load
        return load(folder, ops, device=device, dtype=dtype)

    def num_params(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations of a training step a token, in sequences of ``T``.

        6 a weight of the matrices, and 12 a key and number of each head (Chowdhery et al. 2022,
        appendix B): a causal mask counts as if it were full, as everyone counts it.
        """
        config = self.config
        matrices = sum(p.numel() for p in self.h.parameters() if p.dim() == 2)
        matrices += config.vocab_size * config.n_embd
        return 6 * matrices + 12 * config.n_layer * config.n_head * config.head_width * T


def rotary_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (block_size, D / 2) of the angles; empty where positions do not turn."""
    if config.position != "rotary":
        return torch.empty(0), torch.empty(0)
    D = config.head_width
    frequencies = config.rope_theta ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)
    angles = torch.arange(config.block_size, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def check_ids(
    ids: Tensor, block_size: int, cache: KVCache | None, cu_seqlens: Tensor | None
) -> None:
    """Raises where tokens cannot be the model's input."""
    dims = 2 if cu_seqlens is None else 1
    if ids.dim() != dims or ids.dtype not in (torch.int64, torch.int32):
        shape = "(B, T)" if dims == 2 else "(total,) beside cu_seqlens"
        raise ValueError(
            f"GPT: ids must be {shape} int64 or int32; got {ids.dtype} {tuple(ids.shape)}"
        )
    if cu_seqlens is not None and cache is not None:
        raise ValueError("GPT: cache must be None beside cu_seqlens")
    before = 0
    if cache is not None:
        before = cache.most
        cache.check_room(ids.shape[1])
    if cu_seqlens is None and before + ids.shape[1] > block_size:
        raise ValueError(
            f"GPT: ids must end within block_size, {block_size} tokens; got {ids.shape[1]} tokens"
            + (f" behind {before} in the cache" if before else "")
        )
