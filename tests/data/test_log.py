from __future__ import annotations

from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.data.log import ParquetLog, split_path
from raysys.errors import UserError
from raysys.schema import DenseFeature, FeatureSchema, Label, SparseFeature, Table

SCHEMA = FeatureSchema(
    (Table("t", 10),),
    dense=(DenseFeature("x"),),
    sparse=(SparseFeature("user_id", "t", encoding="index"),),
    labels=(Label("click"), Label("buy", required=False)),
)


def rows(start: int, stop: int) -> pa.Table:
    numbers = range(start, stop)
    columns = {
        "x": [float(n) for n in numbers],
        "user_id": [n % 10 for n in numbers],
        "click": [n % 2 for n in numbers],
    }
    return pa.table(
        {**columns, "buy": pa.array([None if n % 3 else 1 for n in numbers], pa.int8()), "rest": list(numbers)}
    )


def write(path: Path, table: pa.Table, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "train.parquet", rows(0, 100), row_group_size=40)


def error_of(call: object, *arguments: object, **keywords: object) -> UserError:
    with pytest.raises(UserError) as error:
        call(*arguments, **keywords)
    return error.value


def test_a_file_is_read_in_order(path):
    log = ParquetLog(path, SCHEMA)
    assert log.num_rows == 100
    assert log.read(["rest"])["rest"].to_pylist() == list(range(100))
    assert log.read().column_names == ["x", "user_id", "click", "buy"]
    batches = list(log.iter_batches(["rest"], batch_size=25))
    assert [len(batch) for batch in batches] == [25, 15, 25, 15, 20]
    assert [n for batch in batches for n in batch["rest"].to_pylist()] == list(range(100))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (39, 41), (40, 80), (55, 60), (10, 100), (99, 100), (50, 50)])
def test_a_range_of_rows_is_read_with_where_it_comes_from(tmp_path, start, stop):
    folder = tmp_path / "train"
    write(folder / "a.parquet", rows(0, 50), row_group_size=20)
    write(folder / "b.parquet", rows(50, 50))
    write(folder / "c.parquet", rows(50, 100), row_group_size=20)
    log = ParquetLog(folder, SCHEMA)
    found = list(log.scan(start, stop, ["rest"], batch_size=7))
    assert [n for _, batch in found for n in batch["rest"].to_pylist()] == list(range(start, stop))
    for source, batch in found:
        first = batch["rest"][0].as_py()
        file = "a.parquet" if first < 50 else "c.parquet"
        assert source.log_row == first
        assert source.at(0) == f"{folder}/{file}, row group {first % 50 // 20}, row {first % 50}"
    assert list(log.row_groups()) == [(0, 20), (20, 40), (40, 50), (50, 50), (50, 70), (70, 90), (90, 100)]


def test_a_folder_is_read_in_the_order_of_paths_without_what_writers_leave_behind(tmp_path):
    write(tmp_path / "train" / "day=2" / "a.parquet", rows(20, 30))
    write(tmp_path / "train" / "day=1" / "b.parquet", rows(10, 20))
    write(tmp_path / "train" / "day=1" / "a.parquet", rows(0, 10))
    write(tmp_path / "train" / "_temporary" / "a.parquet", rows(90, 99))
    write(tmp_path / "train" / ".hidden.parquet", rows(90, 99))
    (tmp_path / "train" / "_SUCCESS").touch()
    for path in (tmp_path / "train", f"{tmp_path}/train/", f"file://{tmp_path}/train"):
        assert ParquetLog(path, SCHEMA).read(["rest"])["rest"].to_pylist() == list(range(30))


def test_a_log_behind_fsspec(path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/raysys/data/train/a.parquet", path.read_bytes())
    memory.pipe("/raysys/data/test.parquet", path.read_bytes()[:-100])
    assert split_path("memory://raysys/data", "train") == "memory://raysys/data/train"
    log = ParquetLog("memory://raysys/data/train", SCHEMA)
    assert log.read(["rest"])["rest"].to_pylist() == list(range(100))
    error = error_of(ParquetLog, split_path("memory://raysys/data/", "test"), SCHEMA)
    assert error.message.startswith("memory://raysys/data/test.parquet: not a whole Parquet file (")
    memory.rm("/raysys", recursive=True)


def test_integers_and_fractions_may_mix_between_files(tmp_path):
    write(tmp_path / "a.parquet", rows(0, 3).set_column(0, "x", pa.array([1, 2, 3])))
    write(tmp_path / "b.parquet", rows(3, 6))
    assert ParquetLog(tmp_path, SCHEMA).read()["x"].to_pylist() == [1, 2, 3, 3, 4, 5]


def test_labels_are_not_needed_for_scoring(path):
    table = pq.read_table(path).drop_columns(["click", "buy"])
    write(path, table)
    log = ParquetLog(path, SCHEMA, labels=False)
    assert log.read().column_names == ["x", "user_id"]
    error = error_of(ParquetLog, path, SCHEMA)
    assert error.message == f"{path}: column 'click' is missing (a label)"


def test_split_path(tmp_path):
    write(tmp_path / "train.parquet", rows(0, 1))
    write(tmp_path / "test" / "part.parquet", rows(0, 1))
    assert split_path(str(tmp_path), "train") == f"{tmp_path}/train.parquet"
    assert split_path(f"{tmp_path}/", "test") == f"{tmp_path}/test"
    error = error_of(split_path, str(tmp_path), "valid")
    assert error.message == f"{tmp_path}: no split 'valid'"
    assert error.hint == f"{tmp_path}/valid.parquet or {tmp_path}/valid/*.parquet is expected"


def test_nothing_there(tmp_path):
    error = error_of(ParquetLog, tmp_path / "none.parquet", SCHEMA)
    assert error.message == f"{tmp_path}/none.parquet: no such file or folder"
    (tmp_path / "empty").mkdir()
    error = error_of(ParquetLog, tmp_path / "empty", SCHEMA)
    assert error.message == f"{tmp_path}/empty: no *.parquet file in this folder"
    error = error_of(ParquetLog, "nosuch://bucket/train", SCHEMA)
    assert error.message == "nosuch://bucket/train: cannot be opened: Protocol not known: nosuch"


@pytest.mark.parametrize("keep", [-1, -8, 1000, 3])
def test_a_truncated_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    error = error_of(ParquetLog, path, SCHEMA)
    assert error.message.startswith(f"{path}: not a whole Parquet file (")
    assert "\n" not in error.message
    assert error.hint == "the file was cut short or changed while written or copied: write it again"


def test_an_empty_file_and_a_file_without_rows(path):
    write(path, rows(0, 0))
    assert error_of(ParquetLog, path, SCHEMA).message == f"{path}: no rows"
    path.write_bytes(b"")
    assert error_of(ParquetLog, path, SCHEMA).message == f"{path}: the file is empty (0 bytes)"


def test_one_bad_file_of_a_folder_is_named(tmp_path):
    write(tmp_path / "a.parquet", rows(0, 10))
    bad = write(tmp_path / "b.parquet", rows(10, 20).rename_columns(["x", "userid", "click", "buy", "rest"]))
    error = error_of(ParquetLog, tmp_path, SCHEMA)
    assert error.message == f"{bad}: column 'user_id' is missing (a sparse feature with encoding 'index')"
    assert error.hint == "did you mean 'userid'?"
    write(bad, rows(10, 20).set_column(1, "user_id", pa.array([[1]] * 10)))
    error = error_of(ParquetLog, tmp_path, SCHEMA)
    assert error.message == f"{bad}: column 'user_id' has type list<element: int64>, but int64 in another file"


@pytest.mark.parametrize(
    ("column", "values", "found"),
    [
        ("x", ["a"], "type string, expected a number"),
        ("x", [[1.0]], "type list<element: double>, expected a number"),
        ("user_id", ["a"], "type string, expected integers, or a list of them"),
        ("user_id", [0.5], "type double, expected integers, or a list of them"),
        ("user_id", [{"id": 1}], "type struct<id: int64>, expected integers, or a list of them"),
        ("click", ["yes"], "type string, expected a number or a boolean"),
    ],
)
def test_a_column_of_the_wrong_type(path, column, values, found):
    table = rows(0, 1)
    write(path, table.set_column(table.schema.get_field_index(column), column, pa.array(values)))
    assert error_of(ParquetLog, path, SCHEMA).message == f"{path}: column {column!r} has {found}"


@pytest.mark.parametrize("statistics", [True, False])
def test_a_task_without_a_label(path, statistics):
    nulls = pa.nulls(100, pa.int8())
    write(path, rows(0, 100).set_column(3, "buy", nulls), row_group_size=30, write_statistics=statistics)
    error = error_of(ParquetLog, path, SCHEMA)
    assert error.message == f"{path}: label 'buy' is null in every row"
    one = pa.concat_arrays([nulls[:99], pa.array([1], pa.int8())])
    write(path, rows(0, 100).set_column(3, "buy", one), row_group_size=30, write_statistics=statistics)
    assert ParquetLog(path, SCHEMA).num_rows == 100


@pytest.mark.parametrize("checksum", [True, False])
def test_a_damaged_page(path, checksum):
    """With checksums any changed byte is found; without them what cannot be decompressed."""
    write(path, rows(0, 100), row_group_size=40, write_page_checksum=checksum, compression="zstd", use_dictionary=False)
    chunk = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    for offset in range(middle, middle + 8):
        content[offset] ^= 0xFF
    path.write_bytes(content)
    log = ParquetLog(path, SCHEMA)
    assert next(log.iter_batches())["user_id"].to_pylist() == [n % 10 for n in range(40)]
    error = error_of(log.read)
    assert error.message.startswith(f"{path}, row group 1: cannot be read (")
    assert "\n" not in error.message


def test_a_file_cut_short_after_it_was_opened(path):
    log = ParquetLog(path, SCHEMA)
    offset = pq.read_metadata(path).row_group(2).column(1).data_page_offset
    path.write_bytes(path.read_bytes()[: offset + 2])
    error = error_of(log.read)
    assert error.message.startswith(f"{path}, row group 2: cannot be read (")
