from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysys.data.catalogue import NO_ROW, KeyLookup, load_catalogue, read_items
from raysys.data.log import ParquetLog
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.schema import (
    Catalogue,
    DenseFeature,
    ExtraColumn,
    FeatureSchema,
    Label,
    Sequence,
    SequenceFeature,
    SparseFeature,
    Table,
)

KEYS = np.array([30, 10, -20, 50, 40])  # not in order: keys are no row numbers
SCHEMA = FeatureSchema(
    tables=(Table("item", 10, 4), Table("user", 10, 4), Table("tag", 10, 4)),
    dense=(DenseFeature("age", "user", default=3.0), DenseFeature("price", "item", missing_flag=True)),
    sparse=(
        SparseFeature("item", "item", "item"),
        SparseFeature("user", "user", "user"),
        SparseFeature("tags", "tag", "item", max_length=3, weights="tag_weights"),
    ),
    sequences=(Sequence("history", (SequenceFeature("history", "item"),), max_length=4),),
    labels=(Label("click", required=False),),
    extra=(
        ExtraColumn("item", "int"),
        ExtraColumn("seen", "ids"),
        ExtraColumn("slot", "int"),
        ExtraColumn("content", "vector", 2),
        ExtraColumn("teacher"),
    ),
    group_id="user",
    catalogue=Catalogue("item"),
)
ITEMS = pa.table(
    {
        "item": KEYS,
        "price": [1.0, None, 3.0, 4.0, 5.0],
        "tags": [["a"], [], ["b", "c"], ["a"], ["c"]],
        "tag_weights": [[1.0], [], [0.5, 2.0], [1.0], [3.0]],
        "title": ["not in the schema"] * 5,
    }
)


def log_rows(items=(30, 30, 10, 50, 30), click=(1, 1, 0, 1, None)):
    n = len(items)
    return pa.table(
        {
            "item": np.asarray(items),
            "user": ["u1", "u2", "u1", "u2", "u3"][:n],
            "age": [1.0, 2.0, 3.0, 4.0, 5.0][:n],
            "price": [1.0] * n,
            "tags": [["a", "b", "c"]] * n,
            "tag_weights": [[1.0, 1.0, 1.0]] * n,
            "history": [[30, 10]] * n,
            "seen": [[30, 10]] * n,
            "slot": [3] * n,
            "content": [[1.0, 2.0]] * n,
            "teacher": [0.5] * n,
            "click": list(click),
        }
    )


def write(folder, items=ITEMS, rows=None):
    if items is not None:
        pq.write_table(items, folder / "items.parquet")
    pq.write_table(log_rows() if rows is None else rows, folder / "train.parquet", row_group_size=2)
    return folder


def load(folder, schema=SCHEMA):
    log = ParquetLog(folder / "train.parquet", schema)
    return load_catalogue(str(folder), schema, Transforms.fit(schema, log), log, "click")


def test_items_are_counted_in_positive_rows_of_the_training_split(tmp_path):
    items = load(write(tmp_path))
    assert len(items) == 5
    assert items.keys.tolist() == KEYS.tolist()
    assert items.counts.tolist() == [2, 0, 0, 1, 0]


def test_an_encoded_item_has_its_features_and_nothing_of_a_user(tmp_path):
    items = load(write(tmp_path))
    batch = items.batch
    assert batch.extra["item"].tolist() == KEYS.tolist()
    transforms = Transforms.fit(SCHEMA, ParquetLog(tmp_path / "train.parquet", SCHEMA))
    vocabulary = transforms.vocabulary("item").to_pylist()
    known = [vocabulary.index(key) + 1 if key in vocabulary else 0 for key in KEYS]
    assert batch.sparse["item"].values().tolist() == known
    assert batch.weighted["tags"].lengths().tolist() == [1, 0, 2, 1, 1]
    assert batch.weighted["tags"].weights().tolist() == [1.0, 0.5, 2.0, 1.0, 3.0]
    assert batch.dense.tolist() == [[3, 1, 0], [3, 0, 1], [3, 3, 0], [3, 4, 0], [3, 5, 0]]
    assert batch.sparse["user"].values().tolist() == [0] * 5  # a null, in a vocabulary
    assert batch.sequences["history"].lengths().sum() == batch.extra["seen"].lengths().sum() == 0
    assert not batch.weight.any()
    assert not batch.label_mask.any()
    assert (batch.example_id == -1).all()
    assert batch.extra["slot"].tolist() == [0] * 5
    assert batch.extra["content"].tolist() == [[0, 0]] * 5


@pytest.mark.parametrize("picked", [None, [3, 0, 0]])
def test_items_stand_behind_a_batch(tmp_path, picked):
    items = load(write(tmp_path))
    transforms = Transforms.fit(SCHEMA, ParquetLog(tmp_path / "train.parquet", SCHEMA))
    batch = transforms.to_batch(log_rows())
    joined = items.append(batch, None if picked is None else torch.tensor(picked))
    picked = picked or [0, 1, 2, 3, 4]
    assert len(joined) == 5 + len(picked)
    assert joined.extra["item"].tolist() == [30, 30, 10, 50, 30, *KEYS[picked].tolist()]
    assert joined.weight[:, 0].tolist() == [1, 1, 1, 1, 0] + [0] * len(picked)
    assert joined.sequences["history"].lengths().tolist() == [2] * 5 + [0] * len(picked)
    wanted = items.batch.sparse["item"].values()[picked]
    assert torch.equal(joined.sparse["item"].values(), torch.cat([batch.sparse["item"].values(), wanted]))


def test_keys_are_looked_up():
    lookup = KeyLookup(KEYS)
    asked = torch.tensor([[30, 10, -20], [50, 40, 41], [-100, 100, 0]])
    assert lookup(asked).tolist() == [[0, 1, 2], [3, 4, NO_ROW], [NO_ROW] * 3]
    assert not lookup.state_dict()  # it follows from the data and is no part of a checkpoint


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (None, "items.parquet: no such file, and the schema names it as the item catalogue"),
        (ITEMS.slice(0, 0), "items.parquet: no rows"),
        (ITEMS.drop_columns("item"), "items.parquet: column 'item' is missing"),
        (ITEMS.drop_columns("tags"), "items.parquet: column 'tags' is missing"),
        (ITEMS.drop_columns("tag_weights"), "items.parquet: column 'tag_weights' is missing"),
        (ITEMS.rename_columns({"price": "pricee"}), "column 'price' is missing\n  hint: did you mean 'pricee'?"),
        (ITEMS.take([0, 1, 1, 1]), "items.parquet: item 10 is there 3 times"),
        (ITEMS.set_column(0, "item", pa.array(list("abcde"))), "column 'item' has type string and 0 nulls"),
        (ITEMS.set_column(0, "item", pa.array([1, 2, None, 4, 5])), "has type int64 and 1 nulls"),
        (ITEMS.set_column(1, "price", pa.array(list("abcde"))), "items.parquet: column 'price' has type string"),
        (ITEMS.slice(1), "train.parquet: item 30 is not in the catalogue"),
    ],
)
def test_a_catalogue_that_does_not_fit_is_named(tmp_path, items, message):
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, items))
    assert message in str(caught.value)


def test_a_file_that_is_no_parquet_and_a_schema_without_a_catalogue_are_named(tmp_path):
    (write(tmp_path) / "items.parquet").write_text("item,price")
    with pytest.raises(UserError, match=r"items\.parquet: cannot be read as parquet"):
        read_items(str(tmp_path), SCHEMA)
    with pytest.raises(UserError, match="no catalogue, which retrieval needs"):
        read_items(str(tmp_path), dataclasses.replace(SCHEMA, catalogue=None))
