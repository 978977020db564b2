from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysys.data.difference import differing_rows
from raysys.data.join import append_rows, take_rows
from raysys.data.log import ParquetLog
from raysys.data.transforms import Transforms
from raysys.schema import FeatureSchema


@pytest.fixture(scope="module")
def log(tiny_data):
    schema = FeatureSchema.load(tiny_data / "schema.yaml")
    return (
        schema,
        Transforms.fit(schema, ParquetLog(tiny_data / "train.parquet", schema)),
        pq.read_table(tiny_data / "train.parquet"),
    )


def same(first, second, schema):
    return not any(rows.any() for rows in differing_rows(first, second, schema).values())


def test_rows_put_together_are_the_batch_of_all_rows(log):
    schema, transforms, table = log
    joined = append_rows(transforms.to_batch(table.slice(0, 70)), transforms.to_batch(table.slice(70, 30)))
    whole = transforms.to_batch(table.slice(0, 100))
    assert same(joined, whole, schema)
    torch.testing.assert_close(joined.labels, whole.labels)
    assert len(joined) == 100


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_taken_are_the_batch_of_those_rows(log, seed):
    schema, transforms, table = log
    order = np.random.default_rng(seed).integers(0, 100, 150)
    taken = take_rows(transforms.to_batch(table.slice(0, 100)), torch.from_numpy(order))
    assert same(taken, transforms.to_batch(table.take(pa.array(order))), schema)
