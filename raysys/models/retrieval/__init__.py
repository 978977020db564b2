"""Retrieval: models that find candidates among all items, and the indexes that they are found with."""
