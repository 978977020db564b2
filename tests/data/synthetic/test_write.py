from __future__ import annotations

import pytest

from raysys.data.synthetic import SyntheticSpec, prepare
from raysys.data.synthetic.log import make_rows
from raysys.data.synthetic.write import plan_shards, write_log
from raysys.errors import UserError


def test_rows_are_the_same_for_any_number_of_processes(log, tmp_path):
    prepare(tmp_path / "two", rows=90_000, processes=2)
    names = sorted(path.relative_to(log) for path in log.glob("*/*.parquet"))
    assert [str(name) for name in names] == [
        "test/part-000003.parquet",
        "train/part-000000.parquet",
        "train/part-000001.parquet",
        "valid/part-000002.parquet",
    ]
    for name in names:
        assert (log / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_prepare_does_nothing_where_the_log_is_complete(log):
    before = {path: path.stat().st_mtime_ns for path in log.rglob("*")}
    prepare(log, rows=90_000)
    assert {path: path.stat().st_mtime_ns for path in log.rglob("*")} == before


def test_prepare_never_replaces_other_data(log, tmp_path):
    with pytest.raises(UserError, match=r"one: was prepared with third_order = 0\.6, not 0\.1") as caught:
        prepare(log, rows=90_000, spec=SyntheticSpec(third_order=0.1))
    assert caught.value.hint == "name another folder, or remove this one"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no prepared data set"):
        prepare(tmp_path, rows=1000)


def test_a_log_that_fails_half_way_leaves_nothing_behind(tmp_path):
    def plan():
        shard, *_ = plan_shards(1000)
        return [(shard, lambda: make_rows(SyntheticSpec(), shard, 1000)), (shard, lambda: 1 / 0)]

    with pytest.raises(ZeroDivisionError):
        write_log(tmp_path / "log", SyntheticSpec().schema(), {}, plan, processes=1)
    assert list(tmp_path.iterdir()) == []


def test_too_few_rows_to_split(tmp_path):
    with pytest.raises(UserError, match="rows is 5"):
        prepare(tmp_path / "log", rows=5, processes=1)
