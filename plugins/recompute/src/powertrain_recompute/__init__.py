"""Runs the blocks of a model again in backward, in place of keeping what they computed."""

__version__ = "0.1.0"
