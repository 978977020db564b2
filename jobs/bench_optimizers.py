"""Dense optimisers: the bytes of their state, and the time of a step on large matrices beside fused AdamW.

    python jobs/bench_optimizers.py [SIZE ...]       # sides of square matrices, default 1024 2048

One thread, whose CPU time is taken, so that other work on the machine counts little; on a GPU the wall clock's. All take
turns. `products alone` is the random projection of the gradients and nothing else, the least that `apollo` can take.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from raysys.train.apollo import LowRank
from raysys.train.job import set_up_process
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
    gradients = [torch.randn(size, size, device=device) for _ in range(MATRICES)]
    projection = torch.randn(size // 4, size, device=device)
    built: dict[str, torch.optim.Optimizer] = {}
    for name, settings in optimizers(size).items():
        parameters = [nn.Parameter(torch.randn_like(gradient)) for gradient in gradients]
        built[name] = settings.build(parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
    steps: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in built.items()}
    steps["products alone"] = lambda: [projection @ gradient for gradient in gradients]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 1):
        for name, step in steps.items():
            started = _clock(device)
            for _ in range(STEPS):
                step()
            if turn:
                seconds[name].append((_clock(device) - started) / STEPS)
    sizes = {name: state_bytes(optimizer) for name, optimizer in built.items()}
    return {name: (statistics.median(times), sizes.get(name, 0)) for name, times in seconds.items()}


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Print one table for each size."""
    set_up_process(1)
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
