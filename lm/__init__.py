"""A minimal GPT that trains and generates with ``fastlm.kernels``."""

from .cache import KVCache
from .config import PRESETS, GPTConfig
from .model import GPT
from .tokenizer import ByteTokenizer, load_tokenizer

__all__ = ["GPT", "PRESETS", "ByteTokenizer", "GPTConfig", "KVCache", "load_tokenizer"]
