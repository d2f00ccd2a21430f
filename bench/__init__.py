"""Benchmarks of every op in ``fastlm.kernels.OPS``, and reports of what the compiled code says."""
