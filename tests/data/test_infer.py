from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import yaml

from raysys.data import infer
from raysys.data.infer import embedding_dim, infer_schema, schema_text, table_size, write_schema
from raysys.errors import UserError
from raysys.schema import FeatureSchema

ROWS = 2000


@pytest.fixture(scope="module")
def log():
    """A log of impressions with a column for every rule."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, ROWS)
    events = [rng.integers(1, 300, n).tolist() for n in lengths]
    sizes = 1 + rng.integers(0, 4, ROWS)
    return pa.table(
        {
            "impression_id": np.arange(ROWS),
            "click": (rng.random(ROWS) < 0.1).astype(np.int8),
            "watch_time": pa.array(rng.exponential(5, ROWS), mask=rng.random(ROWS) < 0.5),
            "user_id": rng.integers(0, 400, ROWS),
            "itemId": rng.integers(1, 300, ROWS),
            "country": pa.array(rng.choice(["de", "fr", None], ROWS)),
            "category": pa.array(rng.choice(["a", "b"], ROWS)).dictionary_encode(),
            "is_mobile": rng.random(ROWS) < 0.5,
            "num_visits": np.floor(rng.pareto(1.0, ROWS)).astype(np.int64),
            "price": pa.array(rng.normal(10, 1, ROWS), mask=rng.random(ROWS) < 0.1),
            "position": rng.integers(0, 12, ROWS),
            "shown_at": pa.array(rng.integers(0, 10**9, ROWS), pa.timestamp("s")),
            "sample_weight": rng.random(ROWS),
            "history_item": events,
            "history_action": [[event % 3 for event in row] for row in events],
            "recent_items": [row[:3] for row in events],
            "tags": [[f"t{k}" for k in range(n)] for n in sizes],
            "content_vector": [[0.5, 1.0, -1.0]] * ROWS,
            "scores": [[0.5] * n for n in sizes],
            "comment": [f"what user number {n} wrote about it, in so many words and more" for n in range(ROWS)],
            "request": [f"r{n}" for n in range(ROWS)],
            "version": ["v1"] * ROWS,
            "nothing": pa.nulls(ROWS),
            "struct": pa.array([{"a": 1}] * ROWS),
        }
    )


@pytest.fixture(scope="module")
def path(log, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    pq.write_table(log, path)
    return path


@pytest.fixture(scope="module")
def schema(path):
    return infer_schema(path, labels=["click", "watch_time"])


def by_name(features):
    return {feature.name: feature for feature in features}


def test_labels_are_binary_or_regression_and_required_where_never_null(schema):
    labels = by_name(schema.labels)
    assert (labels["click"].kind, labels["click"].required) == ("binary", True)
    assert (labels["watch_time"].kind, labels["watch_time"].required) == ("regression", False)


def test_roles_are_found(schema):
    assert (schema.example_id, schema.group_id, schema.time, schema.weight) == (
        *("impression_id", "user_id", "shown_at", "sample_weight"),
    )


def test_numbers_are_dense_with_a_transform_for_their_shape(schema):
    dense = by_name(schema.dense)
    assert set(dense) == {"num_visits", "price"}
    assert (dense["num_visits"].transform, dense["num_visits"].missing_flag) == ("log_standardize", False)
    assert (dense["price"].transform, dense["price"].missing_flag) == ("standardize", True)


def test_ids_strings_flags_and_few_valued_integers_are_sparse(schema):
    sparse = by_name(schema.sparse)
    assert set(sparse) == {"user_id", "itemId", "country", "category", "is_mobile", "position", "tags"}
    assert {name: feature.side for name, feature in sparse.items() if feature.side != "context"} == {
        "user_id": "user",
        "itemId": "item",
        "position": "position",
    }
    assert (sparse["tags"].max_length, sparse["tags"].pooling, sparse["country"].max_length) == (4, "mean", 1)


def test_lists_of_equal_lengths_are_one_sequence_that_shares_the_table_of_its_single_id(schema):
    history, recent = schema.sequences
    assert (history.name, history.max_length) == ("history", 8)
    assert [(feature.name, feature.table) for feature in history.features] == [
        ("history_item", "item"),
        ("history_action", "history_action"),
    ]
    assert [(feature.name, feature.table) for feature in recent.features] == [("recent_items", "item")]
    assert by_name(schema.sparse)["itemId"].table == "item"


def test_vectors_are_extra_columns(schema):
    assert [(column.name, column.kind, column.width) for column in schema.extra] == [("content_vector", "vector", 3)]


def test_what_is_left_out_is_said_and_why(path):
    text = schema_text(path, labels=["click"])
    reasons = dict(line[4:].split(": ", 1) for line in text.splitlines() if line.startswith("#   "))
    assert reasons == {
        "comment": "text of 62 characters on average",
        "request": "has another value in each row",
        "version": "has one value only",
        "nothing": "has one value only",
        "struct": "of type struct<a: int64>",
        "scores": "numbers in lists of different lengths",
    }


def test_the_text_is_the_schema_with_a_fact_for_each_column(path, schema, tmp_path):
    write_schema(path, tmp_path / "schema.yaml", labels=["click", "watch_time"])
    assert FeatureSchema.load(tmp_path / "schema.yaml") == schema
    lines = (tmp_path / "schema.yaml").read_text().splitlines()
    assert lines[0] == f"# Inferred from {path} (2,000 rows). Edit it: names and values were all there was to go by."
    comments = {
        line.split("name: ")[1].split(",")[0].rstrip("}"): line.split("  # ")[1]
        for line in lines
        if "  # " in line and "name: " in line
    }
    assert comments["history_action"] == "3 distinct, 0 to 2, 0 to 8 long"
    assert comments["country"].startswith("2 distinct, 3")
    assert comments["country"].endswith("% null")
    assert comments["num_visits"].endswith(", whole numbers: if they are ids, move it to sparse")
    assert comments["itemId"] == "299 distinct, 1 to 299"
    assert set(comments) == {
        f.name for f in (*schema.dense, *schema.sparse, *schema.sequence_features, *schema.labels, *schema.extra)
    }


def test_a_label_is_guessed_by_name_or_asked_for(path, log, tmp_path):
    assert infer_schema(path).tasks == ("click",)
    pq.write_table(log.drop_columns("click"), tmp_path / "log.parquet")
    with pytest.raises(
        UserError, match=r"log.parquet: no column's name says that it is a label\n  hint: name it: --label "
    ):
        infer_schema(tmp_path / "log.parquet")
    with pytest.raises(UserError, match=r"log.parquet: no column 'clik'\n  hint: did you mean 'click'"):
        infer_schema(path, ["clik"])
    with pytest.raises(UserError, match=r"log.parquet: label 'country' is a string\n  hint: a number or true/false"):
        infer_schema(path, ["country"])


def test_other_columns_that_are_called_labels_are_no_features(path):
    schema = infer_schema(path, ["watch_time"])
    assert schema.tasks == ("watch_time",)
    assert "click" not in schema.columns()
    assert "#   click: its name says that it is a label" in schema_text(path, ["watch_time"])


def test_a_sample_says_so(path, monkeypatch):
    whole = infer.profile
    monkeypatch.setattr(infer, "profile", lambda path: whole(path, max_rows=500))
    text = schema_text(path, ["click"])
    assert "(500 of 2,000 rows were looked at: counts are estimates)" in text.splitlines()[0]
    assert "# about " in text


def test_huge_vocabularies_are_hashed_for_all_features_of_a_table(path, monkeypatch):
    monkeypatch.setattr(infer, "VOCABULARY_LIMIT", 200)
    schema = infer_schema(path, ["click"])
    assert {feature.name for feature in schema.id_features if feature.encoding == "hash"} == {
        *("user_id", "itemId", "history_item", "recent_items"),
    }


def test_ids_that_became_decimals_are_left_out(tmp_path):
    users, price = pa.array([1.0, None, 3.0] * 50), pa.array([2.0, 3.0, 1.0] * 50)
    pq.write_table(pa.table({"user_id": users, "price": price, "click": [0, 1, 1] * 50}), tmp_path / "log.parquet")
    text = schema_text(tmp_path / "log.parquet")
    assert "#   user_id: ids as floating-point numbers: write them as integers" in text
    schema = infer_schema(tmp_path / "log.parquet")
    assert [feature.name for feature in schema.dense] == ["price"]
    assert schema.group_id is None


def test_csv_gives_the_schema_of_the_same_columns_in_parquet(log, path, tmp_path):
    flat = log.select(["impression_id", "click", "user_id", "country", "num_visits", "price", "is_mobile", "comment"])
    pq.write_table(flat, tmp_path / "log.parquet")
    pacsv.write_csv(flat, tmp_path / "log.csv")
    parquet, csv = (infer_schema(tmp_path / f"log.{kind}").to_dict() for kind in ("parquet", "csv"))
    assert json.dumps(csv) == json.dumps(parquet)


def test_odd_names_survive_yaml(tmp_path):
    table = pa.table(
        {
            "y": [0, 1] * 50,
            "on": ["a", "b"] * 50,
            "a: b #": ["a", "b", "c", "d"] * 25,
            "1": [1.5, 2.5] * 50,
            "_": [[1, 2]] * 100,
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    content = yaml.safe_load(schema_text(tmp_path / "log.parquet"))
    schema = FeatureSchema.from_dict(content)
    assert schema.tasks == ("y",)
    assert [feature.name for feature in (*schema.dense, *schema.sparse)] == ["1", "on", "a: b #", "_"]


@pytest.mark.parametrize(("distinct", "size"), [(1, 3), (8, 10), (943, 1100), (1682, 1900), (100_000, 120_000)])
def test_table_sizes_hold_a_tenth_more_and_the_unseen_row(distinct, size):
    assert table_size(distinct) == size
    assert size > distinct * 1.1


@pytest.mark.parametrize(("distinct", "width"), [(2, 4), (40, 8), (1000, 12), (10**6, 52), (10**9, 64)])
def test_widths_grow_with_the_fourth_root(distinct, width):
    assert embedding_dim(distinct) == width
