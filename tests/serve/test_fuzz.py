"""Requests that nobody would send: drawn from the OpenAPI description, and random bodies, of which a part is valid."""

from __future__ import annotations

import json
import math
import random

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

CHECKS = (schemathesis.checks.not_a_server_error, schemathesis.checks.response_schema_conformance)
ANSWERED = (200, 401, 404, 405, 413, 415, 422)
WEIRD = [
    None,
    True,
    -1,
    0,
    3,
    2**62,
    2**64,
    1.5,
    -0.0,
    1e308,
    "",
    "3",
    "x" * 300,
    "\u0000",
    "\ud83d",
    [],
    {},
    [[]],
    {"a": 1},
]
RAW = [b"", b"{", b"[1,2", b'{"user": NaN}', b"\xff\xfe", b'{"user": 1e999}', b"[" * 500, b'"text"', b"null", b"0"]


def schema_of(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_requests_drawn_from_the_description(learning):
    """Every operation; no answer is a server's error, and every answer is as the description says."""
    operations = [found.ok() for found in schema_of(learning.url).get_all_operations()]
    assert {operation.label for operation in operations} >= {"POST /v1/recommend", "POST /v1/rank", "POST /v1/feedback"}
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=15,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def call(case):
            case.call_and_validate(checks=CHECKS, timeout=60)

        call()
    assert requests.get(f"{learning.url}/healthz", timeout=60).status_code == 200


def random_body(rng, path, items):
    """A valid body, or one with a part that is replaced, left out or added."""
    user = rng.choice([rng.randrange(50), 10**6, -5])
    some = rng.sample(items, rng.randint(1, 8)) + [rng.randrange(10**6)] * rng.randint(0, 2)
    body = {
        "/v1/recommend": {
            "user": user,
            "count": rng.randint(1, 30),
            "explain": rng.random() < 0.5,
            "exclude": some[:3],
        },
        "/v1/retrieve": {"user": user, "count": rng.randint(1, 60)},
        "/v1/rank": rng.choice([{"user": user, "items": some}, {"requests": [{"user": user, "items": some}] * 2}]),
        "/v1/feedback": {"rewards": [{"impression": "v1:00", "reward": rng.random()}]},
        "/v1/items": {"version": "v1", "items": some},
    }[path]
    if rng.random() < 0.3:
        body["context"] = {"hour": rng.choice([3, 23, None])}
    if rng.random() < 0.5:
        return json.dumps(body).encode()
    if rng.random() < 0.1:
        return rng.choice(RAW)
    key = rng.choice([*body, "other", "deadline_ms", "context"])
    body[key] = rng.choice(WEIRD)
    if rng.random() < 0.2:
        del body[rng.choice(list(body))]
    return json.dumps(body).encode()


def scores_of(answer):
    """The lists of scores of an answer that must fall."""
    for ranking in answer.get("rankings", [answer]):
        for ranked in (ranking, *ranking.get("stages", [])):
            yield [item["score"] for item in ranked.get("items", []) if "score" in item]


def send_random_bodies(url, release, number, seed):
    """The share of them that was answered with 200."""
    rng, good = random.Random(seed), 0
    items, session = release.items().keys.tolist(), requests.Session()
    paths = ["/v1/recommend", "/v1/retrieve", "/v1/rank"] * 4 + ["/v1/feedback", "/v1/items"]
    for _ in range(number):
        path = rng.choice(paths)
        body = random_body(rng, path, items)
        answer = session.post(url + path, data=body, headers={"Content-Type": "application/json"}, timeout=60)
        assert answer.status_code in ANSWERED, (path, body, answer.status_code, answer.text)
        if answer.status_code == 200:
            good += 1
            for scores in scores_of(answer.json()):
                assert all(math.isfinite(score) for score in scores), (path, body)
                assert scores == sorted(scores, reverse=True), (path, body)
        else:
            problem = answer.json()
            assert set(problem) == {"error", "request_id"}, (path, body, problem)
            assert "/" not in problem["error"].replace("redis://", ""), problem  # no path of the server
            assert "Traceback" not in problem["error"]
    return good / number


def test_random_bodies(learning):
    assert send_random_bodies(learning.url, learning.release, 400, seed=0) >= 0.3


@pytest.mark.soak
def test_ten_thousand_random_bodies(learning, record_figure):
    share = send_random_bodies(learning.url, learning.release, 10_000, seed=1)
    record_figure("random bodies answered with 200", share)
    assert share >= 0.3
