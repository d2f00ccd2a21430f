"""A minimal GPT that trains and generates with ``fastlm.kernels``."""
