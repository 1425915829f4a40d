"""ZeRO: optimizer state, gradients and parameters sharded over the data dimension."""

__version__ = "0.1.0"
