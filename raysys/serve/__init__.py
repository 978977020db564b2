"""Serving: from bundles to answers, and checks of what was answered."""
