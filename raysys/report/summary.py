"""What a training job prints before it starts and when it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from raysys.report.format import compact, count, duration, metric_title, number, size

_SHOWN = ("auc", "ne", "log_loss", "rmse", "recall@10", "recall@50", "ndcg@10", "mrr")


def print_start(facts: Mapping[str, Any], plan: str, console: Console) -> None:
    """The size of the run and its sharding plan; `facts` are the fields of the run_started event."""
    parameters = facts["parameters"]
    console.print(
        f"[bold]{facts['run_id']}[/]: {count(facts['world_size'])} worker(s) on {facts['device']}, "
        f"{compact(parameters['sparse'])} parameters in tables, {compact(parameters['dense'])} in the dense part"
    )
    console.print(plan, highlight=False)


def print_dry_run(facts: Mapping[str, Any], seconds: float, console: Console) -> None:
    """What a run would take, in place of the run. seconds: the estimate of its dense arithmetic alone."""
    table = Table(show_header=False, box=None)
    table.add_row("bytes per worker", ", ".join(size(value) for value in facts["bytes_per_rank"]))
    table.add_row("forward FLOPs per row", count(facts["flops_per_row"]))
    table.add_row("rows per epoch", count(facts["rows_per_epoch"]))
    table.add_row("steps", count(facts["total_steps"]))
    table.add_row("time, at least", f"{duration(seconds)} (dense arithmetic; reading and look-ups come on top)")
    console.print(table)
    console.print("dry run: nothing was trained")


def print_summary(folder: Path, record: Mapping[str, Any], report: Path, console: Console) -> None:
    """Metrics by split and task, where things are, and what to do next; `record` is the content of run.json."""
    console.print()
    console.print(f"[bold]{folder.name}[/] {record['status'].replace('_', ' ')} at step {count(record['step'])}")
    if record["metrics"]:
        console.print(_metrics_table(record["metrics"]))
    for name, path in (("report", report), ("bundle", folder / "bundle"), ("checkpoint", Path(record["checkpoint"]))):
        if path.exists():
            console.print(f"{name:<11}{path}", highlight=False, soft_wrap=True)
    interrupted = record["status"] == "interrupted"
    score = f"python jobs/predict.py run={folder} input=LOG.parquet output=scores"
    resume = (
        f"python jobs/train.py … run_id={folder.name} resume=auto   (the same command; it continues from this step)"
    )
    console.print("\nnext:")
    retrieves = ((record.get("config") or {}).get("train") or {}).get("retrieval") is not None
    first = (
        [resume] if interrupted else [] if retrieves else [score]
    )  # scores of retrieval are not predicted row by row
    for command in (
        *first,
        f"tensorboard --logdir {folder / 'tensorboard'}",
        "raysys runs" if folder.parent.resolve() == Path("runs").resolve() else f"raysys runs {folder.parent}",
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True)


def _metrics_table(splits: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """The metrics that there are, of the most telling ones; tasks of one kind have their columns together."""
    found = {key for tasks in splits.values() for metrics in tasks.values() for key in metrics}
    keys = [key for key in _SHOWN if key in found]
    table = Table("split", "task", *map(metric_title, keys), "rows", box=None, header_style="bold")
    for split, tasks in splits.items():
        for task, metrics in tasks.items():
            figures = [number(metrics.get(key)) if key in metrics else "" for key in keys]
            table.add_row(split, task, *figures, count(metrics.get("rows")))
    return table
