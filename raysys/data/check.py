"""Is a data set fit to train on? Ranges, nulls, unseen ids, drift between splits, and columns that give the label away."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from raysys.data.column_facts import NUMBER_BUCKETS, ColumnFacts, SplitFacts, columns_of, hash_values
from raysys.data.columns import numbers, whole
from raysys.data.findings import Finding, column_findings, duplicate_findings, table_findings
from raysys.data.roles import check_column, roles
from raysys.data.sketches import HashSample, quantile_edges
from raysys.data.source import open_source, read_batches
from raysys.errors import UserError
from raysys.schema import FeatureSchema, Label

SPLITS = ("train", "valid", "test")
EXAMPLE_IDS = 1 << 22  # so many of a split are compared, beyond that a sample of them


@dataclass(frozen=True)
class DataCheck:
    """All findings, errors first, and the facts that they rest on. rows: by split; `train` alone for a single table."""

    path: str
    schema: FeatureSchema
    rows: dict[str, int]
    facts: tuple[ColumnFacts, ...]
    findings: tuple[Finding, ...]

    @property
    def has_errors(self) -> bool:
        """Whether training would fail or be wrong."""
        return any(finding.severity == "error" for finding in self.findings)


def check(path: str | Path, schema: FeatureSchema | None = None) -> DataCheck:
    """Look at every row of a data set's folder, or of a single table, batch by batch in bounded memory.

    schema: None reads schema.yaml in the folder. What is wrong with the data is a finding; only what cannot be read at
    all is a `UserError`.
    """
    path = str(path).rstrip("/")
    sources = {split: open_source(name) for split, name in _split_paths(path)}
    schema = FeatureSchema.load(f"{path}/schema.yaml") if schema is None else schema
    findings: list[Finding] = []
    usable = {split: _usable(schema, source, split, findings) for split, source in sources.items()}
    tables = {feature.table: HashSample(distinct=True) for feature in schema.id_features}
    facts = [ColumnFacts(column, schema.tasks, tables.get(column.table or "")) for column in columns_of(schema)]
    example_ids = {split: HashSample(distinct=False, limit=EXAMPLE_IDS) for split in sources}
    rows = {}
    for split, source in sources.items():  # train comes first
        rows[split] = _scan(f"{path}: {split}", source, split, schema, facts, usable[split], example_ids[split])
        for sample in (*tables.values(), example_ids[split]):
            sample.finish()
        if rows[split] == 0:
            findings.append(Finding("error", "", f"{split} has no rows"))
    for column_facts in facts:
        findings += column_findings(column_facts, schema)
    findings += table_findings(schema, tables)
    if schema.example_id is not None:
        findings += duplicate_findings(schema.example_id, example_ids)
    findings.sort(key=lambda finding: finding.severity != "error")
    return DataCheck(path, schema, rows, tuple(facts), tuple(findings))


def _split_paths(path: str) -> Iterator[tuple[str, str]]:
    """The splits that a folder has; anything without them is a single table."""
    local = Path(path)
    found = [
        (split, local / name) for split in SPLITS for name in (f"{split}.parquet", split) if (local / name).exists()
    ]
    yield from ((split, str(name)) for split, name in found) if found else (("train", path),)


def _usable(schema: FeatureSchema, source: pads.Dataset, split: str, findings: list[Finding]) -> set[str]:
    """The columns that are there in a type that the schema can use."""
    bad = set()
    for role in roles(schema, labels=True):
        try:
            check_column(role, source.schema, split)
        except UserError as error:
            bad.add(role.column)
            findings.append(Finding("error", role.column, error.message))
    return set(schema.columns()) - bad


def _scan(
    name: str,
    source: pads.Dataset,
    split: str,
    schema: FeatureSchema,
    facts: list[ColumnFacts],
    usable: set[str],
    example_ids: HashSample,
) -> int:
    rows = 0
    edges: dict[str, NDArray[np.float64]] = {}
    for batch in read_batches(source, name, [column for column in schema.columns() if column in usable]):
        rows += len(batch)
        if schema.example_id in usable:
            example_ids.add(hash_values(whole(batch[schema.example_id])))
        labels = {label.name: _label_values(batch, label, usable, edges) for label in schema.labels}
        for column_facts in facts:
            if column_facts.column.name in usable:
                column_facts.add(split, whole(batch[column_facts.column.name]), labels)
    return rows


def _label_values(
    batch: pa.RecordBatch, label: Label, usable: set[str], edges: dict[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """[rows] the label, NaN where it is missing. Of a regression label its rank: few large values would hide the others."""
    if label.name not in usable:
        return np.full(len(batch), np.nan)
    values = numbers(whole(batch[label.name])).astype(np.float64)
    if label.kind == "binary":
        return values
    own = edges.setdefault(label.name, quantile_edges(values, NUMBER_BUCKETS))
    return np.where(np.isnan(values), np.nan, np.searchsorted(own, values, side="right") / max(len(own), 1))


def format_findings(found: DataCheck) -> str:
    """The facts as a table with one line a column, and below it the findings."""
    tasks, others = found.schema.tasks, [split for split in found.rows if split != "train"]
    header = ["column", "role", "null", "distinct", "range", *(f"unseen {split}" for split in others)]
    header += [*(f"PSI {split}" for split in others), *(f"score {task}" for task in tasks)]
    lines = [header]
    for facts in found.facts:
        train = facts.splits.get("train", SplitFacts())
        line = [
            facts.column.name,
            facts.column.role,
            f"{train.nulls / max(train.rows, 1):.1%}",
            _distinct(facts),
            _range(facts),
        ]
        line += [_number(facts.splits.get(split, SplitFacts()).unseen_share, ".1%") for split in others]
        line += [_number(facts.drift(split), ".3f") for split in others]
        line += [_number(facts.score(task, found.schema), ".3f") for task in tasks]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rows = ", ".join(f"{count:,} {split}" for split, count in found.rows.items())
    words = [
        f"{finding.severity}: {finding.column + ': ' if finding.column else ''}{finding.message}"
        for finding in found.findings
    ]
    return (
        "\n".join([f"{found.path}: {rows} rows", "", *table, "", *(words or ["nothing to mend"]), "", *LEGEND]) + "\n"
    )


LEGEND = (
    "null, distinct, range: of train; distinct of the whole embedding table. unseen: share of ids that train does not have.",
    "PSI: population stability index against train, over 64 ranges of about equal shares or 256 hashes of ids.",
    "score: how well the column alone predicts the label, AUC (binary) or R2 of its rank, each half of train predicted from the other.",
)


def _distinct(facts: ColumnFacts) -> str:
    if facts.distinct is None:
        return "-"
    return ("about " if facts.distinct.bits else "") + f"{facts.distinct.count:,}"


def _range(facts: ColumnFacts) -> str:
    train = facts.splits.get("train", SplitFacts())
    if not math.isfinite(train.low):
        return "-"
    if facts.column.use == "time":
        low, high = (
            datetime.fromtimestamp(second, timezone.utc).isoformat()[:19] for second in (train.low, train.high)
        )
        return f"{low} to {high}"
    if facts.column.role == "binary label":
        return f"{train.buckets[1] / max(train.buckets[:2].sum(), 1):.2%} are 1"
    digits = ".0f" if facts.column.use == "ids" else ".4g"
    return f"{train.low:{digits}} to {train.high:{digits}}"


def _number(value: float, digits: str) -> str:
    return "-" if math.isnan(value) else f"{value:{digits}}"
