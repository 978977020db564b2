"""raysys: distributed training, search and serving of large-scale recommenders on Ray."""

__version__ = "0.1.0"
