"""Attention: the flash kernels and the public functions over them."""

from .flash import flash_attention
from .sdpa import scaled_dot_product_attention
from .varlen import flash_attention_varlen

__all__ = ["flash_attention", "flash_attention_varlen", "scaled_dot_product_attention"]
