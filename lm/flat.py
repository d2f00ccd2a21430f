"""A step of generation on a CPU in PyTorch's calls and nothing around them.

There the newest token of a small model costs more Python than arithmetic: modules, the choice of a
kernel, checks that the step before passed already. With 4 layers 128 wide a token took 1300 us by
``GPT.hidden`` and 500 us so (the quickest of ten runs on a busy core of a Zen 4). What is computed
is the same to the bit; what this file does not know, ``flat_step`` leaves to ``GPT.hidden``.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .cache import KVCache
from .model import GPT, MLP, Attention, Block, Norm

_attention = torch._C._nn.scaled_dot_product_attention
Function = Callable[[Tensor], Tensor]


def flat_step(model: GPT, cache: KVCache) -> Function | None:
    """A function from newest tokens (B,) to what the head reads (B, n_embd).

    It gives what ``model.hidden(ids[:, None], cache=cache)`` gives and does to the cache what that
    does, while the cache is even and not empty. None where the model or its device asks for more
    than plain PyTorch.
    """
    weight, blocks = model.wte.weight, cast(Sequence[Block], model.h)
    if (
        weight.device.type != "cpu"
        or model.config.post_norm
        or torch.is_autocast_enabled("cpu")
        or not all(hasattr(op, "dispatch") for op in vars(model.ops).values())  # a reference
        or model.ops.gelu.dispatch.takes_kernel((weight,), {})
        or not all(_plain(part, weight.dtype) for block in blocks for part in _parts(block))
    ):
        return None
    return _Flat(model, blocks, cache)


_WIDE, _FEW_ROWS = 4096, 16


def head(model: GPT) -> Function:
    """A function from what the head reads (rows, n_embd) to logits (rows, vocab_size).

    On a CPU, 2 to 16 rows of a large vocabulary are the table times the rows' columns: the same
    product, for which MKL takes 1.2 to 4 times less than for the rows times the table.
    """
    weight, plain = model.lm_head.weight, _plain(model.lm_head, torch.float32)
    if weight.device.type != "cpu" or len(weight) < _WIDE or not plain:
        return model.lm_head

    def few(x: Tensor) -> Tensor:
        turned = 1 < len(x) <= _FEW_ROWS and x.dtype == weight.dtype
        return (weight @ x.t()).t() if turned else model.lm_head(x)

    return few


def _parts(block: Block) -> tuple[nn.Module, ...]:
    norms, attn, mlp = (block.ln_1, block.ln_2), block.attn, block.mlp
    return block, attn, mlp, *norms, attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj


def _plain(part: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a part is what its model was built with: no adapter, no hook, no other dtype."""
    return (
        type(part) in (Block, Attention, MLP, Norm, nn.Linear)
        and not (part._forward_hooks or part._forward_pre_hooks)
        and all(p is None or p.dtype == dtype for p in part._parameters.values())
    )


class _Layer(NamedTuple):
    """A block: what its arithmetic calls, reads and writes."""

    ln_1: Function
    c_attn: Function
    q_norm: Tensor | None
    k_norm: Tensor | None
    keys: Tensor  # (B, H_kv, capacity, D), a view of the cache
    values: Tensor
    attn_proj: Function
    ln_2: Function
    c_fc: Function
    mlp_proj: Function


class _Flat:
    def __init__(self, model: GPT, blocks: Sequence[Block], cache: KVCache):
        self.config, self.cache, self.wte = model.config, cache, model.wte.weight
        self.wide = torch.promote_types(self.wte.dtype, torch.float32)
        self.cos, self.sin = model.cos.to(self.wide), model.sin.to(self.wide)
        self.wpe = None if model.wpe is None else model.wpe.weight
        self.layers = [_layer(*parts) for parts in zip(blocks, cache.k, cache.v, strict=True)]
        assert model.ln_f is not None  # there is one without post_norm
        self.ln_f = _norm(model.ln_f)
        self.activation = _activation(model)

    def __call__(self, ids: Tensor) -> Tensor:
        config, cache, activation = self.config, self.cache, self.activation
        at, end = cache.most, cache.most + 1
        begin = 0 if config.window is None else max(at - config.window, 0)
        B, H, H_kv, D = len(ids), config.n_head, config.kv_heads, config.head_width
        heads, packed, joined = (H, H_kv, H_kv), (B, H + 2 * H_kv, 1, D), (B, H * D)
        turns, grouped = config.position == "rotary", H_kv != H
        x = torch.embedding(self.wte, ids)
        if self.wpe is not None:
            x = x + self.wpe[at]
        for ln_1, c_attn, q_norm, k_norm, keys, values, attn_proj, ln_2, c_fc, proj in self.layers:
            q, k, v = c_attn(ln_1(x)).view(packed).split_with_sizes(heads, 1)
            if q_norm is not None:
                q = torch.rms_norm(q, (D,), q_norm, config.norm_eps)
                k = torch.rms_norm(k, (D,), k_norm, config.norm_eps)
            if turns:
                q, k = self.turned(q, at), self.turned(k, at)
            keys[:, :, at:end] = k
            values[:, :, at:end] = v
            seen = keys[:, :, begin:end], values[:, :, begin:end]
            x = x + attn_proj(_attention(q, *seen, enable_gqa=grouped).reshape(joined))
            x = x + proj(activation(c_fc(ln_2(x))))
        cache.grow(1)
        return self.ln_f(x)

    def turned(self, x: Tensor, at: int) -> Tensor:
        """``rotary_embedding`` of one place, in float32 as there."""
        c, s = self.cos[at], self.sin[at]
        one, two = x.to(self.wide).chunk(2, -1)
        return torch.cat((one * c - two * s, one * s + two * c), -1).to(x.dtype)


def _layer(block: Block, k: Tensor, v: Tensor) -> _Layer:
    attn, mlp = block.attn, block.mlp
    return _Layer(
        _norm(block.ln_1), _product(attn.c_attn), attn.q_norm, attn.k_norm,
        k.transpose(1, 2), v.transpose(1, 2), _product(attn.c_proj),
        _norm(block.ln_2), _product(mlp.c_fc), _product(mlp.c_proj),
    )  # fmt: skip


def _product(linear: nn.Linear) -> Function:
    bias: Tensor | None = linear.bias
    transposed = linear.weight.t()
    if bias is None:
        return lambda x: torch.mm(x, transposed)
    return lambda x: torch.addmm(bias, x, transposed)


def _norm(norm: Norm) -> Function:
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    shape = weight.shape
    if norm.layer:
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    return lambda x: torch.rms_norm(x, shape, weight, eps)


def _activation(model: GPT) -> Function:
    name = model.config.activation
    if name.startswith("gelu"):
        how = "tanh" if name == "gelu_tanh" else "none"
        return lambda x: torch._C._nn.gelu(x, approximate=how)
    return getattr(model.ops, name).dispatch.eager
