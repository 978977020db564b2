"""Retrieval models ranked over a full catalogue: `python jobs/compare_retrieval.py source=FOLDER` prints the table.

Each model is trained with every seed; the weights that its experiment keeps are tested, beside what counting
alone retrieves. The record is written after each run, and runs that stand there are not repeated.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysys.config import Config, compose, instantiate, run_job
from raysys.errors import UserError
from raysys.machine import commit_here
from raysys.strict_json import to_plain
from raysys.train.job import Job, machine, versions
from raysys.train.recall import rank_metrics
from raysys.train.retrieval import retrieval_task
from raysys.train.trainer import fit, prepare

SHOWN = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr", "coverage@10")
METRIC = "ndcg@10"
Metrics = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One trained model. loss: the objective and which one of its losses. best_step: whose weights were tested.

    seconds: by the wall clock, evaluations included. valid, test: metrics. ordered: recall@10 of the test rows whose item
    stands after the last one of the history in the catalogue's order, and of the other rows; empty without that order.
    """

    model: str
    loss: str
    overrides: list[str]
    seed: int
    commit: str
    steps: int
    best_step: int
    seconds: float
    valid: Metrics
    test: Metrics
    ordered: Metrics


def main(config: Config) -> None:
    """Train what is missing, and print the table."""
    record = read_record(Path(config["record"]))
    commit = commit_here()  # now, and not when a run ends: the code that runs is loaded
    for seed in config["seeds"]:  # all models with one seed, then the next: an interrupted comparison has whole rows
        for model, overrides in config["models"].items():
            if any((run["model"], run["seed"]) == (model, seed) for run in record["runs"]):
                continue
            run, baselines = train(config, model, overrides, seed, commit)
            record["runs"].append(asdict(run))
            record["baselines"] = baselines
            write_record(config, record, commit)
            print(f"{model}, seed {seed}: {run.seconds:.0f} s, valid {METRIC} {run.valid[METRIC]:.4f}", flush=True)
    print(table(record))


def train(config: Config, model: str, overrides: list[str], seed: int, commit: str) -> tuple[Run, dict[str, Metrics]]:
    """One run in this process, and the test metrics of the baselines by name."""
    name = f"{model}-{seed}"
    runs_folder = Path(config["runs_folder"]).resolve()
    source = [] if config["source"] is None else [f"data.prepare.source={config['source']}"]
    settings = compose([*overrides, *source, f"seed={seed}", f"run_id={name}", f"runs_folder={runs_folder}"])
    shutil.rmtree(runs_folder / name, ignore_errors=True)  # of a run that ended before its record was written
    instantiate(settings["data"]["prepare"])
    prepared = prepare(settings)
    job = prepared.job
    assert job.train.retrieval is not None
    started = datetime.now(timezone.utc)
    outcome = fit(prepared, [])
    seconds = (datetime.now(timezone.utc) - started).total_seconds()
    if outcome.status == "interrupted":
        raise UserError(f"{name}: the comparison was stopped", "start it again: it goes on after the last record")
    task = retrieval_task(job.schema, job.train.retrieval)
    test = outcome.metrics["test"]
    ordered = recall_by_order(job, task, config["order"]) if config["order"] else {}
    baselines = {
        key.removeprefix(f"{task}: "): chosen(values) | ordered.get(key, {})
        for key, values in test.items()
        if key != task
    }
    run = Run(
        model=model,
        loss=loss_name(settings),
        overrides=overrides,
        seed=seed,
        commit=commit,
        steps=outcome.step,
        best_step=outcome.best["step"] or outcome.step,
        seconds=round(seconds, 1),
        valid=chosen(outcome.metrics["valid"][task]),
        test=chosen(test[task]),
        ordered=ordered.get(task, {}),
    )
    return run, baselines


def chosen(values: Metrics) -> Metrics:
    """The metrics of the table."""
    return {key: values[key] for key in SHOWN}


def loss_name(settings: Config) -> str:
    """The objective's class and, where it has several losses, which one."""
    objective = settings["objective"]
    kind = objective["_target_"].rpartition(".")[2]
    return f"{kind}, {objective['loss']}" if "loss" in objective else kind


def recall_by_order(job: Job, task: str, column: str) -> dict[str, Metrics]:
    """By task and baseline: recall@10 of test rows whose item stands after the history's last one in `column`, and of others."""
    assert job.train.retrieval is not None
    key, exclude = job.items().key, job.train.retrieval.exclude
    items = pq.read_table(Path(job.data) / "items.parquet", columns=[key, column])
    place = dict(zip(items[key].to_pylist(), np.argsort(np.argsort(items[column].to_numpy())).tolist(), strict=True))
    rows = pq.read_table(Path(job.data) / "test.parquet", columns=["example_id", key, exclude]).to_pylist()
    after = {row["example_id"]: place[row[key]] > place[row[exclude][-1]] for row in rows if row[exclude]}
    found = pq.read_table(job.folder / "predictions" / "test.parquet")
    there = [number in after for number in found["example_id"].to_pylist()]
    found = found.filter(there)
    ascending = np.array([after[number] for number in found["example_id"].to_pylist()])
    return {
        name.removesuffix("_rank"): {
            "recall@10 after": recall(found[name].to_numpy()[ascending]),
            "recall@10 before": recall(found[name].to_numpy()[~ascending]),
            "share after": float(ascending.mean()),
        }
        for name in found.column_names
        if name.endswith("_rank")
    }


def recall(ranks: NDArray[np.int64]) -> float:
    """recall@10 of ranks from 1."""
    return rank_metrics(ranks, [10])["recall@10"]


def read_record(path: Path) -> dict[str, Any]:
    """The record so far, or one without runs."""
    if not path.exists():
        return {"runs": [], "baselines": {}}
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def write_record(config: Config, record: dict[str, Any], commit: str) -> None:
    """All runs so far, and how and on what the last one was made."""
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seeds": config["seeds"],
        "machine": machine() | {"threads": int(os.environ.get("OMP_NUM_THREADS", "1"))},
        "versions": versions(),
        "models": config["models"],
        "baselines": record["baselines"],
        "runs": record["runs"],
    }
    path = Path(config["record"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(to_plain(content), indent=1) + "\n")
    partial.replace(path)


def table(record: dict[str, Any]) -> str:
    """The test metrics as Markdown: means and deviations over the seeds."""
    lines = [f"| model | loss | {' | '.join(SHOWN)} | minutes |", "| --- " * (len(SHOWN) + 3) + "|"]
    for name, values in record["baselines"].items():
        lines.append(f"| {name} | counts | {' | '.join(digits([values[key]]) for key in SHOWN)} | |")
    for model in dict.fromkeys(run["model"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["model"] == model]
        cells = [digits([run["test"][key] for run in runs]) for key in SHOWN]
        minutes = mean(run["seconds"] for run in runs) / 60
        lines.append(f"| {model} | {runs[0]['loss']} | {' | '.join(cells)} | {minutes:.1f} |")
    return "\n".join(lines)


def digits(values: Sequence[float]) -> str:
    """Mean and deviation."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    run_job(main, "compare_retrieval", __doc__)
