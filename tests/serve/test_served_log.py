"""What the application logs of its own traffic, computed again from the rows as training reads them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raysys.serve.client import Client
from raysys.serve.messages import RankRequest
from raysys.serve.served_log import ServedLog
from raysys.serve.settings import ServedLogSettings
from raysys.serve.skew import check_skew, read_served
from raysys.serve.stages import Predictions


def test_a_thousand_logged_rows_agree_with_the_bundle(learning):
    """Half of the requests are logged, each with its raw rows; the bundle says the same of them, through training's transforms."""
    items = learning.release.items().keys.tolist()
    rng = np.random.default_rng(0)
    sent = 0
    with Client(learning.url) as client:
        for user in range(100):
            asked = rng.choice(items, 20, replace=False).tolist()
            context = {"hour": int(rng.integers(24))} if user % 3 else {}
            client.rank_batch([RankRequest(user=user, items=asked, context=context)] * 2)
            client.recommend(user, 5, context=context)
            sent += 3
    logged = list(read_served(learning.served))
    assert 0.3 * sent < len(logged) < 0.7 * sent
    assert sum(len(request.rows) for request in logged) >= 1000
    report = check_skew(logged, learning.release.bundle("final_ranker"))
    assert report.rows >= 1000
    assert not report.skewed, report
    logged[0].predictions[0][0] += 0.01
    assert check_skew(logged, learning.release.bundle("final_ranker")).skewed


def test_a_replica_keeps_two_files(tmp_path):
    log = ServedLog(ServedLogSettings(folder=str(tmp_path), share=1.0, max_bytes=400))
    found = Predictions(np.array([[0.5]]), ("click",), 0)
    for number in range(20):
        log.add(f"r{number}", "v1", pa.table({"user": [number], "name": ["x" * 50]}), found)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    kept = [request.request_id for request in read_served(tmp_path)]
    assert kept == [f"r{number}" for number in range(20 - len(kept), 20)]  # the newest, none lost between the two
    assert all(path.stat().st_size <= 400 for path in tmp_path.glob("*.jsonl"))


def test_the_sample_is_of_requests_with_an_id(tmp_path):
    log = ServedLog(ServedLogSettings(folder=str(tmp_path), share=0.1))
    assert 70 < sum(log.wants(f"r{number}") for number in range(1000)) < 130
    assert not ServedLog(ServedLogSettings(folder=str(tmp_path), share=1.0)).wants("")
