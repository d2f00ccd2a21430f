"""A minimal GPT that trains and generates with ``fastlm.kernels``."""

from .cache import KVCache
from .config import PRESETS, GPTConfig
from .model import GPT

__all__ = ["GPT", "PRESETS", "GPTConfig", "KVCache"]
