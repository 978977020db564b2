"""Killed replicas and swapped releases under load, for `bench_serve.py`: every answer is compared with what it must be."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_serve_app import Asker, Load, has_replaced, read_version, replicas_of, wait_until

from raysys.models.retrieval.indexes.exact import Exact
from raysys.serve.client import Client
from raysys.serve.deploy import Deployment
from raysys.serve.release import Release, build_release

KILLED = ("Ranker", "Cascade", "Retriever", "EarlyRanker")
TOLERANCE = 1e-5  # of a probability: float32 sums, whose order differs with the size of a batch
RECOVERY_S = 60.0


def kills(config: Mapping[str, Any], asker: Asker, bodies: Sequence[Mapping[str, Any]], rate: float) -> dict[str, Any]:
    """SIGKILL for a replica of each deployment in turn."""
    expected = {read_version(config["release"]): references(asker.url, bodies)}
    seconds = config["kills"] * config["kill_every_s"] + 10
    events: list[dict[str, Any]] = []
    with asker.ask("/v1/recommend", bodies, rate, seconds, keep=True) as result:
        time.sleep(5)
        for number in range(config["kills"]):
            next_one = time.time() + config["kill_every_s"]
            name = KILLED[number % len(KILLED)]
            before = replicas_of(name)
            moment = time.time()
            before[0].send_signal(signal.SIGKILL)
            back = wait_until(RECOVERY_S, lambda name=name, before=before: has_replaced(name, before))
            events.append({"deployment": name, "moment": moment, "replaced_s": back})
            time.sleep(max(0.0, next_one - time.time()))
    load = result[0]
    for event, following in zip(events, [*(e["moment"] for e in events[1:]), float("inf")], strict=True):
        event |= _after_kill(load, event["moment"], following)
        event["under_load"] = event["moment"] + (event["replaced_s"] or RECOVERY_S) < max(
            r["meant"] for r in load.requests
        )
    wrong = count_wrong(load, expected)
    failed, in_flight = (sum(event[key] for event in events) for key in ("failed", "in_flight"))
    worse = sum(event["failed"] > event["in_flight"] for event in events)
    slowest = max(max(event["recovery_s"], event["replaced_s"] or RECOVERY_S) for event in events)
    rows = [
        (f"wrong answers of {load.statuses().get('200', 0):,}", str(wrong), "0"),
        (f"failed requests of {len(events)} kills (in flight then)", f"{failed} ({in_flight})", ""),
        ("  kills that failed more than were in flight", str(worse), "0"),
        (
            "  kills that outlasted the load: kill_every_s is too short",
            str(sum(not e["under_load"] for e in events)),
            "0",
        ),
        ("slowest recovery", f"{slowest:.1f} s", "30 s"),
    ]
    return {**load.facts(), "wrong": wrong, "events": events, "rows": rows}


def swaps(
    config: Mapping[str, Any], asker: Asker, deployment: Deployment, bodies: Sequence[Mapping[str, Any]], rate: float
) -> dict[str, Any]:
    """Two releases in turn: the one that is served, and another whose final ranker is the first one's early ranker."""
    folder = Path(tempfile.mkdtemp(prefix="raysys-swap-"))
    try:
        first, other = str(Path(config["release"]).resolve()), make_other(Path(config["release"]), folder / "other")
        expected = {read_version(first): references(asker.url, bodies)}
        deployment.roll_forward(str(other.folder))
        expected[other.version] = references(asker.url, bodies)
        deployment.roll_back()
        seconds, moments = config["swaps"] * config["swap_every_s"] + 10, []
        with asker.ask("/v1/recommend", bodies, rate, seconds, keep=True) as result:
            time.sleep(3)
            for number in range(config["swaps"]):
                next_one = time.time() + config["swap_every_s"]
                start = time.time()
                deployment.roll_forward(first if number % 2 else str(other.folder))
                moments.append({"moment": start, "seconds": time.time() - start})
                time.sleep(max(0.0, next_one - time.time()))
    finally:
        shutil.rmtree(folder)
    load = result[0]
    wrong = count_wrong(load, expected)
    failed = sum(r["status"] != 200 for r in load.requests)
    answered = {r["answer"]["version"] for r in load.requests if "answer" in r}
    rows = [
        (f"failed requests of {len(load.requests):,} in {len(moments)} swaps", str(failed), "0"),
        (f"mixed or wrong answers, of {len(answered)} versions", str(wrong), "0"),
        ("median seconds of a swap", f"{np.median([m['seconds'] for m in moments]):.1f}", ""),
    ]
    return {**load.facts(), "wrong": wrong, "failed": failed, "moments": moments, "rows": rows}


def make_other(first: Path, folder: Path) -> Release:
    """Of the same bundles, with other predictions."""
    bundles = {
        "retriever": first / "retriever",
        "early_ranker": first / "early_ranker",
        "final_ranker": first / "early_ranker",
    }
    version, task = f"{read_version(str(first))}-2", Release.open(first).task
    return build_release(folder, version, bundles, str(first), lambda model: Exact(model.width), task)


def _after_kill(load: Load, moment: float, following: float) -> dict[str, Any]:
    """What a kill cost: requests that failed from then until the next one, those in flight, seconds to the last failure."""
    failed = [r for r in load.requests if r["status"] != 200 and moment <= r["done"] < following]
    in_flight = [r for r in load.requests if r["sent"] <= moment < r["done"]]
    recovery = max((r["done"] - moment for r in failed), default=0.0)
    statuses = sorted({r["status"] for r in failed})
    return {"failed": len(failed), "in_flight": len(in_flight), "recovery_s": recovery, "failed_statuses": statuses}


def references(url: str, bodies: Sequence[Mapping[str, Any]]) -> dict[int, dict[int, dict[str, float]]]:
    """Predictions by item of each request, asked before there is any load."""
    with Client(url, timeout=60) as client:
        answers = [client.recommend(body["user"], body["count"], deadline_ms=body["deadline_ms"]) for body in bodies]
    return {place: {i.item: i.predictions for i in answer.items} for place, answer in enumerate(answers)}


def count_wrong(load: Load, expected: Mapping[str, Mapping[int, Mapping[int, Mapping[str, float]]]]) -> int:
    """Answers that have another version, other items, another order than by score, or a prediction that is off."""
    wrong = 0
    for request in load.requests:
        if request["status"] != 200:
            continue
        answer = request.get("answer")  # none where it was no JSON
        if answer is None:
            wrong += 1
            continue
        wanted = expected.get(answer["version"], {}).get(request["body"])
        items, scores = answer["items"], [item["score"] for item in answer["items"]]
        is_right = (
            wanted is not None
            and wanted.keys() == {item["item"] for item in items}
            and answer["complete"]
            and scores == sorted(scores, reverse=True)
            and all(
                abs(value - wanted[item["item"]][task]) <= TOLERANCE
                for item in items
                for task, value in item["predictions"].items()
            )
        )
        wrong += not is_right
    return wrong
