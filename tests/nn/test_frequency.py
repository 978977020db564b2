from __future__ import annotations

import pytest
import torch

from raysys.nn.frequency import StreamingFrequency

PERIODS = torch.tensor([1, 2, 4, 5, 10, 20])


def feed(frequency, periods, steps, first=1):
    """Id k comes once every periods[k] steps."""
    for step in range(first, first + steps):
        frequency.update(torch.arange(len(periods))[step % periods == 0])


def test_it_finds_the_frequencies_of_a_stationary_stream():
    frequency = StreamingFrequency(rate=0.05, initial_gap=10.0)
    feed(frequency, PERIODS, 4000)
    torch.testing.assert_close(frequency(torch.arange(6)), 1 / PERIODS.double(), rtol=0.1, atol=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_appearances_are_found_within_a_tenth_on_average(seed):
    generator, share = torch.Generator().manual_seed(seed), torch.tensor([0.5, 0.2, 0.1])
    frequency, found = StreamingFrequency(rate=0.01, initial_gap=5.0), []
    for step in range(6000):
        frequency.update(torch.arange(3)[torch.rand(3, generator=generator) < share])
        if step >= 3000 and step % 100 == 0:
            found.append(frequency(torch.arange(3)))
    torch.testing.assert_close(torch.stack(found).mean(0), share.double(), rtol=0.1, atol=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_near_after_some_tens_of_appearances_whatever_it_started_from(seed):
    generator, share = torch.Generator().manual_seed(seed), torch.tensor([0.5, 0.2, 0.05]).repeat(100)
    frequency = StreamingFrequency()
    for _ in range(1000):
        frequency.update(torch.arange(300)[torch.rand(300, generator=generator) < share])
    ratio = (frequency(torch.arange(300)) / share).unflatten(0, (100, 3)).mean(0)
    torch.testing.assert_close(ratio, torch.ones(3).double(), rtol=0.1, atol=0)


def test_it_follows_a_change():
    frequency = StreamingFrequency(rate=0.05)
    feed(frequency, torch.tensor([2]), 1000)
    feed(frequency, torch.tensor([10]), 3000, first=1001)
    assert float(frequency(torch.tensor([0]))) == pytest.approx(0.1, rel=0.1)


def test_several_hashes_undo_collisions():
    many = torch.arange(200)
    errors = []
    for hashes in (1, 4):
        frequency = StreamingFrequency(size=512, hashes=hashes, rate=0.05, initial_gap=10.0)
        feed(frequency, torch.full((200,), 10) + many % 10, 3000)
        errors.append((frequency(many) * (10 + many % 10) - 1).abs().mean())
    assert errors[1] < 0.5 * errors[0]


def test_no_id_and_repeated_ids_change_nothing_more():
    one, other = StreamingFrequency(), StreamingFrequency()
    one.update(torch.tensor([3, 3, -1, 7]))
    other.update(torch.tensor([7, 3]))
    torch.testing.assert_close(one.gap, other.gap)
    torch.testing.assert_close(one.last, other.last)
