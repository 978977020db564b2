"""Training: from a config to checkpoints, metrics and events."""
