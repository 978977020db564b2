"""The rows of Online Retail II: what was bought, what was not, what came back, and what was known at the time.

A request is what a customer buys at one moment. Its candidates are the items sold to anyone in the `CANDIDATE_DAYS` before;
those bought are its positives (an item that nobody bought in this time could be told from every negative, and is no row).
Negatives are other candidates, none of them twice in a request: drawn evenly, or from the lines sold in that time, so in
proportion to how often an item sells, and popularity alone tells nothing.

Validation and test start at the times that 80% and 90% of the lines with a full return window come before. A label may not
look across the end of train: the window of a training row ends before validation starts, or the row has no label.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raysys.data.hashing import mix
from raysys.data.prepare.dataset import SPLITS
from raysys.data.prepare.past import Past
from raysys.data.prepare.splits import TRAIN, check_split, time_cuts, time_split

HISTORY = 50  # most recent purchases of a history
CANDIDATE_DAYS = 28
RETURN_DAYS = 60
DAY = 86_400
_ROUNDS = 100  # of drawing; few requests have so few candidates that one is left without

Draw = Literal["uniform", "popular"]
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Log:
    """Lines of invoices in any order, some of them twice. time in seconds, item a position in `titles`, quantity < 0: returned."""

    user: Integers
    item: Integers
    time: Integers
    quantity: Integers
    price: Floats
    country: pa.Array
    titles: pa.Array

    def lines(self, chosen: NDArray[np.bool_]) -> Log:
        """The chosen lines by time, user and item, one for each."""
        rows = np.flatnonzero(chosen)
        rows = rows[np.lexsort((self.price[rows], self.item[rows], self.user[rows], self.time[rows]))]
        keys = np.stack([self.time[rows], self.user[rows], self.item[rows]])
        rows = rows[np.any(np.diff(keys, prepend=-1) != 0, axis=0)]
        return Log(
            self.user[rows],
            self.item[rows],
            self.time[rows],
            self.quantity[rows],
            self.price[rows],
            self.country.take(pa.array(rows)),
            self.titles,
        )

    @cached_property
    def request(self) -> Integers:
        """[lines] the number of each line's request, where lines are sorted: the (time, user) in their order."""
        return np.cumsum((np.diff(self.time, prepend=-1) != 0) | (np.diff(self.user, prepend=-1) != 0)) - 1


def build(log: Log, negatives: int, draw: Draw, train_rows: int | None, seed: int) -> tuple[list[pa.Table], pa.Table]:
    """The rows of train, valid and test in the order of time, those of a request together, and the catalogue after train."""
    bought, returned = log.lines(log.quantity > 0), log.lines(log.quantity < 0)
    end = int(log.time.max(initial=0))
    cuts = _cuts(bought, end)
    positive = np.flatnonzero(_sold_lately(bought))
    if train_rows is not None:
        positive = _sampled(bought, positive, cuts[0], train_rows // (1 + negatives), seed)
    line, item = _rows(bought, positive, negatives, draw, seed)  # for each row, the line of its positive
    split = time_split(bought.time[line], cuts)
    check_split(np.bincount(split, minlength=len(SPLITS)), "time", "online_retail")
    is_bought = bought.item[line] == item
    window_ends = bought.time[line] + RETURN_DAYS * DAY
    labelled = is_bought & (window_ends < np.where(split == TRAIN, cuts[0], end + 1))
    comes_back = _comes_back(bought, returned)[line]
    known = Known(bought, returned, cuts[0])
    rows = pa.table(
        {
            "example_id": np.arange(len(line)),
            "time": bought.time[line],
            "request_id": bought.request[line],
            "purchase": is_bought.astype(np.int8),
            "returned": pa.array(comes_back.astype(np.int8), mask=~labelled),
            **known.of_rows(bought.user[line], bought.country.take(pa.array(line)), item, bought.time[line]),
        }
    )
    items = np.arange(len(log.titles))
    catalogue = {"item_id": items, "title": log.titles, "words": _words(log.titles)}
    catalogue |= known.of_items(items, np.full(len(items), end + 1))
    return [rows.filter(pa.array(split == number)) for number in range(len(SPLITS))], pa.table(catalogue)


def _cuts(bought: Log, end: int) -> tuple[int, int]:
    """When validation and test begin."""
    full = bought.time[bought.time + RETURN_DAYS * DAY <= end]
    if len(full) == 0:
        check_split(np.zeros(len(SPLITS), np.int64), "time", "online_retail")
    return time_cuts(full)


def _sold_lately(bought: Log) -> NDArray[np.bool_]:
    """[lines] whether the item was sold to anyone in the days before."""
    past = Past.of(bought.item, bought.time, np.ones(len(bought.item), np.bool_))
    return _last_time(past, bought.time, never=-CANDIDATE_DAYS * DAY) >= bought.time - CANDIDATE_DAYS * DAY


def _sampled(bought: Log, positive: Integers, train_end: int, most: int, seed: int) -> Integers:
    """Those of the requests with the smallest hashes, so that at most `most` of them are in train."""
    hashes = mix(bought.request[positive].view(np.uint64), seed)
    in_train = np.sort(hashes[bought.time[positive] < train_end])
    return positive if len(in_train) <= most else positive[hashes < in_train[most]]


def _rows(bought: Log, positive: Integers, negatives: int, draw: Draw, seed: int) -> tuple[Integers, Integers]:
    """The line and the item of each row, by request and item: every positive with its own item and `negatives` others."""
    line = np.repeat(positive, negatives)
    item = np.full(len(line), -1)
    number = len(bought.titles)
    taken = bought.request * number + bought.item  # sorted; np.isin hashes all of it each round
    left = np.arange(len(line))
    candidates = _Candidates(bought)
    generator = np.random.default_rng(seed)
    for _ in range(_ROUNDS):
        drawn, allowed = candidates.draw(bought.time[line[left]], draw, generator)
        key = bought.request[line[left]] * number + drawn
        new = np.zeros(len(left), np.bool_)
        new[np.unique(key, return_index=True)[1]] = True
        new &= allowed & (taken[np.minimum(np.searchsorted(taken, key), len(taken) - 1)] != key)
        item[left[new]] = drawn[new]
        taken = np.sort(np.concatenate([taken, key[new]]), kind="stable")
        left = left[~new]
        if len(left) == 0:
            break
    found = item >= 0
    line = np.concatenate([positive, line[found]])
    item = np.concatenate([bought.item[positive], item[found]])
    order = np.lexsort((item, bought.request[line]))
    return line[order], item[order]


class _Candidates:
    """What sold in the `CANDIDATE_DAYS` before a time."""

    def __init__(self, bought: Log) -> None:
        self.bought = bought
        self.span = int(bought.time.max()) + 1
        self.sold = np.sort(bought.item * self.span + bought.time)

    def draw(self, time: Integers, draw: Draw, generator: np.random.Generator) -> tuple[Integers, NDArray[np.bool_]]:
        """An item for each time at which there are candidates, and whether it is one of them: "uniform" needs tries."""
        share, earliest = generator.random(len(time)), np.maximum(time - CANDIDATE_DAYS * DAY, 0)
        if draw == "popular":
            first = np.searchsorted(self.bought.time, earliest)
            count = np.searchsorted(self.bought.time, time) - first
            return self.bought.item[first + (share * count).astype(np.int64)], np.ones(len(time), np.bool_)
        item = (share * len(self.bought.titles)).astype(np.int64)
        start = np.searchsorted(self.sold, item * self.span + earliest)
        return item, start < np.searchsorted(self.sold, item * self.span + time)


def _comes_back(bought: Log, returned: Log) -> NDArray[np.bool_]:
    """[lines] whether the customer returns the item later, within `RETURN_DAYS`."""
    both = np.concatenate([bought.time, returned.time])
    start = int(both.min())
    span = int(both.max()) - start + RETURN_DAYS * DAY + 1  # so that pairs do not overlap: about 6e15 at most, of 9e18

    def place(log: Log) -> Integers:
        return (log.user * len(log.titles) + log.item) * span + log.time - start

    bought_at, returned_at = place(bought), np.sort(place(returned))
    return np.searchsorted(returned_at, bought_at, "right") < np.searchsorted(
        returned_at, bought_at + RETURN_DAYS * DAY, "right"
    )


@dataclass(frozen=True)
class Known:
    """What the lines before the end of train tell about customers and items at any later time.

    All lines of that time are known, those of requests that are no rows as well; none of validation or test is.
    """

    bought: Log
    returned: Log
    train_end: int

    @classmethod
    def of(cls, log: Log) -> Known:
        """What is known of a whole log."""
        bought = log.lines(log.quantity > 0)
        return cls(bought, log.lines(log.quantity < 0), _cuts(bought, int(log.time.max(initial=0)))[0])

    def of_rows(self, user: Integers, country: pa.Array, item: Integers, time: Integers) -> dict[str, pa.Array]:
        """All features of rows: what a customer in a country would see of an item at a time."""
        moment = pa.array(time, pa.timestamp("s"))
        return {
            "user_id": pa.array(user),
            "country": country,
            "hour": pc.hour(moment),
            "weekday": pc.day_of_week(moment),
            **self.of_users(user, time),
            "item_id": pa.array(item),
            "words": _words(self.bought.titles).take(pa.array(item)),
            **self.of_items(item, time),
        }

    def of_users(self, user: Integers, time: Integers) -> dict[str, pa.Array]:
        """The columns of customers, each as known before `time`."""
        past = _past(user, time, self.bought.user, self.bought.time, self.train_end)
        returns = _past(user, time, self.returned.user, self.returned.time, self.train_end)
        days = (time - _last_time(past, self.bought.time, never=0)) / DAY
        return {
            "user_purchases": _float32(past.count),
            "user_returns": _float32(returns.count),
            "user_price": _float32(past.mean(self.bought.price, self._usual_price, 1.0)),
            "user_days_since": pa.array(days.astype(np.float32), mask=past.count == 0),
            "history_item": past.lists(pa.array(self.bought.item), HISTORY),
        }

    def of_items(self, item: Integers, time: Integers) -> dict[str, pa.Array]:
        """The columns of items, each as known before `time`."""
        past = _past(item, time, self.bought.item, self.bought.time, self.train_end)
        returns = _past(item, time, self.returned.item, self.returned.time, self.train_end)
        return {
            "item_purchases": _float32(past.count),
            "item_returns": _float32(returns.count),
            "item_price": _float32(past.mean(self.bought.price, self._usual_price, 1.0)),
        }

    @cached_property
    def _usual_price(self) -> float:
        return float(np.median(self.bought.price[self.bought.time < self.train_end]))


def _past(group: Integers, time: Integers, of_line: Integers, line_time: Integers, train_end: int) -> Past:
    """The lines of train before each (group, time); `order` numbers lines."""
    rows = len(group)
    visible = np.concatenate([np.zeros(rows, np.bool_), line_time < train_end])
    past = Past.of(np.concatenate([group, of_line]), np.concatenate([time, line_time]), visible)
    return Past(past.order - rows, past.start[:rows], past.stop[:rows])


def _last_time(past: Past, time: Integers, never: int) -> Integers:
    """The time of the last event of each past."""
    last = time[past.order[past.stop - 1]] if len(past.order) else np.zeros(len(past.stop), np.int64)
    return np.where(past.count > 0, last, never)


def _words(titles: pa.Array) -> pa.Array:
    """The words of each title in small letters."""
    spaced = pc.replace_substring_regex(pc.utf8_lower(titles), "[^a-z0-9]+", " ")
    return pc.split_pattern(pc.utf8_trim_whitespace(spaced), " ")


def _float32(value: Floats | Integers) -> pa.Array:
    return pa.array(value.astype(np.float32))
