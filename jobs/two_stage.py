"""Two stages of ranking on real logs: `python jobs/two_stage.py set=movielens` trains both and prints a table.

A final stage is trained on the impressions of a log. Requests get candidates and bids, and the final stage scores them. Early
stages that see half of the features learn from the labels of impressions or from these scores. On requests of the test split
their order is compared with the final one. A run that is finished is not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys.config import Config, compose, instantiate, run_job
from raysys.data.prepare.dataset import SPLITS, prepare_folder, write_table
from raysys.data.prepare.traffic import Traffic, candidate_rows, draw_requests, read_impressions
from raysys.errors import UserError, nearest
from raysys.machine import commit_here
from raysys.models.value import Value
from raysys.schema import ExtraColumn, FeatureSchema
from raysys.strict_json import to_plain
from raysys.train.funnel_metrics import pair_agreement, recall_at, value_recall_at
from raysys.train.predict import predict
from raysys.train.record import read_record
from raysys.train.trainer import fit, prepare

CANDIDATES = {"train": 10**9, "test": 2 * 10**9}  # their first example ids: larger than impressions have


@dataclass(frozen=True)
class Experiment:
    """One data set. value: of both stages. early: the features that the early stage sees."""

    name: str
    config: Config
    traffic: Traffic
    value: Value
    early: list[str]

    @property
    def folder(self) -> Path:
        """Where its runs and logs are."""
        return Path(self.config["runs_folder"]).resolve() / self.name

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks of the log."""
        return self.traffic.schema.tasks


def main(config: Config) -> None:
    """Every data set: both stages, the record, the table."""
    if config["set"] is not None and config["set"] not in config["sets"]:
        raise UserError(
            f"set {config['set']!r} is not in configs/two_stage.yaml", nearest(config["set"], config["sets"])
        )
    for name in [config["set"]] if config["set"] else config["sets"]:
        node, given = config["sets"][name], {}
        if (source := node.get("source")) is not None:
            given = {"source": config["sources"][source]}
            if given["source"] is None:
                print(f"{name} is left out: give sources.{source}=FOLDER")
                continue
        overrides = [*node["overrides"], *(f"data.prepare.source={path}" for path in given.values())]
        data = compose(overrides)["data"]
        instantiate(data["prepare"])
        traffic = instantiate(node["traffic"], folder=data["folder"], **given)
        asked = config | {"requests": config["requests"] | node.get("requests", {})}
        experiment = Experiment(name, asked, traffic, Value(**node["value"]), node["early"])
        experiment.value.check(traffic.schema, f"sets.{name}.value")
        run(experiment)


def run(experiment: Experiment) -> None:
    """Both stages of one data set."""
    config, folder = experiment.config, experiment.folder
    write_final_log(experiment)
    final = train(experiment, "final", "log", config["final"])
    write_early_log(experiment, final)
    candidates = folder / "early_log" / "candidates" / "test.parquet"
    test = pq.read_table(candidates)
    figures: dict[str, dict[str, Any]] = {"bid_only": {"-": measure(experiment, test, {}, Value())}}
    for seed in config["seeds"]:
        for method, how in config["methods"].items():
            value = experiment.value if how["events"] else dataclasses.replace(experiment.value, events={})
            overrides = [*early_overrides(experiment, how), f"seed={seed}"]
            run_folder = train(experiment, f"{method}-{seed}", "early_log", overrides)
            scores = score(run_folder, candidates, "test")
            early = {task: scores[f"{task}_probability"].to_numpy() for task in value.tasks}
            found = measure(experiment, test, early, value)
            figures.setdefault(method, {})[str(seed)] = found | {"seconds": seconds(run_folder)}
            print(f"{experiment.name} {method} seed {seed}: {found}", flush=True)
        write_record(experiment, final, figures)
    print(table(experiment, figures))


def train(experiment: Experiment, name: str, log: str, overrides: list[str]) -> Path:
    """Train one run in this process, unless it is finished, and return its folder."""
    stopping = f"train.early_stopping={{metric: ne, task: {experiment.value.factors[0]}, patience: 2}}"
    data = ["data=table", f"data.folder={experiment.folder / log}", "data.prepare=null"]
    place = [f"run_id={name}", f"runs_folder={experiment.folder}", "resume=auto"]
    prepared = prepare(compose([*data, *experiment.config["all_runs"], stopping, *overrides, *place]))
    record = read_record(prepared.job.folder)
    is_finished = record is not None and record["status"] in ("finished", "early_stopped")
    if not is_finished and fit(prepared, []).status == "interrupted":
        raise KeyboardInterrupt
    return prepared.job.folder


def early_overrides(experiment: Experiment, how: Config) -> list[str]:
    """The model and the loss of a method."""
    shares = {task: how["soft_share"] for task in experiment.tasks}
    weights = {} if how["events"] else dict.fromkeys(experiment.value.events, 0.0)
    return [
        "objective=early_stage",
        *experiment.config["early"],
        f"objective.teachers={braces({task: f'final_{task}' for task in experiment.tasks})}",
        f"objective.soft_share={braces(shares)}",
        f"objective.task_weights={braces(weights)}",
    ]


def braces(mapping: Any) -> str:
    """A mapping as Hydra reads it."""
    return "{" + ", ".join(f"{key}: {value}" for key, value in mapping.items()) + "}"


def write_final_log(experiment: Experiment) -> None:
    """The impressions with all features, and candidates of requests of train and test with their bids."""
    asked, traffic = experiment.config["requests"], experiment.traffic

    def write(partial: Path) -> None:
        impressions = read_impressions(traffic)
        counts = {split: asked[split] for split in CANDIDATES}
        requests = draw_requests(traffic, impressions, counts, asked["candidates"], asked["seed"])
        random = np.random.default_rng(asked["seed"])
        kept = random.permuted(requests["train"].item, axis=1)[:, : asked["scored"]]
        requests["train"] = dataclasses.replace(requests["train"], item=kept)
        for split, rows in impressions.items():
            write_table(partial / f"{split}.parquet", rows)
        (partial / "candidates").mkdir()
        for split, first_id in CANDIDATES.items():
            rows = candidate_rows(traffic, impressions[split], requests[split], first_id)
            bid = np.exp(random.normal(size=len(rows)) / 2).astype(np.float32)
            write_table(partial / "candidates" / f"{split}.parquet", rows.append_column("bid", pa.array(bid)))
        dataclasses.replace(traffic.schema, group_id="request", time=None).save(partial / "schema.yaml")

    base = {key: experiment.config["sets"][experiment.name][key] for key in ("overrides", "traffic")}
    arguments = {"data": "two_stage", **base, "requests": asked}
    prepare_folder(experiment.folder / "log", arguments, write)


def write_early_log(experiment: Experiment, final: Path) -> None:
    """What an early stage learns from: impressions with labels and scored candidates without, request by request."""
    log, tasks = experiment.folder / "log", experiment.tasks
    schema = early_schema(experiment.traffic.schema, experiment.early)

    def write(partial: Path) -> None:
        empty = [*(f"final_{task}" for task in tasks), "bid"]
        parts = {}
        for split in SPLITS:
            rows = pq.read_table(log / f"{split}.parquet")
            for name in empty:
                rows = rows.append_column(name, pa.nulls(len(rows), pa.float32()))
            parts[split] = rows.select(schema.columns())
        (partial / "candidates").mkdir()
        for split in CANDIDATES:
            path = log / "candidates" / f"{split}.parquet"
            rows, scores = pq.read_table(path), score(final, path, split)
            for task in tasks:
                column = scores[f"{task}_probability"].cast(pa.float32())
                rows = rows.append_column(f"final_{task}", column).append_column(task, pa.nulls(len(rows), pa.int8()))
            write_table(partial / "candidates" / f"{split}.parquet", rows)
            if split == "train":
                both = [parts[split], rows.select(schema.columns()).cast(parts[split].schema)]
                parts[split] = pa.concat_tables(both).sort_by([("request", "ascending"), ("example_id", "ascending")])
        for split, rows in parts.items():
            write_table(partial / f"{split}.parquet", rows)
        schema.save(partial / "schema.yaml")

    record = read_record(final) or {}
    arguments = {"data": "two_stage early", "features": experiment.early, "final": record["config_hash"]}
    prepare_folder(experiment.folder / "early_log", arguments, write)


def early_schema(schema: FeatureSchema, names: list[str]) -> FeatureSchema:
    """The schema with these features alone, labels that may be missing, the final stage's probabilities and the bid."""
    known = features_of(schema)
    for name in names:
        if name not in known:
            raise UserError(f"early: no feature {name!r} in {schema.source}", nearest(name, known))
    sparse = tuple(f for f in schema.sparse if f.name in names)
    sequences = tuple(sequence for sequence in schema.sequences if sequence.name in names)
    used = {f.table for f in sparse} | {f.table for sequence in sequences for f in sequence.features}
    return dataclasses.replace(
        schema,
        tables=tuple(table for table in schema.tables if table.name in used),
        dense=tuple(f for f in schema.dense if f.name in names),
        sparse=sparse,
        sequences=sequences,
        labels=tuple(dataclasses.replace(label, required=False) for label in schema.labels),
        extra=tuple(ExtraColumn(name) for name in [*(f"final_{task}" for task in schema.tasks), "bid"]),
        group_id="request",
        time=None,
        catalogue=None,
    )


def score(run_folder: Path, log: Path, name: str) -> pa.Table:
    """What the run's model predicts for the rows of a file, in their order."""
    output = run_folder / "candidates" / name
    if not output.exists():
        predict(run_folder, str(log), output, compose(["data=table"])["trainer"])
    return pq.read_table(output).sort_by("example_id")


def measure(experiment: Experiment, rows: pa.Table, early: dict[str, Any], formula: Value) -> dict[str, Any]:
    """How well the early order of the candidates agrees with the final one, and early over final probabilities by task.

    A candidate that the final stage gives a negative value would not be shown: it counts 0 in the value recall.
    """
    bid, request = (rows[name].to_numpy() for name in ("bid", "request"))
    probabilities = {task: rows[f"final_{task}"].to_numpy() for task in experiment.tasks}
    final, early_value = experiment.value(bid, probabilities), formula(bid, early)
    k, passed = experiment.config["k"], experiment.config["n"]
    return {
        "recall": {str(n): recall_at(final, early_value, request, k, n) for n in passed},
        "value_recall": value_recall_at(np.maximum(final, 0), early_value, request, k, passed[0]),
        "pair_agreement": pair_agreement(final, early_value, request),
        "calibration": {task: float(p.sum() / probabilities[task].sum()) for task, p in early.items()},
    }


def seconds(run_folder: Path) -> float:
    """How long a run took."""
    record = read_record(run_folder) or {}
    return round(record["finished"] - record["started"], 1)


def write_record(experiment: Experiment, final: Path, figures: dict[str, Any]) -> None:
    """What was run on what, and all figures."""
    config, record = experiment.config, read_record(final) or {}
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit_here(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "set": experiment.name,
        **{key: config[key] for key in ("requests", "k", "n", "all_runs", "final", "early", "methods")},
        **{key: config["sets"][experiment.name][key] for key in ("overrides", "value")},
        "features": {"final": features_of(experiment.traffic.schema), "early": experiment.early},
        "final_metrics": {
            task: {key: metrics.get(key) for key in ("auc", "ne", "calibration", "rows")}
            for task, metrics in record["metrics"]["test"].items()
        },
        "final_seconds": seconds(final),
        "figures": figures,
    }
    path = Path(config["records"]) / f"{experiment.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_plain(content), indent=1) + "\n")
    print(f"record: {path}")


def features_of(schema: FeatureSchema) -> list[str]:
    """The names of all features."""
    return [*(f.name for f in schema.sparse), *(f.name for f in schema.dense), *(f.name for f in schema.sequences)]


def table(experiment: Experiment, figures: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown: means and deviations over the seeds."""
    config = experiment.config
    read: dict[str, tuple[str, ...]] = {f"Recall@({config['k']},{n})": ("recall", str(n)) for n in config["n"]}
    read |= {"value recall": ("value_recall",), "pair agreement": ("pair_agreement",)}
    read |= {f"calibration, {task}": ("calibration", task) for task in experiment.value.tasks}
    lines = ["| " + " | ".join(["early stage", *read]) + " |", "| --- " * (len(read) + 1) + "|"]
    for method, runs in figures.items():
        lines.append("| " + " | ".join([method, *(cell(runs, *path) for path in read.values())]) + " |")
    return "\n".join(lines)


def cell(runs: dict[str, Any], key: str, part: str | None = None) -> str:
    """Mean and deviation of a figure over the runs, a single value, or nothing."""
    values = [run[key] if part is None else run[key].get(part) for run in runs.values()]
    found = [value for value in values if value is not None]
    return f"{mean(found):.3f} ± {stdev(found):.3f}" if len(found) > 1 else "".join(f"{x:.3f}" for x in found)


if __name__ == "__main__":
    run_job(main, "two_stage", __doc__)
