"""``powertrain plan``: the memory a run needs, before anything is allocated."""
