"""What plugin authors test with: contract suites, a pool of ranks, a null device.

- ``powertrain.testing.pool``: processes that start once and serve as ranks;
- ``powertrain.testing.loopback``: ranks as threads of one process;
- ``powertrain.testing.null``: an accelerator and a communicator that do nothing;
- ``powertrain.testing.memory_store``: checkpoints in a dictionary;
- ``powertrain.testing.surroundings``: a ``Context`` without an engine;
- ``powertrain.testing.accelerator``, ``.communicator``, ``.optimizer``,
  ``.checkpoint``, ``.sampler``, ``.tier``, ``.files``: one contract class a role; ``.plugin``: every plugin's;
- ``powertrain.testing.suites``: those classes, run on an installed plugin by
  ``powertrain plugins test NAME``;
- ``powertrain.testing.pytest_plugin``: the fixture ``ranks`` and the option ``--plugin``.
"""
