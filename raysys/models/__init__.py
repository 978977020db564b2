"""Blocks put together into models."""
