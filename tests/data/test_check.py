from __future__ import annotations

from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.data import check as check_module
from raysys.data.check import check, format_findings
from raysys.errors import UserError
from raysys.schema import (
    DenseFeature,
    ExtraColumn,
    FeatureSchema,
    Label,
    Sequence,
    SequenceFeature,
    SparseFeature,
    Table,
)

SCHEMA = FeatureSchema(
    tables=(Table("user", 400), Table("item", 300), Table("slot", 10), Table("tag", 50)),
    dense=(DenseFeature("age"), DenseFeature("score", missing_flag=True)),
    sparse=(
        SparseFeature("user", "user"),
        SparseFeature("item", "item"),
        SparseFeature("slot", "slot", encoding="index"),
        SparseFeature("tags", "tag", max_length=4),
    ),
    sequences=(Sequence("history", (SequenceFeature("history_item", "item"),)),),
    labels=(Label("click"), Label("seconds", "regression", required=False)),
    example_id="row",
    time="at",
    weight="importance",
    extra=(ExtraColumn("teacher"), ExtraColumn("vector", "vector", 2)),
)
ROWS = {"train": 6000, "valid": 1500, "test": 1500}


@cache
def make(split, rows):
    """Columns without a fault."""
    rng = np.random.default_rng(sum(map(ord, split)))
    click = (rng.random(rows) < 0.2).astype(np.int8)
    first = {"train": 0, "valid": 10_000, "test": 20_000}[split]
    return {
        "age": pa.array(rng.normal(40, 10, rows)),
        "score": pa.array(rng.exponential(1, rows), mask=rng.random(rows) < 0.3),
        "user": pa.array([f"u{n}" for n in rng.integers(0, 300, rows)]),
        "item": pa.array(rng.integers(1000, 1200, rows)),
        "slot": pa.array(rng.integers(0, 10, rows)),
        "tags": pa.array([[f"t{k}" for k in rng.integers(0, 20, n)] for n in rng.integers(0, 4, rows)]),
        "history_item": pa.array([rng.integers(1000, 1200, n).tolist() for n in rng.integers(0, 5, rows)]),
        "click": pa.array(click),
        "seconds": pa.array(rng.exponential(9, rows), mask=click == 0),
        "row": pa.array(np.arange(first, first + rows)),
        "at": pa.array(rng.integers(10**9, 10**9 + 10**6, rows), pa.timestamp("s")),
        "importance": pa.array(rng.random(rows)),
        "teacher": pa.array(rng.random(rows)),
        "vector": pa.array([[1.0, 2.0]] * rows),
        "unused": pa.array(click),
    }


@pytest.fixture
def run(tmp_path):
    """Checks a log in which some columns of some splits were replaced: {split: {column: new values}}."""

    def run_check(changes=None, schema=SCHEMA, row_group_size=700):
        for split, rows in ROWS.items():
            columns = dict(make(split, rows))
            for name, change in (changes or {}).get(split, {}).items():
                columns[name] = change(columns[name]) if callable(change) else change
            present = {name: column for name, column in columns.items() if column is not None}
            pq.write_table(pa.table(present), tmp_path / f"{split}.parquet", row_group_size=row_group_size)
        schema.save(tmp_path / "schema.yaml")
        return check(tmp_path)

    return run_check


def found(result):
    return [(finding.severity, finding.column, finding.message) for finding in result.findings]


def numpy(change):
    return lambda column: pa.array(change(column.to_numpy(zero_copy_only=False).copy()))


def put(value, *rows):
    """Replaces the values of some rows."""

    def change(column):
        values = column.to_pylist()
        for row in rows:
            values[row] = value
        return pa.array(values, column.type if value is None or isinstance(value, int) else None)

    return change


def test_a_log_without_a_fault_has_no_findings(run):
    result = run()
    assert found(result) == []
    assert not result.has_errors
    assert result.rows == ROWS
    assert "nothing to mend" in format_findings(result)


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"valid": {"age": None}}, ("error", "age", "valid: column 'age' is missing (a dense feature)")),
        ({"test": {"slot": pa.array(["a"] * 1500)}}, ("error", "slot", "test: column 'slot' has type string, expected integers, or a list of them")),
        ({"train": {"age": put(float("nan"), 3, 4)}}, ("error", "age", "2 NaN or infinite values in train: write them as null")),
        ({"valid": {"teacher": put(float("inf"), 3)}}, ("error", "teacher", "1 NaN or infinite values in valid: write them as null")),
        ({"train": {"importance": put(-0.5, 7)}}, ("error", "importance", "weights in train go down to -0.5, but must not be negative")),
        ({"test": {"click": put(2, 7, 9)}}, ("error", "click", "2 values in test are neither 0 nor 1 (0 to 2)")),
        ({"valid": {"click": put(None, 7)}}, ("error", "click", "1 nulls in valid, but the label is required: required: false masks them")),
        ({"valid": {"seconds": pa.nulls(1500, pa.float64())}}, ("error", "seconds", "is null in every row of valid")),
        ({"train": {"click": pa.array(np.zeros(6000, np.int8))}}, ("error", "click", "is 0 in every row of train")),
        ({"test": {"click": pa.array(np.ones(1500, np.int8))}}, ("warning", "click", "is 1 in every row of test")),
        ({"test": {"slot": put(10, 7)}}, ("error", "slot", "ids from 0 to 10 in test, but table 'slot' has rows 0 to 9")),
        ({"train": {"row": put(5, 17, 18)}}, ("error", "row", "2 rows of train repeat an example id: they must be unique")),
        ({"valid": {"row": put(5, 17)}}, ("error", "row", "1 example ids are in train and in valid: rows leak")),
        ({"train": {"age": put(None, *range(300))}}, ("warning", "age", "5.0% null become 0: missing_flag: true tells the model")),
        ({"train": {"item": pa.array([7] * 6000)}}, ("warning", "item", "has one value only in train: leave it out")),
        ({"train": {"user": pa.array(["u"] * 6000)}}, ("warning", "user", "has one value only in train: leave it out")),
        ({"train": {"teacher": pa.array([0.5] * 6000)}}, ("warning", "teacher", "has one value only in train: leave it out")),
        ({"train": {"age": pa.nulls(6000, pa.float64())}}, ("warning", "age", "has one value only in train: leave it out")),
    ],
)  # fmt: skip
def test_each_fault_is_found(run, changes, finding):
    assert finding in found(run(changes))


def test_drift_is_found_by_its_size_in_numbers_ids_and_histories(run):
    older = numpy(lambda age: age + 15)
    others = pa.array([[1000 + k % 20] for k in range(1500)])
    result = run(
        {"valid": {"age": older, "history_item": others}, "test": {"item": numpy(lambda item: 1000 + item % 20)}}
    )
    assert [column for _, column, message in found(result) if "distributed otherwise" in message] == [
        *("age", "item", "history_item")
    ]
    by_name = {facts.column.name: facts for facts in result.facts}
    train, valid = make("train", 6000)["age"].to_numpy(), make("valid", 1500)["age"].to_numpy() + 15
    edges = np.quantile(train[:700], np.linspace(0, 1, 64), method="lower")  # of the first batch; no value repeats
    p, q = (np.bincount(np.searchsorted(edges, x, side="right"), minlength=65) for x in (train, valid))
    p, q = (p + 0.5) / (p + 0.5).sum(), (q + 0.5) / (q + 0.5).sum()
    assert by_name["age"].drift("valid") == pytest.approx(np.sum((p - q) * np.log(p / q)), rel=1e-9)


def test_the_share_of_unseen_ids_counts_rows_and_shares_tables(run):
    result = run({"valid": {"item": numpy(lambda item: np.where(np.arange(1500) < 600, 5, item))}})
    assert (
        "warning",
        "item",
        "40.0% of the ids in valid, 0.0% of the ids in test are not in train: their embeddings are not trained",
    ) in found(result)
    result = run(
        {
            "train": {
                "item": pa.array(np.arange(6000) % 5),
                "history_item": pa.array([[n % 200 + 1000] for n in range(6000)]),
            }
        }
    )
    by_name = {facts.column.name: facts for facts in result.facts}
    assert by_name["item"].splits["valid"].unseen_share == 0  # train has them in the history, which shares the table
    assert by_name["item"].distinct.count == 205


def test_columns_that_give_a_label_away_are_named_for_each_label(run):
    rng = np.random.default_rng(0)
    columns = make("train", 6000)
    click, seconds = columns["click"].to_numpy(), columns["seconds"].to_numpy(zero_copy_only=False)
    leaks = {
        "age": pa.array(np.where(click == 1, 1.0, -1.0) * rng.random(6000)),  # by its sign
        "score": pa.array(np.nan_to_num(seconds) * 2 + 1, mask=click == 0),  # by being null as well
        "tags": pa.array([["bought"] if yes else ["seen", "left"] for yes in click]),  # by its last tag
        "user": pa.array([f"u{n}" for n in range(6000)]),  # so many values say nothing of another row
    }
    messages = [
        message for _, column, message in found(run({"train": leaks}, row_group_size=6000)) if "predicts" in message
    ]
    assert messages == [
        "alone predicts click with AUC 1.000: is it known before the event?",
        "alone predicts click with AUC 1.000: is it known before the event?",
        "alone predicts seconds with R2 0.987: is it known before the event?",
        "alone predicts click with AUC 1.000: is it known before the event?",
    ]


def test_tables_that_are_too_small_are_named(run):
    user = pa.array([f"u{n % 500}" for n in range(6000)])
    findings = found(run({"train": {"user": user}}))
    assert (
        "warning",
        "table user",
        "has 400 rows: 101 of the 500 values in train, the rarest, share its first row",
    ) in findings


def test_facts_do_not_depend_on_how_the_rows_come(run, monkeypatch):
    tables = []
    for size in (700, 6000):
        result = run(row_group_size=size)
        tables.append(
            [(facts.column.name, facts.splits["valid"].nulls, facts.splits["train"].low) for facts in result.facts]
        )
    assert tables[0] == tables[1]
    monkeypatch.setattr(check_module, "EXAMPLE_IDS", 512)  # a sample of the example ids
    result = run({"train": {"row": numpy(lambda row: row // 2)}})
    (message,) = [message for _, column, message in found(result) if column == "row" and "train repeat" in message]
    assert message.startswith("about ")
    assert float(message.split()[1].replace(",", "")) == pytest.approx(
        3000, rel=4 / np.sqrt(128)
    )  # 4 standard deviations


def test_a_single_table_and_one_without_a_schema(run, tmp_path):
    run()
    result = check(tmp_path / "train.parquet", SCHEMA)
    assert result.rows == {"train": 6000}
    assert found(result) == []
    (tmp_path / "schema.yaml").unlink()
    with pytest.raises(UserError, match=r"schema.yaml: no such schema\n  hint: make a first one with: raysys schema"):
        check(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        check(tmp_path / "nowhere", SCHEMA)


def test_an_empty_split_is_an_error(run, tmp_path):
    run()
    pq.write_table(pq.read_table(tmp_path / "valid.parquet").slice(0, 0), tmp_path / "valid.parquet")
    assert ("error", "", "valid has no rows") in found(check(tmp_path))


def test_the_printed_table_has_a_line_for_each_column_and_errors_come_first(run):
    result = run({"train": {"age": put(None, *range(300))}, "test": {"slot": put(10, 7)}})
    text = format_findings(result)
    lines = text.splitlines()
    assert lines[0].endswith(": 6,000 train, 1,500 valid, 1,500 test rows")
    header = lines[2].split("  ")
    assert [cell.strip() for cell in header if cell] == [
        *("column", "role", "null", "distinct", "range", "unseen valid", "unseen test", "PSI valid", "PSI test"),
        *("score click", "score seconds"),
    ]
    assert [line.split()[0] for line in lines[3 : lines.index("", 3)]] == [facts.column.name for facts in result.facts]
    assert "unused" not in text
    item = next(line for line in lines if line.startswith("item "))
    assert item.split()[1:8] == ["vocab", "in", "item", "0.0%", "200", "1000", "to"]
    assert [line.split(":")[0] for line in lines if ": " in line][1:4] == ["error", "warning", "warning"]
