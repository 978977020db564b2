"""Aggregators and collectors with their logs, in this process: nothing that was acknowledged is lost or counted twice."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from raysys.errors import UserError
from raysys.serve.bandit.aggregate import Aggregator, Collector, Settings
from raysys.serve.bandit.cluster import join_parts
from raysys.serve.bandit.edges import Decay
from raysys.serve.bandit.feedback import to_impressions
from raysys.serve.bandit.graph import insert_items
from raysys.serve.bandit.policy import Policy, recommend

STATISTICS = ("d", "b", "n", "r")


class Crash(Exception):
    """Where a process is said to end."""


class Shop:
    """A few users who come again and again; actors may be ended and opened anew between any two steps."""

    def __init__(self, small, settings, rng):
        self.small, self.settings, self.rng = small, settings, rng
        self.crash_after: int | None = None  # messages of a delivery
        self.now, self.ids = 0.0, 0
        self.open()

    def open(self):
        self.aggregators = [Aggregator(self.settings, shard) for shard in range(self.settings.shards)]
        self.collector = Collector(self.settings, 0, self.send)

    def kill(self):
        """What a process had in memory is gone, and so is its lock."""
        for actor in [*self.aggregators, self.collector]:
            actor._log._journal.close()
        self.open()

    def send(self, messages, now):
        for number, message in enumerate(messages):
            if number == self.crash_after:
                raise Crash
            self.aggregators[message.shard].apply(message.worker, message.sequence, message.delta, now)
        if self.crash_after is not None:  # all were applied, and the answer is lost
            raise Crash

    def set_graph(self, graph, base=None):
        for shard, aggregator in enumerate(self.aggregators):
            aggregator.set_graph(graph.part(shard, self.settings.shards), base, self.now)

    def snapshot(self):
        version = max(set.intersection(*(set(aggregator.versions()) for aggregator in self.aggregators)))
        return join_parts([aggregator.part(version, self.now) for aggregator in self.aggregators])

    def serve(self):
        """One window: the impressions of users, rewards of half of them."""
        shown = recommend(self.snapshot(), self.small.users[:40], Policy(), count=2, generator=self.rng)
        ids = np.arange(self.ids, self.ids + 80).reshape(40, 2)
        self.ids += 80
        self.collector.impress(to_impressions(shown, ids, self.now))
        self.collector.reward(ids[::2, 0], np.ones(20), self.now)
        self.now += 1
        return shown


def same(one, other):
    assert one.version == other.version
    for name in STATISTICS:
        np.testing.assert_array_equal(getattr(one.statistics, name), getattr(other.statistics, name))


@pytest.fixture(params=[64 * 2**20, 2000], ids=["logs", "compacted"])
def settings(request, tmp_path):
    return Settings("shop", str(tmp_path / "one"), shards=3, window_s=0.0, compact_bytes=request.param)


@pytest.fixture
def shops(small, settings, tmp_path):
    """Two shops with the same visitors and luck; one is left alone."""
    quiet = dataclasses.replace(settings, folder=str(tmp_path / "two"))
    both = [Shop(small, given, np.random.default_rng(5)) for given in (settings, quiet)]
    for shop in both:
        shop.set_graph(small.graph)
    return both


def test_ending_everything_between_any_two_steps_loses_and_doubles_nothing(shops):
    shop, quiet = shops
    for number in range(8):
        for one in shops:
            one.serve()
            if one is shop and number % 2:
                one.kill()  # fed, not flushed
            one.collector.flush(one.now)
            if one is shop:
                one.kill()
    same(shop.snapshot(), quiet.snapshot())
    assert quiet.snapshot().statistics.r.sum() > 0


@pytest.mark.parametrize("crash_after", [0, 1, 2, 3])
def test_a_delivery_that_breaks_off_is_completed_once(shops, crash_after):
    shop, quiet = shops
    for _ in range(4):
        for one in shops:
            one.serve()
        quiet.collector.flush(quiet.now)
        shop.crash_after = crash_after
        with pytest.raises(Crash):
            shop.collector.flush(shop.now)
        shop.crash_after = None
        shop.kill()
        shop.collector.flush(shop.now)
        counted = [
            {key: value for key, value in one.collector.facts().items() if key != "pid"} for one in (shop, quiet)
        ]
        assert counted[0] == counted[1]
        assert counted[0]["unacknowledged"] == 0
        for name in STATISTICS:
            found, expected = (getattr(one.snapshot().statistics, name) for one in (shop, quiet))
            np.testing.assert_array_equal(found, expected)


def test_graphs_come_back_with_the_log(shops, unit_vectors):
    shop, quiet = shops
    for one in shops:
        one.serve()
        one.collector.flush(one.now)
        one.set_graph(
            insert_items(one.snapshot().graph, np.array([1000]), unit_vectors(np.random.default_rng(0), 1), 2), 1
        )
        one.set_graph(
            insert_items(one.snapshot().graph, np.array([1001]), unit_vectors(np.random.default_rng(1), 1), 2), 2
        )
        if one is shop:
            one.kill()
        one.serve()
        one.collector.flush(one.now)
    assert shop.snapshot().graph.version == 3
    assert [aggregator.versions() for aggregator in shop.aggregators] == [[2, 3]] * 3
    same(shop.snapshot(), quiet.snapshot())


def test_a_snapshot_never_mixes_versions_of_the_graph(shops, unit_vectors, rng):
    """At every point of a refresh the shards have one version in common, and the next refresh takes up a broken one."""
    shop, _ = shops
    for step in range(4):
        before = shop.snapshot()
        graph = insert_items(before.graph, np.array([1000 + step]), unit_vectors(rng, 1), 2)
        graph = dataclasses.replace(graph, version=before.graph.version + 2)
        reached = rng.integers(0, 3)
        for shard in range(reached):  # broken off after some shards
            shop.aggregators[shard].set_graph(graph.part(shard, 3), before.graph.version, shop.now)
            assert shop.snapshot().graph.version == before.graph.version
        same(shop.snapshot(), before)
        again = dataclasses.replace(graph, version=graph.version + 1)
        for shard in range(3):
            assert shop.snapshot().graph.version == before.graph.version
            shop.aggregators[shard].set_graph(again.part(shard, 3), before.graph.version, shop.now)
        after = shop.snapshot()
        assert after.graph.version == again.version
        assert len(after.statistics.d) == len(after.graph.items) == len(before.graph.items) + 2
        np.testing.assert_array_equal(after.graph.items, again.items)


def test_a_refused_graph_is_not_in_the_log(shops):
    shop, _ = shops
    shop.set_graph(dataclasses.replace(shop.small.graph, version=5), 1)
    with pytest.raises(UserError, match="graph 4 was made from 1"):
        shop.set_graph(dataclasses.replace(shop.small.graph, version=4), 1)
    shop.kill()
    assert shop.aggregators[0].versions() == [1, 5]
    assert shop.aggregators[0].part(4, 0.0) is None


def test_decayed_statistics_come_back(small, tmp_path):
    settings = Settings("shop", str(tmp_path), shards=2, window_s=0.0, decay=Decay(0.5, 2.0, 4))
    shop = Shop(small, settings, np.random.default_rng(0))
    shop.set_graph(small.graph)
    for _ in range(12):
        shop.serve()
        shop.collector.flush(shop.now)
    before = shop.snapshot()
    shop.kill()
    same(shop.snapshot(), before)
    assert before.statistics.n.sum() < 12 * 80 * 4 / 2


def test_nothing_is_sent_within_the_window(small, tmp_path):
    shop = Shop(small, Settings("shop", str(tmp_path), window_s=10.0), np.random.default_rng(0))
    shop.set_graph(small.graph)
    counted = []
    for _ in range(21):
        shop.serve()
        shop.collector.flush(shop.now)
        counted.append(shop.snapshot().statistics.n.sum())
    assert [place for place in range(1, 21) if counted[place] != counted[place - 1]] == [10, 20]


def test_a_folder_of_other_settings_is_refused(shops):
    shop, _ = shops
    for actor in [*shop.aggregators, shop.collector]:
        actor._log._journal.close()
    with pytest.raises(UserError, match=r"aggregator-0000: was made with shards = 3, not 4"):
        Aggregator(dataclasses.replace(shop.settings, shards=4), 0)
    with pytest.raises(UserError, match=r"collector-0000: was made with bucket_s = None, not 5.0"):
        Collector(dataclasses.replace(shop.settings, decay=Decay(0.5, 5.0, 2)), 0, shop.send)


def test_a_reward_that_is_none_is_not_in_the_log(shops):
    shop, _ = shops
    with pytest.raises(UserError, match="reward 2"):
        shop.collector.reward(np.array([1]), np.array([2.0]), 0.0)
    shop.kill()
    shop.collector.flush(1.0)
