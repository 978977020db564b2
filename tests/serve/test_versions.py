"""Two releases side by side on a real Serve instance: users keep one, nothing is mixed, and too much is answered 503."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pytest
import requests

from raysys.serve.client import Client, ServerError
from raysys.serve.plan import Plan
from raysys.serve.stages import EarlyRankerStage, RankerStage, RetrieverStage
from raysys.serve.store import ArrowStore

STAGE = {"num_cpus": 0.1, "max_ongoing": 16}
TRAFFIC = {"v1": 0.5, "v2": 0.5}


@pytest.fixture(scope="module")
def releases(release, make_release, tmp_path_factory):
    return {"v1": release, "v2": make_release(tmp_path_factory.mktemp("second") / "v2", "v2", seed=1)}


@pytest.fixture(scope="module")
def served(serving, releases, user_store):
    """The address of an application with both; one request at a time in its only ingress."""
    config = {
        "releases": {version: str(release.folder) for version, release in releases.items()},
        "traffic": TRAFFIC,
        "shadow": "v2",
        "cascade": {
            "users": str(user_store),
            "retrieve": 20,
            "rank": 10,
            "deadline_ms": 10_000,
            "max_requests": 1,
            "retry_after_s": 3,
        },
        **{name: STAGE for name in ("retriever", "early_ranker", "ranker", "ingress")},
    }
    with serving(config) as url:
        yield url


def test_every_answer_is_wholly_of_the_users_version(served, releases, user_store):
    rows, _ = ArrowStore(user_store).get(list(range(12)))
    users, plan = pa.Table.from_batches([rows]), Plan({"v1": "", "v2": ""}, TRAFFIC)
    versions = set()
    with Client(served) as client:
        for user in range(12):
            row, version = users.slice(user, 1), plan.assign(user)
            (found,) = RetrieverStage(releases[version]).retrieve(row, [20], [np.zeros(0, np.int64)])
            (early,) = EarlyRankerStage(releases[version]).rank(row, [found.ids], [10])
            (values,) = RankerStage(releases[version]).predict(row, [early.ids])
            order = np.argsort(-values[:, 0].numpy(), kind="stable")
            answer = client.recommend(user, 10)
            assert answer.version == version
            assert [item.item for item in answer.items] == early.ids[order].tolist()
            np.testing.assert_allclose([item.score for item in answer.items], values[order][:, 0], rtol=1e-6)
            versions.add(version)
        assert versions == {"v1", "v2"}
        facts = {version.version: (version.share, version.shadow) for version in client.models().versions}
    assert facts == {"v1": (0.5, False), "v2": (0.5, True)}


def test_too_much_is_answered_503_and_what_is_accepted_is_right(served):
    with Client(served) as client:
        expected = [item.item for item in client.recommend(3, 10).items]
    answers = []

    def ask():
        for _ in range(10):
            answers.append(requests.post(f"{served}/v1/recommend", json={"user": 3, "count": 10}, timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    accepted = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(accepted) + len(refused) == 80
    assert accepted
    assert refused
    assert all([item["item"] for item in answer.json()["items"]] == expected for answer in accepted)
    assert all(answer.headers["Retry-After"] == "3" for answer in refused)
    with Client(served) as client:  # what was refused left nothing behind
        assert [item.item for item in client.recommend(3, 10).items] == expected


def ask_until_refused(client):
    for _ in range(1000):
        client.recommend(4, 10)


def test_the_client_gives_up_after_its_attempts(served):
    stop = threading.Event()

    def load():
        while not stop.is_set():
            requests.post(f"{served}/v1/recommend", json={"user": 3, "count": 10}, timeout=60)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with Client(served, attempts=1) as client, pytest.raises(ServerError, match="503: too many requests"):
            ask_until_refused(client)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
