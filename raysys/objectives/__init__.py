"""Losses: from a model's outputs to one number."""
