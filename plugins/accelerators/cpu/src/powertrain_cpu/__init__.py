"""The accelerator that every machine has: the processor."""

__version__ = "0.1.0"
