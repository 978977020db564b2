from __future__ import annotations

import copy
import subprocess
import sys

import pytest

from raysys.errors import UserError
from raysys.schema import DenseFeature, FeatureSchema, Label, SparseFeature, Table

CONTENT = {
    "tables": {
        "items": {"num_embeddings": 100, "embedding_dim": 8},
        "users": {"num_embeddings": 50, "embedding_dim": 16},
    },
    "dense": [{"name": "age", "side": "user", "missing_flag": True}, {"name": "price", "transform": "log"}],
    "sparse": [
        {"name": "user", "table": "users", "side": "user", "encoding": "hash"},
        {"name": "item", "table": "items", "side": "item"},
        {"name": "basket", "table": "items", "max_length": 5, "weights": "amounts", "pooling": "mean"},
    ],
    "sequences": [{"name": "history", "max_length": 20, "features": [{"name": "seen", "table": "items"}]}],
    "labels": [{"name": "click"}, {"name": "stars", "kind": "regression", "required": False, "weight": "trust"}],
    "extra": [{"name": "position", "kind": "int"}],
    "example_id": "id",
    "group_id": "user",
    "time": "when",
    "weight": "share",
    "catalogue": {"key": "item", "file": "items.parquet"},
}


def test_a_yaml_file_and_back(tmp_path):
    schema = FeatureSchema.from_dict(CONTENT)
    assert schema.to_dict() == CONTENT
    schema.save(tmp_path / "schema.yaml")
    loaded = FeatureSchema.load(tmp_path / "schema.yaml")
    assert loaded == schema
    assert loaded.source == f"{tmp_path}/schema.yaml"
    assert loaded.fingerprint() == schema.fingerprint()
    assert list(loaded.to_dict()["tables"]) == ["items", "users"], "the order of tables is kept"


def test_the_fingerprint_changes_with_the_content():
    changed = copy.deepcopy(CONTENT)
    changed["dense"][0]["default"] = 1.0
    assert FeatureSchema.from_dict(changed).fingerprint() != FeatureSchema.from_dict(CONTENT).fingerprint()


def test_what_the_schema_says():
    schema = FeatureSchema.from_dict(CONTENT)
    assert schema.tasks == ("click", "stars")
    assert schema.dense_width == 3
    assert [feature.name for feature in schema.unweighted] == ["user", "item"]
    assert [feature.name for feature in schema.weighted] == ["basket"]
    assert [feature.name for feature in schema.id_features] == ["user", "item", "basket", "seen"]
    assert schema.table("users") == Table("users", 50, 16)
    assert schema.encoding("users") == "hash"
    assert schema.encoding("items") == "vocab"
    features = ["age", "price", "user", "item", "basket", "amounts", "seen", "position"]
    assert schema.columns() == [*features, "click", "stars", "trust", "share", "id", "when"]
    assert schema.columns(labels=False) == [*features, "id", "when"]


def test_the_schema_needs_no_torch():
    code = "import sys, raysys.schema, raysys.errors, raysys.data.log; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


MISTAKES = [
    ("dence", [], "s: unknown key 'dence'", "did you mean 'dense'?"),
    ("dense", "age", "s: dense is 'age', expected a list", None),
    (
        "dense",
        ["age"],
        "s: dense: expected a mapping with keys name, side, transform, default, missing_flag, found 'age'",
        None,
    ),
    ("dense", [{"name": "a", "side": "usr"}], "s: 'a' has side 'usr'", "did you mean 'user'?"),
    ("dense", [{"name": "a", "side": None}], "s: 'a' has side None", "did you mean 'context'?"),
    ("dense", [{"name": "a", "transform": "logg"}], "s: 'a' has transform 'logg'", "did you mean 'log'?"),
    ("dense", [{"name": "a", "default": float("nan")}], "s: 'a' has default nan", "give a finite number"),
    ("dense", [{"name": "a"}, {"name": "a"}], "s: feature 'a' is named twice", None),
    ("dense", [{"name": "item"}], "s: feature 'item' is named twice", None),
    (
        "dense",
        [{"name": "a", "width": 3}],
        "s: dense 'a': unknown key 'width'",
        "known: default, missing_flag, name, side, transform",
    ),
    ("sparse", [{"name": "a"}], "s: sparse 'a': missing key 'table'", None),
    (
        "sparse",
        [{"name": "a", "table": "itms"}],
        "s: feature 'a' names table 'itms', which does not exist",
        "did you mean 'items'?",
    ),
    (
        "sparse",
        [{"name": "a", "table": "items", "encoding": "hsh"}],
        "s: 'a' has encoding 'hsh'",
        "did you mean 'hash'?",
    ),
    ("sparse", [{"name": "a", "table": "items", "pooling": "max"}], "s: 'a' has pooling 'max'", "did you mean 'mean'?"),
    (
        "sparse",
        [{"name": "a", "table": "items", "max_length": 0}],
        "s: 'a' has max_length 0",
        "a positive whole number is expected",
    ),
    (
        "sparse",
        [{"name": "a", "table": "items", "max_length": "5"}],
        "s: sparse 'a': max_length is '5', expected a whole number",
        None,
    ),
    (
        "sparse",
        [{"name": "a", "table": "items", "encoding": "hash"}],
        "s: feature 'seen' has encoding 'vocab', but table 'items' is already used with 'hash'",
        "features that share a table share its encoding",
    ),
    ("sparse", [], "s: table 'users' is used by no feature", "remove it or name it in a feature"),
    ("sequences", [{"name": "h", "features": "seen"}], "s: sequence 'h': features is 'seen', expected a list", None),
    ("sequences", [{"name": "h", "features": []}], "s: sequence 'h' has no features", "name at least one column"),
    ("sequences", [{"name": "h", "features": [{"name": "a"}]}], "s: sequence 'h' 'a': missing key 'table'", None),
    ("tables", ["items"], "s: tables is ['items'], expected a mapping from table name to its num_embeddings", None),
    (
        "tables",
        {"items": 5},
        "s: table 'items': expected a mapping with keys name, num_embeddings, embedding_dim, found 5",
        None,
    ),
    (
        "tables",
        {"items": {"num_embeddings": 0}},
        "s: table 'items' has num_embeddings 0",
        "a positive whole number is expected",
    ),
    (
        "tables",
        {"items": {"num_embeddings": 2**33}},
        f"s: table 'items' has num_embeddings {2**33}",
        "at most 4294967296 (2**32) are supported",
    ),
    (
        "labels",
        [{"name": "age"}],
        "s: label 'age' is also a feature",
        "a label as a feature gives the answer away: remove it",
    ),
    (
        "labels",
        [{"name": "amounts"}],
        "s: label 'amounts' is also a feature",
        "a label as a feature gives the answer away: remove it",
    ),
    ("labels", [{"name": "a"}, {"name": "a"}], "s: label 'a' is named twice", None),
    ("labels", [{"name": "a", "kind": "count"}], "s: 'a' has kind 'count'", "known: binary, regression"),
    (
        "labels",
        [{"name": "a", "negative_keep_rate": 0}],
        "s: label 'a' has negative_keep_rate 0",
        "a rate in (0, 1] is expected",
    ),
    ("extra", [{"name": "a", "kind": "vectr"}], "s: 'a' has kind 'vectr'", "did you mean 'vector'?"),
    ("extra", [{"name": "a", "width": 0}], "s: 'a' has width 0", "a positive whole number is expected"),
    ("catalogue", {"file": "items.parquet"}, "s: catalogue: missing key 'key'", None),
    ("time", ["when"], "s: time is ['when'], expected the name of a column", None),
]


@pytest.mark.parametrize(("key", "value", "message", "hint"), MISTAKES)
def test_mistakes_are_named(key, value, message, hint):
    with pytest.raises(UserError) as error:
        FeatureSchema.from_dict({**CONTENT, key: value}, source="s")
    assert error.value.message == message
    assert error.value.hint == hint


def test_a_schema_made_in_code_is_checked_too():
    with pytest.raises(UserError, match=r"^schema: feature 'x' names table 't', which does not exist"):
        FeatureSchema(sparse=(SparseFeature("x", "t"),))
    with pytest.raises(UserError, match=r"^schema: label 'x' is also a feature"):
        FeatureSchema(dense=(DenseFeature("x"),), labels=(Label("x"),))


def test_files_that_are_no_schema(tmp_path):
    path = tmp_path / "schema.yaml"
    with pytest.raises(UserError) as error:
        FeatureSchema.load(path)
    assert error.value.message == f"{path}: no such schema"
    assert error.value.hint == "make a first one with: raysys schema LOG.parquet"
    path.write_text("dense: [")
    with pytest.raises(UserError) as error:
        FeatureSchema.load(path)
    assert error.value.message.startswith(f"{path}: not valid YAML: ")
    assert "\n" not in error.value.message
    for text, found in (("", "NoneType"), ("- dense", "list")):
        path.write_text(text)
        with pytest.raises(UserError) as error:
            FeatureSchema.load(path)
        assert error.value.message == f"{path}: expected a mapping, found {found}"
