"""Dense features, labels, weights, row ids and extra columns, from Arrow to numpy; a bad value is an error with its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raysys.data.columns import Source, flatten, integers, is_text, numbers, present, seconds, text
from raysys.data.hashing import hash_strings
from raysys.errors import UserError
from raysys.schema import DenseFeature, ExtraColumn, FeatureSchema, Label

Columns = Mapping[str, pa.Array]
NULL_HINT = "write a missing value as null: it becomes the feature's default"


@dataclass(frozen=True)
class Normalizer:
    """Mean and standard deviation of a dense feature (after its log) over the present values of the training split."""

    mean: float
    deviation: float


def encode_dense(
    columns: Columns, schema: FeatureSchema, normalizers: Mapping[str, Normalizer], num_rows: int, source: Source
) -> NDArray[np.float32]:
    """The dense features and then the missing flags, [n, D]."""
    matrix = np.empty((num_rows, schema.dense_width), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 or is not finite is found below
        for index, feature in enumerate(schema.dense):
            matrix[:, index] = dense_values(columns[feature.name], feature, normalizers.get(feature.name))
    if not np.isfinite(matrix).all():
        for index, feature in enumerate(schema.dense):
            check_finite(matrix[:, index], columns[feature.name], f"dense column {feature.name!r}", source, NULL_HINT)
    flagged = (feature for feature in schema.dense if feature.missing_flag)
    for index, feature in enumerate(flagged, start=len(schema.dense)):
        valid = present(columns[feature.name])
        matrix[:, index] = 0 if valid is None else ~valid
    return matrix


def dense_values(column: pa.Array, feature: DenseFeature, normalizer: Normalizer | None) -> NDArray[np.floating[Any]]:
    """The values with `default` for null, after the transform; computed in float64 wherever arithmetic is needed."""
    values = numbers(column)
    valid = present(column)
    if valid is not None:
        values = np.where(valid, values, np.asarray(feature.default, values.dtype))
    if feature.transform in ("log", "log_standardize"):
        values = values.astype(np.float64, copy=False)
        values = np.copysign(np.log1p(np.abs(values)), values)
    if normalizer is not None:
        values = (values.astype(np.float64, copy=False) - normalizer.mean) / normalizer.deviation
    return values


def check_finite(values: NDArray[Any], column: pa.Array, what: str, source: Source, hint: str | None = None) -> None:
    """Refuse NaN and infinity, naming the row and what the column holds there."""
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argmin(finite))
        raise UserError(f"{source.at(row)}: {what} holds {column[row].as_py()}, expected a finite number", hint)


def encode_labels(columns: Columns, schema: FeatureSchema, num_rows: int, source: Source) -> dict[str, NDArray[Any]]:
    """`labels`, `label_mask` and `weight`, [n, T] each; the weight is the row's times the label's, 0 where masked."""
    encoded = no_labels(schema, num_rows)
    labels, mask, weight = encoded["labels"], encoded["label_mask"], encoded["weight"]
    row_weight = _weights(columns[schema.weight], schema.weight, source) if schema.weight else np.float64(1)
    for task, label in enumerate(schema.labels):
        valid = present(columns[label.name])
        mask[:, task] = True if valid is None else valid
        labels[:, task] = _label_values(columns[label.name], label, source)
        own = _weights(columns[label.weight], label.weight, source) if label.weight else np.float64(1)
        weight[:, task] = row_weight * own * mask[:, task]
    return encoded


def no_labels(schema: FeatureSchema, num_rows: int) -> dict[str, NDArray[Any]]:
    """What `encode_labels` gives for rows without labels: all masked."""
    shape = (num_rows, len(schema.labels))
    return {
        "labels": np.zeros(shape, np.float32),
        "label_mask": np.zeros(shape, np.bool_),
        "weight": np.zeros(shape, np.float32),
    }


def _label_values(column: pa.Array, label: Label, source: Source) -> NDArray[np.floating[Any]]:
    values, valid = numbers(column), present(column)
    if valid is not None:
        if label.required:
            row = int(np.argmin(valid))
            hint = "drop such rows, or mask them with required: false"
            raise UserError(f"{source.at(row)}: label {label.name!r} is null", hint)
        values = np.where(valid, values, np.asarray(0, values.dtype))
    if label.kind == "regression":
        check_finite(values, column, f"label {label.name!r}", source)
        return values
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(
            f"{source.at(row)}: label {label.name!r} holds {column[row].as_py()}, expected 0 or 1",
            "a label of other numbers has kind: regression",
        )
    return values


def _weights(column: pa.Array, name: str, source: Source) -> NDArray[np.float64]:
    _require_values(column, name, "weight", source)
    values = numbers(column).astype(np.float64)
    check_finite(values, column, f"weight column {name!r}", source)
    if (values < 0).any():
        row = int(np.argmax(values < 0))
        raise UserError(f"{source.at(row)}: weight column {name!r} holds {column[row].as_py()}, expected 0 or more")
    return values


def encode_row_ids(
    columns: Columns, schema: FeatureSchema, num_rows: int, source: Source
) -> dict[str, NDArray[np.int64]]:
    """`example_id` (else the row number in the log), `group_id` and `time` (else 0), [n] each; a null group is 0."""
    rows = {
        "example_id": source.log_row + np.arange(num_rows),
        "group_id": np.zeros(num_rows, np.int64),
        "time": np.zeros(num_rows, np.int64),
    }
    for role in rows:
        name = getattr(schema, role)
        if name is not None and name in columns:
            if role != "group_id":
                _require_values(columns[name], name, role, source)
            convert = {"example_id": integers, "group_id": group_ids, "time": seconds}[role]
            rows[role] = convert(columns[name])
    if (rows["example_id"] == -1).any():
        row = int(np.argmax(rows["example_id"] == -1))
        raise UserError(f"{source.at(row)}: example_id is -1, which stands for padding", "use other ids")
    return rows


def group_ids(column: pa.Array) -> NDArray[np.int64]:
    """`group_id` of a column [n]: integers as they are, 63 bits of a hash of text, 0 for a null."""
    if not is_text(column):
        return integers(column)
    groups, valid = np.zeros(len(column), np.int64), column.is_valid().to_numpy(zero_copy_only=False)
    groups[valid] = (hash_strings(text(column.drop_null())) >> np.uint64(1)).view(np.int64)  # 63 bits: not negative
    return groups


def encode_extra(column: pa.Array, extra: ExtraColumn, source: Source) -> NDArray[Any]:
    """An extra column of kind float [n], int [n] or vector [n, width]; in floats a null is NaN, in integers an error."""
    if extra.kind == "int":
        _require_values(column, extra.name, "extra", source)
        return integers(column)
    if extra.kind == "float":
        return numbers(column).astype(np.float32)
    values, lengths = flatten(column)
    if (lengths != extra.width).any():
        row = int(np.argmax(lengths != extra.width))
        raise UserError(
            f"{source.at(row)}: extra column {extra.name!r} holds {lengths[row]} numbers, expected {extra.width}",
            "set its width in the schema, and write a vector in every row",
        )
    return numbers(values).astype(np.float32).reshape(len(column), extra.width)


def _require_values(column: pa.Array, name: str, role: str, source: Source) -> None:
    valid = present(column)
    if valid is not None:
        row = int(np.argmin(valid))
        raise UserError(f"{source.at(row)}: {role} column {name!r} is null", "fill the column or drop the row")
