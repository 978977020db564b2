"""How well the best possible model would do: the metrics of the true probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
from numpy.typing import NDArray

from raysys.data.synthetic.spec import TRUTH
from raysys.errors import UserError, nearest

BINS = 1 << 20
"""Bins of the histograms behind the AUC: rows of one bin count as ties, which moves the AUC by less than 1e-5."""


def bayes_metrics(path: str | Path, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """By task: ne, log_loss (nats), auc, calibration, base_rate and rows of the true probability on the labelled rows.

    path: a file or folder of Parquet that a `prepare` of this package wrote. Memory does not grow with the rows.
    A metric that is not defined (no rows, one class only) is NaN.
    """
    log = ds.dataset(str(path), format="parquet")
    for column in [name for task in tasks for name in (task, task + TRUTH)]:
        if column not in log.schema.names:
            raise UserError(f"{path}: no column {column!r}", nearest(column, log.schema.names))
    sums = {task: _Sums() for task in tasks}
    for batch in log.to_batches(columns=[name for task in tasks for name in (task, task + TRUTH)]):
        for task in tasks:
            labelled = batch[task].is_valid()
            labels = batch[task].filter(labelled).to_numpy(zero_copy_only=False)
            sums[task].add(labels > 0, batch[task + TRUTH].filter(labelled).to_numpy())
    return {task: sums[task].metrics() for task in tasks}


class _Sums:
    def __init__(self) -> None:
        self.log_loss = 0.0
        self.probability = 0.0
        self.counts = np.zeros((2, BINS), np.int64)  # rows by label and bin of the probability

    def add(self, positive: NDArray[np.bool_], probability: NDArray[np.float64]) -> None:
        self.log_loss -= np.log(np.where(positive, probability, 1 - probability)).sum()
        self.probability += probability.sum()
        bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
        for label in (False, True):
            self.counts[int(label)] += np.bincount(bins[positive == label], minlength=BINS)

    def metrics(self) -> dict[str, float]:
        negatives, positives = (int(count) for count in self.counts.sum(1))
        rows = negatives + positives
        found = {"ne": math.nan, "log_loss": math.nan, "auc": math.nan, "calibration": math.nan, "base_rate": math.nan}
        if rows:
            found |= {"log_loss": self.log_loss / rows, "base_rate": positives / rows}
        if positives:
            found["calibration"] = self.probability / positives
        if positives and negatives:
            rate = positives / rows
            found["ne"] = found["log_loss"] / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
            below = np.cumsum(self.counts[0]) - self.counts[0] / 2
            found["auc"] = float((self.counts[1] * below).sum() / (positives * negatives))
        return {key: float(value) for key, value in found.items()} | {"rows": rows}
