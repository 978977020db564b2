"""From impressions and rewards to deltas: each impression is joined with its reward once, with the weights of its logging.

How long an impression waits, and what is counted when, is ours: Online Matching (Yi et al. 2023) is not known to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.errors import UserError
from raysys.models.retrieval.indexes.index import NO_ITEM, Ids
from raysys.serve.bandit.edges import Decay, Delta, buckets_of, sum_up, to_sums
from raysys.serve.bandit.graph import NO_CLUSTER
from raysys.serve.bandit.policy import Floats, Recommendations


@dataclass(frozen=True)
class Impressions:
    """Items [P] that were shown, with what they were shown for.

    id: [P], one number an impression, drawn at random from 63 bits. time: [P] seconds. cluster, weight: [P, K] as in
    `Recommendations`: the w that was used. graph: [P], the version that it was used with. propensity: [P]. position: [P],
    from 0 on.
    """

    id: Ids
    time: Floats
    item: Ids
    cluster: Ids
    weight: Floats
    graph: Ids
    propensity: Floats
    position: Ids

    def __len__(self) -> int:
        return len(self.id)

    def take(self, rows: NDArray[Any]) -> Impressions:
        """Some of the rows, by number or by mask."""
        return Impressions(**{name: array[rows] for name, array in self.to_arrays().items()})

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The columns by name."""
        return {column.name: getattr(self, column.name) for column in fields(self)}

    def check(self) -> Impressions:
        """Themselves as int64 and float64; raises UserError where columns do not fit together or hold what is no weight."""
        floats = ("time", "weight", "propensity")
        arrays: dict[str, NDArray[Any]] = {
            name: np.asarray(array, np.float64 if name in floats else np.int64)
            for name, array in self.to_arrays().items()
        }
        shapes = {array.shape for name, array in arrays.items() if name not in ("cluster", "weight")}
        if (
            shapes != {(len(self),)}
            or self.cluster.shape != self.weight.shape
            or self.cluster.shape[:1] != (len(self),)
        ):
            raise UserError("impressions: columns have different lengths", "one row an impression is expected")
        for name in floats:
            if not np.isfinite(arrays[name]).all():
                raise UserError(f"impressions: {name} holds NaN or infinity", "log what `recommend` gave")
        if ((self.weight < 0) | (self.weight > 1)).any():
            raise UserError("impressions: a weight is below 0 or above 1", "log what `recommend` gave")
        return Impressions(**arrays)


def concatenate(parts: Sequence[Impressions]) -> Impressions:
    """Impressions one after another; where they have different numbers of clusters K, the largest."""
    width = max(part.cluster.shape[1] for part in parts)
    columns: dict[str, list[NDArray[Any]]] = {}
    for part in parts:
        missing = ((0, 0), (0, width - part.cluster.shape[1]))
        padded = {
            "cluster": np.pad(part.cluster, missing, constant_values=NO_CLUSTER),
            "weight": np.pad(part.weight, missing),
        }
        for name, array in (part.to_arrays() | padded).items():
            columns.setdefault(name, []).append(array)
    return Impressions(**{name: np.concatenate(arrays) for name, arrays in columns.items()})


def to_impressions(shown: Recommendations, ids: Ids, time: float) -> Impressions:
    """All that was recommended as impressions: ids [B, k] of each place, of which those without an item are left out."""
    there = shown.item != NO_ITEM  # [B, k]
    size = int(there.sum())
    position = np.broadcast_to(np.arange(shown.item.shape[1]), shown.item.shape)
    return Impressions(
        id=ids[there],
        time=np.full(size, time),
        item=shown.item[there],
        cluster=shown.cluster[there],
        weight=shown.weight[there],
        graph=np.full(size, shown.graph),
        propensity=shown.propensity[there],
        position=position[there],
    )


NO_IMPRESSIONS = Impressions(
    id=np.zeros(0, np.int64),
    time=np.zeros(0),
    item=np.zeros(0, np.int64),
    cluster=np.zeros((0, 0), np.int64),
    weight=np.zeros((0, 0)),
    graph=np.zeros(0, np.int64),
    propensity=np.zeros(0),
    position=np.zeros(0, np.int64),
)


class Joiner:
    """Holds impressions until they are joined: a function of the calls made, so that a log of them restores it to the bit.

    An impression counts with reward 0 when `horizon_s` seconds have passed without one, so that clicks that come a little
    later do not make it look bad first; with a reward, at once. A reward that comes after the horizon, but within `join_s` of
    the impression, is added to what was counted. The first reward of an impression counts.

    duplicates: later rewards of one impression, or impressions that came twice. unmatched: rewards without an impression,
    after they waited for it for `join_s`. Neither counts anywhere.
    """

    def __init__(self, *, horizon_s: float = 0.0, join_s: float = 3600.0, decay: Decay | None = None) -> None:
        if not 0 <= horizon_s <= join_s:
            raise UserError(
                f"horizon_s is {horizon_s} and join_s {join_s}", "0 <= horizon_s <= join_s is expected, in seconds"
            )
        self.horizon_s, self.join_s, self.decay = horizon_s, join_s, decay
        self.duplicates = self.unmatched = 0
        self._arrived: list[Impressions] = []  # since the last flush
        self._held = NO_IMPRESSIONS  # ascending by id
        self._counted = self._rewarded = np.zeros(0, np.bool_)  # [P] with its w², with its reward
        self._rewards = (np.zeros(0, np.int64), np.zeros(0), np.zeros(0))  # id, reward, time of arrival

    def __len__(self) -> int:
        """Impressions that are held."""
        return len(self._held) + sum(len(impressions) for impressions in self._arrived)

    def impress(self, impressions: Impressions) -> None:
        """Take impressions."""
        self._arrived.append(impressions)

    def reward(self, ids: Ids, rewards: Floats, now: float) -> None:
        """Take rewards [n], in [0, 1], of impressions [n]; they are joined by the next `flush`."""
        arrived = np.full(len(ids), now)
        known = self._rewards
        self._rewards = tuple(np.concatenate(pair) for pair in zip(known, (ids, rewards, arrived), strict=True))  # type: ignore[assignment]

    def flush(self, now: float) -> Delta:
        """What there is to count at this moment, and forget what is older than `join_s`."""
        self._merge()
        held = self._held
        reward = np.zeros(len(held))
        rows = self._match(now, reward)
        due = ~self._counted & (held.time + self.horizon_s <= now)
        due[rows] = True
        impressions = (~self._counted & due).astype(np.int64)
        self._counted |= due
        self._rewarded[rows] = True
        delta = self._delta(held.take(due), reward[due], impressions[due])
        self._keep(held, np.flatnonzero(held.time + self.join_s > now))
        return delta

    def _match(self, now: float, reward: Floats) -> NDArray[np.int64]:
        """The rows of held impressions that get their first reward, which is written to `reward` [P]."""
        ids, values, arrived = self._rewards
        held = self._held.id
        place = np.searchsorted(held, ids).clip(max=max(len(held) - 1, 0))
        found = held[place] == ids if len(held) else np.zeros(len(ids), np.bool_)
        rows, first = np.unique(place[found], return_index=True)
        fresh = ~self._rewarded[rows]
        rows, first = rows[fresh], first[fresh]
        self.duplicates += int(found.sum()) - len(rows)
        reward[rows] = values[found][first]
        waits = ~found & (arrived + self.join_s > now)
        self.unmatched += int((~found & ~waits).sum())
        self._rewards = (ids[waits], values[waits], arrived[waits])
        return rows

    def _delta(self, shown: Impressions, reward: Floats, impressions: NDArray[np.int64]) -> Delta:
        row, slot = np.nonzero(shown.cluster != NO_CLUSTER)
        sums = to_sums(shown.weight[row, slot], reward[row], impressions[row])
        return sum_up(shown.cluster[row, slot], shown.item[row], buckets_of(shown.time, self.decay)[row], sums)

    def _merge(self) -> None:
        """Put what arrived among what is held, ascending by id, the first of each."""
        everything = concatenate([self._held, *self._arrived])
        self._arrived = []
        flags = np.zeros(len(everything) - len(self._held), np.bool_)
        self._counted, self._rewarded = (np.concatenate([known, flags]) for known in (self._counted, self._rewarded))
        _, first = np.unique(everything.id, return_index=True)
        self.duplicates += len(everything) - len(first)
        self._keep(everything, first)

    def _keep(self, impressions: Impressions, rows: NDArray[np.int64]) -> None:
        self._held = impressions.take(rows)
        self._counted, self._rewarded = self._counted[rows], self._rewarded[rows]

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Everything, as plain facts and as arrays."""
        self._merge()
        arrays = self._held.to_arrays() | {"counted": self._counted, "rewarded": self._rewarded}
        arrays |= dict(zip(("reward_id", "reward", "arrived"), self._rewards, strict=True))
        return {"counters": [self.duplicates, self.unmatched]}, arrays

    def restore(self, facts: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Become what `state` told of."""
        self.duplicates, self.unmatched = facts["counters"]
        self._rewards = (arrays["reward_id"], arrays["reward"], arrays["arrived"])
        self._held = Impressions(**{column.name: arrays[column.name] for column in fields(Impressions)})
        self._counted, self._rewarded = arrays["counted"], arrays["rewarded"]


def check_rewards(ids: Ids, rewards: Floats) -> tuple[Ids, Floats]:
    """Ids [n] as int64 and rewards [n] as float64. Raises UserError for a reward that is not from 0 to 1."""
    ids, rewards = np.asarray(ids, np.int64), np.asarray(rewards, np.float64)
    if ids.ndim != 1 or ids.shape != rewards.shape:
        raise UserError(
            f"{list(ids.shape)} ids and {list(rewards.shape)} rewards", "one reward an impression is expected"
        )
    wrong = ~((rewards >= 0) & (rewards <= 1))  # NaN, too
    if wrong.any():
        raise UserError(f"reward {rewards[wrong][0]} of impression {ids[wrong][0]}", "a number from 0 to 1 is expected")
    return ids, rewards
