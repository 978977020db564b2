"""How large a model is and how long it may take, before anything is trained."""

from __future__ import annotations

import time

import torch
from torch import nn

from raysys.train.tables import find_tables


def parameter_counts(step: nn.Module) -> dict[str, int]:
    """Parameters of the embedding tables (`sparse`) and of everything else (`dense`)."""
    sparse = sum(table.config.num_embeddings * table.config.embedding_dim for table in find_tables(step))
    return {"dense": sum(parameter.numel() for parameter in step.parameters()) - sparse, "sparse": sparse}


def estimate_seconds(flops: int, rows: int, threads: int) -> float:
    """Seconds of `rows` training rows (three times the forward pass) at this machine's measured float32 GEMM rate.

    A lower bound: reading, look-ups, optimisers and communication come on top.
    """
    side = 512
    a, b = torch.ones(side, side), torch.ones(side, side)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        a @ b
        products += 1
    rate = products * 2 * side**3 / (time.perf_counter() - started) / torch.get_num_threads()  # per thread
    return 3 * flops * rows / (rate * threads)
