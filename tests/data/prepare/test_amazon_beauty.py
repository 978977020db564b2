"""On made-up files in the layout of the published ones: these may not be passed on."""

from __future__ import annotations

import gzip
import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.config import compose, instantiate
from raysys.data.log import ParquetLog
from raysys.data.prepare.amazon_beauty import prepare
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.schema import FeatureSchema
from raysys.train.retrieval import count_baselines
from raysys.train.trainer import fit
from raysys.train.trainer import prepare as start

SPLITS = ("train", "valid", "test")
ITEMS = 40
USERS = 60


def write(folder, lines, items=range(1, ITEMS + 1), packed=True):
    """The two files; item i has the attributes 100 + i % 7 and 200 + i % 3."""
    folder.mkdir(exist_ok=True)
    text = "".join(f"{line}\n" for line in lines)
    if packed:
        (folder / "sequences.txt.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (folder / "sequences.txt").write_text(text)
    catalogue = {
        "item_id": pa.array(items, pa.int32()),
        "asin": [f"B{item:03}" for item in items],
        "title": [None if item == 3 else f"Soap {item}" for item in items],
        "attribute_ids": pa.array([[100 + item % 7, 200 + item % 3] for item in items], pa.list_(pa.int32())),
        "attributes": [["Brand", "Soap"] for _ in items],
    }
    pq.write_table(pa.table(catalogue), folder / "items.parquet")
    return folder


@pytest.fixture(scope="module")
def sequences():
    """Items of each user: 3 to 38 of them, some twice, as numbers of any size."""
    rng = np.random.default_rng(3)
    found = {}
    for user in range(1, USERS + 1):
        items = rng.choice(ITEMS, rng.integers(3, ITEMS - 1), replace=False) + 1
        found[user * 7] = [int(item) for item in (*items, items[0])]
    return found


@pytest.fixture(scope="module")
def source(sequences, tmp_path_factory):
    lines = [" ".join(map(str, (user, *items))) for user, items in sequences.items()]
    return write(tmp_path_factory.mktemp("beauty") / "source", lines)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "beauty"
    prepare(folder, source=source)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return {split: pq.read_table(folder / f"{split}.parquet").to_pylist() for split in SPLITS}


def test_the_last_item_tests_the_one_before_validates_and_those_from_the_second_on_train(rows, sequences):
    expected = {
        "train": [(user, item) for user, items in sequences.items() for item in items[1:-2]],
        "valid": [(user, items[-2]) for user, items in sequences.items()],
        "test": [(user, items[-1]) for user, items in sequences.items()],
    }
    for split in SPLITS:
        assert [(row["user_id"], row["item_id"]) for row in rows[split] if row["next"]] == expected[split]
    ids = sorted(row["example_id"] for split in SPLITS for row in rows[split])
    assert ids == list(range(2 * sum(len(items) - 1 for items in sequences.values())))


def test_a_history_is_what_the_user_had_before_and_never_the_item_itself_or_a_later_one(rows, sequences):
    for user, items in sequences.items():
        mine = [row for split in SPLITS for row in rows[split] if row["user_id"] == user]
        assert len(mine) == 2 * (len(items) - 1)
        for number, row in enumerate(sorted(mine, key=lambda row: row["example_id"])):
            position = 1 + number // 2
            assert row["next"] == (number + 1) % 2
            assert row["history_item"] == items[max(position - 20, 0) : position]
            assert row["history_length"] == position
    assert max(len(row["history_item"]) for row in rows["test"]) == 20


def test_no_history_of_train_or_valid_holds_an_item_that_is_held_back_for_a_later_split(rows, sequences):
    for user, items in sequences.items():
        train = [item for row in rows["train"] if row["user_id"] == user for item in row["history_item"]]
        assert set(train) <= set(items[:-2])
        valid = [item for row in rows["valid"] if row["user_id"] == user for item in row["history_item"]]
        assert set(valid) <= set(items[:-2])


def test_a_negative_stands_beside_its_positive_and_is_nowhere_in_the_sequence(rows, sequences):
    for split in SPLITS:
        positives, negatives = rows[split][::2], rows[split][1::2]
        for positive, negative in zip(positives, negatives, strict=True):
            same = ("user_id", "history_item", "history_length")
            assert [positive[name] for name in same] == [negative[name] for name in same]
            assert (positive["next"], negative["next"]) == (1, 0)
            assert negative["item_id"] not in sequences[negative["user_id"]]
            assert 1 <= negative["item_id"] <= ITEMS


def test_every_item_that_a_user_never_has_is_as_likely_to_be_a_negative(tmp_path):
    own = [2, 3, 9, 10, 1]
    lines = [" ".join(map(str, (user, *own))) for user in range(1, 2001)]
    prepare(tmp_path / "log", source=write(tmp_path / "source", lines, items=range(1, 11)))
    train = pq.read_table(tmp_path / "log" / "train.parquet").to_pylist()
    counts = Counter(row["item_id"] for row in train if not row["next"])
    assert sorted(counts) == [4, 5, 6, 7, 8]
    expected = 4000 / 5
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_attributes_are_those_of_the_item_and_the_catalogue_has_all_items(rows, folder):
    for row in (row for split in SPLITS for row in rows[split]):
        assert row["attribute_ids"] == [100 + row["item_id"] % 7, 200 + row["item_id"] % 3]
    items = pq.read_table(folder / "items.parquet").to_pylist()
    assert [item["item_id"] for item in items] == list(range(1, ITEMS + 1))
    assert items[2]["title"] is None
    schema = FeatureSchema.load(folder / "schema.yaml")
    assert all(feature.name in items[0] for feature in schema.sparse if feature.side == "item")
    assert (schema.group_id, schema.tasks, schema.time) == ("user_id", ("next",), None)
    assert {table.name: table.num_embeddings for table in schema.tables} == {"user": 61, "item": 41, "attribute": 11}


def test_what_is_written_depends_on_the_arguments_alone(tmp_path, source, sequences, folder):
    lines = [" ".join(map(str, (user, *items))) for user, items in sequences.items()]
    prepare(tmp_path / "again", source=write(tmp_path / "unpacked", lines, packed=False))
    prepare(tmp_path / "seed", source=source, seed=1)
    for split in SPLITS:
        same, other = (pq.read_table(tmp_path / name / f"{split}.parquet") for name in ("again", "seed"))
        first = pq.read_table(folder / f"{split}.parquet")
        assert same.equals(first)
        assert not other.equals(first)
        assert other["user_id"].equals(first["user_id"])


def test_the_folder_trains_as_it_is_and_needs_no_source_again(folder, source, capsys):
    schema = FeatureSchema.load(folder / "schema.yaml")
    transforms = Transforms.fit(schema, ParquetLog(folder / "train.parquet", schema))
    for split in SPLITS:
        batch = transforms.to_batch(ParquetLog(folder / f"{split}.parquet", schema).read())
        assert batch.labels.mean() == 0.5
    prepare(folder)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="was prepared with seed = 0, not 5"):
        prepare(folder, source=source, seed=5)


def test_train_rows_leaves_out_whole_users_of_all_splits(tmp_path, source):
    prepare(tmp_path / "all", source)
    prepare(tmp_path / "some", source, train_rows=500)
    tables = {name: pq.read_table(tmp_path / "some" / f"{name}.parquet") for name in SPLITS}
    users = [set(table["user_id"].to_pylist()) for table in tables.values()]
    assert 450 < len(tables["train"]) <= 500
    assert users[0] <= users[1] == users[2]
    assert len(users[1]) < USERS
    for name, table in tables.items():
        every = pq.read_table(tmp_path / "all" / f"{name}.parquet").to_pylist()
        positives = [row["item_id"] for row in every if row["next"] and row["user_id"] in users[1]]
        assert [row["item_id"] for row in table.to_pylist() if row["next"]] == positives
    with pytest.raises(UserError, match="train_rows is 1"):
        prepare(tmp_path / "none", source, train_rows=1)


def test_seen_is_all_that_the_user_had_before_and_the_history_its_end(rows, sequences):
    for row in (row for split in SPLITS for row in rows[split]):
        assert row["seen"] == sequences[row["user_id"]][: int(row["history_length"])]
        assert row["history_item"] == row["seen"][-20:]


def test_without_negatives_and_with_one_row_a_user_the_other_rows_stay_as_they_are(tmp_path, source, rows, sequences):
    prepare(tmp_path / "log", source, negatives=False, every_event=False, history_length=5)
    found = {split: pq.read_table(tmp_path / "log" / f"{split}.parquet").to_pylist() for split in SPLITS}
    trained = [user for user, items in sequences.items() if len(items) > 3]
    assert [row["user_id"] for row in found["train"]] == trained
    for split in SPLITS:
        whole = {row["example_id"]: row for row in rows[split]}
        for row in found[split]:
            assert row.pop("history_item") == row["seen"][-5:]
            assert row.items() <= whole[row["example_id"]].items()
            assert row["next"] == 1
    for row in found["train"]:
        assert [*row["seen"], row["item_id"]] == sequences[row["user_id"]][:-2]
    assert [len(found[split]) for split in ("valid", "test")] == [USERS, USERS]
    assert FeatureSchema.load(tmp_path / "log" / "schema.yaml").sequences[0].max_length == 5


def test_training_sequences_are_whole_whichever_rows_are_written(tmp_path, source, folder, sequences):
    """What counting baselines are fitted on: of every user what stands before the validation item."""
    prepare(tmp_path / "users", source, negatives=False, every_event=False)
    expected = Counter(item for items in sequences.values() for item in items[:-2] if len(items) > 3)
    for one in (folder, tmp_path / "users"):
        run = start(config(one, tmp_path))
        items = run.job.items()
        counted = count_baselines(run.job, items)
        assert dict(zip(items.keys.tolist(), counted.popularity.tolist(), strict=True)) == {
            key: expected[key] for key in items.keys.tolist()
        }


@pytest.mark.experiment
def test_counting_baselines_of_the_published_files(tmp_path, record_figure):
    source = beauty_source()
    prepare(tmp_path / "log", source, negatives=False)
    schema = FeatureSchema.load(tmp_path / "log" / "schema.yaml")
    train, valid, test = (pq.read_metadata(tmp_path / "log" / f"{split}.parquet").num_rows for split in SPLITS)
    users, items = (table.num_embeddings - 1 for table in schema.tables[:2])
    assert (users, items, train + valid + test + users) == (22_363, 12_101, 198_502)  # first items have no row
    run = start(config(tmp_path / "log", tmp_path, "train.max_steps=1"))
    found = fit(run, []).metrics["test"]
    expected = {"popularity": 0.0110, "last item (Markov)": 0.0665, "co-occurrence": 0.0566}
    for name, recall in expected.items():
        record_figure(f"recall@10 of {name}", found[f"next: {name}"]["recall@10"])
        assert found[f"next: {name}"]["recall@10"] == pytest.approx(recall, abs=0.0001)


@pytest.mark.experiment
def test_sasrec_learns_more_from_all_items_than_from_one_negative(tmp_path, record_figure):
    source, found = beauty_source(), {}
    for loss in ("full", "bce"):
        given = [f"data.folder={tmp_path}/log", f"data.prepare.source={source}", f"runs_folder={tmp_path}/runs"]
        settings = compose(["experiment=beauty_sasrec", *given, f"objective.loss={loss}", f"run_id={loss}"], "train")
        instantiate(settings["data"]["prepare"])
        found[loss] = fit(start(settings), []).metrics["test"]["next"]["recall@10"]
        record_figure(f"recall@10 of SASRec, loss {loss}", found[loss])
    assert found["full"] > found["bce"] + 0.015


def config(folder, runs, *overrides):
    given = [f"data.folder={folder}", "data.prepare=null", f"runs_folder={runs}/runs", "train.early_stopping=null"]
    return compose(["experiment=beauty_two_tower", *given, *overrides], "train")


def beauty_source():
    """The folder of the published files: they may not be passed on, so who has them says where."""
    source = os.environ.get("AMAZON_BEAUTY")
    if source is None:
        pytest.skip("AMAZON_BEAUTY=FOLDER names the folder with sequences.txt.gz and items.parquet")
    return source


@pytest.mark.parametrize(
    ("lines", "items", "message"),
    [
        (
            None,
            9,
            "amazon_beauty: source is not given\n  hint: data.prepare.source=FOLDER; expected are sequences.txt.gz",
        ),
        ([], None, "items.parquet: no such file\n  hint: expected are sequences.txt.gz (a line `user item item …`"),
        (["1 2 3 x"], 9, "sequences.txt.gz: not the file that was expected: "),
        (["1 2 3 4", "2 3 4"], 9, "sequences.txt.gz: line 2 has 2 items, expected 3 or more"),
        (["1 2 3 40"], 9, "sequences.txt.gz: item 40 is not in items.parquet"),
        (["1 2 3 1", "2 3 2 1"], 3, "amazon_beauty: a user has all items of items.parquet\n  hint: none is left"),
    ],
)
def test_errors_name_what_is_wrong(tmp_path, lines, items, message):
    source = None if lines is None else write(tmp_path / "source", lines, range(1, (items or 1) + 1))
    if items is None:
        (tmp_path / "source" / "items.parquet").unlink()
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "log", source=source)
    assert message in str(error.value)
    assert not (tmp_path / "log").exists()


def test_a_missing_file_or_column_is_named(tmp_path):
    source = write(tmp_path / "source", ["1 2 3 4"])
    table = pq.read_table(source / "items.parquet")
    pq.write_table(table.drop_columns("attribute_ids"), source / "items.parquet")
    with pytest.raises(UserError, match=r"items.parquet: column 'attribute_ids' is missing\n  hint: did you mean"):
        prepare(tmp_path / "log", source=source)
    pq.write_table(table, source / "items.parquet")
    (source / "sequences.txt.gz").unlink()
    with pytest.raises(UserError, match=r"sequences.txt.gz: no such file\n  hint: expected are"):
        prepare(tmp_path / "log", source=source)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        prepare(tmp_path / "log", source=tmp_path / "nowhere")
