"""On a tiny log everything is compared with its definition, row by row; on the real one what that cannot show."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from raysys.data.prepare.movielens import prepare
from raysys.errors import UserError
from raysys.schema import FeatureSchema

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module", params=["random", "user_time", "global_time"])
def small(request, small_movielens, tmp_path_factory):
    """The prepared tiny log with each split: its rows by example id, with `split`."""
    folder = tmp_path_factory.mktemp("prepared") / "small"
    prepare(folder, source=small_movielens, split=request.param)
    rows = [
        row | {"split": split} for split in SPLITS for row in pq.read_table(folder / f"{split}.parquet").to_pylist()
    ]
    return folder, sorted(rows, key=lambda row: row["example_id"])


@pytest.fixture(scope="module")
def real(tmp_path_factory, downloads):
    """MovieLens-100K itself, with the random split."""
    folder = tmp_path_factory.mktemp("real") / "movielens"
    prepare(folder, downloads=downloads)
    return folder


def past_of(rows, row, key="user_id"):
    """Training rows with the same key at a strictly earlier time, oldest first."""
    found = [
        other for other in rows if other["split"] == "train" and other[key] == row[key] and other["time"] < row["time"]
    ]
    return sorted(found, key=lambda other: (other["time"], other["example_id"]))


def test_every_rating_is_in_exactly_one_split_as_it_came(small, small_movielens):
    _, rows = small
    lines = (small_movielens / "ml-100k.inter").read_text().splitlines()[1:]
    found = [f"{row['user_id']}\t{row['item_id']}\t{row['rating']:.0f}\t{row['time']}" for row in rows]
    assert found == lines
    assert [row["example_id"] for row in rows] == list(range(len(lines)))
    assert all(row["like"] == (row["rating"] >= 4) for row in rows)


def test_histories_hold_earlier_training_rows_of_the_user_and_nothing_else(small):
    _, rows = small
    for row in rows:
        past = past_of(rows, row)
        assert row["history_item"] == [other["item_id"] for other in past]
        assert row["history_rating"] == [other["rating"] for other in past]
        assert row["liked_item"] == [other["item_id"] for other in past if other["like"]]
        assert row["disliked_item"] == [other["item_id"] for other in past if not other["like"]]
        # Said once more without the helper: a user rates an item once, so that the row itself would show.
        assert row["item_id"] not in row["history_item"]


def test_no_history_shows_the_same_second_the_future_or_a_row_that_is_held_back(small):
    _, rows = small
    of_pair = {(row["user_id"], row["item_id"]): row for row in rows}
    ties = held_back = 0
    for row in rows:
        shown = [of_pair[row["user_id"], item] for item in row["history_item"]]
        assert all(other["time"] < row["time"] and other["split"] == "train" for other in shown)
        mine = [other for other in rows if other["user_id"] == row["user_id"]]
        ties += sum(other["time"] == row["time"] and other is not row for other in mine)
        held_back += sum(other["time"] < row["time"] and other["split"] != "train" for other in mine)
    assert ties > 100  # there was something to leave out
    assert held_back > 10


def test_statistics_of_the_past_follow_their_definition(small):
    _, rows = small
    for row in rows:
        user, item = past_of(rows, row), past_of(rows, row, "item_id")
        row["exact_user_mean"] = (sum(other["rating"] for other in user) + 5 * 3.5) / (len(user) + 5)
        row["exact_item_mean"] = (sum(other["rating"] for other in item) + 5 * 3.5) / (len(item) + 5)
    for row in rows:
        user, item = past_of(rows, row), past_of(rows, row, "item_id")
        above = [other["rating"] - other["exact_item_mean"] for other in user]
        shared = [len(set(row["genres"]) & set(other["genres"])) for other in user]
        recent = [other["rating"] for other in user[-20:]]
        expected = {
            "user_ratings": len(user),
            "user_mean": row["exact_user_mean"],
            "user_recent_mean": (sum(recent) + 2 * 3.5) / (len(recent) + 2),
            "user_bias": sum(above) / (len(user) + 3),
            "item_ratings": len(item),
            "item_mean": row["exact_item_mean"],
            "item_bias": sum(other["rating"] - other["exact_user_mean"] for other in item) / (len(item) + 3),
            "user_genre_bias": sum(a * s for a, s in zip(above, shared, strict=True)) / (sum(shared) + 3),
        }
        assert {name: row[name] for name in expected} == pytest.approx(
            expected, rel=1e-6, abs=1e-6
        )  # stored as float32


def test_a_held_back_label_changes_no_row_but_its_own(tmp_path, small_movielens, write_movielens):
    lines = [
        [int(value) for value in line.split("\t")]
        for line in (small_movielens / "ml-100k.inter").read_text().split("\n")[1:-1]
    ]
    prepare(tmp_path / "before", source=small_movielens)
    test_ids = pq.read_table(tmp_path / "before" / "test.parquet")["example_id"].to_pylist()
    for row in test_ids:
        lines[row][2] = 6 - lines[row][2]
    prepare(tmp_path / "after", source=write_movielens(tmp_path / "changed", [tuple(line) for line in lines]))
    for split in (*SPLITS, "items"):
        before, after = (pq.read_table(tmp_path / name / f"{split}.parquet") for name in ("before", "after"))
        own = ["like", "rating", "stars"] if split == "test" else []
        assert before.drop_columns(own).equals(after.drop_columns(own))


def test_the_catalogue_has_the_item_features_as_after_training(small):
    folder, rows = small
    items = {item["item_id"]: item for item in pq.read_table(folder / "items.parquet").to_pylist()}
    schema = FeatureSchema.load(folder / "schema.yaml")
    features = [f.name for f in (*schema.dense, *schema.sparse) if f.side == "item"]
    assert features
    assert all(name in item for name in features for item in items.values())
    for number, item in items.items():
        ratings = [row["rating"] for row in rows if row["split"] == "train" and row["item_id"] == number]
        assert item["item_ratings"] == len(ratings)
        assert item["item_mean"] == pytest.approx((sum(ratings) + 17.5) / (len(ratings) + 5), rel=1e-6)
        assert item["title"] == f'The "{number}'


def test_neither_the_rating_nor_a_sequence_that_was_not_asked_for_is_in_the_schema(small, tmp_path, small_movielens):
    columns = FeatureSchema.load(small[0] / "schema.yaml").columns()
    assert "rating" not in columns
    assert [name for name in columns if name in ("liked_item", "disliked_item", "history_item")] == [
        "liked_item",
        "disliked_item",
    ]
    prepare(tmp_path / "history", source=small_movielens, sequences=["history"])
    schema = FeatureSchema.load(tmp_path / "history" / "schema.yaml")
    assert [feature.name for feature in schema.sequence_features] == ["history_item", "history_rating"]
    assert "rating" in [table.name for table in schema.tables]


def test_history_length_is_what_the_schema_has_a_model_read(tmp_path, small_movielens):
    prepare(tmp_path / "log", small_movielens, history_length=3)
    assert [sequence.max_length for sequence in FeatureSchema.load(tmp_path / "log/schema.yaml").sequences] == [3, 3]
    lengths = pc.list_value_length(pq.read_table(tmp_path / "log/train.parquet")["liked_item"])
    assert pc.max(lengths).as_py() > 3


def test_dense_features_are_those_that_are_asked_for(tmp_path, small_movielens):
    prepare(tmp_path / "log", small_movielens, dense=["age", "item_mean"])
    schema = FeatureSchema.load(tmp_path / "log/schema.yaml")
    assert [feature.name for feature in schema.dense] == ["age", "item_mean"]
    assert "user_genre_bias" in pq.read_schema(tmp_path / "log/train.parquet").names
    with pytest.raises(UserError, match="dense has 'item_maen'"):
        prepare(tmp_path / "other", small_movielens, dense=["item_maen"])


def test_a_finished_folder_is_left_alone(tmp_path, small_movielens, capsys):
    prepare(tmp_path / "log", source=small_movielens)
    assert capsys.readouterr().out == f"{tmp_path / 'log'}: prepared (640 train, 80 valid, 80 test rows)\n"
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "log").iterdir()}
    prepare(tmp_path / "log", source=small_movielens)
    assert capsys.readouterr().out == f"{tmp_path / 'log'}: already prepared\n"
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "log").iterdir()} == before
    with pytest.raises(UserError, match=r"log: was prepared with seed = 0, not 1\n  hint: name another folder"):
        prepare(tmp_path / "log", source=small_movielens, seed=1)


def test_another_source_is_noticed(tmp_path, small_movielens, write_movielens):
    prepare(tmp_path / "log", source=small_movielens)
    other = write_movielens(tmp_path / "other", [(1, 2, 5, 100)])
    with pytest.raises(UserError, match="log: was prepared with source = "):
        prepare(tmp_path / "log", source=other)


def test_an_interrupted_preparation_leaves_nothing_and_harms_nothing(tmp_path, small_movielens, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FeatureSchema, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "log", source=small_movielens)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="log: exists and is no prepared data set"):
        prepare(tmp_path / "log", source=small_movielens)
    assert (tmp_path / "log" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "by_user"}, "movielens: split has 'by_user'\n  hint: did you mean 'user_time'?"),
        ({"sequences": ["likes"]}, "movielens: sequences has 'likes'\n  hint: did you mean 'liked'?"),
        (
            {"source": "SOURCE"},
            "ml-100k.inter: no such file\n  hint: a folder with ml-100k.inter, ml-100k.item and "
            "ml-100k.user is expected, as in recbole==1.2.1; without source= it is fetched",
        ),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    if "source" in arguments:
        arguments = {"source": tmp_path / "empty"}
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "log", **arguments)
    assert message in str(error.value)
    assert not (tmp_path / "log").exists()


def test_a_log_too_small_for_its_split_is_refused(tmp_path, write_movielens):
    source = write_movielens(tmp_path / "source", [(1, item, 4, 100) for item in range(1, 6)])
    with pytest.raises(UserError, match="movielens: split 'global_time' leaves no row for train"):
        prepare(tmp_path / "log", source=source, split="global_time")


def test_the_real_log_is_complete_and_every_vocabulary_fits_its_table(real):
    rows = {split: pq.read_table(real / f"{split}.parquet") for split in SPLITS}
    assert {split: len(table) for split, table in rows.items()} == {"train": 80_000, "valid": 10_000, "test": 10_000}
    log = pa.concat_tables(rows.values())
    assert np.array_equal(np.sort(log["example_id"].to_numpy()), np.arange(100_000))
    assert pc.mean(log["like"]).as_py() == pytest.approx(0.55375, abs=1e-12)
    assert json.loads((real / "prepared.json").read_text())["rows"] == {
        split: len(table) for split, table in rows.items()
    }
    schema = FeatureSchema.load(real / "schema.yaml")
    for feature in schema.sparse:
        values = pc.list_flatten(log[feature.name]) if pa.types.is_list(log[feature.name].type) else log[feature.name]
        assert pc.count_distinct(values).as_py() < schema.table(feature.table).num_embeddings
    for feature in schema.dense:
        assert np.isfinite(log[feature.name].to_numpy()).all()
    lengths = pc.list_value_length(log["liked_item"])
    assert pc.max(lengths).as_py() == 50
    assert pq.ParquetFile(real / "train.parquet").metadata.num_row_groups == 10


def test_the_real_histories_are_strictly_earlier_training_rows(real):
    train = pq.read_table(real / "train.parquet")
    keys = train["user_id"].to_numpy() * 10_000 + train["item_id"].to_numpy()
    order = np.argsort(keys)
    for split in SPLITS:
        rows = pq.read_table(real / f"{split}.parquet")
        rows = rows.take(np.arange(0, len(rows), 5))
        for column, low, high in (("liked_item", 4, 5), ("disliked_item", 1, 3), ("history_item", 1, 5)):
            parent = pc.list_parent_indices(rows[column]).to_numpy()
            shown = rows["user_id"].to_numpy()[parent] * 10_000 + pc.list_flatten(rows[column]).to_numpy()
            position = order[np.minimum(np.searchsorted(keys, shown, sorter=order), len(keys) - 1)]
            assert np.array_equal(keys[position], shown)  # every event is a row of train
            assert (train["time"].to_numpy()[position] < rows["time"].to_numpy()[parent]).all()
            stars = train["rating"].to_numpy()[position]
            assert low <= stars.min()
            assert stars.max() <= high
