from __future__ import annotations

import pytest

from raysys.data.schedule import Schedule

CASES = [
    (1000, 64, 12),
    (1000, 100, 12),
    (960, 96, 12),
    (7, 4, 12),
    (5, 100, 3),
    (1, 1, 1),
    (101, 5, 12),
    (4096, 4095, 7),
]


@pytest.mark.parametrize(("num_rows", "batch_size", "shards"), CASES)
def test_every_row_is_taken_once_and_every_batch_but_the_last_is_full(num_rows, batch_size, shards):
    schedule = Schedule(num_rows, batch_size, shards)
    quotas = [schedule.quota(step) for step in range(schedule.steps)]
    assert all(min(quota) >= 0 for quota in quotas)
    assert [sum(quota) for quota in quotas[:-1]] == [batch_size] * (schedule.steps - 1)
    assert sum(quotas[-1]) == num_rows - batch_size * (schedule.steps - 1)
    assert schedule.taken(0) == (0,) * shards
    bounds = [schedule.shard(shard) for shard in range(shards)]
    assert [stop - start for start, stop in bounds] == list(schedule.taken(schedule.steps))
    assert [start for start, _ in bounds] == [0] + [stop for _, stop in bounds[:-1]]
    assert bounds[-1][1] == num_rows


@pytest.mark.parametrize(("num_rows", "batch_size", "shards"), CASES)
def test_shards_and_their_shares_of_a_batch_are_equal_up_to_rounding(num_rows, batch_size, shards):
    schedule = Schedule(num_rows, batch_size, shards)
    lengths = schedule.taken(schedule.steps)
    assert max(lengths) - min(lengths) <= 2, "one from the full batches and one from the last"
    for step in range(schedule.steps):
        assert max(schedule.quota(step)) - min(schedule.quota(step)) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 12])
def test_padding_is_the_least_that_gives_all_ranks_and_full_batches_one_size(world_size):
    schedule = Schedule(10_000, 100, 12, world_size)
    sizes = [
        max(sum(schedule.quota(step)[rank::world_size]) for rank in range(world_size)) for step in range(schedule.steps)
    ]
    assert {schedule.padded_rows(step) for step in range(schedule.steps)} == {max(sizes)}
    rest = Schedule(10_050, 100, 12, world_size)
    assert rest.padded_rows(0) == max(sizes)
    assert rest.padded_rows(100) < max(sizes)


def test_a_log_of_less_than_a_batch_is_padded_for_the_fullest_rank():
    assert Schedule(5, 100, 12, 1).padded_rows(0) == 5
    assert Schedule(5, 100, 12, 12).padded_rows(0) == 1
