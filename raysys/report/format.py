"""How figures are written for people: the same in the terminal, the report and the tables of runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

ABSENT = "–"  # noqa: RUF001 (an en dash)

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Metric:
    """How a metric is called and which way is good; `target` metrics are best at 1."""

    title: str
    better: Literal["lower", "higher", "target"]


METRICS = {
    "ne": Metric("NE", "lower"),
    "auc": Metric("AUC", "higher"),
    "gauc": Metric("GAUC", "higher"),
    "log_loss": Metric("Log loss", "lower"),
    "calibration": Metric("Calibration", "target"),
    "ece": Metric("ECE", "lower"),
    "rmse": Metric("RMSE", "lower"),
    "mae": Metric("MAE", "lower"),
    "recall@10": Metric("Recall@10", "higher"),
    "ndcg@10": Metric("NDCG@10", "higher"),
    "mrr": Metric("MRR", "higher"),
}
"""Quality metrics in the order in which they are shown; `rows` and `base_rate` describe the data instead."""


def metric_title(key: str) -> str:
    """`log_loss` as "Log loss"; a metric that is not known keeps its key."""
    return METRICS[key].title if key in METRICS else key


def in_order(names: list[str], first: tuple[str, ...]) -> list[str]:
    """The names of `first` that there are, in that order, and then the others as they come."""
    return [name for name in first if name in names] + [name for name in names if name not in first]


def number(value: float | None, digits: int = 4) -> str:
    """A metric with a fixed number of decimals, so that columns line up; None and NaN are a dash."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.2e}"
    return f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    return ABSENT if value is None else f"{round(value):,}"


def compact(value: float | None) -> str:
    """Three significant digits with k, M, G or T: 12.3k."""
    if value is None or not math.isfinite(value):
        return ABSENT
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5 or unit == "T":
            break
        value /= 1000
    decimals = 0 if abs(value) >= 99.95 or (unit == "" and value == round(value)) else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{decimals}f}{unit}"


def size(value: float | None) -> str:
    """Bytes in binary units: 1.5 MiB."""
    if value is None:
        return ABSENT
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1023.95 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """The two largest units: 1h 02m, 3m 05s, 4.2s, 15 ms."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms" if seconds else "0s"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours < 48 else f"{hours // 24}d {hours % 24:02d}h"


def share(value: float | None) -> str:
    """A fraction as per cent: 12.3%."""
    return ABSENT if value is None or not math.isfinite(value) else f"{value:.1%}"


def timestamp(value: float | str | None) -> float | None:
    """Unix seconds from unix seconds or an ISO 8601 text (UTC where it names no zone)."""
    if not isinstance(value, str):
        return value
    moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def moment(seconds: float | None) -> str:
    """Unix seconds as a date and time in UTC, the same on every machine."""
    if seconds is None:
        return ABSENT
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
