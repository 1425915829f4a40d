"""``python -m powertrain.cli`` is the ``powertrain`` command."""

from __future__ import annotations

from powertrain.cli import main

main()
