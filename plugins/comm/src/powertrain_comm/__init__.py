"""Connects ranks with torch.distributed, under a watchdog that explains hangs."""

__version__ = "0.1.0"
