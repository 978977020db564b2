"""Requests at random moments, for `bench_serve.py`: `locust -f jobs/bench_serve_load.py`, with the plan's file in RAYSYS_LOAD.

The load is open: moments are drawn before (Poisson), and each request is sent at its own, whether earlier ones were answered or
not, so that latency, counted from the moment that was meant, has the time in queues. Locust sends, keeps connections and ends.
"""

from __future__ import annotations

import json
import os
import resource
import time
import uuid
from pathlib import Path
from typing import Any

import gevent
import numpy as np
from gevent.pool import Pool
from locust import FastHttpUser, constant, task

PLAN: dict[str, Any] = json.loads(Path(os.environ["RAYSYS_LOAD"]).read_text())
MAX_IN_FLIGHT = 4096
os.sched_setaffinity(0, PLAN["cores"])


class Arrivals(FastHttpUser):
    """One user that makes all requests; each has a greenlet."""

    host = PLAN["url"]
    wait_time = constant(0)
    concurrency = MAX_IN_FLIGHT
    network_timeout = connection_timeout = PLAN["timeout_s"]
    max_retries = 0

    @task
    def arrive(self) -> None:
        """Send the whole plan, write what came, and end."""
        bodies = [json.dumps(body) for body in PLAN["bodies"]]
        generator = np.random.default_rng(PLAN["seed"])
        gaps = generator.exponential(1 / PLAN["rate"], int(2 * PLAN["rate"] * PLAN["seconds"]) + 100)
        moments = gaps.cumsum()
        moments = moments[moments < PLAN["seconds"]]
        which = generator.integers(len(bodies), size=len(moments))
        found: list[dict[str, Any]] = []
        pool, start = Pool(MAX_IN_FLIGHT), time.time() + 0.2
        for moment, body in zip(moments.tolist(), which.tolist(), strict=True):
            gevent.sleep(max(0.0, start + moment - time.time()))
            pool.spawn(self._send, bodies[body], body, start + moment, found)
        pool.join()
        assert len(found) == len(moments)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        busy = (usage.ru_utime + usage.ru_stime) / (time.time() - start)
        Path(PLAN["output"]).write_text(json.dumps({"cpu": busy, "start": start, "requests": found}))
        self.environment.runner.quit()

    def _send(self, data: str, body: int, meant: float, found: list[dict[str, Any]]) -> None:
        sent, name = time.time(), uuid.uuid4().hex
        headers = {"Content-Type": "application/json", "X-Request-ID": name}
        with self.client.post(PLAN["path"], data=data, headers=headers, catch_response=True) as answer:
            done = time.time()
            entry = {"body": body, "meant": meant, "sent": sent, "done": done, "status": answer.status_code}
            found.append(entry)
            if answer.status_code:
                entry["has_id"] = answer.headers.get("X-Request-ID") == name
            if answer.status_code == 503:
                entry["retry_after"] = answer.headers.get("Retry-After")
            elif answer.status_code == 200 and PLAN["keep"]:
                entry["answer"] = answer.json()
            answer.success()
