"""Layout-independent checkpoints: sharded safetensors, one JSON manifest, no pickle."""

__version__ = "0.1.0"
