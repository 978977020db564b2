from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from raysys.data.prepare import table
from raysys.data.prepare.table import prepare
from raysys.errors import UserError
from raysys.schema import FeatureSchema

SPLITS = ("train", "valid", "test")
ROWS = 50_000
SCHEMA = """\
tables: {item: {num_embeddings: 100}}
sparse: [{name: item, table: item}]
labels: [{name: click}]
time: at
"""


@pytest.fixture(scope="module")
def log():
    rng = np.random.default_rng(5)
    columns = {
        "item": rng.integers(0, 90, ROWS),
        "click": (rng.random(ROWS) < 0.25).astype(np.int8),
        "at": rng.integers(0, 1000, ROWS),
    }
    return pa.table({**columns, "words": [f"w{n % 7}" for n in range(ROWS)], "number": np.arange(ROWS)})


@pytest.fixture(scope="module")
def source(log, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "log.parquet"
    pq.write_table(log, path, row_group_size=7000)
    return path


@pytest.fixture
def schema(tmp_path):
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    return tmp_path / "schema.yaml"


def read(folder):
    return {split: pq.read_table(folder / f"{split}.parquet") for split in SPLITS}


def test_random_split_keeps_every_row_once_in_order_and_numbers_them(source, schema, log, tmp_path):
    prepare(tmp_path / "log", source=source, schema=schema)
    rows = read(tmp_path / "log")
    shares = [len(rows[split]) / ROWS for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=4 * np.sqrt(0.16 / ROWS))  # 4 standard deviations
    for part in rows.values():
        assert np.all(np.diff(part["number"].to_numpy()) > 0)
        assert part["example_id"].equals(part["number"])
    together = pa.concat_tables(rows.values()).sort_by("number")
    assert together.drop_columns("example_id").equals(log)  # columns that the schema does not name are kept as well
    assert FeatureSchema.load(tmp_path / "log" / "schema.yaml").example_id == "example_id"
    groups = pq.ParquetFile(tmp_path / "log" / "train.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)][:-1] == [16_384] * (
        groups.num_row_groups - 1
    )


def test_parquet_and_csv_files_and_folders_give_the_same_rows(source, schema, log, tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "parts").mkdir()
    pacsv.write_csv(log, tmp_path / "csv" / "log.csv")
    for n, first in enumerate(range(0, ROWS, 20_000)):
        pq.write_table(log.slice(first, 20_000), tmp_path / "parts" / f"part-{n}.parquet")
    (tmp_path / "parts" / "_SUCCESS").touch()
    for name, path in (("a", source), ("b", tmp_path / "csv"), ("c", tmp_path / "parts")):
        prepare(tmp_path / name, source=path, schema=schema)
    expected = read(tmp_path / "a")
    for name in ("b", "c"):
        found = read(tmp_path / name)
        for split in SPLITS:
            assert found[split].cast(expected[split].schema).equals(expected[split])


def test_the_split_of_a_row_depends_on_its_example_id_alone(source, schema, log, tmp_path):
    shuffled = log.take(np.random.default_rng(0).permutation(ROWS))
    pq.write_table(shuffled, tmp_path / "shuffled.parquet")
    schema.write_text(SCHEMA + "example_id: number\n")
    prepare(tmp_path / "a", source=source, schema=schema)
    prepare(tmp_path / "b", source=tmp_path / "shuffled.parquet", schema=schema)
    for split in SPLITS:
        numbers = [np.sort(read(tmp_path / name)[split]["number"].to_numpy()) for name in ("a", "b")]
        assert np.array_equal(*numbers)


def test_time_split_cuts_at_moments(source, schema, tmp_path):
    prepare(tmp_path / "log", source=source, schema=schema, split="time")
    times = {split: part["at"].to_numpy() for split, part in read(tmp_path / "log").items()}
    assert times["train"].max() < times["valid"].min()
    assert times["valid"].max() < times["test"].min()
    assert sum(map(len, times.values())) == ROWS


def test_negatives_of_train_are_kept_at_the_rate_that_the_schema_notes(source, schema, tmp_path):
    prepare(tmp_path / "all", source=source, schema=schema)
    prepare(tmp_path / "some", source=source, schema=schema, negative_keep_rate={"click": 0.3})
    everything, some = read(tmp_path / "all"), read(tmp_path / "some")
    for split in ("valid", "test"):
        assert some[split].equals(everything[split])
    clicks = everything["train"]["click"].to_numpy()
    negatives = np.count_nonzero(clicks == 0)
    kept = some["train"]["click"].to_numpy()
    assert np.count_nonzero(kept == 1) == np.count_nonzero(clicks == 1)
    share = np.count_nonzero(kept == 0) / negatives
    assert share == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / negatives))  # 4 standard deviations
    assert FeatureSchema.load(tmp_path / "some" / "schema.yaml").labels[0].negative_keep_rate == 0.3


def test_dropping_rows_that_another_label_needs_is_refused(source, schema, log, tmp_path):
    schema.write_text(SCHEMA.replace("[{name: click}]", "[{name: click}, {name: buy, required: false}]"))
    buy = np.where(log["click"].to_numpy() == 1, 0.0, np.nan)
    pq.write_table(log.append_column("buy", pa.array(buy, from_pandas=True)), tmp_path / "funnel.parquet")
    prepare(tmp_path / "funnel", source=tmp_path / "funnel.parquet", schema=schema, negative_keep_rate={"click": 0.5})
    pq.write_table(log.append_column("buy", pa.array(np.zeros(ROWS))), tmp_path / "both.parquet")
    with pytest.raises(
        UserError, match="label 'buy' has values where 'click' is 0, so that dropping such rows would distort it"
    ):
        prepare(tmp_path / "both", source=tmp_path / "both.parquet", schema=schema, negative_keep_rate={"click": 0.5})
    assert not (tmp_path / "both").exists()


def test_without_a_schema_one_is_inferred(source, tmp_path):
    prepare(tmp_path / "log", source=source)
    schema = FeatureSchema.load(tmp_path / "log" / "schema.yaml")
    assert schema.tasks == ("click",)
    assert "item" in [feature.name for feature in schema.sparse]


def test_the_catalogue_beside_the_schema_comes_along(source, schema, tmp_path):
    schema.write_text(SCHEMA + "catalogue: {key: item, file: things.parquet}\n")
    with pytest.raises(
        UserError, match=r"things.parquet: no such file\n  hint: the catalogue of .*schema.yaml is expected beside it"
    ):
        prepare(tmp_path / "log", source=source, schema=schema)
    pq.write_table(pa.table({"item": [1, 2]}), tmp_path / "things.parquet")
    prepare(tmp_path / "log", source=source, schema=schema)
    assert pq.read_table(tmp_path / "log" / "things.parquet")["item"].to_pylist() == [1, 2]


def test_few_rows_at_a_time_are_in_memory(source, schema, tmp_path, monkeypatch):
    waiting = []
    write = table.RowGroupWriter.write
    monkeypatch.setattr(
        table.RowGroupWriter,
        "write",
        lambda self, batch: (write(self, batch), waiting.append(sum(map(len, self.waiting)))),
    )
    prepare(tmp_path / "log", source=source, schema=schema)
    assert len(waiting) >= 3 * 8  # row groups of the source
    assert max(waiting) < 16_384


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"source": None},
            "table: source is not given\n  hint: name a Parquet or CSV file or folder: data.prepare.source=",
        ),
        ({"source": "nowhere.csv"}, "nowhere.csv: no such file or folder"),
        ({"split": "user_time"}, "table: split is 'user_time'\n  hint: did you mean 'time'?"),
        ({"text": SCHEMA.replace("time: at", "")} | {"split": "time"}, "schema.yaml names no time column"),
        (
            {"text": SCHEMA.replace("item, table", "itm, table")},
            "column 'itm' of SCHEMA is missing\n  hint: did you mean 'item'?",
        ),
        ({"text": SCHEMA + "example_id: words\n"}, "column 'words' has type string, expected an integer"),
        (
            {"text": SCHEMA.replace("{name: click}", "{name: click, negative_keep_rate: 0.5}")},
            "label 'click' has negative_keep_rate 0.5",
        ),
        (
            {"negative_keep_rate": {"clik": 0.5}},
            "negative_keep_rate names 'clik', which is no label\n  hint: did you mean 'click'?",
        ),
        ({"negative_keep_rate": {"click": 1.5}}, "negative_keep_rate of the binary label 'click' is 1.5"),
        ({"negative_keep_rate": {"click": 0.5, "buy": 0.5}}, "negative_keep_rate names several labels"),
    ],
)
def test_wrong_arguments_are_named(source, schema, tmp_path, arguments, message):
    arguments = {"source": source} | arguments
    schema.write_text(arguments.pop("text", SCHEMA))
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "log", schema=schema, **arguments)
    assert message.replace("SCHEMA", str(schema)) in str(error.value)
    assert not (tmp_path / "log").exists()


def test_a_column_of_the_source_is_not_overwritten_by_the_row_number(log, schema, tmp_path):
    pq.write_table(log.rename_columns(["item", "click", "at", "words", "example_id"]), tmp_path / "log.parquet")
    with pytest.raises(
        UserError, match=r"has a column 'example_id' that .* does not name\n  hint: add: example_id: example_id"
    ):
        prepare(tmp_path / "log", source=tmp_path / "log.parquet", schema=schema)
