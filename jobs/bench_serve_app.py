"""The application under load, for `bench_serve.py`: started on a Ray of its own, asked by Locust, watched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray import serve

from raysys.serve.deploy import FAST_PATH, NAME, Deployment
from raysys.serve.settings import read_settings

LOAD = Path(__file__).with_name("bench_serve_load.py")
PROXIES: dict[str, dict[str, str]] = {"default": {}, "haproxy": FAST_PATH}
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Load:
    """What came of a load. cpu: cores that the generator used. requests: see `bench_serve_load.py`."""

    rate: float
    seconds: float
    cpu: float
    requests: list[dict[str, Any]]

    def milliseconds(self, status: int = 200) -> np.ndarray:
        """From the moment a request was meant to be sent until its answer, of all with this status."""
        return 1000 * np.array([r["done"] - r["meant"] for r in self.requests if r["status"] == status])

    def statuses(self) -> dict[str, int]:
        """Requests by HTTP status; 0: there was no answer."""
        values, counts = np.unique([r["status"] for r in self.requests], return_counts=True)
        return {str(value): int(count) for value, count in zip(values, counts, strict=True)}

    def lateness(self) -> float:
        """99th percentile of how late the generator sent, ms."""
        return float(np.percentile([1000 * (r["sent"] - r["meant"]) for r in self.requests], 99))

    def accepted_rate(self) -> float:
        """Answers of 200 a second, until the last one came."""
        done = [r["done"] for r in self.requests if r["status"] == 200]
        first = min(r["meant"] for r in self.requests)
        return len(done) / (max(done) - first) if done else 0.0

    def facts(self) -> dict[str, Any]:
        """For the record."""
        found = self.milliseconds()
        percentiles = {f"p{q}_ms": float(np.percentile(found, q)) for q in (50, 90, 99)} if len(found) else {}
        return {
            "offered": self.rate,
            "seconds": self.seconds,
            "accepted_rate": self.accepted_rate(),
            "statuses": self.statuses(),
            "lost_ids": sum(not r.get("has_id", True) for r in self.requests),
            **percentiles,
            "generator_late_p99_ms": self.lateness(),
            "generator_cores": self.cpu,
        }


class Asker:
    """Sends loads to one path of the application."""

    def __init__(self, url: str, cores: Sequence[int], seed: int) -> None:
        self.url, self._cores, self._seed = url, list(cores), seed

    @contextmanager
    def ask(
        self, path: str, bodies: Sequence[Mapping[str, Any]], rate: float, seconds: float, keep: bool = False
    ) -> Iterator[list[Load]]:
        """A load that runs beside the block; the list has its result after it."""
        result: list[Load] = []
        with tempfile.TemporaryDirectory() as folder:
            plan: dict[str, Any] = {
                "url": self.url,
                "path": path,
                "bodies": list(bodies),
                "rate": rate,
                "seconds": seconds,
            }
            plan |= {"keep": keep, "seed": self._seed, "cores": self._cores, "timeout_s": TIMEOUT_S}
            plan["output"] = f"{folder}/requests.json"
            command = [sys.executable, "-m", "locust", "-f", str(LOAD), "--headless", "-u", "1", "--only-summary"]
            Path(folder, "plan.json").write_text(json.dumps(plan))  # too long for a variable
            environment = os.environ | {"RAYSYS_LOAD": f"{folder}/plan.json"}
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            ) as process:
                try:
                    yield result
                    _, errors = process.communicate(timeout=seconds + 2 * TIMEOUT_S)
                finally:
                    process.kill()
            if not Path(plan["output"]).exists():
                raise RuntimeError(f"the load generator failed: {errors[-2000:]}")
            found = json.loads(Path(plan["output"]).read_text())
            result.append(Load(rate, seconds, found["cpu"], found["requests"]))

    def measure(self, path: str, bodies: Sequence[Mapping[str, Any]], rate: float, seconds: float) -> Load:
        """A load, and nothing beside it."""
        with self.ask(path, bodies, rate, seconds) as result:
            pass
        return result[0]


@contextmanager
def application(config: Mapping[str, Any], replicas: Mapping[str, int]) -> Iterator[Deployment]:
    """The application on a Ray of its own. replicas: by `retriever`, `early_ranker`, `ranker`, `ingress`."""
    os.environ.update(PROXIES[config["proxy"]])
    dashboard = ray.init("local", include_dashboard=True, log_to_driver=False, num_cpus=16).dashboard_url
    version = read_version(config["release"])
    batch = {"max_batch_size": config["max_batch_size"], "wait_ms": config["wait_ms"], "threads": config["threads"]}
    stages = {
        name: {"min_replicas": count, "max_replicas": count, "num_cpus": 0.1}
        | ({} if name == "ingress" else {"batch": batch})
        for name, count in replicas.items()
    }
    settings = {
        "releases": {version: str(Path(config["release"]).resolve())},
        "traffic": {version: 1.0},
        "cascade": {"users": str(Path(config["users"]).resolve())},
        **stages,
    }
    try:
        deployment = Deployment(f"http://{dashboard}")
        deployment.start(read_settings(settings), port=config["port"])
        yield deployment
    finally:
        serve.shutdown()
        ray.shutdown()


def read_version(release: str) -> str:
    """Of a release folder."""
    version: str = json.loads(Path(release, "release.json").read_text())["version"]
    return version


def replicas_of(deployment: str) -> list[psutil.Process]:
    """The processes of its replicas, oldest first: below this process, for what is found here may be killed."""
    title = f"ServeReplica:raysys:{deployment}"  # what it does at the moment may stand around it
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()[:1]):
                found.append((process.create_time(), process))
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def has_replaced(name: str, before: Sequence[psutil.Process]) -> bool:
    """Whether a replica is there that was not, and as many as before take requests."""
    states = serve.status().applications[NAME].deployments[name].replica_states
    running = sum(count for state, count in states.items() if state == "RUNNING")
    return running == len(before) and bool({p.pid for p in replicas_of(name)} - {p.pid for p in before})


def memory(names: Sequence[str]) -> dict[str, float]:
    """MiB that the replicas of each deployment hold."""
    return {name: sum(process.memory_info().rss for process in replicas_of(name)) / 2**20 for name in names}


def wait_until(seconds: float, is_so: Any) -> float | None:
    """Seconds until it was so; None where that took longer."""
    start = time.time()
    while time.time() < start + seconds:
        if is_so():
            return time.time() - start
        time.sleep(0.05)
    return None
