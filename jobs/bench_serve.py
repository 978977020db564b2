"""The application under load: `make bench-serve`. Latency, throughput, overload, killed replicas and swaps, as a table and JSON.

Targets: /v1/rank of 200 candidates at half of saturation within the model's time + 6 ms (median) and + 25 ms (99th percentile);
throughput at least 0.7 of the bare batched model; at twice saturation nothing but answers and 503 with Retry-After; no wrong
answer and no more failed requests than were in flight when a replica gets SIGKILL; no failed and no mixed one in a swap.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from bench_result import machine
from bench_serve_app import PROXIES, Asker, application, memory
from bench_serve_faults import kills, swaps

from raysys.config import Config, run_job
from raysys.errors import UserError, nearest
from raysys.machine import commit_here
from raysys.serve.app import INGRESS, STAGES
from raysys.serve.release import Release
from raysys.serve.stages import Call, RankerStage
from raysys.serve.store import ArrowStore
from raysys.strict_json import to_plain

CALLS, BATCHES = 300, 60
NAMES = (*STAGES, INGRESS)
PARTS = ("model", "saturation", "half", "overload", "kills", "swaps")
LATE_MS = 1.0
Figures = dict[str, Any]


def main(config: Config) -> None:
    """Measure the parts, print the table, write the record."""
    check(config)
    about = machine() | {"threads_per_process": config["threads"]}
    torch.set_num_threads(config["threads"])
    bodies = make_bodies(config)
    figures: Figures = {"model": model_time(config, bodies)}
    url = f"http://127.0.0.1:{config['port']}"
    asker = Asker(url, config["cores"], config["seed"])
    others = config["replicas"]["others"]
    replicas = {"retriever": others, "early_ranker": others, "ranker": config["replicas"]["ranker"], "ingress": others}
    parts = set(config["parts"])
    if parts & {"half", "overload"} or (config["rate"] is None and parts - {"model"}):
        with application(config, replicas):
            warm_up(asker, bodies)
            if config["rate"] is None:
                figures["saturation"] = saturation(config, asker, bodies, figures["model"]["batched_per_s"])
            rate = config["rate"] or figures["saturation"]["rate"]
            if "half" in parts:
                figures["half"] = asker.measure("/v1/rank", bodies, rate / 2, config["half_s"]).facts()
            if "overload" in parts:
                figures["overload"] = overload(config, asker, bodies, rate)
    if parts & {"kills", "swaps"}:
        rate = (config["rate"] or figures["saturation"]["rate"]) * config["fault_share"]
        asked = [{"user": body["user"], "count": 20, "deadline_ms": 60_000} for body in bodies]
        with application(config, dict.fromkeys(replicas, 2)) as deployment:
            warm_up(asker, bodies)
            if "kills" in parts:
                figures["kills"] = kills(config, asker, asked, rate)
            if "swaps" in parts:
                figures["swaps"] = swaps(config, asker, deployment, asked, rate)
    print(table(figures))
    if config["record"]:
        write_record(config, about, figures)


def check(config: Config) -> None:
    """Names that are chosen from a list."""
    for key, names, known in (("parts", config["parts"], PARTS), ("proxy", [config["proxy"]], tuple(PROXIES))):
        for name in set(names) - set(known):
            raise UserError(f"{key} has {name!r}", nearest(name, known))


def make_bodies(config: Config) -> list[dict[str, Any]]:
    """Requests of /v1/rank: users of the store, items of the release, both drawn evenly."""
    generator = np.random.default_rng(config["seed"])
    users = ArrowStore(config["users"]).some_keys(10_000)
    items = Release.open(config["release"]).items().keys
    return [
        {
            "user": users[generator.integers(len(users))],
            "items": generator.choice(items, config["candidates"], replace=False).tolist(),
        }
        for _ in range(config["bodies"])
    ]


def model_time(config: Config, bodies: Sequence[Mapping[str, Any]]) -> Figures:
    """The final ranker in this process: from a user's row and item ids to predictions, one call and a batch at a time."""
    release, store = Release.open(config["release"]), ArrowStore(config["users"])
    stage = RankerStage(release, config["threads"])
    calls = [
        Call(release.version, pa.Table.from_batches([store.get([b["user"]])[0]]), items=np.array(b["items"], np.int64))
        for b in bodies
    ]
    users = [call.user for call in calls]

    def run(places: Sequence[int]) -> float:
        start = time.perf_counter()
        stage.answer(pa.concat_tables([users[place] for place in places]), [calls[place] for place in places])
        return time.perf_counter() - start

    size = config["max_batch_size"]
    for place in range(20):
        run([place % len(calls)])
    single = np.array([1000 * run([number % len(calls)]) for number in range(CALLS)])
    batch = np.array([run([(number * size + k) % len(calls) for k in range(size)]) for number in range(BATCHES)])
    return {
        "p50_ms": float(np.percentile(single, 50)),
        "p99_ms": float(np.percentile(single, 99)),
        "batch_size": size,
        "batched_per_s": size / float(np.median(batch)),
    }


def warm_up(asker: Asker, bodies: Sequence[Mapping[str, Any]]) -> None:
    """Until every replica has answered: the first calls of each are slow."""
    asker.measure("/v1/rank", bodies, 20, 5)


def saturation(config: Config, asker: Asker, bodies: Sequence[Mapping[str, Any]], ceiling: float) -> Figures:
    """The highest rate of answers over rates that are offered one after another, until fewer than 0.9 of them are accepted."""
    steps = []
    for share in config["steps"]:
        load = asker.measure("/v1/rank", bodies, share * ceiling, config["step_s"])
        steps.append(load.facts())
        if load.statuses().get("200", 0) < 0.9 * len(load.requests):
            break
    rate = max(step["accepted_rate"] for step in steps)
    return {"rate": rate, "of_bare": rate / ceiling, "steps": steps}


def overload(config: Config, asker: Asker, bodies: Sequence[Mapping[str, Any]], rate: float) -> Figures:
    """Twice what can be done: what is accepted, what is refused, and what memory does."""
    readings = []
    with asker.ask("/v1/rank", bodies, 2 * rate, config["overload_s"]) as result:
        for _ in range(6):
            time.sleep(config["overload_s"] / 6)
            readings.append(memory(NAMES))
    load = result[0]
    refused = [r for r in load.requests if r["status"] == 503]
    return {
        **load.facts(),
        "refused_without_retry_after": sum(r["retry_after"] is None for r in refused),
        "other_statuses": sum(r["status"] not in (200, 503) for r in load.requests),
        "memory_mib": {name: [reading[name] for reading in readings] for name in NAMES},
    }


def table(figures: Figures) -> str:
    """The figures beside their targets, as Markdown."""
    model = figures["model"]
    rows: list[tuple[str, str, str]] = [
        (f"model, {name} of one request", f"{model[key]:.1f} ms", "")
        for name, key in (("p50", "p50_ms"), ("p99", "p99_ms"))
    ]
    rows.append(("model, batched", f"{model['batched_per_s']:.0f} requests/s", ""))
    if "saturation" in figures:
        found = figures["saturation"]
        rows.append(("saturation", f"{found['rate']:.0f} requests/s, {found['of_bare']:.2f} of the model's", "0.7"))
    if "half" in figures:
        for name, more in (("p50", 6), ("p99", 25)):
            value = figures["half"][f"{name}_ms"]
            rows.append((f"half of it, {name}", f"{value:.1f} ms", f"{model[f'{name}_ms'] + more:.1f} ms"))
    if "overload" in figures:
        found = figures["overload"]
        growth = max(readings[-1] - readings[1] for readings in found["memory_mib"].values())
        refused = found["statuses"].get("503", 0)
        rows += [
            ("twice as much, p99 of accepted", f"{found['p99_ms']:.0f} ms", ""),
            ("  accepted", f"{found['accepted_rate']:.0f} requests/s", ""),
            ("  503, of them without Retry-After", f"{refused}, {found['refused_without_retry_after']}", "0"),
            ("  other statuses", str(found["other_statuses"]), "0"),
            ("  most that a deployment grew", f"{growth:.0f} MiB", "flat"),
        ]
    for part in ("kills", "swaps"):
        if part in figures:
            rows += [(f"{part}, {name}", value, target) for name, value, target in figures[part]["rows"]]
    loads = [figures[part] for part in PARTS[2:] if part in figures]
    if loads:
        late = max(load["generator_late_p99_ms"] for load in loads)
        rows.append(("answers without the request's X-Request-ID", str(sum(load["lost_ids"] for load in loads)), "0"))
        rows.append(("load generator, p99 of how late it sent", f"{late:.1f} ms", f"{LATE_MS:g} ms"))
    lines = ["| | measured | target |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def write_record(config: Config, about: Figures, figures: Figures) -> None:
    """What was measured, on what."""
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit_here(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": about | {"load_after": os.getloadavg()[0]},
        "config": config,
        "figures": figures,
    }
    Path(config["record"]).write_text(json.dumps(to_plain(content), indent=1) + "\n")


if __name__ == "__main__":
    run_job(main, "bench_serve", __doc__)
