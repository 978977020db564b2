"""One pass over the training split: vocabularies and normalisers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raysys.data.columns import flatten, is_list, kind_of, present, type_word, whole
from raysys.data.encode import NULL_HINT, Normalizer, check_finite, dense_values
from raysys.data.log import ParquetLog
from raysys.data.vocabulary import ValueCounter, Vocabulary
from raysys.errors import UserError
from raysys.schema import FeatureSchema


def fit(schema: FeatureSchema, log: ParquetLog) -> tuple[dict[str, Normalizer], dict[str, Vocabulary]]:
    """Normalisers by dense feature and vocabularies by table; a vocabulary counts all columns that share its table."""
    tables = _vocabulary_columns(schema)
    _check_families(tables, log)
    counters = {table: ValueCounter() for table in tables}
    standardized = [feature for feature in schema.dense if "standardize" in feature.transform]
    moments = {feature.name: Moments() for feature in standardized}
    columns = [feature.name for feature in standardized] + [name for names in tables.values() for name in names]
    for source, batch in log.scan(columns=columns) if columns else ():
        for feature in standardized:
            column = whole(batch[feature.name])
            values, valid = dense_values(column, feature, None), present(column)
            check_finite(values, column, f"dense column {feature.name!r}", source, NULL_HINT)
            moments[feature.name].add(values if valid is None else values[valid])
        for table, names in tables.items():
            for name in names:
                column = whole(batch[name])
                counters[table].add(flatten(column)[0] if is_list(column.type) else column)
    limits = {table: schema.table(table).num_embeddings - 1 for table in tables}
    vocabularies = {
        table: Vocabulary(_as_text(counters[table].most_frequent(limits[table]), names, log))
        for table, names in tables.items()
    }
    return {name: moment.normalizer() for name, moment in moments.items()}, vocabularies


@dataclass
class Moments:
    """Mean and sum of squared deviations of a stream of values, merged by the method of Chan, Golub and LeVeque (1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: NDArray[np.floating]) -> None:
        """Take in more values."""
        if not len(values):
            return
        values = values.astype(np.float64)
        mean, count = float(values.mean()), self.count + len(values)
        difference = mean - self.mean
        self.squares += float(np.square(values - mean).sum()) + difference**2 * self.count * len(values) / count
        self.mean += difference * len(values) / count
        self.count = count

    def normalizer(self) -> Normalizer:
        """Mean and standard deviation; a constant column keeps its scale, so that it becomes 0 and not NaN."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return Normalizer(self.mean, deviation if deviation > 0 else 1.0)


def _vocabulary_columns(schema: FeatureSchema) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {}
    for feature in schema.id_features:
        if feature.encoding == "vocab":
            columns.setdefault(feature.table, []).append(feature.name)
    return columns


def _as_text(values: pa.Array, names: list[str], log: ParquetLog) -> pa.Array:
    """The values as strings, where the columns hold text."""
    texts = [kind_of(log.types[name])[0] == "string" for name in names]
    return values.cast(pa.string()) if any(texts) and pa.types.is_large_binary(values.type) else values


def _check_families(tables: dict[str, list[str]], log: ParquetLog) -> None:
    """Columns that share a vocabulary hold one type of id."""
    for table, names in tables.items():
        known: dict[str, str] = {}
        for name in names:
            known.setdefault(type_word(log.types[name]).removeprefix("list<").removesuffix(">"), name)
        known.pop("null", None)
        if len(known) > 1:
            (first, a), (second, b) = sorted(known.items())
            raise UserError(
                f"{log.path}: table {table!r} is shared by column {a!r} of type {first} and {b!r} of type {second}",
                "the number 5 and the text '5' are different ids: write both columns with one type",
            )
