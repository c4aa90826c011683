"""Early-exit large language models: training under 3D parallelism, tuning, inference."""

__version__ = "0.1.0"
