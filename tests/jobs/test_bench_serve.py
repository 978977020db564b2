"""The bench of the application without one: what is counted from when, what counts as wrong, and that the load is open."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from raysys.errors import UserError

SERVICE_S = 0.1


@pytest.fixture(scope="module")
def app(jobs):
    return jobs("bench_serve_app")


@pytest.fixture(scope="module")
def faults(jobs):
    return jobs("bench_serve_faults")


@pytest.fixture
def server():
    """The address of a server that answers one request after another, as the body says; each takes `SERVICE_S`."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            time.sleep(SERVICE_S)
            self.send_response(503 if "busy" in body else 200)
            if "later" in body:
                self.send_header("Retry-After", "7")
            if "nameless" not in body:
                self.send_header("X-Request-ID", self.headers["X-Request-ID"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments):
            pass

    class Queue(HTTPServer):
        request_queue_size = 1024

    with Queue(("127.0.0.1", 0), Answers) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def request(meant, sent, done, status=200, **more):
    return {"meant": meant, "sent": sent, "done": done, "status": status, **more}


def test_latency_is_counted_from_the_moment_that_was_meant(app):
    requests = [request(10.0, 10.0, 10.1), request(10.2, 10.9, 11.0), request(10.3, 10.3, 10.4, 503)]
    load = app.Load(rate=3, seconds=1, cpu=0.5, requests=requests)
    assert load.milliseconds().tolist() == pytest.approx([100, 800])
    assert load.milliseconds(503).tolist() == pytest.approx([100])
    assert load.statuses() == {"200": 2, "503": 1}
    assert load.lateness() == pytest.approx(686)  # the 99th percentile of 0, 0 and 700
    assert load.accepted_rate() == pytest.approx(2 / 1.0)
    facts = load.facts()
    assert (facts["p50_ms"], facts["p99_ms"]) == pytest.approx((450, 793))
    assert (facts["offered"], facts["generator_cores"]) == (3, 0.5)


def test_a_load_without_an_answer_has_no_percentiles(app):
    facts = app.Load(rate=3, seconds=1, cpu=0.5, requests=[request(1.0, 1.0, 2.0, 0)]).facts()
    assert facts["statuses"] == {"0": 1}
    assert facts["accepted_rate"] == 0.0
    assert "p99_ms" not in facts


def test_the_load_is_open_and_waits_for_no_answer(app, server):
    """At 30 a second the server, which can do 10, has a queue of seconds at the end; each request is sent at its moment."""
    bodies = [{"say": "yes"}, {"say": "busy, later"}, {"say": "busy, nameless"}]
    asker = app.Asker(server, sorted(os.sched_getaffinity(0))[:1], seed=0)
    with asker.ask("/", bodies, rate=30, seconds=2, keep=True) as result:
        assert result == []
    (load,) = result
    requests = sorted(load.requests, key=lambda r: r["meant"])
    assert 30 < len(requests) < 100  # 60 ± 5 standard deviations of a Poisson process
    gaps = [b["meant"] - a["meant"] for a, b in itertools.pairwise(requests)]
    assert max(gaps) > 4 * sorted(gaps)[len(gaps) // 4]  # random moments, not a metronome
    assert requests[-1]["meant"] - requests[0]["meant"] < 2
    late = [r["sent"] - r["meant"] for r in requests]
    assert min(late) > -0.001
    assert max(late) < 1  # as late as a busy machine is, not as the server
    assert max(r["done"] - r["meant"] for r in requests) > 0.5 * (SERVICE_S * len(requests) - 2)
    for number, body in enumerate(bodies):
        found = [r for r in requests if r["body"] == number]
        assert found
        assert {r["status"] for r in found} == {503 if "busy" in body["say"] else 200}
        assert {r.get("retry_after") for r in found} == {"7" if "later" in body["say"] else None}
        assert all(r["answer"] == body for r in found if r["status"] == 200)
        assert {r["has_id"] for r in found} == {"nameless" not in body["say"]}
    assert load.facts()["lost_ids"] == sum(r["body"] == 2 for r in requests)


def test_a_seed_gives_the_same_moments_and_requests(app, server):
    asker, plans = app.Asker(server, sorted(os.sched_getaffinity(0))[:1], seed=5), []
    for _ in range(2):
        requests = sorted(asker.measure("/", [{"say": "a"}, {"say": "b"}], 6, 1).requests, key=lambda r: r["meant"])
        plans.append([(r["body"], r["meant"] - requests[0]["meant"]) for r in requests])
    assert [body for body, _ in plans[0]] == [body for body, _ in plans[1]]
    moments = [[moment for _, moment in plan] for plan in plans]
    assert moments[0] == pytest.approx(moments[1], abs=1e-5)  # of the plan, not of the clock when it was carried out


def test_nobody_listening_is_a_failure_of_every_request(app):
    load = app.Asker("http://127.0.0.1:9", sorted(os.sched_getaffinity(0))[:1], seed=0).measure("/", [{}], 10, 1)
    assert load.statuses() == {"0": len(load.requests)}


def test_what_a_wrong_answer_is(app, faults):
    expected = {
        "v1": {0: {5: {"click": 0.5}, 6: {"click": 0.25}}},
        "v2": {0: {5: {"click": 0.75}, 6: {"click": 0.125}}},
    }

    def wrong(scores, version="v1", complete=True, status=200):
        items = [{"item": item, "score": score, "predictions": {"click": score}} for item, score in scores]
        answer = {"version": version, "complete": complete, "items": items}
        load = app.Load(1, 1, 0, [request(0, 0, 1, status, body=0, answer=answer)])
        return faults.count_wrong(load, expected)

    right = [(5, 0.5), (6, 0.25)]
    assert wrong(right) == 0
    assert wrong([(5, 0.5 + 1e-6), (6, 0.25)]) == 0  # sums in another order
    assert wrong([(5, 0.75), (6, 0.125)], "v2") == 0
    assert wrong(right, "v2") == 1  # one version's name on the other's scores
    assert wrong([(5, 0.5), (6, 0.125)]) == 1  # one score of each
    assert wrong([(5, 0.501), (6, 0.25)]) == 1
    assert wrong([(6, 0.25), (5, 0.5)]) == 1
    assert wrong([(5, 0.5)]) == 1
    assert wrong([(5, 0.5), (7, 0.25)]) == 1
    assert wrong(right, "v3") == 1
    assert wrong(right, complete=False) == 1
    assert faults.count_wrong(app.Load(1, 1, 0, [request(0, 0, 1, 200, body=0)]), expected) == 1  # no JSON
    assert wrong([], status=503) == 0  # failed, which is counted elsewhere


def test_what_a_kill_costs(app, faults):
    requests = [
        request(1.0, 1.0, 1.5, 500),  # before
        request(1.9, 1.9, 2.5, 500),  # in flight
        request(1.8, 1.8, 2.1),  # in flight, and answered
        request(2.2, 2.2, 4.0, 503),  # after it
        request(6.0, 6.0, 9.5, 0),  # of the next kill
    ]
    found = faults._after_kill(app.Load(1, 10, 0, requests), 2.0, 9.0)
    assert found == {"failed": 2, "in_flight": 2, "recovery_s": 2.0, "failed_statuses": [500, 503]}
    assert faults._after_kill(app.Load(1, 10, 0, requests), 20.0, 30.0)["recovery_s"] == 0.0


def test_plans_longer_than_a_variable_may_be(app, server):
    body = {"items": list(range(10_000, 40_000))}
    load = app.Asker(server, sorted(os.sched_getaffinity(0))[:1], seed=0).measure("/", [body], 5, 1)
    assert load.statuses() == {"200": len(load.requests)}


def test_replicas_are_those_below_this_process(app):
    title = ["ray::ServeReplica:raysys:Ranker", "-c", "import time; print(flush=True); time.sleep(60)"]
    with subprocess.Popen(title, executable=sys.executable, stdout=subprocess.PIPE) as ours:
        assert ours.stdout is not None
        ours.stdout.readline()
        try:
            assert [process.pid for process in app.replicas_of("Ranker")] == [ours.pid]
            assert app.replicas_of("EarlyRanker") == []
            other = "import sys; sys.path.insert(0, sys.argv[1]); import bench_serve_app as a; print(a.replicas_of('Ranker'))"
            jobs = str(Path(app.__file__).parent)
            assert subprocess.check_output([sys.executable, "-c", other, jobs], text=True) == "[]\n"
        finally:
            ours.kill()


def test_a_part_or_a_proxy_that_there_is_not(jobs):
    bench = jobs("bench_serve")
    bench.check({"parts": ["kills"], "proxy": "default"})
    with pytest.raises(UserError, match="did you mean 'kills'"):
        bench.check({"parts": ["model", "kill"], "proxy": "default"})
    with pytest.raises(UserError, match="did you mean 'haproxy'"):
        bench.check({"parts": [], "proxy": "ha_proxy"})


def test_the_table_has_targets_beside_what_was_measured(jobs):
    bench = jobs("bench_serve")
    figures = {"model": {"p50_ms": 4.0, "p99_ms": 10.0, "batch_size": 16, "batched_per_s": 500.0}}
    assert "saturation" not in bench.table(figures)
    figures |= {
        "saturation": {"rate": 375.0, "of_bare": 0.75},
        "half": {"p50_ms": 9.5, "p99_ms": 40.0, "generator_late_p99_ms": 0.5, "lost_ids": 0},
        "overload": {
            "p99_ms": 800.0,
            "accepted_rate": 370.0,
            "statuses": {"200": 30, "503": 12},
            "refused_without_retry_after": 2,
            "other_statuses": 1,
            "generator_late_p99_ms": 0.7,
            "lost_ids": 0,
            "memory_mib": {"Ranker": [100.0, 110.0, 113.0], "Cascade": [90.0, 90.0, 91.0]},
        },
        "kills": {"rows": [("wrong answers of 9", "0", "0")], "generator_late_p99_ms": 2.0, "lost_ids": 3},
    }
    lines = bench.table(figures).splitlines()
    assert lines[0] == "| | measured | target |"
    for line in (
        "| saturation | 375 requests/s, 0.75 of the model's | 0.7 |",
        "| half of it, p50 | 9.5 ms | 10.0 ms |",
        "| half of it, p99 | 40.0 ms | 35.0 ms |",
        "|   503, of them without Retry-After | 12, 2 | 0 |",
        "|   other statuses | 1 | 0 |",
        "|   most that a deployment grew | 3 MiB | flat |",
        "| kills, wrong answers of 9 | 0 | 0 |",
        "| answers without the request's X-Request-ID | 3 | 0 |",
        "| load generator, p99 of how late it sent | 2.0 ms | 1 ms |",
    ):
        assert line in lines
