"""The page of a comparison: tables and a plot from the recorded runs of `jobs/compare.py`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from raysys.errors import UserError
from raysys.report.format import ABSENT, compact, number

HEADING = "## Comparison"
METRICS = ("auc", "ne", "gauc")


@dataclass(frozen=True)
class Run:
    """One recorded run; versus: by task and metric its difference to the baseline's run of that seed, low and high end.

    seconds: by the wall clock. rows_per_second: rows of training per second of CPU time, evaluation included.
    """

    comparison: str
    set: str
    task: str
    model: str
    baseline: str
    trial: int
    seed: int
    overrides: list[str]
    commit: str
    steps: int
    seconds: float
    rows_per_second: float
    parameters: dict[str, int]
    flops_per_row: int
    metrics: dict[str, dict[str, dict[str, float | None]]]
    versus: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    bayes: dict[str, float] = field(default_factory=dict)
    """NE of the true probabilities on the test split by task, where the data is made."""

    @property
    def tasks(self) -> list[str]:
        """The binary tasks of the data set."""
        return [task for task, values in self.metrics["test"].items() if values.get("auc") is not None]

    @property
    def score(self) -> float:
        """What trials are chosen by: the validation NE of `task`, or its mean over the tasks where that is "all"."""
        tasks = self.tasks if self.task == "all" else [self.task]
        return mean(self.value("valid", task, "ne") for task in tasks)

    def value(self, split: str, task: str, metric: str) -> float:
        """A metric; NaN where it is undefined."""
        found = self.metrics[split][task][metric]
        return float("nan") if found is None else found


def read_runs(file: Path) -> list[Run]:
    """The runs of one file, in the order in which they ended; none where there is no file yet."""
    if not file.exists():
        return []
    return [Run(**json.loads(line)) for line in file.read_text().splitlines()]


def chosen_trial(runs: Sequence[Run], model: str) -> int:
    """The trial of a model whose validation NE is best with the seed that has all trials: the first one."""
    own = [run for run in runs if run.model == model]
    if not own:
        raise UserError("a comparison without trials", "give at least one in `trials`")
    return min((run for run in own if run.seed == own[0].seed), key=lambda run: run.score).trial


def write_page(page: Path, records: Path) -> None:
    """Write the part of the page from `HEADING` on, and a plot beside the records, anew from all records."""
    files = {file: read_runs(file) for file in sorted(records.glob("*.jsonl"))}
    parts = [_contest(runs, _plot(runs, file.with_suffix(".svg")), page) for file, runs in files.items() if runs]
    before = page.read_text().partition(f"{HEADING}\n")[0].rstrip() if page.exists() else "# Results"
    page.write_text("\n\n".join([before, HEADING, _INTRODUCTION, *parts]) + "\n")


_INTRODUCTION = """\
Written by `make results` from the records in [records/compare](records/compare). Each model had the same trials of learning rates and
regularisation; the one with the best validation NE with the first seed was trained with the other seeds, with early stopping on
the validation split. Figures: mean ± standard deviation over the seeds, test split. Difference: to the baseline's run of the same seed on
the same rows, mean over the seeds, with the mean ends of the 95% intervals of the rows (`raysys compare`); **bold** where all of
the interval is on one side of 0. Rows/s: rows of training over the CPU time of the whole run with one thread, reading and evaluation
included, so that what else the machine does counts little."""


def selected(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """By model the runs of its chosen trial, one a seed; the baseline first."""
    best = {model: chosen_trial(runs, model) for model in {run.model for run in runs}}
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.model != run.baseline):  # stable: otherwise in the order of the records
        if run.trial == best[run.model]:
            found.setdefault(run.model, []).append(run)
    return found


def _contest(runs: Sequence[Run], plot: Path, page: Path) -> str:
    by_model = selected(runs)
    parts = [f"### {runs[0].comparison}: {runs[0].set}"]
    for task in runs[0].tasks:
        bayes = runs[0].bayes.get(task)
        head = f"Task `{task}`, baseline {runs[0].baseline}" + (
            f", NE of the true probability {bayes:.4f}" if bayes else ""
        )
        parts.append(f"{head}:\n\n{_table(by_model, task, bayes)}")
    parts.append(f"![Difference of NE to the baseline]({os.path.relpath(plot, page.parent)})")
    return "\n\n".join(parts)


def _table(by_model: dict[str, list[Run]], task: str, bayes: float | None) -> str:
    titles = [
        "model",
        "AUC",
        "NE",
        "GAUC",
        "dense parameters",
        "FLOPs a row",
        "rows/s",
        "AUC difference",
        "NE difference",
    ]
    baseline = next(iter(by_model.values()))
    rows = [titles + (["NE gap closed"] if bayes else []), ["---"] * (len(titles) + bool(bayes))]
    for model, runs in by_model.items():
        row = [f"`{model}`", *(_spread([run.value("test", task, metric) for run in runs]) for metric in METRICS)]
        row += [compact(runs[0].parameters["dense"]), compact(runs[0].flops_per_row)]
        row += [compact(median(run.rows_per_second for run in runs))]
        row += [_difference([run.versus.get(task, {}).get(metric) for run in runs]) for metric in ("auc", "ne")]
        if bayes:
            gap = mean(run.value("test", task, "ne") for run in baseline) - bayes
            own = mean(run.value("test", task, "ne") for run in runs) - bayes
            row.append(f"{1 - own / gap:.0%}")
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _spread(values: list[float]) -> str:
    if any(value != value for value in values):
        return ABSENT
    return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else number(values[0])


def _difference(found: list[list[float] | None]) -> str:
    known = [entry for entry in found if entry is not None]
    if not known:
        return ""
    value, low, high = (mean(column) for column in zip(*known, strict=True))
    text = f"{value:+.4f} ({low:+.4f} … {high:+.4f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def _plot(runs: Sequence[Run], file: Path) -> Path:
    """Each model's NE difference to the baseline on the first task, a dot a seed and the mean interval."""
    mpl.rcParams["svg.hashsalt"] = "raysys"  # the same bytes for the same records
    task = runs[0].tasks[0] if runs[0].task == "all" else runs[0].task
    others: dict[str, list[Any]] = {
        model: [entry for run in own if (entry := run.versus.get(task, {}).get("ne"))]
        for model, own in selected(runs).items()
        if model != runs[0].baseline
    }
    others = dict(sorted(((k, v) for k, v in others.items() if v), key=lambda item: -mean(e[0] for e in item[1])))
    figure = Figure(figsize=(7, 1 + 0.35 * len(others)), layout="constrained")
    axes = figure.subplots()
    for place, entries in enumerate(others.values()):
        value, low, high = (mean(column) for column in zip(*entries, strict=True))
        axes.plot([low, high], [place, place], color="tab:blue", linewidth=2)
        axes.plot(
            [entry[0] for entry in entries], [place] * len(entries), "o", color="tab:blue", markersize=4, alpha=0.5
        )
        axes.plot(value, place, "D", color="tab:blue")
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(others)), list(others))
    axes.set_xlabel(f"NE({task}) minus that of {runs[0].baseline}, test split; left is better")
    figure.savefig(file, metadata={"Date": None})
    return file
