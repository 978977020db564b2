"""Users as serving knows them: the newest row that a log has of each, and the items that they have met there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysys.data.columns import integers, whole
from raysys.data.log import ParquetLog, split_path
from raysys.data.prepare.dataset import SPLITS
from raysys.data.sides import side_columns
from raysys.errors import UserError
from raysys.schema import FeatureSchema

SEEN = "seen"
"""The column of a user store with the items that its user is not shown again."""


def user_rows(folder: str, schemas: Sequence[FeatureSchema], item: str) -> tuple[pa.Table, str]:
    """Rows for a user store from all splits of a prepared folder, and the column of its key.

    The key is the schemas' `group_id`. A row has the features of side `user` of all schemas as in the user's newest row (the
    last one where the schema names no time) and in `seen` every item that the user has a row with. item: the column that
    names one. Raises UserError where the schemas have no group id, or different ones.
    """
    keys = {schema.group_id for schema in schemas}
    if len(keys) != 1 or None in keys:
        found = ", ".join(sorted(str(key) for key in keys))
        raise UserError(f"users cannot be told apart: group_id is {found}", "name the user's column in every schema")
    (key,) = keys
    assert key is not None
    times = sorted({schema.time for schema in schemas if schema.time is not None})
    names = dict.fromkeys([key, *(name for schema in schemas for name in side_columns(schema, "user"))])
    columns = list(dict.fromkeys([*names, *times, item]))
    splits = [ParquetLog(split_path(folder, split), schemas[0]).read(columns) for split in SPLITS]
    log = pa.concat_tables(splits, promote_options="permissive")
    by = {f"{place}": log[name] for place, name in enumerate((key, *times))} | {"row": pa.array(np.arange(len(log)))}
    order = pc.sort_indices(pa.table(by), sort_keys=[(name, "ascending") for name in by])
    newest = _last_of_each(log[key].take(order), order)
    rows = log.take(newest).select(list(names))
    return rows.append_column(SEEN, _items_of(log, key, item, rows[key])), key


def _last_of_each(sorted_keys: pa.ChunkedArray, order: pa.Array) -> pa.Array:
    """Of rows in this order, whose equal keys stand together, the last one of each key; null is no key."""
    keys = whole(sorted_keys)
    ends = np.ones(len(keys), np.bool_)
    ends[:-1] = pc.fill_null(pc.not_equal(keys[1:], keys[:-1]), True).to_numpy(zero_copy_only=False)
    return order.filter(pc.and_(pa.array(ends), keys.is_valid()))


def _items_of(log: pa.Table, key: str, item: str, keys: pa.ChunkedArray) -> pa.ListArray:
    """The distinct items of each of these users, as lists of int64."""
    pairs = log.select([key, item]).group_by([key, item]).aggregate([])
    user = pc.index_in(pairs[key], value_set=whole(keys))
    pairs = pairs.filter(pc.and_(user.is_valid(), pairs[item].is_valid()))
    owner = integers(whole(user.drop_null()))
    order = np.argsort(owner, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(keys)))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(integers(whole(pairs[item]))[order]))
