"""The made-up catalogue: written once, the same for a seed, and with a preference that no inner product of few columns has."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.data.synthetic.catalogue import CONTENT, INTEREST, affinities, prepare
from raysys.errors import UserError
from raysys.schema import FeatureSchema

ITEMS, ROWS, QUERIES = 600, 1500, 60


@pytest.fixture(scope="module", params=[0, 1])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalogue") / "world"
    prepare(folder, ITEMS, ROWS, QUERIES, request.param)
    return folder


def read(folder, name):
    return pq.read_table(folder / f"{name}.parquet")


def test_rows_have_the_columns_of_their_item_and_of_the_schema(folder):
    items = read(folder, "items").sort_by("item_id")
    schema = FeatureSchema.load(folder / "schema.yaml")
    assert items["item_id"].to_pylist() == list(range(ITEMS))
    for name, rows in (("train", ROWS), ("valid", QUERIES), ("test", QUERIES)):
        table = read(folder, name)
        assert len(table) == rows
        assert not set(schema.columns()) - set(table.column_names)
        own = items.take(table["item_id"])
        for column in ("content_3", "price", "category"):
            np.testing.assert_array_equal(table[column].to_numpy(), own[column].to_numpy())
    assert len(np.unique(np.concatenate([read(folder, name)["example_id"] for name in ("train", "test")]))) == 1560


def test_users_take_items_that_they_like(folder):
    test, items = read(folder, "test"), read(folder, "items").sort_by("item_id")
    all_of_them = affinities(test, items)
    own = np.take_along_axis(all_of_them, test["item_id"].to_numpy()[:, None], 1)
    rank = (all_of_them > own).sum(1)
    assert np.median(rank) < ITEMS / 50
    assert rank.max() > 0  # they draw, and do not take the best


def test_affinity_is_what_its_formula_says():
    unit = np.eye(16, dtype=np.float32)
    users = {name: [0.0] for name in INTEREST} | {"budget": [1.0]}
    users["interest_0_2"], users["interest_1_5"] = [1.0], [1.0]
    items = dict(zip(CONTENT, unit.T, strict=True)) | {"price": np.full(16, 2.0), "quality": np.arange(16.0)}
    found = affinities(pa.table(users), pa.table(items))[0]
    expected = 0.1 * np.arange(16.0)
    expected[[2, 5]] += np.exp(-2)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_inner_product_of_few_columns_gives_the_affinities(folder):
    """The best approximation of rank 32, the width of the models, leaves 5% of the variance and more."""
    values = affinities(read(folder, "train"), read(folder, "items"))
    singular = np.linalg.svd(values - values.mean(), compute_uv=False) ** 2
    assert singular[32:].sum() > 0.05 * singular.sum()


def test_a_seed_gives_the_same_world_and_another_one_another(folder, tmp_path):
    seed = 0 if 'seed": 0' in (folder / "prepared.json").read_text() else 1
    prepare(tmp_path / "again", ITEMS, ROWS, QUERIES, seed)
    prepare(tmp_path / "other", ITEMS, ROWS, QUERIES, 7)
    assert read(tmp_path / "again", "train").equals(read(folder, "train"))
    assert not read(tmp_path / "other", "items").equals(read(folder, "items"))
    with pytest.raises(UserError, match="was prepared with items"):
        prepare(folder, ITEMS + 1, ROWS, QUERIES, seed)
