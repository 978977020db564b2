"""The item catalogue as encoded rows, which can be put behind the rows of a batch: negatives, or all items at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.data.batch import Batch
from raysys.data.columns import integers, whole
from raysys.data.filesystem import resolve
from raysys.data.join import append_rows, take_rows
from raysys.data.log import ParquetLog
from raysys.data.roles import roles
from raysys.data.transforms import Transforms
from raysys.errors import UserError, first_line, nearest
from raysys.schema import Catalogue, FeatureSchema

NO_ROW = -1


@dataclass(frozen=True, eq=False)
class CatalogueItems:
    """N items. The features of users and contexts are empty in `batch`, its labels are masked and its weights 0.

    key: the column that names an item. keys: [N] int64, what it holds. task: the label that makes a row positive.
    counts: [N] int64, how often each is the item of a positive row of the training split.
    """

    key: str
    keys: NDArray[np.int64]
    task: str
    counts: NDArray[np.int64]
    batch: Batch

    def __len__(self) -> int:
        return len(self.keys)

    def append(self, batch: Batch, rows: Tensor | None = None) -> Batch:
        """The batch with these items ([M], row numbers; None: all) as further rows of example id -1 and weight 0."""
        return append_rows(batch, self.batch if rows is None else take_rows(self.batch, rows))


class KeyLookup(torch.nn.Module):
    """From keys to rows of a catalogue, on the device of the keys: buffers that are no part of a checkpoint."""

    keys: Tensor
    order: Tensor

    def __init__(self, keys: NDArray[np.int64]) -> None:
        super().__init__()
        order = np.argsort(keys, kind="stable")
        self.register_buffer("keys", torch.from_numpy(keys[order]), persistent=False)
        self.register_buffer("order", torch.from_numpy(order), persistent=False)

    def forward(self, keys: Tensor) -> Tensor:
        """int64 [...] → int64 [...], `NO_ROW` where no item has the key."""
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[place] == keys, self.order[place], NO_ROW)


def read_items(folder: str, schema: FeatureSchema) -> pa.Table:
    """The catalogue's file as it is: one row per item, checked for the key. Raises UserError naming file and row."""
    catalogue = catalogue_of(schema)
    path = f"{folder.rstrip('/')}/{catalogue.file}"
    filesystem, root = resolve(path)
    try:
        table = pq.read_table(root, filesystem=filesystem)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file, and the schema names it as the item catalogue",
            "write one row per item with the item features there, or correct `catalogue.file`",
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {first_line(error)}") from None
    if catalogue.key not in table.column_names:
        raise UserError(f"{path}: column {catalogue.key!r} is missing", nearest(catalogue.key, table.column_names))
    key = whole(table[catalogue.key])
    if not pa.types.is_integer(key.type) or key.null_count:
        raise UserError(
            f"{path}: column {catalogue.key!r} has type {key.type} and {key.null_count} nulls",
            "items are known by an integer without nulls: number them when the data is prepared",
        )
    counted = pc.value_counts(key)
    twice = counted.filter(pc.greater(counted.field("counts"), 1))
    if len(twice):
        raise UserError(f"{path}: {catalogue.key} {twice[0]['values']} is there {twice[0]['counts']} times")
    return table


def encode_items(table: pa.Table, schema: FeatureSchema, transforms: Transforms) -> Batch:
    """The item features of catalogue rows as a batch; what a catalogue does not have is empty."""
    batch = transforms.to_batch(with_blanks(table, schema), labels=False)
    batch.example_id.fill_(-1)
    return batch


def load_catalogue(
    folder: str, schema: FeatureSchema, transforms: Transforms, train: ParquetLog, task: str
) -> CatalogueItems:
    """The catalogue of a data set with the counts of its training split."""
    table = read_items(folder, schema)
    key = catalogue_of(schema).key
    keys = integers(whole(table[key].cast(pa.int64())))
    return CatalogueItems(key, keys, task, _count(keys, key, train, task), encode_items(table, schema, transforms))


def with_blanks(rows: pa.Table, schema: FeatureSchema) -> pa.Table:
    """The rows with an empty column for every one of the schema's that they lack: users without items, items without users."""
    extra = {column.name: column for column in schema.extra}
    needed = {role.column for role in roles(schema, labels=False) if not role.optional}
    for name in schema.columns(labels=False):
        if name in needed and name not in rows.column_names:
            rows = rows.append_column(name, _blank(extra.get(name), rows.num_rows))
    return rows


def positives(rows: pa.Table | pa.RecordBatch, task: str) -> pa.Array:
    """Whether each row's label says yes; null labels do not."""
    return pc.fill_null(pc.greater(whole(rows[task]).cast(pa.float64()), 0), False)


def catalogue_of(schema: FeatureSchema) -> Catalogue:
    """The schema's catalogue; a UserError where it has none."""
    if schema.catalogue is None:
        raise UserError(
            f"{schema.source}: no catalogue, which retrieval needs",
            "add `catalogue: {key: item_id, file: items.parquet}` and the file with a row per item",
        )
    return schema.catalogue


def _blank(extra: Any, rows: int) -> pa.Array:
    if extra is None:
        return pa.nulls(rows)
    if extra.kind == "ids":
        return pa.ListArray.from_arrays(pa.array(np.zeros(rows + 1, np.int32)), pa.array([], pa.int64()))
    if extra.kind == "vector":
        flat = pa.array(np.zeros(rows * extra.width, np.float32))
        return pa.FixedSizeListArray.from_arrays(flat, extra.width)
    return pa.array(np.zeros(rows, np.int64)) if extra.kind == "int" else pa.nulls(rows, pa.float32())


def _count(keys: NDArray[np.int64], key: str, train: ParquetLog, task: str) -> NDArray[np.int64]:
    order = np.argsort(keys)
    counts = np.zeros(len(keys), np.int64)
    for rows in train.iter_batches(columns=list(dict.fromkeys([key, task]))):
        shown = integers(whole(rows[key]).filter(positives(rows, task)).cast(pa.int64()))
        place = np.minimum(np.searchsorted(keys, shown, sorter=order), len(keys) - 1)
        found = order[place]
        unknown = keys[found] != shown
        if unknown.any():
            raise UserError(
                f"{train.path}: {key} {shown[unknown][0]} is not in the catalogue",
                "every item of a positive row must have its row there",
            )
        counts += np.bincount(found, minlength=len(keys))
    return counts
