from __future__ import annotations

import torch

from raysys.nn.random import hash64, seeded


def test_same_seed_and_part_draw_the_same_whatever_was_drawn_before():
    draws = []
    for before in range(2):
        torch.rand(before)
        with seeded(3, "towers"):
            draws.append(torch.rand(4))
    assert torch.equal(*draws)


def test_parts_and_seeds_draw_differently():
    draws = []
    for seed, part in ((0, "a"), (0, "b"), (1, "a")):
        with seeded(seed, part):
            draws.append(torch.rand(4))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_generator_outside_goes_on_as_if_nothing_had_been_drawn():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(0, "x"):
        torch.rand(10)
    assert torch.equal(torch.rand(3), expected)


def test_hash_is_fixed():
    # From `hashlib.sha256(b"0/item")`: initial weights of every run depend on it.
    assert hash64("0/item") == 4428905645505327010
