"""The application on a real Serve instance: every endpoint, its limits, and a plan that changes."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import requests

from raysys.errors import UserError
from raysys.serve.client import Client
from raysys.serve.messages import Models, RankBatchAnswer, Ranking, RankRequest, Recommendation
from raysys.serve.stages import EarlyRankerStage, RankerStage, RetrieverStage
from raysys.serve.store import ArrowStore

KEY = "a-key-of-more-than-16-characters"
HEADERS = {"X-API-Key": KEY, "Content-Type": "application/json"}
STAGE = {"num_cpus": 0.1, "max_ongoing": 16}


@pytest.fixture(scope="module")
def served(serving, release, user_store, tmp_path_factory):
    """The address of the application."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"another-key-that-is-as-long\n{KEY}\n")
    config = {
        "releases": {"v1": str(release.folder)},
        "traffic": {"v1": 1.0},
        "cascade": {"users": str(user_store), "retrieve": 20, "rank": 10, "deadline_ms": 10_000},
        "http": {"api_keys": str(keys), "max_body": 20_000},
        **{name: STAGE for name in ("retriever", "early_ranker", "ranker")},
        "ingress": {"num_cpus": 0.1},
    }
    with serving(config) as url:
        yield url


@pytest.fixture
def post(served):
    def send(path, body, status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = requests.post(f"{served}{path}", data=data, headers=HEADERS | headers, timeout=60)
        assert answer.status_code == status, answer.text
        return answer

    return send


def test_recommend_goes_through_the_three_stages(post, release, user_store):
    body = {"user": 3, "count": 5, "context": {"hour": 7}, "explain": True}
    found = Recommendation.model_validate(post("/v1/recommend", body).json())
    rows, _ = ArrowStore(user_store).get([3])
    user = pa.Table.from_batches([rows]).append_column("hour", pa.array([7]))
    (candidates,) = RetrieverStage(release).retrieve(user, [20], [np.zeros(0, np.int64)])
    (early,) = EarlyRankerStage(release).rank(user, [candidates.ids], [10])
    (values,) = RankerStage(release).predict(user, [early.ids])
    order = np.argsort(-values[:, 0].numpy(), kind="stable")
    assert [item.item for item in found.items] == early.ids[order][:5].tolist()
    np.testing.assert_allclose([item.score for item in found.items], values[order][:5, 0], rtol=1e-6)
    assert found.items[0].predictions.keys() == {"click", "stars"}
    assert found.complete
    assert found.version == "v1"
    assert [(stage.stage, stage.entered, stage.left) for stage in found.stages] == [
        ("retrieve", 20, 20),
        ("early", 20, 10),
        ("rank", 10, 5),
    ]
    assert [item.item for item in found.stages[1].items][:10] == early.ids.tolist()
    assert {item.item for item in found.stages[1].items} == set(candidates.ids.tolist())  # also those that fell out
    assert [item.item for item in found.stages[2].items] == early.ids[order].tolist()
    assert found.explored == []
    assert found.items[0].impression is None


def test_retrieve_and_rank_by_themselves(post, release):
    found = Ranking.model_validate(post("/v1/retrieve", {"user": 3, "count": 7}).json())
    assert len(found.items) == 7
    excluded = found.items[0].item
    rest = Ranking.model_validate(post("/v1/retrieve", {"user": 3, "count": 7, "exclude": [excluded]}).json())
    assert [item.item for item in rest.items[:6]] == [item.item for item in found.items[1:]]
    items = [item.item for item in found.items] + [987_654]  # the last one is unknown
    one = Ranking.model_validate(post("/v1/rank", {"user": 3, "items": items}).json())
    assert sorted(item.item for item in one.items) == sorted(items)
    assert [item.score for item in one.items] == sorted((item.score for item in one.items), reverse=True)
    batch = {"requests": [{"user": user, "items": items} for user in (3, 4, 10**6)]}
    both = RankBatchAnswer.model_validate(post("/v1/rank", batch).json())
    assert len(both.rankings) == 3
    np.testing.assert_allclose(
        [item.score for item in both.rankings[0].items], [item.score for item in one.items], rtol=1e-5
    )


def test_unknown_users_get_answers(post):
    assert len(post("/v1/recommend", {"user": 10**9, "count": 3}).json()["items"]) == 3


def test_request_ids_models_health_metrics_and_openapi(post, served):
    answer = post("/v1/recommend", {"user": 1}, **{"X-Request-ID": "mine-1"})
    assert answer.headers["X-Request-ID"] == answer.json()["request_id"] == "mine-1"
    other = post("/v1/recommend", {"user": 1}, **{"X-Request-ID": "not allowed: /../"})
    assert len(other.json()["request_id"]) == 32
    headers = {"X-API-Key": KEY}
    models = Models.model_validate(requests.get(f"{served}/v1/models", headers=headers, timeout=60).json())
    assert [(version.version, version.share, version.shadow) for version in models.versions] == [("v1", 1.0, False)]
    assert requests.get(f"{served}/healthz", timeout=60).text == "ok"
    assert requests.get(f"{served}/metrics", headers=headers, timeout=60).status_code == 200
    paths = requests.get(f"{served}/openapi.json", headers=headers, timeout=60).json()["paths"]
    assert {"/v1/recommend", "/v1/retrieve", "/v1/rank", "/v1/models", "/healthz", "/metrics"} <= set(paths)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"user": 3, "count": 0}, 422, "count"),
        ({"user": 3, "count": 10**9}, 422, "count"),
        ({"user": 3, "colour": "red"}, 422, "colour"),
        ({"user": "three"}, 422, "an integer is expected"),
        ({"user": 2**63}, 422, "user"),
        ({"user": 3, "context": {"age": 5}}, 422, "'age' is a column of the user store"),
        (b'{"user": 3, "context": {"hour": NaN}}', 422, "hour"),
        (b'{"user": 3, "context": {"hour": 1e999}}', 422, "hour"),
        (b"[" * 10_000, 422, "nested"),
        (b'{"user": 3, "exclude": [' + b"1," * 9000 + b"1]}", 422, "exclude"),
        (b'{"user": 3' + b" " * 20_000 + b"}", 413, "bytes"),
        (b"{", 422, "JSON"),
        (b"\xff\xfe", 422, ""),
        (b"", 422, ""),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(post, body, status, message):
    answer = post("/v1/recommend", body, status)
    assert message in answer.json()["error"]
    assert answer.json()["request_id"] == answer.headers["X-Request-ID"]
    assert "/" not in answer.json()["error"]  # no paths


def test_rows_of_users_and_items(served, post, user_store):
    def get(path):
        return requests.get(f"{served}{path}", headers=HEADERS, timeout=60)

    some = get("/v1/users?count=7").json()
    assert some["key"] == "user"
    assert len({row["user"] for row in some["rows"]}) == 7
    (row,) = get("/v1/users/3").json()["rows"]
    assert row == ArrowStore(user_store).get([3])[0].to_pylist()[0]
    assert get("/v1/users/3").json()["item_columns"] == ["liked"]
    assert get("/v1/users/100000").json()["rows"] == []
    for name, message in (("three", "an integer is expected"), (str(2**70), "64 bits")):
        assert get(f"/v1/users/{name}").status_code == 422
        assert message in get(f"/v1/users/{name}").json()["error"]
    items = post("/v1/retrieve", {"user": 3, "count": 2}).json()["items"]
    keys = [item["item"] for item in items] + [-5]
    rows = post("/v1/items", {"version": "v1", "items": keys}).json()["rows"]
    assert [row["item"] for row in rows] == keys
    assert rows[0]["title"].startswith("Item ")
    assert rows[2]["title"] is None
    assert "known: v1" in post("/v1/items", {"version": "other", "items": keys}, 422).json()["error"]


def test_only_json_is_read(post):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert "application/json" in post("/v1/recommend", {"user": 3}, 415, **{"Content-Type": kind}).json()["error"]


def test_nobody_without_a_key(served):
    for headers in ({}, {"X-API-Key": ""}, {"X-API-Key": KEY[:-1]}, {"X-API-Key": KEY + "x"}):
        answer = requests.post(f"{served}/v1/recommend", json={"user": 3}, headers=headers, timeout=60)
        assert answer.status_code == 401
    for path in ("/v1/models", "/metrics", "/docs", "/openapi.json"):
        assert requests.get(f"{served}{path}", timeout=60).status_code == 401


def test_a_short_deadline_shortens_the_work_and_still_answers(post):
    for _ in range(3):
        found = post("/v1/recommend", {"user": 3, "count": 4, "deadline_ms": 0.01}).json()
        assert len(found["items"]) == 4
        assert not found["complete"]
    assert post("/v1/recommend", {"user": 3, "count": 4}).json()["complete"]


def test_the_client_speaks_all_of_it(served):
    with Client(served, KEY) as client:
        found = client.recommend(3, 4, context={"hour": 5}, exclude=[1], explain=True)
        assert len(found.items) == 4
        candidates = client.retrieve(3, 6)
        ids = [item.item for item in candidates.items]
        ranking = client.rank(3, ids, context={"hour": 5})
        assert sorted(item.item for item in ranking.items) == sorted(ids)
        batch = client.rank_batch([RankRequest(user=3, items=ids, context={"hour": 5}), RankRequest(user=4, items=ids)])
        np.testing.assert_allclose([i.score for i in batch[0].items], [i.score for i in ranking.items], rtol=1e-5)
        with pytest.raises(UserError, match="takes no feedback"):
            client.feedback({"v1:0000000000000001": 1.0})
        assert client.models().versions[0].version == "v1"
        with pytest.raises(UserError, match="count: "):
            client.recommend(3, 0)
        with pytest.raises(UserError, match="an integer is expected"):
            client.recommend("three")
    with Client(served, "wrong") as stranger, pytest.raises(UserError, match="a valid key"):
        stranger.models()
    with Client(served + "/elsewhere", KEY) as lost, pytest.raises(UserError, match="Not Found"):
        lost.models()
