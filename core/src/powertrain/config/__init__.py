"""The configuration: TOML or a dict in, checked tables and the origin of every value out.

>>> from powertrain.config import read, structure
>>> config = structure(read({"batch": {"micro": 8}}, environ={}), {})
>>> config.batch.micro, str(config.origins["batch.micro"])
(8, 'config argument')
"""

from __future__ import annotations

from powertrain.config.batch import BatchSizes, resolve_batch
from powertrain.config.derive import derive
from powertrain.config.document import Document, read
from powertrain.config.effective import Config
from powertrain.config.origin import DEFAULT, Origin, derived
from powertrain.config.problem import Problem
from powertrain.config.structure import structure

__all__ = [
    "DEFAULT",
    "BatchSizes",
    "Config",
    "Document",
    "Origin",
    "Problem",
    "derive",
    "derived",
    "read",
    "resolve_batch",
    "structure",
]
