"""Online Matching in the application: what is shown can be answered by feedback, and what was acknowledged counts once."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time

import numpy as np
import pytest

from raysys.errors import UserError
from raysys.serve.bandit.aggregate import Settings
from raysys.serve.bandit.cluster import OnlineMatching
from raysys.serve.bandit.journal import Journal
from raysys.serve.bandit.replica import ACTORS
from raysys.serve.client import Client


@pytest.fixture
def client(learning):
    with Client(learning.url) as opened:
        yield opened


@pytest.fixture(scope="module")
def actors(learning):
    """The actors, which the deployment has started."""
    version = learning.release.version
    settings = Settings(ACTORS.format(version=version), str(learning.bandit / version))
    bandit = OnlineMatching.start(settings)
    yield bandit
    bandit.stop()


def numbers(names):
    return {int(name.rpartition(":")[2], 16) for name in names}


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not in time"
        time.sleep(0.1)
    return found


def test_an_answer_has_items_to_learn_about_and_every_item_has_an_impression(client):
    answer = client.recommend(3, 4)
    shown, explored = [item.item for item in answer.items], [item.item for item in answer.explored]
    assert len(shown) == 4
    assert len(explored) == 2
    assert not set(shown) & set(explored)
    names = [item.impression for item in (*answer.items, *answer.explored)]
    assert len(set(names)) == 6
    assert all(name.startswith(f"{answer.version}:") for name in names)


def test_what_was_shown_and_what_was_acknowledged_is_in_the_log(client, learning, tmp_path):
    answer = client.recommend(4, 3)
    names = [item.impression for item in (*answer.items, *answer.explored)]
    rewards = dict(zip(names[:2], (1.0, 0.25), strict=True))
    assert client.feedback(rewards) == 2
    log = learning.bandit / answer.version / "collector-0000"
    shutil.copytree(log, tmp_path / "log", ignore=shutil.ignore_patterns("lock"))  # the collector holds the log itself
    records = list(Journal(tmp_path / "log").records())
    logged = {number for record in records if record.kind == "impressions" for number in record.arrays["id"].tolist()}
    assert numbers(names) <= logged
    found = [record for record in records if record.kind == "rewards"][-1].arrays
    got = dict(zip(found["id"].tolist(), found["reward"].tolist(), strict=True))
    assert got == {number: reward for name, reward in rewards.items() for number in numbers([name])}


def test_feedback_counts_once_where_its_actors_are_killed(client, actors):
    """Every process of Online Matching gets SIGKILL between the acknowledgement and the count; the client sends twice."""
    time.sleep(1.1)  # over two windows: what other tests rewarded is counted by this flush, or by one before it
    actors.flush(time.time())
    snapshot = actors.snapshot(time.time())
    before = list(zip(snapshot.graph.items.tolist(), snapshot.statistics.r.tolist(), strict=True))
    answer = client.recommend(5, 2)
    item = answer.explored[0]
    client.feedback({item.impression: 1.0})
    for actor in itertools.chain(*actors.facts().values()):
        os.kill(actor["pid"], signal.SIGKILL)
    assert client.feedback({item.impression: 1.0}) == 1

    def counted():
        actors.flush(time.time())
        now = actors.snapshot(time.time())
        on_item = now.graph.items == item.item
        first = sum(reward for other, reward in before if other == item.item)
        return now if now.statistics.r[on_item].sum() > first else None

    found = until(counted)
    on_item = found.graph.items == item.item
    gained = found.statistics.r[on_item] - [reward for other, reward in before if other == item.item]
    assert set(gained.tolist()) <= {0.0, 1.0}  # 1 on each edge that took part, not 2
    assert sum(actor.get("duplicates", 0) for actor in actors.facts()["collectors"]) >= 1


def test_what_is_liked_becomes_a_candidate(client, actors):
    """An item that the retriever does not find is liked by a user, who then gets it among their candidates."""
    snapshot = actors.snapshot(time.time())
    for _ in range(30):
        answer = client.recommend(6, 1, explain=True)
        client.feedback({item.impression: 1.0 for item in answer.explored})
    retrieved = {item.item for item in answer.stages[0].items}

    def learned():
        stages = {stage.stage: stage for stage in client.recommend(6, 1, explain=True).stages}
        return stages.get("learned")

    stage = until(learned)
    offered = {item.item for item in stage.items}
    assert offered <= set(snapshot.graph.items.tolist())
    assert not offered & retrieved
    assert all(item.score > 0 for item in stage.items)
    assert np.isfinite([item.score for item in stage.items]).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [("nonsense", "not the name of an impression"), ("gone:00000000000000ff", "no longer served")],
)
def test_feedback_on_what_was_never_shown_is_refused(client, name, message):
    with pytest.raises(UserError, match=message):
        client.feedback({name: 1.0})
    with pytest.raises(UserError, match=r"rewards.0.reward"):
        client.feedback({"a": 2.0})
