"""Models that are made of several models."""
