"""Rows of users alone and of items alone, as an early stage encodes them before they meet."""

from __future__ import annotations

import pyarrow as pa

from raysys.schema import FeatureSchema, Side


def fill_other_sides(rows: pa.Table, schema: FeatureSchema, *sides: Side) -> pa.Table:
    """`rows` with nulls for what they lack of other sides and of `extra`, so that `Transforms.to_batch` takes them.

    sides: those that the rows are of: "item" for a catalogue, "user" and "context" for requests. A column of these sides
    that is missing stays so, and is an error of `to_batch`. What a model says of the other sides is of no use.
    """
    others = [feature.name for feature in schema.dense if feature.side not in sides]
    for feature in schema.sparse:
        if feature.side not in sides:
            others += [feature.name, *([feature.weights] if feature.weights else [])]
    for sequence in schema.sequences:
        if sequence.side not in sides:
            others += [feature.name for feature in sequence.features]
    others += [column.name for column in schema.extra]
    for name in others:
        if name not in rows.column_names:
            rows = rows.append_column(name, pa.nulls(rows.num_rows))
    return rows
