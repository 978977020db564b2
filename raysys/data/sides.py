"""Rows of users alone and of items alone, as they are encoded before they meet."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pyarrow as pa

from raysys.schema import ExtraColumn, FeatureSchema, Side


def fill_other_sides(rows: pa.Table, schema: FeatureSchema, *sides: Side) -> pa.Table:
    """`rows` with blanks for what they lack of other sides and of `extra`, so that `Transforms.to_batch` takes them.

    sides: those that the rows are of: "item" for a catalogue, "user" and "context" for requests. A column of these sides
    that is missing stays so, and is an error of `to_batch`. What a model says of the other sides is of no use. A feature is
    null; of `extra`, ids are empty, integers and vectors 0, and floats null.
    """
    own = set(side_columns(schema, *sides))
    others = [name for name in side_columns(schema, *get_args(Side)) if name not in own]
    blanks = {name: pa.nulls(rows.num_rows) for name in others}
    blanks |= {column.name: _blank(column, rows.num_rows) for column in schema.extra if column.name not in own}
    for name, blank in blanks.items():
        if name not in rows.column_names:
            rows = rows.append_column(name, blank)
    return rows


def side_columns(schema: FeatureSchema, *sides: Side) -> list[str]:
    """The columns of the features of these sides, with the weights of bags."""
    names = [feature.name for feature in schema.dense if feature.side in sides]
    for feature in schema.sparse:
        if feature.side in sides:
            names += [feature.name, *([feature.weights] if feature.weights else [])]
    for sequence in schema.sequences:
        if sequence.side in sides:
            names += [feature.name for feature in sequence.features]
    return names


def _blank(column: ExtraColumn, rows: int) -> pa.Array:
    if column.kind == "ids":
        return pa.ListArray.from_arrays(pa.array(np.zeros(rows + 1, np.int32)), pa.array([], pa.int64()))
    if column.kind == "vector":
        return pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * column.width, np.float32)), column.width)
    return pa.array(np.zeros(rows, np.int64)) if column.kind == "int" else pa.nulls(rows, pa.float32())
