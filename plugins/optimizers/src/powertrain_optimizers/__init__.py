"""Optimizers that scale, update and cast in one pass; each is a ``torch.optim.Optimizer`` for any training loop.

- ``powertrain_optimizers.adam``: ``Adam``, ``AdamW``;
- ``powertrain_optimizers.sgd``, ``adagrad``, ``lion``: ``SGD``, ``Adagrad``, ``Lion``;
- ``powertrain_optimizers.lamb``: ``Lamb``, which needs sums over whole tensors;
- ``powertrain_optimizers.adafactor``, ``muon``: ``Adafactor``, ``Muon``, which need whole matrices;
- ``powertrain_optimizers.adam8bit``: ``Adam8bit``, ``AdamW8bit``;
- ``powertrain_optimizers.onebit_adam``, ``zero_one_adam``, ``onebit_lamb``: for gradients that travel as one bit;
- ``powertrain_optimizers.schedule_free``: ``ScheduleFreeAdamW``, and ``evaluating``.
"""

__version__ = "0.1.0"
