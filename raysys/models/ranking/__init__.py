"""Ranking models."""
