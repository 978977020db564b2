"""A log that has every kind of column, for the tests of the data room."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.data.log import ParquetLog
from raysys.data.transforms import Transforms
from raysys.schema import FeatureSchema

SCHEMA = {
    "tables": {
        "users": {"num_embeddings": 12},
        "items": {"num_embeddings": 20},
        "cities": {"num_embeddings": 7},
        "slots": {"num_embeddings": 5},
        "tags": {"num_embeddings": 6},
        "topics": {"num_embeddings": 50},
        "actions": {"num_embeddings": 4},
    },
    "dense": [
        {"name": "age", "transform": "log_standardize", "default": 30.0, "missing_flag": True},
        {"name": "price"},
        {"name": "visits", "transform": "log"},
        {"name": "member", "missing_flag": True},
    ],
    "sparse": [
        {"name": "user", "table": "users"},
        {"name": "city", "table": "cities", "encoding": "hash"},
        {"name": "tags", "table": "tags", "max_length": 3},
        {"name": "slot", "table": "slots", "encoding": "index"},
        {"name": "topics", "table": "topics", "encoding": "hash", "max_length": 2, "weights": "topic_weights"},
        {"name": "item", "table": "items"},
        {"name": "slots_seen", "table": "slots", "encoding": "index", "max_length": 4},
    ],
    "sequences": [
        {
            "name": "history",
            "max_length": 3,
            "features": [
                {"name": "history_item", "table": "items"},
                {"name": "history_action", "table": "actions", "encoding": "index"},
            ],
        }
    ],
    "labels": [
        {"name": "click"},
        {"name": "rating", "kind": "regression", "required": False, "weight": "rating_weight"},
    ],
    "example_id": "id",
    "group_id": "user",
    "time": "when",
    "weight": "row_weight",
    "extra": [
        {"name": "position", "kind": "int"},
        {"name": "teacher", "kind": "float"},
        {"name": "vector", "kind": "vector", "width": 2},
        {"name": "candidates", "kind": "ids"},
    ],
}


def random_table(num_rows: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)

    def some(values: list, share: float = 0.2) -> list:
        return [None if missing else value for value, missing in zip(values, rng.random(num_rows) < share, strict=True)]

    def lists(element: Callable[[], object], most: int, nulls: float = 0.0) -> list[list]:
        return [
            [None if rng.random() < nulls else element() for _ in range(rng.integers(0, most + 1))]
            for _ in range(num_rows)
        ]

    def item() -> int:
        return int(rng.zipf(1.5)) % 40 + 10**12

    topics, events = lists(lambda: int(rng.integers(-9, 9)), 4), lists(item, 6, nulls=0.1)
    start = datetime(1969, 12, 31, 12)
    return pa.table(
        {
            "id": pa.array(rng.permutation(num_rows) + 1000),
            "age": pa.array(some(rng.integers(1, 90, num_rows).tolist()), pa.int16()),
            "price": pa.array(rng.normal(size=num_rows), pa.float32()),
            "visits": pa.array(rng.normal(size=num_rows) * 50),
            "member": pa.array(some((rng.random(num_rows) < 0.5).tolist())),
            "user": pa.array([f"user {int(value)}" for value in rng.zipf(1.4, num_rows) % 25]),
            "city": pa.array(some([f"città {int(value)}" for value in rng.integers(0, 30, num_rows)])),
            "tags": pa.array(some(lists(lambda: str(rng.integers(0, 9)), 5, nulls=0.2))),
            "slot": pa.array(some(rng.integers(0, 5, num_rows).tolist()), pa.uint8()),
            "topics": pa.array(topics),
            "topic_weights": pa.array([rng.random(len(bag)).tolist() for bag in topics], pa.list_(pa.float32())),
            "item": pa.array(some([item() for _ in range(num_rows)])),
            "slots_seen": pa.array(some(lists(lambda: int(rng.integers(0, 5)), 6, nulls=0.2)), pa.list_(pa.int32())),
            "history_item": pa.array(events),
            "history_action": pa.array([rng.integers(0, 4, len(bag)).tolist() for bag in events], pa.list_(pa.int8())),
            "click": pa.array((rng.random(num_rows) < 0.3).astype(np.int8)),
            "rating": pa.array(some(rng.normal(size=num_rows).tolist(), 0.5), pa.float32()),
            "rating_weight": pa.array(rng.random(num_rows)),
            "row_weight": pa.array(rng.random(num_rows), pa.float32()),
            "when": pa.array([start + timedelta(seconds=float(s)) for s in rng.uniform(0, 9e5, num_rows)]),
            "position": pa.array(rng.integers(0, 9, num_rows)),
            "teacher": pa.array(some(rng.normal(size=num_rows).tolist()), pa.float32()),
            "vector": pa.array([rng.normal(size=2).tolist() for _ in range(num_rows)], pa.list_(pa.float32(), 2)),
            "candidates": pa.array(lists(lambda: int(rng.integers(0, 99)), 3)),
            "unused": pa.array([None] * num_rows),
        }
    )


@pytest.fixture(scope="session")
def schema() -> FeatureSchema:
    return FeatureSchema.from_dict(SCHEMA)


@pytest.fixture(scope="session")
def make_table() -> Callable[[int, int], pa.Table]:
    """`make_table(num_rows, seed)`: rows for `schema`."""
    return random_table


@pytest.fixture(scope="session")
def train_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 rows in 4 row groups."""
    path = tmp_path_factory.mktemp("log") / "train.parquet"
    pq.write_table(random_table(1000, seed=0), path, row_group_size=300)
    return path


@pytest.fixture(scope="session")
def transforms(schema: FeatureSchema, train_path: Path) -> Transforms:
    """Fitted on the log of `train_path`."""
    return Transforms.fit(schema, ParquetLog(train_path, schema), seed=3)
