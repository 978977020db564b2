"""Compare models on data sets: `python jobs/compare.py comparison=interactions set=movielens` trains what has no record yet.

For each model every trial is trained with the first seed, the best on the validation split is chosen, and that one is
trained with the other seeds. Each run leaves one line in `records`; the page is written from all of them.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from raysys.config import Config, compose, flat, instantiate, run_job
from raysys.errors import UserError, nearest
from raysys.machine import commit_here
from raysys.report.compare import compare
from raysys.report.results import Run, chosen_trial, read_runs, write_page
from raysys.strict_json import to_plain

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
SHOWN = ("auc", "ne", "gauc", "log_loss")


@dataclass(frozen=True)
class Contest:
    """One data set of one comparison. models: overrides by model, of which the first is the baseline."""

    name: str
    set: str
    task: str
    overrides: list[str]
    models: dict[str, list[str]]
    trials: list[list[str]]
    seeds: list[int]
    records: Path
    runs_folder: Path

    @property
    def file(self) -> Path:
        """Where its runs are recorded."""
        return self.records / f"{self.name}-{self.set}.jsonl"


def main(config: Config) -> None:
    """Train what is missing, then write the page."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config["processes"], spawn, initializer=_end_with_parent) as pool:
        for contest in contests(config):
            prepare_data(contest)
            baseline, *others = contest.models
            pool.submit(
                train_model, contest, baseline, baseline
            ).result()  # the others are compared with its predictions
            for done in [pool.submit(train_model, contest, model, baseline) for model in others]:
                done.result()
    write_page(Path(config["page"]), Path(config["records"]))
    print(f"page: {config['page']}")


def _end_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, which a killed one cannot do."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def contests(config: Config) -> Iterator[Contest]:
    """What the config asks for; an unknown name is a `UserError` with the nearest one."""
    for name, comparison in _chosen(config["comparisons"], config["comparison"], "comparison").items():
        for title, data in _chosen(comparison["sets"], config["set"], "set").items():
            source = data.get("source")
            if source is not None and config["sources"][source] is None:
                print(f"{name}: {title} is left out: give sources.{source}=FOLDER")
                continue
            given = [] if source is None else [f"data.prepare.source={config['sources'][source]}"]
            options = {model: flat(overrides) for model, overrides in comparison["models"].items()}
            for model, overrides in data.get("models", {}).items():
                options[model] = options.get(model, []) + flat(overrides)
            models = dict.fromkeys([comparison["baseline"], *(config["models"] or options)])
            yield Contest(
                name,
                title,
                data["task"],
                [*config["all_runs"], *data["overrides"], *given],
                {model: _chosen(options, model, "models")[model] for model in models},
                config["trials"],
                data.get("seeds", config["seeds"]),
                Path(config["records"]),
                Path(config["runs_folder"]).resolve(),
            )


def _chosen(options: Config, name: str | None, key: str) -> Config:
    if name is not None and name not in options:
        raise UserError(f"{key} {name!r} is not in configs/compare.yaml", nearest(name, options))
    return options if name is None else {name: options[name]}


def prepare_data(contest: Contest) -> None:
    """Write the data set where it is missing."""
    instantiate(compose(contest.overrides)["data"]["prepare"])


def train_model(contest: Contest, model: str, baseline: str) -> None:
    """All runs of one model that have no record yet."""
    first, *others = contest.seeds
    for trial in range(len(contest.trials)):
        train_once(contest, model, baseline, trial, first)
    best = chosen_trial(read_runs(contest.file), model)
    for seed in others:
        train_once(contest, model, baseline, best, seed)


def train_once(contest: Contest, model: str, baseline: str, trial: int, seed: int) -> None:
    """Train one run in this process and append its record, unless there is one."""
    from raysys.train.record import read_record
    from raysys.train.trainer import fit, prepare

    if any((run.model, run.trial, run.seed) == (model, trial, seed) for run in read_runs(contest.file)):
        return
    name = f"{contest.name}-{contest.set}-{model}-{trial}-{seed}"
    stopping = f"train.early_stopping={{metric: ne, task: {contest.task}, patience: 2}}"
    overrides = [*contest.overrides, stopping, *contest.models[model], *contest.trials[trial], f"seed={seed}"]
    config = compose([*overrides, f"run_id={name}", f"runs_folder={contest.runs_folder}"])
    shutil.rmtree(contest.runs_folder / name, ignore_errors=True)  # of a run that ended before its record was written
    prepared = prepare(config)
    started = time.process_time()
    outcome = fit(prepared, [])
    cpu_seconds = time.process_time() - started
    if outcome.status == "interrupted":
        raise UserError(f"{name}: the comparison was stopped", "start it again: it goes on after the last record")
    record = read_record(prepared.job.folder)
    assert record is not None
    run = Run(
        comparison=contest.name,
        set=contest.set,
        task=contest.task,
        model=model,
        baseline=baseline,
        trial=trial,
        seed=seed,
        overrides=[*contest.models[model], *contest.trials[trial]],
        commit=commit_here(),
        steps=record["step"],
        seconds=record["finished"] - record["started"],
        rows_per_second=record["step"] * config["train"]["batch_size"] / cpu_seconds,
        parameters=record["parameters"],
        flops_per_row=record["flops_per_row"],
        metrics={
            split: {task: {key: values.get(key) for key in SHOWN} for task, values in tasks.items()}
            for split, tasks in record["metrics"].items()
        },
        bayes={task: values["ne"] for task, values in record["bayes"].get("test", {}).items()},
        versus=_versus(contest, prepared.job.folder, baseline, seed) if model != baseline else {},
    )
    contest.file.parent.mkdir(parents=True, exist_ok=True)
    with contest.file.open("a") as file:  # one write of one line: other processes append to the same file
        file.write(json.dumps(to_plain(asdict(run))) + "\n")


def _versus(contest: Contest, folder: Path, baseline: str, seed: int) -> dict[str, dict[str, list[float]]]:
    """By task and metric: difference to the baseline's chosen run of this seed on the test split, and its 95% interval."""
    from raysys.train.intervals import paired_interval

    best = chosen_trial(read_runs(contest.file), baseline)
    other = contest.runs_folder / f"{contest.name}-{contest.set}-{baseline}-{best}-{seed}"
    if not (other / "predictions" / "test.parquet").exists():
        raise UserError(
            f"{other}: the baseline's predictions are not on this machine",
            f"delete the lines of {baseline!r} in {contest.file}, so that it is trained again",
        )
    versus: dict[str, dict[str, list[float]]] = {}
    for row in compare(other, folder, paired_interval).metrics:
        if row.split == "test" and row.difference is not None and row.low is not None and row.high is not None:
            versus.setdefault(row.task, {})[row.metric] = [row.difference, row.low, row.high]
    return versus


if __name__ == "__main__":
    run_job(main, "compare", __doc__)
