"""The item catalogue as encoded rows, which can be put behind the rows of a batch: negatives, or all items at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.data.batch import Batch
from raysys.data.columns import Source, integers, whole
from raysys.data.filesystem import resolve
from raysys.data.join import append_rows, take_rows
from raysys.data.log import ParquetLog
from raysys.data.sides import fill_other_sides, side_columns
from raysys.data.transforms import Transforms
from raysys.errors import UserError, first_line, nearest
from raysys.schema import Catalogue, FeatureSchema

NO_ROW = -1


@dataclass(frozen=True, eq=False)
class CatalogueItems:
    """N items. The features of users and contexts are null in `batch`, its labels are masked and its weights 0.

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
    """The catalogue's file as it is: one row per item, checked for the key and the item features. Raises UserError."""
    catalogue = catalogue_of(schema)
    path = _path(folder, catalogue)
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
    for name in (catalogue.key, *side_columns(schema, "item")):
        if name not in table.column_names:
            raise UserError(f"{path}: column {name!r} is missing", nearest(name, table.column_names))
    if not table.num_rows:
        raise UserError(f"{path}: no rows", "write one row per item")
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


def encode_items(table: pa.Table, schema: FeatureSchema, transforms: Transforms, name: str) -> Batch:
    """The item features of catalogue rows as a batch; those of other sides are null. name: of the table in errors."""
    rows = transforms.encode(fill_other_sides(table, schema, "item"), Source(name), labels=False)
    batch = transforms.collate([(rows, 0, len(rows))], len(rows))
    batch.example_id.fill_(-1)
    return batch


def load_catalogue(
    folder: str, schema: FeatureSchema, transforms: Transforms, train: ParquetLog, task: str
) -> CatalogueItems:
    """The catalogue of a data set with the counts of its training split."""
    table, catalogue = read_items(folder, schema), catalogue_of(schema)
    keys = integers(whole(table[catalogue.key]))
    counts = _count(keys, catalogue.key, train, task)
    batch = encode_items(table, schema, transforms, _path(folder, catalogue))
    return CatalogueItems(catalogue.key, keys, task, counts, batch)


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


def _path(folder: str, catalogue: Catalogue) -> str:
    return f"{folder.rstrip('/')}/{catalogue.file}"


def _count(keys: NDArray[np.int64], key: str, train: ParquetLog, task: str) -> NDArray[np.int64]:
    order = np.argsort(keys)
    counts = np.zeros(len(keys), np.int64)
    for rows in train.iter_batches(columns=list(dict.fromkeys([key, task]))):
        shown = integers(whole(rows[key]).filter(positives(rows, task)))
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
