from __future__ import annotations

import numpy as np
import pytest

from raysys.data.hashing import mix
from raysys.data.prepare.splits import (
    TEST,
    TRAIN,
    VALID,
    check_split,
    random_split,
    share_split,
    time_cuts,
    time_split,
    user_time_split,
)
from raysys.errors import UserError


def test_random_split_is_80_10_10_and_depends_on_the_seed_alone():
    split = random_split(1001, seed=0)
    assert np.bincount(split).tolist() == [800, 100, 101]
    assert np.array_equal(split, random_split(1001, seed=0))
    assert not np.array_equal(split, random_split(1001, seed=1))


def test_user_time_split_takes_the_end_of_each_user():
    user = np.array([5] * 20 + [9] * 35 + [2] * 9)
    time = np.concatenate([np.arange(20)[::-1], np.arange(35), np.zeros(9)]).astype(np.int64)
    shuffled = np.random.default_rng(0).permutation(len(user))
    split = np.empty(len(user), np.int8)
    split[shuffled] = user_time_split(user[shuffled], time[shuffled])
    assert split[:20].tolist() == [TEST] * 2 + [VALID] * 2 + [TRAIN] * 16  # times run backwards
    assert split[20:55].tolist() == [TRAIN] * 29 + [VALID] * 3 + [TEST] * 3
    assert split[55:].tolist() == [TRAIN] * 9  # too few for a tenth


def test_ties_of_a_user_are_cut_in_the_order_of_the_log():
    split = user_time_split(np.ones(10, np.int64), np.zeros(10, np.int64))
    assert split.tolist() == [TRAIN] * 8 + [VALID, TEST]


def test_time_split_leaves_no_row_of_train_after_a_row_of_valid_or_test():
    time = np.random.default_rng(0).integers(0, 40, 1000)
    split = time_split(time, time_cuts(time))
    assert time[split == TRAIN].max() < time[split == VALID].min()
    assert time[split == VALID].max() < time[split == TEST].min()
    assert 0.75 < np.mean(split == TRAIN) <= 0.8  # rows of one time stay together


def test_share_split_has_the_shares_of_uniform_hashes_and_takes_every_hash():
    split = share_split(mix(np.arange(100_000, dtype=np.uint64)))
    shares = np.bincount(split) / len(split)
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=4 * np.sqrt(0.16 / len(split)))  # 4 standard deviations
    assert share_split(np.array([0, 2**64 - 1], np.uint64)).tolist() == [TRAIN, TEST]


def test_an_empty_split_is_named():
    with pytest.raises(UserError, match="mine: split 'time' leaves no row for valid"):
        check_split(np.array([5, 0, 3]), "time", "mine")
