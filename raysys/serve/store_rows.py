"""What all feature stores check of rows and keys, and rows for keys that are unknown."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raysys.data.columns import is_text, kind_of
from raysys.errors import UserError, first_line, nearest


def as_rows(rows: pa.Table, key: str, schema: pa.Schema | None = None) -> pa.RecordBatch:
    """Rows as one record batch with a checked key, an int64 or large_string, and with the columns of `schema` if given.

    Raises UserError for a key that is missing, null, there twice or of another type, and for columns that differ.
    """
    if key not in rows.column_names:
        raise UserError(f"feature store: rows have no column {key!r}, the key", nearest(key, rows.column_names))
    kind, is_list = kind_of(rows.schema.field(key).type)
    if is_list or kind not in ("integer", "unsigned", "string", "null"):
        raise UserError(
            f"feature store: the key {key!r} has type {rows.schema.field(key).type}", "an integer or text is expected"
        )
    if rows[key].null_count:
        row = pc.index(rows[key].is_null(), True).as_py()
        raise UserError(f"feature store: the key {key!r} of row {row} is null", "leave the row out, or give it a key")
    counts = pc.value_counts(rows[key])
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise UserError(f"feature store: {key} {twice[0]['values']} is there {twice[0]['counts']} times")
    if schema is None:
        place, exact = rows.column_names.index(key), pa.large_string() if kind == "string" else pa.int64()
        rows = rows.set_column(place, pa.field(key, exact), _cast(rows[key], exact, key))
    else:
        rows = _with_schema(rows, schema)
    batches = rows.combine_chunks().to_batches()
    if len(batches) > 1:
        raise UserError("feature store: a column holds more than 2 GiB of text", "give it the type large_string")
    return batches[0] if batches else missing_rows(rows.schema, 0)


def check_keys(keys: Any, schema: pa.Schema, key: str) -> pa.Array:
    """Keys as an array of the key's type."""
    kind = schema.field(key).type
    try:
        array = keys if isinstance(keys, pa.Array) else pa.array(keys, from_pandas=False)
        if len(array) and is_text(array) != pa.types.is_large_string(kind):
            raise pa.ArrowTypeError(f"found {array.type}")
        array = array.cast(kind)
    except (pa.ArrowException, TypeError) as error:
        raise UserError(f"feature store: keys do not fit {key!r}: {first_line(error)}", f"{kind} is expected") from None
    if array.null_count:
        raise UserError(f"feature store: a key to look up in {key!r} is null", "leave it out")
    return array


def missing_rows(schema: pa.Schema, count: int) -> pa.RecordBatch:
    """Rows of nulls."""
    return pa.RecordBatch.from_arrays([pa.nulls(count, field.type) for field in schema], schema=schema)


def with_keys(rows: pa.RecordBatch, key: str, keys: pa.Array) -> pa.RecordBatch:
    """The rows with these keys."""
    arrays = [keys if name == key else rows.column(name) for name in rows.schema.names]
    return pa.RecordBatch.from_arrays(arrays, schema=rows.schema)


def _with_schema(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of the schema in its order and types, of rows that have just these."""
    different = sorted(set(rows.column_names) ^ set(schema.names))
    if different:
        raise UserError(
            f"feature store: column {different[0]!r} is not in both the store and the rows to put",
            "put whole rows; to change the columns, replace all rows",
        )
    columns = [_cast(rows[field.name], field.type, field.name) for field in schema]
    return pa.table(columns, schema=schema)


def _cast(column: pa.ChunkedArray, kind: pa.DataType, name: str) -> pa.ChunkedArray:
    try:
        return column.cast(kind)
    except pa.ArrowException as error:
        raise UserError(
            f"feature store: column {name!r} does not fit: {first_line(error)}", f"{kind} is expected"
        ) from None
