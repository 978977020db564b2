from __future__ import annotations

import gzip

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from raysys.data.source import fingerprint, is_text, open_source, read_batches
from raysys.errors import UserError

TABLE = pa.table({"n": list(range(10)), "word": [f"w,{i}" for i in range(10)]})


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".csv.gz", ".tsv"])
def test_each_kind_of_file_is_read_alone_in_a_folder_and_by_uri(tmp_path, suffix):
    (tmp_path / "log").mkdir()
    path = tmp_path / "log" / f"part{suffix}"
    if suffix == ".parquet":
        pq.write_table(TABLE, path)
    else:
        pacsv.write_csv(TABLE, path, pacsv.WriteOptions(delimiter="\t" if suffix == ".tsv" else ","))
        if suffix.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "log" / "_SUCCESS").touch()
    (tmp_path / "log" / ".part.csv.crc").touch()
    for source in (path, tmp_path / "log", f"file://{path}"):
        batches = list(read_batches(open_source(source), "log", ["word", "n"], batch_size=4))
        assert max(len(batch) for batch in batches) <= 4
        assert pa.Table.from_batches(batches).equals(TABLE.select(["word", "n"]))


def test_columns_of_a_csv_file_can_be_given_a_type(tmp_path):
    (tmp_path / "log.csv").write_text("word,n\n07,1\n,2\n")
    (batch,) = read_batches(open_source(tmp_path / "log.csv", {"word": pa.string(), "other": pa.string()}), "log")
    assert batch.to_pydict() == {"word": ["07", None], "n": [1, 2]}


def test_text_is_what_holds_csv_and_no_parquet(tmp_path):
    for name, expected in {"a.csv": True, "b.tsv.gz": True, "c.parquet": False, "d": False}.items():
        (tmp_path / name).touch()
        assert is_text(tmp_path / name) == expected
    assert not is_text(tmp_path)
    (tmp_path / "c.parquet").unlink()
    assert is_text(tmp_path)


def test_nothing_and_na_are_null_in_csv_unless_quoted(tmp_path):
    (tmp_path / "log.csv").write_text('word,n\na,1\n,2\nNA,\n"NA",4\n"",5\n')
    (batch,) = read_batches(open_source(tmp_path / "log.csv"), "log")
    assert batch.to_pydict() == {"word": ["a", None, None, "NA", ""], "n": [1, 2, None, 4, 5]}


def test_files_of_a_folder_come_in_the_order_of_their_names(tmp_path):
    for name, first in (("b", 4), ("a", 0), ("c/d", 7)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(TABLE.slice(first, {0: 4, 4: 3, 7: 3}[first]), tmp_path / f"{name}.parquet")
    assert pa.Table.from_batches(read_batches(open_source(tmp_path), "log")).equals(TABLE)


def test_what_cannot_be_read_is_named(tmp_path):
    pq.write_table(TABLE, tmp_path / "whole.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-20])
    (tmp_path / "log.xlsx").touch()
    (tmp_path / "log.csv").write_text("n\n" + "1\n" * 800_000 + "one\n")  # beyond the block that gives the type
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nowhere", "nowhere: no such file or folder"),
        ("cut.parquet", "cut.parquet: cannot be read as parquet: "),
        ("log.xlsx", "log.xlsx: no Parquet or CSV file\n  hint: known endings: .parquet"),
        ("empty", "empty: no Parquet or CSV file"),
        ("s4://bucket/log.csv", "s4://bucket/log.csv: cannot be opened: "),
        (
            "log.csv",
            "log.csv: cannot be read: .*'one'.*\n  hint: all rows of a column must have the type of its first ones",
        ),
    ):
        path = name if "://" in name else tmp_path / name
        with pytest.raises(UserError, match=message):
            list(read_batches(open_source(path), name))


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    pq.write_table(TABLE, tmp_path / "a.parquet")
    pacsv.write_csv(TABLE, tmp_path / "b.csv")
    with pytest.raises(UserError, match="holds csv and parquet files"):
        open_source(tmp_path)


def test_a_fingerprint_changes_with_name_size_and_content_and_with_nothing_else(tmp_path):
    def written(name, content, file="log.csv"):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(content)
        return fingerprint(tmp_path / name)

    large = b"x" * 200_000
    first = written("a", large)
    assert written("b", large) == first
    others = [
        written("c", large[:-1] + b"y"),
        written("d", b"y" + large[1:]),
        written("e", large + b"x"),
        written("f", large, "l.csv"),
    ]
    assert len({first, *others}) == 5
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        fingerprint(tmp_path / "nowhere")
