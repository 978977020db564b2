"""What facts about a data set mean: things to mend and things to look at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raysys.data.column_facts import ColumnFacts, SplitFacts
from raysys.data.sketches import HashSample, noise_of_stability_index
from raysys.schema import FeatureSchema, Label

Severity = Literal["error", "warning"]
DRIFT = 0.25  # PSI beyond what chance gives; the usual limit for "another distribution"
UNSEEN = 0.2  # share of ids that train does not have
NULLS = 0.01  # share of nulls in a dense feature without missing_flag
GIVES_AWAY = 0.98  # AUC, or R² of a regression label's rank, of one column alone


@dataclass(frozen=True)
class Finding:
    """Something to mend (`error`: training would fail or be wrong) or to look at (`warning`). column: "" for all."""

    severity: Severity
    column: str
    message: str


def column_findings(facts: ColumnFacts, schema: FeatureSchema) -> Iterator[Finding]:
    """What one column's facts mean."""
    name = facts.column.name
    label = next((label for label in schema.labels if label.name == name), None)
    for split, own in facts.splits.items():
        if own.not_finite:
            yield Finding("error", name, f"{own.not_finite:,} NaN or infinite values in {split}: write them as null")
        if facts.column.use == "weight" and own.low < 0:
            yield Finding("error", name, f"weights in {split} go down to {own.low:.4g}, but must not be negative")
        if label is not None:
            yield from _label_findings(label, split, own)
        yield from _index_findings(facts, split, own, schema)
    yield from _drift_findings(facts)
    train = facts.splits.get("train", SplitFacts())
    if facts.column.use in ("ids", "number") and _is_constant(facts, train):
        yield Finding("warning", name, "has one value only in train: leave it out")
    dense = next((feature for feature in schema.dense if feature.name == name), None)
    if dense is not None and not dense.missing_flag and train.nulls > NULLS * train.rows:
        share = train.nulls / train.rows
        yield Finding("warning", name, f"{share:.1%} null become {dense.default:g}: missing_flag: true tells the model")
    for task in schema.tasks:
        if (score := facts.score(task, schema)) >= GIVES_AWAY:
            kind = "AUC" if schema.labels[schema.tasks.index(task)].kind == "binary" else "R2"
            yield Finding(
                "warning", name, f"alone predicts {task} with {kind} {score:.3f}: is it known before the event?"
            )


def table_findings(schema: FeatureSchema, tables: dict[str, HashSample]) -> Iterator[Finding]:
    """Embedding tables that are too small for the values of train."""
    for table in schema.tables:
        encoding, values = schema.encoding(table.name), tables[table.name].count
        if encoding == "vocab" and values >= table.num_embeddings:
            least = f"{values - table.num_embeddings + 1:,} of the {values:,} values in train, the rarest, share its first row"
            yield Finding("warning", f"table {table.name}", f"has {table.num_embeddings:,} rows: {least}")
        elif encoding == "hash" and values > table.num_embeddings:
            yield Finding(
                "warning", f"table {table.name}", f"{values:,} values in train share its {table.num_embeddings:,} rows"
            )


def duplicate_findings(column: str, splits: dict[str, HashSample]) -> Iterator[Finding]:
    """Example ids that are not unique, within a split or over two of them."""
    bits = max(sample.bits for sample in splits.values())
    about = "about " if bits else ""
    unique = {}
    for split, sample in splits.items():
        sample.thin(bits)
        unique[split] = np.unique(sample.hashes)
        if repeated := len(sample.hashes) - len(unique[split]) << bits:
            yield Finding(
                "error", column, f"{about}{repeated:,} rows of {split} repeat an example id: they must be unique"
            )
    names = list(splits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if shared := len(np.intersect1d(unique[first], unique[second], assume_unique=True)) << bits:
                yield Finding(
                    "error", column, f"{about}{shared:,} example ids are in {first} and in {second}: rows leak"
                )


def _label_findings(label: Label, split: str, own: SplitFacts) -> Iterator[Finding]:
    if own.nulls == own.rows > 0:
        yield Finding("error", label.name, f"is null in every row of {split}")
        return
    if own.nulls and label.required:
        yield Finding(
            "error",
            label.name,
            f"{own.nulls:,} nulls in {split}, but the label is required: required: false masks them",
        )
    if label.kind == "binary" and own.not_binary:
        yield Finding(
            "error",
            label.name,
            f"{own.not_binary:,} values in {split} are neither 0 nor 1 ({own.low:g} to {own.high:g})",
        )
    elif own.low == own.high:
        severity: Severity = "error" if split == "train" else "warning"
        yield Finding(severity, label.name, f"is {own.low:g} in every row of {split}")


def _index_findings(facts: ColumnFacts, split: str, own: SplitFacts, schema: FeatureSchema) -> Iterator[Finding]:
    if facts.column.table is None or schema.encoding(facts.column.table) != "index":
        return
    size = schema.table(facts.column.table).num_embeddings
    if own.low < 0 or own.high >= size:
        found = f"ids from {own.low:,.0f} to {own.high:,.0f} in {split}"
        yield Finding(
            "error", facts.column.name, f"{found}, but table {facts.column.table!r} has rows 0 to {size - 1:,}"
        )


def _drift_findings(facts: ColumnFacts) -> Iterator[Finding]:
    train = facts.splits.get("train")
    if train is None or not len(train.buckets):
        return
    others = {split: own for split, own in facts.splits.items() if split != "train" and len(own.buckets)}
    drift = {split: facts.drift(split) for split in others}
    chance = {split: noise_of_stability_index(train.buckets, own.buckets) for split, own in others.items()}
    if any(drift[split] - chance[split] > DRIFT for split in others):
        found = ", ".join(f"{split} {value:.2f}" for split, value in drift.items())
        yield Finding("warning", facts.column.name, f"is distributed otherwise than in train: PSI {found}")
    if any(own.unseen_share > UNSEEN for own in others.values()):
        found = ", ".join(f"{own.unseen_share:.1%} of the ids in {split}" for split, own in others.items())
        yield Finding("warning", facts.column.name, f"{found} are not in train: their embeddings are not trained")


def _is_constant(facts: ColumnFacts, train: SplitFacts) -> bool:
    """One bucket only; as that of ids can hold several values, their range or number has to say so too."""
    if np.count_nonzero(train.buckets) != 1:
        return False
    if train.nulls == train.rows or train.low == train.high:
        return True
    return math.isinf(train.low) and facts.distinct is not None and facts.distinct.count <= 1
