"""What `bench.py` reports: rows with their targets, on the terminal and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench_rival import THREADS
from rich.console import Console
from rich.table import Table

from raysys.report.format import count, number
from raysys.strict_json import to_plain


@dataclass(frozen=True)
class Row:
    """One measured figure. It is met where it is at least `target`, or, with `within`, off by no more than that.

    No target: said for information. detail: what the figure was made of; profile: a file that says what limits a figure that missed its target.
    """

    section: str
    name: str
    value: float
    target: float | None = None
    within: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    profile: str | None = None

    @property
    def met(self) -> bool | None:
        """None where there is no target; a figure that is not a number is missed."""
        if self.target is None or self.within is None:
            return None if self.target is None else self.value >= self.target
        return abs(self.value - self.target) <= self.within

    @property
    def wanted(self) -> str:
        """The target in words."""
        if self.target is None:
            return ""
        return f"at least {self.target:g}" if self.within is None else f"{self.target:g} ± {self.within:g}"


def ratio(rates: dict[str, list[float]], above: str, below: str) -> tuple[float, dict[str, Any]]:
    """The median over the rounds of one rate over another, and what it was made of."""
    ratios = [a / b for a, b in zip(rates[above], rates[below], strict=True)]
    detail = {
        "ratios": ratios,
        "rows_per_second": {name: {"median": median(values), "turns": values} for name, values in rates.items()},
    }
    return median(ratios), detail


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cpus": cpus,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads_per_process": THREADS,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "torchrec", "ray", "pyarrow")},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(path: Path, rows: Sequence[Row], **about: Any) -> None:
    """The JSON file: `about` (machine, settings) and one object a row."""
    content = {**about, "rows": [{**asdict(row), "met": row.met} for row in rows]}
    path.write_text(json.dumps(to_plain(content), indent=1) + "\n")


def show(rows: Sequence[Row], about: dict[str, Any], console: Console) -> None:
    """The table."""
    console.print(
        f"{about['processor']}, {about['cpus']} cores, {about['threads_per_process']} thread a process, "
        f"load before {about['load_before']:.1f}; rates are medians of turns, in thousands of rows a second"
    )
    if about["load_before"] > about["cpus"] / 2:
        console.print("[red]other work was running: do not trust these figures[/]")
    table = Table(box=None, header_style="bold")
    for title in ("section", "figure", "value", "target", ""):
        table.add_column(title, no_wrap=True)
    table.add_column("rates")
    for row in rows:
        verdict = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[row.met]
        rates = row.detail.get("rows_per_second", {})
        medians = ", ".join(f"{name} {values['median'] / 1000:.1f}" for name, values in rates.items())
        table.add_row(row.section, row.name, number(row.value), row.wanted, verdict, medians)
    console.print(table)
    for row in rows:
        if "dense_parameters" in row.detail:
            sizes = [count(row.detail[key]) for key in ("dense_parameters", "flops_per_row")]
            console.print(f"{row.name}: {sizes[0]} dense parameters, {sizes[1]} FLOPs a row on both sides")
    for row in rows:
        if row.profile:
            console.print(f"{row.name}: what limits it: {row.profile}", highlight=False, soft_wrap=True)
