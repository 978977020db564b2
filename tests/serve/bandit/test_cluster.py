"""The actors on Ray: killed with SIGKILL in the middle of feedback, they lose nothing acknowledged and count nothing twice."""

from __future__ import annotations

import threading
import time

import numpy as np
import psutil
import pytest
import ray

from raysys.errors import UserError
from raysys.serve.bandit.aggregate import Settings
from raysys.serve.bandit.cluster import OnlineMatching
from raysys.serve.bandit.edges import EdgeSums, sum_up, to_sums
from raysys.serve.bandit.feedback import to_impressions
from raysys.serve.bandit.policy import Policy, recommend

STATISTICS = ("d", "b", "n", "r")
WAIT_S = 60


@pytest.fixture
def start(ray_cluster, tmp_path):
    """`start(name)`: a bandit of its own, which is stopped at the end."""
    started = []

    def start_one(name, **settings):
        given = Settings(name, str(tmp_path / name), **{"shards": 2, "window_s": 0.0, **settings})
        started.append(OnlineMatching.start(given))
        return started[-1]

    yield start_one
    for bandit in started:
        bandit.stop()


def kill(pid):
    """kill -9, and wait until the process is gone."""
    process = psutil.Process(pid)
    process.kill()
    process.wait(WAIT_S)


def expected_of(graph, shown, rewarded):
    """Statistics when each of these recommendations was counted once, by the formulas."""
    sums = EdgeSums()
    sums.set_graph(graph, None, 0.0)
    row, place, slot = np.nonzero(shown.cluster >= 0)
    increments = to_sums(shown.weight[row, place, slot], rewarded[row, place], np.ones(len(row), np.int64))
    delta = sum_up(shown.cluster[row, place, slot], shown.item[row, place], np.zeros(len(row), np.int64), increments)
    sums.apply("test", 0, delta, 0.0)
    return sums.statistics(graph.version, 0.0)


def test_actors_that_are_killed_under_feedback_count_everything_once(start, small):
    """Both aggregators and the collector are killed while windows come in; 30 windows of 40 impressions."""
    bandit = start("killed")
    bandit.refresh(small.graph, 0.9, now=0.0)
    snapshot = bandit.snapshot(0.0)
    rng = np.random.default_rng(0)
    users = small.users[rng.integers(0, 300, 1200)]
    shown = recommend(snapshot, users, Policy(), generator=rng)
    rewarded = (rng.random((1200, 1)) < 0.4).astype(float)
    impressions = to_impressions(shown, np.arange(1200)[:, None], 0.0)
    facts = bandit.facts()
    victims = [*(actor["pid"] for actor in facts["aggregators"]), facts["collectors"][0]["pid"]]
    go = [threading.Event() for _ in victims]

    def killer():
        for event, pid in zip(go, victims, strict=True):
            assert event.wait(WAIT_S)
            kill(pid)

    thread = threading.Thread(target=killer)
    thread.start()
    for window in range(30):
        if window % 10 == 5:
            go[window // 10].set()
        rows = np.arange(40 * window, 40 * window + 40)
        bandit.impress(impressions.take(rows))
        clicked = rows[rewarded[rows, 0] > 0]
        bandit.reward(clicked, np.ones(len(clicked)), now=float(window))
        bandit.flush(now=float(window))
    thread.join(WAIT_S)
    bandit.flush(now=100.0)
    after = bandit.facts()
    assert not {actor["pid"] for kind in after.values() for actor in kind} & set(victims)
    assert sum(actor["discarded"] + actor["late"] for actor in after["aggregators"]) == 0
    found, expected = bandit.snapshot(100.0), expected_of(small.graph, shown, rewarded)
    for name in STATISTICS:
        np.testing.assert_array_equal(getattr(found.statistics, name), getattr(expected, name))
    assert found.statistics.r.sum() > 0


def test_every_process_finds_the_actors_and_one_that_starts_anew_finds_the_log(start, small, tmp_path):
    bandit = start("found")
    with pytest.raises(UserError, match="has no graph yet"):
        bandit.snapshot(0.0)
    with pytest.raises(UserError, match="has no graph yet"):
        bandit.insert(np.array([1]), small.vectors[:1], 1, now=0.0)
    bandit.refresh(small.graph, 0.9, now=0.0)
    settings = Settings("found", str(tmp_path / "found"), window_s=0.0)

    @ray.remote(num_cpus=0)
    def serve(users):
        other = OnlineMatching.start(settings)
        shown = recommend(other.snapshot(0.0), users, Policy(), generator=np.random.default_rng(0))
        other.impress(to_impressions(shown, np.arange(len(users))[:, None], 0.0))
        other.reward(np.arange(5), np.ones(5), now=0.0)
        other.flush(now=0.0)

    ray.get(serve.remote(small.users[:20]))
    before = bandit.snapshot(0.0)
    assert before.statistics.n.sum() >= 20
    assert before.statistics.r.sum() >= 5
    bandit.stop()
    after = start("found").snapshot(0.0)
    assert after.version == before.version
    for name in STATISTICS:
        np.testing.assert_array_equal(getattr(after.statistics, name), getattr(before.statistics, name))


def test_new_items_and_refreshed_graphs_reach_snapshots_whole(start, small, unit_vectors):
    """A reader that pulls all the while sees versions grow, each with the statistics of its edges."""
    bandit = start("refreshed")
    bandit.refresh(small.graph, 0.9, now=0.0)
    seen, stop = [], threading.Event()

    def pull():
        while not stop.is_set():
            snapshot = bandit.snapshot(0.0)
            edges = len(snapshot.graph.items)
            seen.append((snapshot.graph.version, edges, len(snapshot.statistics.d)))

    thread = threading.Thread(target=pull)
    thread.start()
    sizes = {bandit.snapshot(0.0).graph.version: 72}
    for number in range(10):
        vectors = unit_vectors(np.random.default_rng(number), 1)
        version = bandit.insert(np.array([1000 + number]), vectors, 2, now=0.0)
        sizes[version] = 72 + 2 * (number + 1)
    version = bandit.refresh(small.graph, 0.9, now=0.0)
    sizes[version] = 72
    time.sleep(0.2)
    stop.set()
    thread.join(WAIT_S)
    assert [version for version, _, _ in seen] == sorted(version for version, _, _ in seen)
    assert all(sizes[version] == edges == statistics for version, edges, statistics in seen)
    assert seen[-1][0] == version
    assert bandit.snapshot(0.0).graph.clusters.tolist() == list(range(12))


def test_errors_of_the_user_come_back_as_such(start, small, tmp_path):
    bandit = start("errors")
    with pytest.raises(UserError, match=r"reward 3.0 of impression 1"):
        bandit.reward(np.array([1]), np.array([3.0]), now=0.0)
    bandit.stop()
    with pytest.raises(UserError, match="was made with shards = 2, not 3"):
        OnlineMatching.start(Settings("other", str(tmp_path / "errors"), shards=3))
