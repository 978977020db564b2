"""Requests with candidates, made of a log: what a ranking funnel is simulated on.

A log has rows of what users met, its impressions. A request is a (user, time) of them; what other items would have looked like
in it, any row of it with another item, is asked of a `Traffic`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysys.data.columns import integers, whole
from raysys.data.prepare.dataset import SPLITS
from raysys.data.prepare.movielens import features_at as movielens_features_at
from raysys.data.prepare.online_retail import read_log
from raysys.data.prepare.online_retail_features import Known
from raysys.errors import UserError
from raysys.schema import FeatureSchema, Label

Integers = NDArray[np.int64]
_CHUNK = 256  # requests whose candidates are drawn at once


class Traffic(Protocol):
    """A prepared data set of which candidates can be made. schema: of its rows, all tasks binary and on all impressions."""

    schema: FeatureSchema

    def impressions(self, split: str) -> pa.Table:
        """The rows of a split, with example_id, user_id, item_id, time, labels and all features."""

    def chosen(self, rows: pa.Table) -> pa.Table:
        """Those of the impressions that the user chose the item in, which tell how popular it is."""

    def features(self, rows: pa.Table, item: Integers) -> pa.Table:
        """All features of `rows` with other items, as known at their time; rows stay in their order."""


class MovieLensTraffic:
    """MovieLens-100K with the tasks `like` (4 or 5 stars) and `dislike` (1 or 2)."""

    def __init__(self, folder: str, source: str | None = None, downloads: str = "data/downloads") -> None:
        self.folder, self.source, self.downloads = folder, source, downloads
        schema = FeatureSchema.load(f"{folder}/schema.yaml")
        self.schema = dataclasses.replace(schema, labels=(Label("like"), Label("dislike")))

    def impressions(self, split: str) -> pa.Table:
        """See `Traffic`."""
        rows = pq.read_table(f"{self.folder}/{split}.parquet")
        return rows.append_column("dislike", pc.less_equal(rows["rating"], 2).cast(pa.int8()))

    def chosen(self, rows: pa.Table) -> pa.Table:
        """See `Traffic`: all, for users choose what they rate."""
        return rows

    def features(self, rows: pa.Table, item: Integers) -> pa.Table:
        """See `Traffic`."""
        train = pq.read_table(f"{self.folder}/train.parquet", columns=["example_id"])["example_id"].to_numpy()
        return movielens_features_at(rows, item, train, self.source, self.downloads)


class OnlineRetailTraffic:
    """Online Retail II with the tasks `purchase` and `returned`: bought and brought back, 0 where nothing was bought.

    source: the files that the folder was prepared from.
    """

    def __init__(self, folder: str, source: str) -> None:
        self.folder, self.source = folder, source
        schema = FeatureSchema.load(f"{folder}/schema.yaml")
        self.schema = dataclasses.replace(schema, labels=(Label("purchase"), Label("returned", required=False)))

    def impressions(self, split: str) -> pa.Table:
        """See `Traffic`."""
        rows = pq.read_table(f"{self.folder}/{split}.parquet")
        place = rows.column_names.index("returned")
        returned = pc.if_else(pc.equal(rows["purchase"], 0), pa.scalar(0, pa.int8()), rows["returned"])
        return rows.set_column(place, "returned", returned)

    def chosen(self, rows: pa.Table) -> pa.Table:
        """See `Traffic`."""
        return rows.filter(pc.equal(rows["purchase"], 1))

    def features(self, rows: pa.Table, item: Integers) -> pa.Table:
        """See `Traffic`."""
        user, time = (integers(whole(rows[name])) for name in ("user_id", "time"))
        return pa.table(Known.of(read_log(self.source)).of_rows(user, whole(rows["country"]), item, time))


@dataclass(frozen=True)
class Requests:
    """C candidates for each of R requests. number: [R], of all (user, time) of the log. row: [R], an impression of each.

    item: [R, C]. Which of the split's impressions `row` counts is said by who made them.
    """

    number: Integers
    row: Integers
    item: Integers


def request_numbers(impressions: dict[str, pa.Table]) -> dict[str, Integers]:
    """By split, the number of each row's (user, time); those of one user are side by side."""
    keys = [np.stack([integers(whole(rows[name])) for name in ("user_id", "time")], 1) for rows in impressions.values()]
    _, number = np.unique(np.concatenate(keys), axis=0, return_inverse=True)
    parts = np.split(number.reshape(-1), np.cumsum([len(key) for key in keys])[:-1])
    return dict(zip(impressions, parts, strict=True))


def draw_requests(
    traffic: Traffic, impressions: dict[str, pa.Table], counts: dict[str, int], candidates: int, seed: int
) -> dict[str, Requests]:
    """So many requests of each split, none of which has a row in a split before it, with candidates.

    Half of the candidates are drawn in proportion to how often the training split's users chose an item, the others evenly,
    none twice and none that the request's impressions show. Only items that someone chose there are candidates.
    """
    random = np.random.default_rng(seed)
    chosen = traffic.chosen(impressions["train"])
    items, popularity = np.unique(integers(whole(chosen["item_id"])), return_counts=True)
    numbers, found, before = request_numbers(impressions), {}, np.empty(0, np.int64)
    for split in SPLITS:
        number = numbers[split]
        if counts.get(split):
            free = np.setdiff1d(number, before)
            if len(free) < counts[split]:
                raise UserError(f"requests.{split} is {counts[split]}, and there are {len(free)}", "take fewer")
            wanted = np.sort(random.choice(free, counts[split], replace=False))
            shown = [np.flatnonzero(np.isin(part, wanted)) for part in numbers.values()]
            request = np.concatenate([part[rows] for part, rows in zip(numbers.values(), shown, strict=True)])
            seen = np.concatenate(
                [
                    integers(whole(table["item_id"]))[rows]
                    for table, rows in zip(impressions.values(), shown, strict=True)
                ]
            )
            known = np.isin(seen, items)
            excluded = np.searchsorted(wanted, request[known]), np.searchsorted(items, seen[known])
            drawn = draw_items(popularity, excluded, len(wanted), candidates, random)
            rows = np.unique(number, return_index=True)
            found[split] = Requests(wanted, rows[1][np.searchsorted(rows[0], wanted)], items[drawn])
        before = np.concatenate([before, number])
    return found


def draw_items(
    popularity: Integers, excluded: tuple[Integers, Integers], requests: int, count: int, random: np.random.Generator
) -> Integers:
    """[requests, count] different places of `popularity`: half with chances in proportion to it, the rest with equal ones.

    excluded: pairs (request, place) that are not drawn.
    """
    parts = []
    for first in range(0, requests, _CHUNK):
        shape = (min(_CHUNK, requests - first), len(popularity))
        inside = (excluded[0] >= first) & (excluded[0] < first + shape[0])
        out = excluded[0][inside] - first, excluded[1][inside]
        keys = random.gumbel(size=shape) + np.log(popularity)  # the largest are a draw without replacement
        keys[out] = -np.inf
        popular = _largest(keys, count // 2)
        keys = random.random(shape)
        keys[out] = -np.inf
        np.put_along_axis(keys, popular, -np.inf, 1)
        even = _largest(keys, count - count // 2)
        if np.isinf(np.take_along_axis(keys, even, 1)).any():
            raise UserError(f"requests.candidates is {count}, and a request has fewer items", "take fewer")
        parts.append(np.concatenate([popular, even], 1))
    return np.concatenate(parts)


def _largest(keys: NDArray[np.float64], count: int) -> Integers:
    count = min(count, keys.shape[1])
    return np.argpartition(-keys, count - 1, axis=1)[:, :count]


def candidate_rows(traffic: Traffic, impressions: pa.Table, requests: Requests, first_id: int) -> pa.Table:
    """One row for each candidate, requests one after another: example_id from `first_id` on, request, features."""
    candidates = requests.item.shape[1]
    row = np.repeat(requests.row, candidates)
    features = traffic.features(impressions.take(pa.array(row)), requests.item.reshape(-1))
    features = features.append_column("example_id", pa.array(np.arange(first_id, first_id + len(row))))
    return features.append_column("request", pa.array(np.repeat(requests.number, candidates)))


def read_impressions(traffic: Traffic) -> dict[str, pa.Table]:
    """The impressions of all splits with their requests' numbers as column `request`."""
    impressions = {split: traffic.impressions(split) for split in SPLITS}
    numbers = request_numbers(impressions)
    return {split: rows.append_column("request", pa.array(numbers[split])) for split, rows in impressions.items()}
