"""A difference is found in its feature and its row, and there is none between a log that is trained on and rows as JSON has them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysys.data.difference import differing_rows
from raysys.data.join import append_rows, take_rows
from raysys.data.log import ParquetLog
from raysys.data.reader import Reader

CHANGES = {
    "age": 3,
    "price": 3.5,
    "visits": -3.5,
    "member": None,
    "user": "user 1",
    "city": None,
    "tags": ["1", "2"],
    "slot": 1,
    "topics": [5, 6],
    "item": None,
    "slots_seen": [4, 4, 4, 4],
    "history_item": [10**12 + 1, 10**12 + 2],
    "history_action": [3, 3],
    "position": 77,
    "teacher": 0.125,
    "vector": [0.0, 1.0],
    "candidates": [98],
}
FULL = {
    "topics": [1, 2],
    "topic_weights": [0.5, 0.25],
    "history_item": [10**12 + 9, 10**12 + 8],
    "history_action": [0, 0],
}


@pytest.mark.parametrize("requests", [1, 10, 1000])
def test_a_thousand_rows_read_for_training_equal_those_of_requests(schema, transforms, make_table, tmp_path, requests):
    table = make_table(1000, seed=5)
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=170)
    log = ParquetLog(tmp_path / "log.parquet", schema, labels=False)
    batches = [batch for batch, _ in Reader(log, transforms, 96, labels=False).epoch()]
    trained = batches[0]
    for batch in batches[1:]:
        trained = append_rows(trained, batch)
    place = {example: row for row, example in enumerate(trained.example_id.tolist())}
    rows = json.loads(json.dumps(table.to_pylist(), default=lambda when: when.isoformat()))
    size = len(rows) // requests
    served = [transforms.rows_to_batch(rows[start : start + size]) for start in range(0, len(rows), size)]
    for batch in served if requests < 1000 else served[:200]:
        again = take_rows(trained, torch.tensor([place[example] for example in batch.example_id.tolist()]))
        differ = differing_rows(batch, again, schema)
        assert len(differ) == 4 + 7 + 2 + 4
        assert not any(rows.any() for rows in differ.values())
        for name in ("dense", "example_id", "group_id", "time", "labels", "label_mask", "weight"):
            found, expected = getattr(batch, name), getattr(again, name)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), name


def with_row(table, row, values):
    rows = table.to_pylist()
    rows[row] |= values
    return pa.Table.from_pylist(rows, schema=table.schema)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_value_is_found_in_its_feature_and_row(schema, transforms, make_table, name):
    table = with_row(make_table(50, seed=1), 17, {**FULL, "member": True, "city": "Roma", "item": 10**12 + 10})
    changed = with_row(table, 17, {name: CHANGES[name]})
    first, second = (transforms.to_batch(rows, labels=False) for rows in (table, changed))
    found = {key: np.flatnonzero(rows).tolist() for key, rows in differing_rows(first, second, schema).items()}
    assert {key: rows for key, rows in found.items() if rows} == {name: [17]}


@pytest.mark.parametrize("row", [0, 23, 49])
def test_another_length_another_weight_and_a_sign_are_differences(schema, transforms, make_table, row):
    table = with_row(make_table(50, seed=1), row, {**FULL, "price": 0.0})
    first = transforms.to_batch(table, labels=False)
    for values, names in (
        ({"topics": [], "topic_weights": []}, {"topics"}),
        ({"topic_weights": [0.5, 0.250001]}, {"topics"}),
        ({"history_item": [], "history_action": []}, {"history_item", "history_action"}),
        ({"price": -0.0}, {"price"}),
    ):
        second = transforms.to_batch(with_row(table, row, values), labels=False)
        for one, other in ((first, second), (second, first)):
            found = {key: np.flatnonzero(rows) for key, rows in differing_rows(one, other, schema).items()}
            assert {key for key, rows in found.items() if len(rows)} == names
            assert all(rows.tolist() == [row] for key, rows in found.items() if key in names)
