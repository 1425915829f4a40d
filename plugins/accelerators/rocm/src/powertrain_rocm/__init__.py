"""The accelerator for AMD GPUs."""

__version__ = "0.1.0"
