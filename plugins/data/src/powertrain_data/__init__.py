"""Which samples a rank sees and in which order, and tokens in memory-mapped files.

- ``powertrain_data.sampler``: the plugin's sampler;
- ``powertrain_data.permutation``: its shuffle, in constant memory;
- ``powertrain_data.tokens``: ``TokenDataset`` and the files it reads;
- ``powertrain_data.corpus``: ``build_bytes``, which makes such files from text.
"""

__version__ = "0.1.0"
