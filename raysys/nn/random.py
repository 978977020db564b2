"""Random numbers that depend on a seed and on nothing that was drawn before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, part: str) -> Iterator[None]:
    """Inside, torch's CPU generator starts from (seed, part); afterwards it goes on as if nothing had been drawn.

    part: what is drawn for, so that parts of a model with one seed do not get the same numbers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash64(f"{seed}/{part}"))
        yield


def hash64(text: str) -> int:
    """64 well mixed bits of a text as a signed number, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
