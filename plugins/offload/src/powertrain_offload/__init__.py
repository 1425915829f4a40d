"""Keeps training state on disks and in host memory, and moves it past the page cache."""

from __future__ import annotations

__version__ = "0.1.0"
