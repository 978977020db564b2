"""The rows of a user store against a plain loop over the log."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.errors import UserError
from raysys.schema import FeatureSchema
from raysys.serve.users import user_rows

SCHEMA = {
    "tables": {"user": {"num_embeddings": 9, "embedding_dim": 4}, "item": {"num_embeddings": 9, "embedding_dim": 4}},
    "dense": [{"name": "age", "side": "user"}, {"name": "price", "side": "item"}],
    "sparse": [{"name": "user", "table": "user"}, {"name": "item", "table": "item", "side": "item"}],
    "sequences": [{"name": "liked", "features": [{"name": "liked", "table": "item"}], "max_length": 3}],
    "labels": [{"name": "click"}],
    "group_id": "user",
    "time": "at",
}


@pytest.fixture
def folder(tmp_path):
    """A log whose rows are not in the order of time, with equal times, a null user, and an item that comes again."""
    rng = np.random.default_rng(0)
    for split, size in (("train", 40), ("valid", 10), ("test", 10)):
        rows = [
            {
                "user": None if number == 3 else int(rng.integers(6)),
                "age": float(rng.integers(90)),
                "item": int(rng.integers(5)),
                "price": 1.0,
                "liked": rng.integers(0, 5, rng.integers(4)).tolist(),
                "click": int(rng.integers(2)),
                "at": int(rng.integers(12)),
            }
            for number in range(size)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    return tmp_path


def test_the_newest_row_of_each_user_with_every_item_that_they_met(folder):
    schema = FeatureSchema.from_dict(SCHEMA)
    log = [
        row for split in ("train", "valid", "test") for row in pq.read_table(folder / f"{split}.parquet").to_pylist()
    ]
    newest, seen = {}, {}
    for row in sorted(log, key=lambda row: row["at"]):  # stable: the later of two rows of one time counts
        newest[row["user"]] = {name: row[name] for name in ("user", "age", "liked")}
        seen.setdefault(row["user"], set()).add(row["item"])
    found, key = user_rows(str(folder), [schema, schema], "item")
    assert key == "user"
    assert found.column_names == ["user", "age", "liked", "seen"]
    rows = {row["user"]: row for row in found.to_pylist()}
    assert len(rows) == len(found) == 6
    for user, row in rows.items():
        assert sorted(row.pop("seen")) == sorted(seen[user])
        assert row == newest[user]


def test_a_schema_that_does_not_say_who_the_user_is(folder):
    schema = FeatureSchema.from_dict(SCHEMA)
    with pytest.raises(UserError, match="group_id is None, user"):
        user_rows(str(folder), [schema, replace(schema, group_id=None)], "item")
