"""Candidates of requests: which are drawn, and that they look as rows of the log do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from raysys.data.prepare.movielens import prepare as prepare_movielens
from raysys.data.prepare.online_retail import prepare as prepare_retail
from raysys.data.prepare.traffic import (
    MovieLensTraffic,
    OnlineRetailTraffic,
    candidate_rows,
    draw_items,
    draw_requests,
    read_impressions,
)
from raysys.errors import UserError

SAMPLE = Path(__file__).parent / "online_retail"
COUNTS = {"train": 30, "test": 12}


@pytest.fixture(scope="module", params=["movielens", "retail"])
def traffic(request, small_movielens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traffic") / request.param
    if request.param == "movielens":
        prepare_movielens(folder, source=small_movielens, split="user_time")
        return MovieLensTraffic(str(folder), str(small_movielens))
    prepare_retail(folder, source=SAMPLE)
    return OnlineRetailTraffic(str(folder), str(SAMPLE))


@pytest.fixture(scope="module")
def impressions(traffic):
    return read_impressions(traffic)


@pytest.fixture(scope="module")
def requests(traffic, impressions):
    return draw_requests(traffic, impressions, COUNTS, 10, seed=0)


def test_a_row_made_anew_is_the_row_of_the_log(traffic, impressions):
    for rows in impressions.values():
        made = traffic.features(rows, rows["item_id"].to_numpy())
        names = [name for name in traffic.schema.columns(labels=False) if name in made.column_names]
        assert set(traffic.schema.columns(labels=False)) - set(names) <= {"example_id", "time", "user_id", "request_id"}
        for name in names:
            assert made[name].to_pylist() == rows[name].to_pylist(), name


def test_a_candidate_differs_from_its_request_in_what_is_of_the_item_only(traffic, impressions, requests):
    made = candidate_rows(traffic, impressions["test"], requests["test"], first_id=1000)
    assert made["example_id"].to_pylist() == list(range(1000, 1000 + 120))
    assert made["item_id"].to_pylist() == requests["test"].item.reshape(-1).tolist()
    source = impressions["test"].take(pa.array(np.repeat(requests["test"].row, 10)))
    assert made["request"].to_pylist() == source["request"].to_pylist()
    of_users = [f.name for f in (*traffic.schema.sparse, *traffic.schema.dense) if f.side == "user"]
    for name in [*of_users, *(f.name for f in traffic.schema.sequence_features)]:
        assert made[name].to_pylist() == source[name].to_pylist(), name


def test_requests_of_test_have_no_row_in_another_split(impressions, requests):
    for split, count in COUNTS.items():
        assert len(set(requests[split].number.tolist())) == count
        shown = impressions[split].take(pa.array(requests[split].row))
        assert shown["request"].to_pylist() == requests[split].number.tolist()
    others = {(row["user_id"], row["time"]) for split in ("train", "valid") for row in impressions[split].to_pylist()}
    test = impressions["test"].take(pa.array(requests["test"].row)).to_pylist()
    assert not others & {(row["user_id"], row["time"]) for row in test}


def test_candidates_are_different_items_of_train_that_the_request_does_not_show(traffic, impressions, requests):
    known = set(traffic.chosen(impressions["train"])["item_id"].to_pylist())
    shown: dict[int, set[int]] = {}
    for rows in impressions.values():
        for number, item in zip(rows["request"].to_pylist(), rows["item_id"].to_pylist(), strict=True):
            shown.setdefault(number, set()).add(item)
    for part in requests.values():
        for number, items in zip(part.number.tolist(), part.item.tolist(), strict=True):
            assert len(set(items)) == 10
            assert set(items) <= known - shown[number]


def test_the_same_seed_draws_the_same_requests(traffic, impressions, requests):
    again = draw_requests(traffic, impressions, COUNTS, 10, seed=0)
    other = draw_requests(traffic, impressions, COUNTS, 10, seed=1)
    assert np.array_equal(again["test"].item, requests["test"].item)
    assert not np.array_equal(other["test"].item, requests["test"].item)


def test_half_of_the_items_come_by_popularity_and_half_evenly():
    """10 items of popularity 9 and 990 of 1: of two draws the first is a popular item with chance 1 / 12."""
    popularity = np.repeat([9, 1], [10, 990])
    none = np.empty(0, np.int64), np.empty(0, np.int64)
    drawn = draw_items(popularity, none, 12_000, 2, np.random.default_rng(0))
    shares = (drawn < 10).mean(0)
    assert shares[0] == pytest.approx(90 / 1080, abs=4 * 0.0026)
    assert shares[1] == pytest.approx(0.01, abs=4 * 0.001)


def test_too_much_is_named(traffic, impressions):
    with pytest.raises(UserError, match=r"requests.test is 100000, and there are \d+"):
        draw_requests(traffic, impressions, {"test": 100_000}, 10, seed=0)
    with pytest.raises(UserError, match=r"requests.candidates is 5000, and a request has fewer items"):
        draw_requests(traffic, impressions, {"test": 2}, 5000, seed=0)


def test_every_impression_has_labels_of_both_tasks(traffic, impressions):
    rows = pa.concat_tables([rows.select(traffic.schema.tasks) for rows in impressions.values()])
    first, second = (rows[task] for task in traffic.schema.tasks)
    assert first.null_count == 0
    both = pc.sum(pc.and_(pc.equal(first, 1), pc.equal(second, 1))).as_py()
    if traffic.schema.tasks == ("like", "dislike"):
        assert both == second.null_count == 0  # nobody likes what he dislikes
    else:
        assert both == pc.sum(second).as_py()  # only what was bought comes back
        assert pc.all(pc.is_valid(second.filter(pc.equal(first, 0)))).as_py()
