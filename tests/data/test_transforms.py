from __future__ import annotations

import dataclasses
import json
from collections import Counter
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.data.hashing import hash_strings, mix, spread
from raysys.data.log import ParquetLog
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.schema import DenseFeature, FeatureSchema, Label, SparseFeature, Table


def fit(table: pa.Table, schema: FeatureSchema, folder: Path, seed: int = 0) -> Transforms:
    pq.write_table(table, folder / "train.parquet")
    return Transforms.fit(schema, ParquetLog(folder / "train.parquet", schema), seed)


def bags(keyed: KeyedJaggedTensor, name: str) -> list[list[int]]:
    return [row.tolist() for row in keyed[name].to_dense()]


def same(first: Batch, second: Batch) -> bool:
    """Bit for bit, NaN equal to NaN."""

    def parts(value: object) -> list[torch.Tensor]:
        if isinstance(value, KeyedJaggedTensor):
            return [
                value.values(),
                value.lengths(),
                *([value.weights()] if value.weights_or_none() is not None else []),
            ]
        return [] if value is None else [value]

    for f in dataclasses.fields(Batch):
        left, right = getattr(first, f.name), getattr(second, f.name)
        pairs = zip(left.values(), right.values(), strict=True) if f.name == "extra" else [(left, right)]
        for a, b in pairs:
            if type(a) is not type(b) or (isinstance(a, KeyedJaggedTensor) and a.keys() != b.keys()):
                return False
            for x, y in zip(parts(a), parts(b), strict=True):
                if x.dtype != y.dtype or not torch.equal(torch.nan_to_num(x, 12345), torch.nan_to_num(y, 12345)):
                    return False
    return True


def expected_ids(rows: list[dict], schema: FeatureSchema, transforms: Transforms, name: str) -> list[list[int]]:
    """One row and one id at a time, in plain Python."""
    feature = next(f for f in schema.id_features if f.name == name)
    sequence = next((s for s in schema.sequences if name in [f.name for f in s.features]), None)
    table = schema.table(feature.table)
    vocabulary = transforms.vocabulary(table.name)
    known = {value: i + 1 for i, value in enumerate(vocabulary.to_pylist())} if vocabulary is not None else {}

    def one(value: object) -> list[int]:
        if feature.encoding == "vocab":
            return [known.get(value, 0)]
        if value is None:
            return []
        if feature.encoding == "index":
            return [int(value)]
        if isinstance(value, str):
            hashed = hash_strings(pa.array([value], pa.string()).cast(pa.large_binary()), 3)
        else:
            hashed = mix(np.array([value], np.int64).view(np.uint64), 3)
        return spread(hashed, table.num_embeddings).tolist()

    expected = []
    for row in rows:
        value = row[name]
        values = value if isinstance(value, list) else [value]
        if value is None and feature.encoding == "vocab" and name in ("tags",):
            values = []
        expected.append([i for v in values[-(sequence or feature).max_length :] for i in one(v)])
    return expected


def test_every_column_equals_a_row_by_row_encoding(schema, transforms, make_table):
    table = make_table(200, seed=1)
    rows = table.to_pylist()
    batch = transforms.to_batch(table)
    assert batch.sparse.keys() == ["user", "city", "tags", "slot", "item", "slots_seen"]
    assert batch.weighted.keys() == ["topics"]
    assert batch.sequences.keys() == ["history_item", "history_action"]
    for keyed in (batch.sparse, batch.weighted, batch.sequences):
        assert keyed.values().dtype == torch.int64
        assert keyed.lengths().dtype == torch.int32
        assert keyed.stride() == 200
        for name in (names := keyed.keys()):
            assert bags(keyed, name) == expected_ids(rows, schema, transforms, name), name
            assert keyed[name].lengths().sum() == keyed.length_per_key()[names.index(name)]
    weights = [w for row in rows for w in row["topic_weights"][-2:]]
    assert batch.weighted.weights().tolist() == weights
    assert batch.example_id.tolist() == table["id"].to_pylist()
    epoch = datetime(1970, 1, 1)
    assert batch.time.tolist() == [(row["when"] - epoch) // timedelta(seconds=1) for row in rows]
    assert min(batch.time) < 0, "rounding down shows before 1970 only"
    groups = {row["user"]: int(group) for row, group in zip(rows, batch.group_id, strict=True)}
    assert [groups[row["user"]] for row in rows] == batch.group_id.tolist()
    assert len(set(groups.values())) == len(groups)
    assert min(groups.values()) >= 0


def test_labels_weights_and_extra_columns(transforms, make_table):
    rows = make_table(200, seed=1).to_pylist()
    batch = transforms.to_batch(make_table(200, seed=1))
    rated = [row["rating"] is not None for row in rows]
    assert batch.labels[:, 0].tolist() == [row["click"] for row in rows]
    assert batch.labels[:, 1].tolist() == [row["rating"] or 0.0 for row in rows]
    assert batch.label_mask.tolist() == [[True, mask] for mask in rated]
    assert batch.weight[:, 0].tolist() == [row["row_weight"] for row in rows]
    product = [np.float32(r["row_weight"] * r["rating_weight"] * mask) for r, mask in zip(rows, rated, strict=True)]
    assert batch.weight[:, 1].tolist() == product
    assert batch.extra["position"].tolist() == [row["position"] for row in rows]
    assert batch.extra["vector"].tolist() == [row["vector"] for row in rows]
    assert bags(batch.extra["candidates"], "candidates") == [row["candidates"] for row in rows]
    teacher = batch.extra["teacher"]
    assert torch.isnan(teacher).tolist() == [row["teacher"] is None for row in rows]


def test_dense_features_are_transformed(transforms, make_table, train_path):
    train, table = pq.read_table(train_path), make_table(200, seed=1)
    age = train["age"].drop_null().to_numpy().astype(np.float64)
    mean, deviation = np.log1p(age).mean(), np.log1p(age).std()
    assert transforms.normalizers["age"].mean == pytest.approx(mean, rel=1e-12)
    assert transforms.normalizers["age"].deviation == pytest.approx(deviation, rel=1e-12)
    dense = transforms.to_batch(table).dense
    ages = np.array([30 if value is None else value for value in table["age"].to_pylist()])
    np.testing.assert_allclose(dense[:, 0], (np.log1p(ages) - mean) / deviation, rtol=1e-5, atol=1e-6)
    assert dense[:, 1].tolist() == table["price"].to_pylist()
    visits = table["visits"].to_numpy()
    np.testing.assert_allclose(dense[:, 2], np.sign(visits) * np.log1p(np.abs(visits)), rtol=1e-6)
    assert dense[:, 3].tolist() == [float(value or 0) for value in table["member"].to_pylist()]
    assert dense[:, 4].tolist() == [float(value is None) for value in table["age"].to_pylist()]
    assert dense[:, 5].tolist() == [float(value is None) for value in table["member"].to_pylist()]


def test_serving_rows_and_training_columns_agree_exactly(transforms, make_table):
    table = make_table(1000, seed=2)
    rows = table.to_pylist()
    whole = transforms.to_batch(table, labels=False)
    assert same(transforms.rows_to_batch(rows), whole)
    assert same(transforms.rows_to_batch(rows, labels=True), transforms.to_batch(table))
    shuffled = [dict(reversed(row.items())) for row in rows]
    assert same(transforms.rows_to_batch(shuffled), whole)
    for number in range(0, 1000, 50):  # one row alone: every null is a whole column of nulls
        assert same(
            transforms.rows_to_batch(rows[number : number + 1]),
            transforms.to_batch(table.slice(number, 1), labels=False),
        )


def test_json_rows_agree_exactly(transforms, make_table):
    table = make_table(1000, seed=2)
    rows = [{**row, "when": row["when"].isoformat()} for row in table.to_pylist()]
    rows = json.loads(json.dumps(rows))
    assert same(transforms.rows_to_batch(rows), transforms.to_batch(table, labels=False))


def test_absent_keys_of_a_row_are_null(transforms, make_table):
    rows = make_table(50, seed=2).to_pylist()
    sparse = [{key: value for key, value in row.items() if value is not None} for row in rows]
    assert same(transforms.rows_to_batch(rows), transforms.rows_to_batch(sparse))
    for row in rows:
        for key in ("id", "when", "unused", "click"):
            del row[key]
    batch = transforms.rows_to_batch(rows)
    assert batch.example_id.tolist() == list(range(50))
    assert not batch.time.any()
    assert not batch.label_mask.any()
    assert not batch.weight.any()


@pytest.mark.parametrize("layout", ["chunks", "sliced", "large", "dictionary", "view", "record batch"])
def test_the_arrow_layout_does_not_matter(transforms, make_table, layout):
    table = make_table(120, seed=4)
    expected = transforms.to_batch(table)
    if layout == "chunks":
        other = pa.concat_tables([table.slice(0, 50), table.slice(50, 1), table.slice(51)])
    elif layout == "sliced":
        other = pa.concat_tables([make_table(30, seed=5), table, table]).combine_chunks().slice(30, 120)
    elif layout == "record batch":
        other = table.combine_chunks().to_batches()[0]
    else:
        other = table
        for index, field in enumerate(table.schema):
            column, kind = table[field.name], field.type
            if layout == "large" and pa.types.is_list(kind):
                element = pa.large_string() if pa.types.is_string(kind.value_type) else kind.value_type
                column = column.cast(pa.large_list(element))
            elif layout == "large" and pa.types.is_string(kind):
                column = column.cast(pa.large_string())
            elif layout == "dictionary" and (pa.types.is_string(kind) or field.name in ("item", "slot")):
                column = column.dictionary_encode()
            elif layout == "view" and pa.types.is_string(kind):
                column = column.cast(pa.string_view())
            other = other.set_column(index, field.name, column)
        assert other.schema != table.schema
    assert same(transforms.to_batch(other), expected)


def test_null_lists_may_have_elements_behind_them(transforms, make_table):
    table = make_table(3, seed=0)
    mask = pa.array([False, True, False])
    hidden = pa.ListArray.from_arrays(pa.array([0, 1, 3, 4], pa.int32()), pa.array(["1", "2", "3", "4"]), mask=mask)
    shown = pa.array([["1"], None, ["4"]])
    index = table.schema.get_field_index("tags")
    batches = [transforms.to_batch(table.set_column(index, "tags", column)) for column in (hidden, shown)]
    assert same(*batches)
    assert batches[0].sparse["tags"].lengths().tolist() == [1, 0, 1]


def test_fixed_size_lists(tmp_path):
    schema = FeatureSchema((Table("t", 100),), sparse=(SparseFeature("bag", "t", encoding="index", max_length=2),))
    bag = pa.array([[1, 2, 3], None, [4, 5, 6]], pa.list_(pa.int64(), 3))
    transforms = fit(pa.table({"bag": bag}), schema, tmp_path)
    assert bags(transforms.to_batch(pa.table({"bag": bag})).sparse, "bag") == [[2, 3], [], [5, 6]]
    assert bags(transforms.to_batch(pa.table({"bag": bag}).slice(1)).sparse, "bag") == [[], [5, 6]]


def test_vocabulary_keeps_the_most_frequent_values_of_all_columns_of_its_table(schema, transforms, train_path):
    train = pq.read_table(train_path).to_pylist()
    counts = Counter(row["item"] for row in train) + Counter(item for row in train for item in row["history_item"])
    counts.pop(None)
    ranked = sorted(counts, key=lambda value: (-counts[value], value))
    assert len(ranked) > 19
    assert transforms.vocabulary("items").to_pylist() == ranked[:19]
    assert transforms.vocabulary("users").type == pa.string()
    assert transforms.vocabulary("cities") is None


def test_ties_in_a_vocabulary_go_by_value(tmp_path):
    schema = FeatureSchema((Table("t", 4),), sparse=(SparseFeature("x", "t"),))
    values = pa.table({"x": ["b", "é", "a", "c", "c", "B"]})
    assert fit(values, schema, tmp_path).vocabulary("t").to_pylist() == ["c", "B", "a"]


def test_a_column_of_nulls_only_can_be_fitted(tmp_path):
    schema = FeatureSchema((Table("t", 4),), sparse=(SparseFeature("x", "t"),), dense=(DenseFeature("d"),))
    nulls = pa.table({"x": pa.nulls(3), "d": pa.nulls(3)})
    transforms = fit(nulls, schema, tmp_path)
    assert len(transforms.vocabulary("t")) == 0
    for values in (
        nulls,
        pa.table({"x": [1, 2, 3], "d": pa.nulls(3)}),
        pa.table({"x": ["a", "", None], "d": [1, 2, 3]}),
    ):
        assert set(transforms.to_batch(values).sparse.values().tolist()) <= {0}


def test_a_constant_column_is_not_divided_by_zero(tmp_path):
    schema = FeatureSchema(dense=(DenseFeature("x", transform="standardize"),))
    transforms = fit(pa.table({"x": [5.0, 5.0]}), schema, tmp_path)
    assert transforms.to_batch(pa.table({"x": [5.0, 7.0]})).dense.tolist() == [[0.0], [2.0]]


def test_hashed_ids_depend_on_the_seed_and_fill_the_table(tmp_path):
    schema = FeatureSchema((Table("t", 1000),), sparse=(SparseFeature("x", "t", encoding="hash"),))
    table = pa.table({"x": pa.array(range(100_000))})
    ids = [fit(table, schema, tmp_path, seed).to_batch(table).sparse.values().numpy() for seed in (0, 1)]
    assert np.mean(ids[0] == ids[1]) < 0.01
    for values in ids:
        counts = np.bincount(values, minlength=1000)
        # chi-square with 999 degrees of freedom: mean 999, deviation 44.7
        assert len(counts) == 1000
        assert 800 < ((counts - 100) ** 2 / 100).sum() < 1200


def test_unsigned_ids_keep_all_bits(tmp_path):
    schema = FeatureSchema(
        (Table("h", 1000), Table("v", 5)), sparse=(SparseFeature("h", "h", encoding="hash"), SparseFeature("v", "v"))
    )
    big = pa.array([2**64 - 1, 2**63, 7], pa.uint64())
    table = pa.table({"h": big, "v": big})
    transforms = fit(table, schema, tmp_path)
    batch = transforms.to_batch(table)
    assert sorted(batch.sparse["v"].values().tolist()) == [1, 2, 3]
    assert same(transforms.rows_to_batch(table.to_pylist()), batch)


@pytest.mark.parametrize(
    "times",
    [
        pa.array([90, -1]),
        pa.array([90, -1], pa.timestamp("s")),
        pa.array([90_999, -1], pa.timestamp("ms", tz="Asia/Tokyo")),
        pa.array([90_999_999_999, -1], pa.timestamp("ns")),
    ],
)
def test_times_are_seconds_rounded_down(tmp_path, times):
    transforms = fit(pa.table({"t": times}), FeatureSchema(time="t"), tmp_path)
    assert transforms.to_batch(pa.table({"t": times})).time.tolist() == [90, -1]


@pytest.mark.parametrize("groups", [["a", None, "a"], [7, None, 7], [None, None, None]])
def test_a_null_group_is_0(tmp_path, groups):
    table = pa.table({"g": groups})
    found = fit(table, FeatureSchema(group_id="g"), tmp_path).to_batch(table).group_id.tolist()
    assert found[1] == 0
    assert found[0] == found[2]
    assert (found[0] != 0) == (groups[0] is not None)


def test_times_of_requests(tmp_path):
    transforms = fit(pa.table({"t": [1]}), FeatureSchema(time="t"), tmp_path)
    east = timezone(timedelta(hours=2))
    for given, seconds in (
        ("1970-01-01T00:01:30Z", 90),
        ("1970-01-01T02:01:30+02:00", 90),
        ("1970-01-01 00:01:30.700", 90),
        (datetime(1970, 1, 1, 2, 1, 30, tzinfo=east), 90),
        (date(1970, 1, 2), 86400),
        (90, 90),
    ):
        assert transforms.rows_to_batch([{"t": given}]).time.tolist() == [seconds], given


def test_padding_rows_are_empty(schema, transforms, make_table):
    table = make_table(5, seed=0)
    batch, padded = transforms.to_batch(table), transforms.to_batch(table, pad_to=8)
    assert len(padded) == 8
    for name in ("dense", "labels", "label_mask", "weight", "example_id", "group_id", "time"):
        assert torch.equal(getattr(padded, name)[:5], getattr(batch, name)), name
        fill = -1 if name == "example_id" else 0
        assert (getattr(padded, name)[5:] == fill).all(), name
    for name in ("sparse", "weighted", "sequences"):
        keyed = getattr(padded, name)
        assert keyed.stride() == 8
        assert torch.equal(keyed.values(), getattr(batch, name).values())
        assert not keyed.lengths().view(-1, 8)[:, 5:].any()
    assert padded.extra["vector"].shape == (8, 2)
    assert padded.extra["candidates"].lengths().tolist()[5:] == [0, 0, 0]


def test_a_schema_without_features_has_empty_parts(tmp_path):
    schema = FeatureSchema(labels=(Label("y"),))
    table = pa.table({"y": [True, False]})
    batch = fit(table, schema, tmp_path).to_batch(table, pad_to=3)
    assert batch.dense.shape == (3, 0)
    assert batch.sparse.keys() == []
    assert batch.sparse.stride() == 3
    assert batch.weighted is None
    assert batch.sequences is None
    assert batch.labels.tolist() == [[1], [0], [0]]


def test_saved_transforms_are_the_same(schema, transforms, make_table, tmp_path, train_path):
    transforms.save(tmp_path / "a")
    again = Transforms.fit(schema, ParquetLog(train_path, schema), seed=3)
    again.save(tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert [str(f) for f in files] == [
        "transforms.json",
        "vocabulary/items.parquet",
        "vocabulary/tags.parquet",
        "vocabulary/users.parquet",
    ]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    loaded = Transforms.load(tmp_path / "a")
    assert loaded.schema == schema
    assert same(loaded.to_batch(make_table(300, seed=6)), transforms.to_batch(make_table(300, seed=6)))
    with pytest.raises(UserError, match="no such file"):
        Transforms.load(tmp_path / "none")


def test_columns_of_one_vocabulary_have_one_type(tmp_path):
    schema = FeatureSchema((Table("t", 4),), sparse=(SparseFeature("a", "t"), SparseFeature("b", "t", max_length=3)))
    with pytest.raises(UserError) as error:
        fit(pa.table({"a": [1, 2], "b": [["1"], []]}), schema, tmp_path)
    path = tmp_path / "train.parquet"
    assert error.value.message == f"{path}: table 't' is shared by column 'a' of type integer and 'b' of type string"


def test_fitting_names_the_row_group_of_a_bad_value(tmp_path):
    schema = FeatureSchema(dense=(DenseFeature("x", transform="standardize"),))
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"x": [1.0, 2.0, float("nan")]}), path, row_group_size=2)
    with pytest.raises(UserError) as error:
        Transforms.fit(schema, ParquetLog(path, schema))
    assert error.value.message == f"{path}, row group 1, row 2: dense column 'x' holds nan, expected a finite number"
