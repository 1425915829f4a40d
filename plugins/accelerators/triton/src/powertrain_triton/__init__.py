"""Triton kernels that the accelerators of GPUs share; a library, not a plugin."""

__version__ = "0.1.0"
