"""A catalogue that is known by its content alone, and users whose preference is no inner product: for retrieval at any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raysys.data.prepare.dataset import prepare_folder, write_table
from raysys.data.synthetic.vectors import Floats, clustered_vectors
from raysys.schema import Catalogue, DenseFeature, FeatureSchema, Label, SparseFeature, Table

WIDTH, INTERESTS = 16, 2
CATEGORIES = 64  # the signs of the first 6 columns of a content vector
SHARPNESS = 20.0
QUALITY = 0.1
POOL, BLOCK = 8192, 64  # items that a block of users chooses among
CONTENT = [f"content_{column}" for column in range(WIDTH)]
INTEREST = [f"interest_{number}_{column}" for number in range(INTERESTS) for column in range(WIDTH)]


def prepare(
    folder: str | Path, items: int = 10_000, train_rows: int = 100_000, queries: int = 200, seed: int = 0
) -> None:
    """Write train, valid, test and items as Parquet, with schema.yaml, unless they are there.

    An item is a content vector (`clustered_vectors`, so in clusters of uneven sizes, more of them in larger catalogues), a
    price and a quality; its id says nothing and is no feature. A row is a user, who has 2 interests of the same clusters and
    a budget, with one item drawn in proportion to exp(20 · `affinities`) among 8,192 items, fresh ones for every 64 users
    (all items of a smaller catalogue). No user is there twice. queries: rows of valid, and as many of test.
    """
    arguments = {
        "data": "synthetic catalogue 1",
        "items": items,
        "train_rows": train_rows,
        "queries": queries,
        "seed": seed,
    }

    def write(partial: Path) -> None:
        count = train_rows + 2 * queries
        random = np.random.default_rng((seed, 1))
        content, interests = clustered_vectors(items, INTERESTS * count, WIDTH, seed)
        catalogue = _items(content, random)
        users = _users(interests.reshape(count, INTERESTS * WIDTH), random)
        chosen = _choose(users, catalogue, random)
        rows = users.append_column("click", pa.array(np.ones(count, np.int8)))
        for name in catalogue.column_names:
            rows = rows.append_column(name, catalogue[name].take(pa.array(chosen)))
        starts = {"train": (0, train_rows), "valid": (train_rows, queries), "test": (train_rows + queries, queries)}
        for split, (start, length) in starts.items():
            write_table(partial / f"{split}.parquet", rows.slice(start, length).combine_chunks())
        write_table(partial / "items.parquet", catalogue)
        catalogue_schema().save(partial / "schema.yaml")

    prepare_folder(folder, arguments, write)


def catalogue_schema() -> FeatureSchema:
    """The schema of a prepared folder: the task is `click`."""
    user = [DenseFeature(name, "user") for name in (*INTEREST, "budget")]
    item = [DenseFeature(name, "item") for name in (*CONTENT, "price", "quality")]
    return FeatureSchema(
        tables=(Table("segment", CATEGORIES), Table("category", CATEGORIES)),
        dense=(*user, *item),
        sparse=(
            SparseFeature("segment", "segment", "user", "index"),
            SparseFeature("category", "category", "item", "index"),
        ),
        labels=(Label("click"),),
        example_id="example_id",
        catalogue=Catalogue("item_id"),
    )


def affinities(users: pa.Table, items: pa.Table) -> Floats:
    """[U, N], what each user truly thinks of each item: max_k ⟨interest_k, content⟩ · exp(-2 (price - budget)²) + quality / 10.

    An interest counts alone, not with the other one, and only at the right price: no inner product of few columns says so.
    users, items: tables with the feature columns of either side.
    """
    interests = _matrix(users, INTEREST).reshape(-1, INTERESTS, WIDTH)
    content = _matrix(items, CONTENT)
    best: Floats = np.full((len(interests), len(content)), -np.inf, np.float32)
    for number in range(INTERESTS):
        np.maximum(best, interests[:, number] @ content.T, out=best)
    price = _matrix(items, ["price"])[:, 0] - _matrix(users, ["budget"])
    best *= np.exp(-2 * price**2)
    best += np.float32(QUALITY) * _matrix(items, ["quality"])[:, 0]
    return best


def _items(content: Floats, random: np.random.Generator) -> pa.Table:
    columns: dict[str, NDArray[np.generic]] = {"item_id": random.permutation(len(content))}
    columns |= dict(zip(CONTENT, content.T, strict=True))
    columns |= {name: random.standard_normal(len(content), np.float32) for name in ("price", "quality")}
    return pa.table(columns | {"category": _signs(content)})


def _users(interests: Floats, random: np.random.Generator) -> pa.Table:
    columns: dict[str, NDArray[np.generic]] = {"example_id": np.arange(len(interests))}
    columns |= dict(zip(INTEREST, interests.T, strict=True))
    columns |= {"budget": random.standard_normal(len(interests), np.float32), "segment": _signs(interests)}
    return pa.table(columns)


def _signs(vectors: Floats) -> NDArray[np.int64]:
    bits = CATEGORIES.bit_length() - 1
    return (vectors[:, :bits] > 0) @ (1 << np.arange(bits))


def _choose(users: pa.Table, items: pa.Table, random: np.random.Generator) -> NDArray[np.int64]:
    """[U] the row of the item that each user takes: the largest of 20 · affinity plus Gumbel noise."""
    chosen = np.empty(len(users), np.int64)
    for start in range(0, len(users), BLOCK):
        pool = random.choice(len(items), min(POOL, len(items)), replace=False, shuffle=False)
        logits = SHARPNESS * affinities(users.slice(start, BLOCK), items.take(pa.array(pool)))
        best = (logits - np.log(random.standard_exponential(logits.shape))).argmax(1)
        chosen[start : start + BLOCK] = pool[best]
    return chosen


def _matrix(table: pa.Table, names: list[str]) -> Floats:
    """[rows, columns] float32."""
    return np.stack([table[name].to_numpy() for name in names], 1).astype(np.float32)
