"""Attention: the flash kernels and the public functions over them."""

from .flash import flash_attention
from .sdpa import scaled_dot_product_attention

__all__ = ["flash_attention", "scaled_dot_product_attention"]
