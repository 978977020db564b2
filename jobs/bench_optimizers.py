"""Dense optimisers: the bytes of their state, and the time of a step on large matrices beside fused AdamW.

usage: python jobs/bench_optimizers.py [SIZE ...]    (sides of square matrices, default 1024 2048)
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch import nn

from raysys.train.apollo import LowRank
from raysys.train.optimizers import DenseOptimizer

ROUNDS, STEPS, MATRICES = 7, 3, 4


def optimizers(size: int) -> dict[str, DenseOptimizer]:
    """The rows of the table for matrices of this size."""
    return {
        "adamw": DenseOptimizer(name="adamw", lr=1e-4),
        "apollo": DenseOptimizer(name="apollo", lr=1e-4),
        "apollo r=m/8": DenseOptimizer(name="apollo", lr=1e-4, low_rank=LowRank(rank=size // 8)),
        "apollo_mini": DenseOptimizer(name="apollo_mini", lr=1e-4),
        "sgd": DenseOptimizer(name="sgd", lr=1e-4),
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimiser keeps, projections apart."""
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))


def step_seconds(size: int, device: torch.device) -> dict[str, tuple[float, int]]:
    """Median seconds of a step and bytes of state by optimiser; they take turns, after a round that warms up."""
    built: dict[str, torch.optim.Optimizer] = {}
    for name, settings in optimizers(size).items():
        parameters = [nn.Parameter(torch.randn(size, size, device=device)) for _ in range(MATRICES)]
        built[name] = settings.build(parameters)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for turn in range(ROUNDS + 1):
        for name, optimizer in built.items():
            _wait(device)
            started = time.perf_counter()
            for _ in range(STEPS):
                optimizer.step()
            _wait(device)
            if turn:
                seconds[name].append((time.perf_counter() - started) / STEPS)
    return {name: (statistics.median(times), state_bytes(built[name])) for name, times in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Print one table for each size."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for size in [int(argument) for argument in sys.argv[1:]] or [1024, 2048]:
        print(f"\n{MATRICES} matrices of {size} x {size} on {device}, one thread")
        print(f"{'optimiser':14} {'ms a step':>10} {'of adamw':>9} {'state MB':>9} {'of adamw':>9}")
        table = step_seconds(size, device)
        base_seconds, base_bytes = table["adamw"]
        for name, (seconds, size_bytes) in table.items():
            times, share = seconds / base_seconds, size_bytes / base_bytes
            print(f"{name:14} {1e3 * seconds:10.2f} {times:9.2f} {size_bytes / 1e6:9.3f} {share:9.4f}")


if __name__ == "__main__":
    main()
