"""How often ids come along in a stream of batches, without a vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raysys.nn.random import hash64

_PRIME = (1 << 61) - 1


class StreamingFrequency(nn.Module):
    """Estimates the probability that an id is in a batch as 1 / the mean number of steps between its appearances.

    Yi et al. (RecSys 2019), algorithm 2: arrays A (step of the last appearance) and B (mean gap, moving average of rate
    `rate`), indexed by a hash; with several hash functions the largest B counts, because collisions only shorten gaps. The
    n-th appearance has at least the rate 1 / n (ours): B is the mean of all gaps at first, where a moving average would keep
    most of its start for hundreds of appearances. An id that never came has the estimate 1 / `initial_gap`.
    """

    last: Tensor
    gap: Tensor
    times: Tensor
    step: Tensor

    def __init__(self, size: int = 1 << 17, hashes: int = 2, rate: float = 0.01, initial_gap: float = 1000.0) -> None:
        super().__init__()
        self.rate = rate
        generator = torch.Generator().manual_seed(hash64("frequency"))
        self.register_buffer("factors", torch.randint(1, 1 << 62, (hashes, 1), generator=generator) | 1)
        self.register_buffer("last", torch.zeros(hashes, size, dtype=torch.float64))
        self.register_buffer("gap", torch.full((hashes, size), float(initial_gap), dtype=torch.float64))
        self.register_buffer("times", torch.zeros(hashes, size, dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, ids: Tensor) -> None:
        """One step, with the ids [n] of its global batch, which must be the same on every rank; -1 is no id."""
        self.step += 1
        places = self._places(ids[ids >= 0].unique())  # [hashes, n]
        for last, gap, times, place in zip(self.last, self.gap, self.times, places, strict=True):
            slots = place.unique()
            times[slots] += 1
            rate = (1 / times[slots]).clamp(min=self.rate)
            gap[slots] += rate * (self.step - last[slots] - gap[slots])
            last[slots] = self.step

    def forward(self, ids: Tensor) -> Tensor:
        """[n] probabilities of being in a batch."""
        return 1.0 / self.gap.gather(1, self._places(ids)).amax(0)

    def _places(self, ids: Tensor) -> Tensor:
        """int64 [n] → [hashes, n]: the high bits of products with odd numbers, which wrap around."""
        mixed = ids[None] * self.get_buffer("factors")
        return (mixed ^ (mixed >> 29)).remainder(_PRIME).remainder(self.gap.shape[1])
