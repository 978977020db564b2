"""Replicas that get SIGKILL while they answer: what was right stays right, and others take over."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest

from raysys.serve.client import Client, ServerError

CLIENTS = 4
RECOVERY_S = 30


@pytest.fixture(scope="module")
def served(serving, release, user_store):
    """The address of an application with two replicas of all that is killed."""
    one, two = {"num_cpus": 0.1}, {"num_cpus": 0.1, "min_replicas": 2, "max_replicas": 2}
    config = {
        "releases": {"v1": str(release.folder)},
        "traffic": {"v1": 1.0},
        "cascade": {"users": str(user_store), "retrieve": 20, "rank": 10, "deadline_ms": 60_000},
        **{"retriever": one, "early_ranker": one, "ranker": two, "ingress": two},
    }
    with serving(config) as url:
        yield url


def replicas(name):
    """The processes of a deployment's replicas."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if f"ServeReplica:raysys:{name}" in title:
            found.add(process.pid)
    return found


class Load:
    """Clients that ask without a pause, in threads, until `stop`."""

    def __init__(self, url, expected):
        self.url, self.expected = url, expected
        self.answered, self.wrong, self.failed = 0, [], []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number):
        with Client(self.url, timeout=60, attempts=1) as client:
            while not self._end.is_set():
                user = number % len(self.expected)
                number += 1
                try:
                    found = items_of(client.recommend(user, 5))
                except (ServerError, OSError) as error:
                    self.failed.append(error)
                    continue
                self.answered += 1
                if found != self.expected[user]:
                    self.wrong.append((user, found))

    def stop(self):
        self._end.set()
        for thread in self._threads:
            thread.join()


def items_of(answer):
    assert answer.complete
    return [(item.item, round(item.score, 4)) for item in answer.items]


@pytest.mark.parametrize("name", ["Ranker", "Cascade"])
def test_a_replica_that_is_killed(served, name):
    with Client(served, timeout=60) as client:
        expected = [items_of(client.recommend(user, 5)) for user in range(10)]
    before = replicas(name)
    assert len(before) == 2
    load = Load(served, expected)
    try:
        time.sleep(1)
        answered = load.answered
        assert answered > 0
        os.kill(min(before), signal.SIGKILL)
        end = time.monotonic() + RECOVERY_S
        while len(replicas(name) - {min(before)}) < 2:
            assert time.monotonic() < end, "no replica has come in the place of the one that was killed"
            time.sleep(0.2)
        time.sleep(1)
    finally:
        load.stop()
    assert load.answered > answered
    assert load.wrong == []
    assert len(load.failed) <= CLIENTS  # those in flight
