"""Whether what was served is what training sees: predictions and features of logged requests, computed again and compared.

A log of served requests has a JSON object a line, with the raw rows as the model's bundle got them, after every look-up of features:

    {"request_id": "r1", "model_version": "v3", "rows": [{"user_id": 7, …}, …], "predictions": [[0.031], …]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from raysys.bundle import Bundle, to_predictions
from raysys.data.batch import Batch
from raysys.data.columns import integers, whole
from raysys.data.difference import differing_rows
from raysys.data.join import take_rows
from raysys.data.log import ParquetLog
from raysys.errors import UserError
from raysys.schema import FeatureSchema


@dataclass(frozen=True)
class ServedRequest:
    """One line of the log. predictions: [rows][tasks], as the bundle's `predict` gives them."""

    request_id: str
    model_version: str
    rows: list[dict[str, Any]]
    predictions: list[list[float]]


@dataclass
class Difference:
    """How many rows differ in a feature or in a task's prediction, and some of them. largest: |served - computed again|."""

    name: str
    rows: int = 0
    largest: float | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class SkewReport:
    """What was compared, and what differs, the name that does so in most rows first."""

    requests: int = 0
    rows: int = 0
    rows_in_log: int = 0
    other_versions: int = 0
    """Requests that another version answered."""
    predictions: list[Difference] = field(default_factory=list)
    features: list[Difference] = field(default_factory=list)

    @property
    def skewed(self) -> bool:
        """Whether anything differs."""
        return bool(self.predictions or self.features)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"skewed": self.skewed, **asdict(self)}


def read_served(path: str | Path) -> Iterator[ServedRequest]:
    """The requests of a log, a file or a folder of *.jsonl; a line that is none is a `UserError` that names it."""
    files = sorted(Path(path).glob("*.jsonl")) if Path(path).is_dir() else [Path(path)]
    try:
        for each in files:
            with open(each, encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _parse(line, f"{each}, line {number}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "a log of served requests is expected, a JSON object a line") from None


def check_skew(
    requests: Iterable[ServedRequest],
    bundle: Bundle,
    log: ParquetLog | None = None,
    *,
    model_version: str | None = None,
    tolerance: float = 1e-6,
    examples: int = 3,
) -> SkewReport:
    """Compute served requests, which are all kept in memory, again and compare.

    Predictions may differ by `tolerance`, since sums depend on the size of a batch. With a log that training reads, the features
    of the served rows are compared, to the bit, with those of the log's rows of the same example id.

    model_version: compare only what this version answered. examples: kept of each feature and task.
    """
    kept, other_versions = [], 0
    for request in requests:
        if model_version is None or request.model_version == model_version:
            kept.append((request, _encode(request, bundle)))
        else:
            other_versions += 1
    if not kept:
        raise UserError(
            f"no request to compare, and {other_versions} of other versions than {model_version!r}",
            "name the version of the bundle as the log has it, or null for all",
        )
    report = SkewReport(len(kept), sum(len(batch) for _, batch in kept), other_versions=other_versions)
    predictions, features = _Differences(examples), _Differences(examples)
    for request, batch in kept:
        _compare_predictions(request, batch, bundle, tolerance, predictions)
    if log is not None:
        logged = LoggedRows(log, kept, bundle.schema)
        for request, batch in kept:
            report.rows_in_log += _compare_features(request, batch, bundle, logged, features)
        if not report.rows_in_log:
            raise UserError(f"{log.path}: no row has the example id of a served one", f"it is {logged.name!r} in both")
    report.predictions, report.features = predictions.found(), features.found()
    return report


class LoggedRows:
    """The rows of a log that requests served, by example id: those alone are kept in memory."""

    def __init__(self, log: ParquetLog, requests: Sequence[tuple[ServedRequest, Batch]], schema: FeatureSchema) -> None:
        if schema.example_id is None or schema.example_id not in log.columns:
            raise UserError(
                f"{log.path}: served rows are found in a log by their example id, and it has none",
                "name the column in the schema as example_id, and have it in the log and in served rows",
            )
        self.name = schema.example_id
        wanted = np.concatenate([self._ids(request, batch) for request, batch in requests])
        parts = [
            batch.filter(pa.array(np.isin(integers(whole(batch[self.name])), wanted))) for batch in log.iter_batches()
        ]
        tables = [pa.Table.from_batches([part]) for part in parts]
        self._table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        self._row_of = {example: row for row, example in enumerate(integers(whole(self._table[self.name])).tolist())}

    def find(self, request: ServedRequest, batch: Batch) -> tuple[list[int], pa.Table]:
        """Which rows of a request the log has, and these rows of the log."""
        places = [self._row_of.get(example, -1) for example in self._ids(request, batch).tolist()]
        rows = [row for row, place in enumerate(places) if place >= 0]
        return rows, self._table.take(pa.array([places[row] for row in rows], pa.int64()))

    def _ids(self, request: ServedRequest, batch: Batch) -> NDArray[np.int64]:
        """Of a request's rows; none where they carry no id, for which the batch has their numbers."""
        carried = any(self.name in row for row in request.rows)
        return batch.example_id.numpy() if carried else np.zeros(0, np.int64)


class _Differences:
    """What differs so far, by name."""

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self._found: dict[str, Difference] = {}

    def found(self) -> list[Difference]:
        """The name that differs in most rows first."""
        return sorted(self._found.values(), key=lambda difference: -difference.rows)

    def add(
        self,
        name: str,
        differ: NDArray[np.bool_],
        example: Callable[[int], dict[str, Any]],
        largest: float | None = None,
    ) -> None:
        """The rows [B] of a request in which it differs; `example` says what is there in the row of a number."""
        if differ.any():
            difference = self._found.setdefault(name, Difference(name))
            difference.rows += int(differ.sum())
            if largest is not None:
                difference.largest = max(largest, difference.largest or 0.0)
            for row in np.flatnonzero(differ)[: self._examples - len(difference.examples)].tolist():
                difference.examples.append(example(row))


def _compare_predictions(
    request: ServedRequest, batch: Batch, bundle: Bundle, tolerance: float, differences: _Differences
) -> None:
    tasks = bundle.schema.tasks
    try:
        served = np.array(request.predictions, np.float64)
    except (TypeError, ValueError):  # text, or rows of unequal lengths
        served = np.zeros(0)
    if served.shape != (len(batch), len(tasks)):
        raise UserError(
            f"request {request.request_id!r}: predictions are not {len(batch)} rows of {len(tasks)} numbers",
            f"one of each row for each task of the bundle: {', '.join(tasks)}",
        )
    with torch.inference_mode():
        computed = to_predictions(bundle.model(batch).logits, bundle.schema, bundle.calibrators).numpy()
    distance = np.abs(served - computed)  # [B, T]
    for task, name in enumerate(tasks):

        def example(row: int, task: int = task) -> dict[str, Any]:
            return {**_place(request, row), "served": served[row, task], "computed": computed[row, task]}

        differences.add(name, ~(distance[:, task] <= tolerance), example, float(distance[:, task].max()))


def _compare_features(
    request: ServedRequest, batch: Batch, bundle: Bundle, logged: LoggedRows, differences: _Differences
) -> int:
    """The number of rows that the log has."""
    rows, table = logged.find(request, batch)
    if not rows:
        return 0
    schema = bundle.schema
    weights = {feature.name: feature.weights for feature in schema.weighted}
    expected = bundle.transforms.to_batch(table, labels=False)
    for name, differ in differing_rows(take_rows(batch, torch.tensor(rows)), expected, schema).items():
        columns = [name] if name not in weights else [name, str(weights[name])]

        def example(place: int, columns: Sequence[str] = columns) -> dict[str, Any]:
            served = {column: request.rows[rows[place]].get(column) for column in columns}
            return {
                **_place(request, rows[place]),
                "served": served,
                "logged": table.select(columns).slice(place, 1).to_pylist()[0],
            }

        differences.add(name, differ, example)
    return len(rows)


def _place(request: ServedRequest, row: int) -> dict[str, Any]:
    return {"request_id": request.request_id, "row": row}


def _encode(request: ServedRequest, bundle: Bundle) -> Batch:
    try:
        return bundle.transforms.rows_to_batch(request.rows)
    except UserError as error:
        raise UserError(f"request {request.request_id!r}: {error.message}", error.hint) from error


def _parse(line: str, where: str) -> ServedRequest:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    expected = {"request_id": str, "model_version": str, "rows": list, "predictions": list}
    for key, kind in expected.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise UserError(f"{where}: no {key!r}", f"a request has {', '.join(expected)}")
    if not all(isinstance(row, dict) for row in content["rows"]):
        raise UserError(f"{where}: a row is no object", "rows map names of columns to values")
    return ServedRequest(**{key: content[key] for key in expected})
