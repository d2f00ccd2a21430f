"""Attention: the flash kernels and the public functions over them."""

from .decode import flash_attention_decode
from .flash import flash_attention
from .merge import merge_attention
from .register import register
from .sdpa import scaled_dot_product_attention
from .varlen import flash_attention_varlen

__all__ = [
    "flash_attention",
    "flash_attention_decode",
    "flash_attention_varlen",
    "merge_attention",
    "register",
    "scaled_dot_product_attention",
]
