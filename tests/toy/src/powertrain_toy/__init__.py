"""An accelerator by somebody else."""

__version__ = "0.1.0"
