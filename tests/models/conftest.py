from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.schema import (
    DenseFeature,
    FeatureSchema,
    Label,
    Sequence,
    SequenceFeature,
    SparseFeature,
    Table,
)

WIDTH = 8


@pytest.fixture
def schema() -> FeatureSchema:
    """Every kind of feature: a shared table, a weighted bag, a mean bag, another width, a sequence of two columns."""
    return FeatureSchema(
        tables=(
            Table("item", 30, WIDTH),
            Table("user", 20, WIDTH),
            Table("genre", 10, 4),
            Table("tag", 12, WIDTH),
            Table("rating", 6, 4),
        ),
        dense=(DenseFeature("age"), DenseFeature("price", missing_flag=True)),
        sparse=(
            SparseFeature("user_id", "user", side="user"),
            SparseFeature("genres", "genre", side="item", max_length=4, pooling="mean"),
            SparseFeature("item_id", "item", side="item"),
            SparseFeature("tags", "tag", max_length=3, weights="tag_weights"),
        ),
        sequences=(
            Sequence(
                "history",
                (SequenceFeature("history_item", "item"), SequenceFeature("history_rating", "rating")),
                max_length=5,
            ),
        ),
        labels=(Label("click"), Label("conversion", required=False)),
    )


@pytest.fixture
def plain_schema() -> FeatureSchema:
    """Three single ids of the token width, no dense features, one task."""
    names = ("a", "b", "c")
    return FeatureSchema(
        tables=tuple(Table(name, 20, WIDTH) for name in names),
        sparse=tuple(SparseFeature(name, name) for name in names),
        labels=(Label("click"),),
    )


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    return build_batch


def build_batch(schema: FeatureSchema, rows: int, seed: int = 0, padding: int = 0) -> Batch:
    """`rows` random rows, the same for every number of rows of padding after them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {table.name: table.num_embeddings for table in schema.tables}

    def padded(column: torch.Tensor) -> torch.Tensor:
        return torch.cat([column, column.new_zeros(padding, *column.shape[1:])])

    def lengths(maximum: int, minimum: int) -> torch.Tensor:
        return padded(torch.randint(minimum, maximum + 1, (rows,), generator=generator))

    def jagged(features: list[tuple[str, str, torch.Tensor]], weights: bool = False) -> KeyedJaggedTensor:
        totals = [int(length.sum()) for _, _, length in features]
        values = [
            torch.randint(0, sizes[table], (n,), generator=generator)
            for (_, table, _), n in zip(features, totals, strict=True)
        ]
        return KeyedJaggedTensor(
            keys=[name for name, _, _ in features],
            values=torch.cat([*values, torch.zeros(0, dtype=torch.int64)]),
            lengths=torch.cat([*(length for _, _, length in features), torch.zeros(0, dtype=torch.int64)]).int(),
            weights=torch.rand(sum(totals), generator=generator) if weights else None,
            stride=rows + padding,
        )

    def bags(features: tuple[SparseFeature, ...]) -> list[tuple[str, str, torch.Tensor]]:
        return [(f.name, f.table, lengths(f.max_length, 1 if f.max_length == 1 else 0)) for f in features]

    events = []
    for sequence in schema.sequences:
        length = lengths(sequence.max_length, 0)
        events += [(feature.name, feature.table, length) for feature in sequence.features]
    tasks = len(schema.labels)
    mask = padded(torch.ones(rows, tasks, dtype=torch.bool))
    ids = torch.arange(rows + padding).where(mask[:, 0], -1)
    return Batch(
        dense=padded(torch.randn(rows, schema.dense_width, generator=generator)),
        sparse=jagged(bags(schema.unweighted)),
        labels=padded(torch.randint(0, 2, (rows, tasks), generator=generator).float()),
        label_mask=mask,
        weight=mask.float(),
        example_id=ids,
        group_id=ids,
        time=ids,
        weighted=jagged(bags(schema.weighted), weights=True) if schema.weighted else None,
        sequences=jagged(events) if events else None,
    )
