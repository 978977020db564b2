"""Heads for several tasks: what a ranking model computes between its shared representation and the logits."""
