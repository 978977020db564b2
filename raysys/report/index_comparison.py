"""The record of `jobs/compare_indexes.py` as tables: means over seeds, with deviations where there are several."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

import numpy as np

COLUMNS = {"scored": "{:,.0f}", "recall": "{:.3f}", "true": "{:.3f}", "taken": "{:.3f}", "ms": "{:.1f}"}
Sets = Mapping[str, Mapping[str, Any]]
"""By set and seed what the job wrote."""


def index_table(sets: Sets) -> str:
    """Markdown: a line for each set and way to retrieve."""
    titles = ["set", "items", "way", *COLUMNS]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for name, seeds in sets.items():
        runs = list(seeds.values())
        for way in dict.fromkeys(way for run in runs for way in run["rows"]):
            rows = [run["rows"][way] for run in runs if way in run["rows"]]
            cells = [_cell([row[key] for row in rows if key in row], form) for key, form in COLUMNS.items()]
            lines.append("| " + " | ".join([name, f"{runs[0]['items']:,}", way, *cells]) + " |")
    slope = scored_slope(sets)
    return "\n".join(lines if slope is None else [*lines, "", f"log-log slope of scored over items: {slope:.2f}"])


def scored_slope(sets: Sets) -> float | None:
    """The least-squares slope of log(scored of the HSNN) over log(items), one point for each size of made-up catalogue.

    None where there are fewer than two sizes.
    """
    points = {
        runs[0]["items"]: float(np.log([run["rows"]["hsnn"]["scored"] for run in runs]).mean())
        for runs in (list(seeds.values()) for seeds in sets.values())
        if runs and "true" in runs[0]["rows"]["hsnn"]
    }
    return float(np.polyfit(np.log(list(points)), list(points.values()), 1)[0]) if len(points) > 1 else None


def _cell(values: list[float], form: str) -> str:
    """Mean and deviation, one value, or nothing."""
    found = form.format(mean(values)) if values else ""
    return f"{found} ± {form.format(stdev(values))}" if len(values) > 1 else found
