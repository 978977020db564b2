"""Which rows train, validate and test: by chance, by time within each user, or by one moment for all."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raysys.errors import UserError

Split = Literal["random", "user_time", "global_time"]
TRAIN, VALID, TEST = 0, 1, 2
"""Values of the arrays below, in the order of `SPLITS`."""


def random_split(rows: int, seed: int) -> NDArray[np.int8]:
    """80% of the rows train, 10% validate, 10% test, drawn without replacement: [rows]."""
    order = np.random.default_rng(seed).permutation(rows)
    split = np.zeros(rows, np.int8)
    split[order[rows * 8 // 10 :]] = VALID
    split[order[rows * 9 // 10 :]] = TEST
    return split


def user_time_split(user: NDArray[np.int64], time: NDArray[np.int64]) -> NDArray[np.int8]:
    """The last 10% of each user's rows test, the 10% before validate (rounded down): [rows].

    Rows of one user at the same time are in the order of the log.
    """
    order = np.lexsort((time, user))  # stable
    count = np.bincount(user)[user[order]]  # [rows] rows of the same user
    first = np.searchsorted(user[order], user[order])
    left = count - (np.arange(len(user)) - first)  # rows of this user from here on, this one included
    split = np.zeros(len(user), np.int8)
    split[order[left <= 2 * (count // 10)]] = VALID
    split[order[left <= count // 10]] = TEST
    return split


def time_cuts(time: NDArray[np.int64]) -> tuple[int, int]:
    """Validation starts at the first time that 80% of the rows come before, test at that of 90%."""
    ordered = np.sort(time)
    return int(ordered[len(time) * 8 // 10]), int(ordered[len(time) * 9 // 10])


def time_split(time: NDArray[np.int64], cuts: tuple[int, int]) -> NDArray[np.int8]:
    """Rows before the first cut train, from the second on test: [rows]. Rows of one time stay together."""
    return (time >= cuts[0]).astype(np.int8) + (time >= cuts[1]).astype(np.int8)


def share_split(hashes: NDArray[np.uint64]) -> NDArray[np.int8]:
    """80% of all hashes train, 10% validate, 10% test: [rows]. Which split a row is in depends on nothing but its hash."""
    tenth = np.uint64(2**64 // 10)
    return (hashes >= tenth * np.uint64(8)).astype(np.int8) + (hashes >= tenth * np.uint64(9)).astype(np.int8)


def check_split(rows: NDArray[np.int64], split: str, what: str) -> None:
    """A `UserError` if train, valid or test has no rows: `rows` has the number of each."""
    for name, count in zip(("train", "valid", "test"), rows, strict=True):
        if count == 0:
            raise UserError(f"{what}: split {split!r} leaves no row for {name}", "take another split, or more rows")
