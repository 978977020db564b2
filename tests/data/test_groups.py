"""Whole groups in batches: nothing else of the reader's contract changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.data import blocks
from raysys.data.batch import Batch
from raysys.data.groups import read_groups
from raysys.data.log import ParquetLog
from raysys.data.reader import Position, Reader
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.schema import DenseFeature, FeatureSchema, Label

SIZES = np.random.default_rng(0).geometric(0.2, 200)  # rows of each group, 1 to 20 or so
ROWS = int(SIZES.sum())
START = Position()
SCHEMA = FeatureSchema(dense=(DenseFeature("x"),), labels=(Label("y"),), group_id="request")


def table(groups: Iterable[object]) -> pa.Table:
    groups = list(groups)
    numbers = np.arange(len(groups))
    return pa.table({"x": numbers.astype(np.float32), "y": numbers % 2, "request": pa.array(groups)})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, whose row groups cut groups in two; a row's number is its dense feature and its example id."""
    folder = tmp_path_factory.mktemp("groups") / "train"
    folder.mkdir()
    rows = table(f"request {number}" for number in np.repeat(np.arange(len(SIZES)), SIZES))
    pq.write_table(rows[:413], folder / "a.parquet", row_group_size=97)
    pq.write_table(rows[413:], folder / "b.parquet", row_group_size=130)
    return folder


@pytest.fixture(params=["kept", "streamed"])
def make_reader(request, path, monkeypatch) -> Callable[..., Reader]:
    if request.param == "streamed":
        monkeypatch.setattr(blocks, "KEEP_BYTES", 0)
    log = ParquetLog(path, SCHEMA)
    transforms = Transforms.fit(SCHEMA, log)
    defaults = {"batch_size": 64, "shuffle_rows": 50, "prefetch": 0, "keep_groups_whole": True}
    return lambda **options: Reader(log, transforms, **defaults | options)


def ids(batch: Batch) -> list[int]:
    return batch.example_id[batch.example_id >= 0].tolist()


def epoch_ids(reader: Reader, position: Position = START) -> list[list[int]]:
    return [ids(batch) for batch, _ in reader.epoch(position)]


def joined(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def whole_groups(rows: list[int]) -> list[int]:
    """The groups that these rows are, one after another, each whole and in the order of the log."""
    group_of, starts = np.repeat(np.arange(len(SIZES)), SIZES), np.cumsum(SIZES) - SIZES
    found, row = [], 0
    while row < len(rows):
        group = group_of[rows[row]]
        assert rows[row : row + SIZES[group]] == list(range(starts[group], starts[group] + SIZES[group]))
        found.append(int(group))
        row += SIZES[group]
    return found


@pytest.mark.parametrize("shuffle_rows", [0, 50, 10_000])
@pytest.mark.parametrize("batch_size", [64, 7, 1, 5000])
def test_groups_stay_whole_and_batches_are_the_same_for_every_number_of_workers(make_reader, batch_size, shuffle_rows):
    options = {"batch_size": batch_size, "shuffle_rows": shuffle_rows}
    alone = [sorted(rows) for rows in epoch_ids(make_reader(**options))]
    assert sorted(joined(alone)) == list(range(ROWS)), "every row once"
    for world_size in (1, 2, 3, 5, 12):
        ranks = [epoch_ids(make_reader(rank=r, world_size=world_size, **options)) for r in range(world_size)]
        assert [sorted(joined(parts)) for parts in zip(*ranks, strict=True)] == alone, world_size
        assert sorted(joined([whole_groups(rows) for rank in ranks for rows in rank])) == list(range(len(SIZES)))


def test_batches_have_the_wanted_rows_on_average(make_reader):
    reader = make_reader(batch_size=100)
    sizes = [len(rows) for rows in epoch_ids(reader)]
    assert len(sizes) == reader.steps_per_epoch
    groups = round(100 * len(SIZES) / ROWS)
    assert len(sizes) == -(-len(SIZES) // groups)
    assert np.mean(sizes[:-1]) == pytest.approx(groups * ROWS / len(SIZES), rel=0.1)
    assert max(sizes) > 100 > min(sizes[:-1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_all_ranks_take_as_many_steps_of_the_size_of_the_fullest(make_reader, world_size):
    readers = [make_reader(rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(2):
        ranks = [[batch for batch, _ in reader.epoch(Position(epoch))] for reader in readers]
        for batches in zip(*ranks, strict=True):
            assert {len(batch) for batch in batches} == {max(len(ids(batch)) for batch in batches)}
            assert all(not batch.weight[batch.example_id < 0].any() for batch in batches)
    largest = {max(len(batch) for batch, _ in reader.epoch()) for reader in readers}
    assert largest == {reader.local_batch_size for reader in readers}


def test_whole_groups_are_shuffled_anew_in_every_epoch(make_reader):
    reader = make_reader(shards=1, shuffle_rows=100)
    epochs = [whole_groups(joined(epoch_ids(reader, Position(epoch)))) for epoch in range(3)]
    assert epoch_ids(make_reader(shards=1, shuffle_rows=100)) == epoch_ids(reader)
    assert len({tuple(groups) for groups in epochs}) == 3
    for groups in epochs:
        distance = np.abs(np.array(groups) - np.arange(len(SIZES)))
        assert distance.mean() > 3, "a third of the 20 groups or so of a block is expected"
        assert distance.max() <= 100, "a block has no more groups than rows"
    assert whole_groups(joined(epoch_ids(make_reader(shards=1, shuffle_rows=0)))) == list(range(len(SIZES)))


@pytest.mark.parametrize("after", [1, 3])
def test_resuming_at_every_step_with_another_number_of_workers(make_reader, after):
    before = make_reader(rank=1, world_size=2)
    alone = [sorted(rows) for rows in epoch_ids(make_reader(), Position(1))]
    readers = [make_reader(rank=rank, world_size=after) for rank in range(after)]
    for step, (_, position) in enumerate(before.epoch(Position(1))):
        assert Position.from_dict(position.to_dict()) == position
        assert sum(position.cursors) == len(joined(alone[: step + 1])), "cursors count rows"
        rest = [epoch_ids(reader, position) for reader in readers]
        assert [sorted(joined(parts)) for parts in zip(*rest, strict=True)] == alone[step + 1 :]


def test_a_position_of_another_order_is_refused(make_reader):
    reader = make_reader()
    position = [position for _, position in reader.epoch()][2]
    for options in ({"keep_groups_whole": False}, {"seed": 1}, {"shuffle_rows": 60}, {"batch_size": 70}):
        with pytest.raises(UserError, match=r"the saved position \(step 3, rows \[.*\]\) is none of this log"):
            make_reader(**options).epoch(position)
    with pytest.raises(UserError, match=r"is none of this log\n  hint: resume with the data, the keys of data, "):
        reader.epoch(Position(step=reader.steps_per_epoch + 1))


def test_a_group_larger_than_a_batch_makes_a_larger_batch(tmp_path):
    pq.write_table(table([1, 1] + [2] * 300 + [3, 4]), tmp_path / "train.parquet")
    log = ParquetLog(tmp_path / "train.parquet", SCHEMA)
    transforms = Transforms.fit(SCHEMA, log)
    ranks = [
        [batch for batch, _ in Reader(log, transforms, 8, 3, rank, 3, keep_groups_whole=True).epoch()]
        for rank in range(3)
    ]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[len(batch) for batch in ranks[0]]] * 3
    groups = [sorted(set(batch.group_id[batch.weight[:, 0] > 0].tolist())) for rank in ranks for batch in rank]
    assert sorted(joined(groups)) == [1, 2, 3, 4], "each in one batch of one rank"
    assert max(len(batch) for batch in ranks[0]) == 300


@pytest.mark.parametrize("values", [[7, 7, 3, None, None], ["a", "a", "b", None, None]])
def test_groups_may_be_numbers_text_and_null(tmp_path, values):
    pq.write_table(table(values), tmp_path / "train.parquet", row_group_size=2)
    assert read_groups(ParquetLog(tmp_path / "train.parquet", SCHEMA)).tolist() == [0, 2, 3, 5]


def test_a_schema_without_groups_is_refused(path):
    schema = FeatureSchema(dense=SCHEMA.dense, labels=SCHEMA.labels, source="data/schema.yaml")
    with pytest.raises(UserError) as error:
        read_groups(ParquetLog(path, schema))
    assert error.value.message == "data/schema.yaml: no group_id, which data.keep_groups_whole needs"
    assert error.value.hint == "name the column of the groups in schema.yaml, or set data.keep_groups_whole=false"


def test_rows_of_a_group_that_are_not_side_by_side_are_named(tmp_path):
    pq.write_table(table(["a", "a", "b", "c", "c"]), tmp_path / "0.parquet")
    pq.write_table(table(["d", "c", "b", "e"]), tmp_path / "1.parquet", row_group_size=1)
    with pytest.raises(UserError) as error:
        read_groups(ParquetLog(tmp_path, SCHEMA))
    assert error.value.message == (
        f"{tmp_path}/1.parquet, row group 1, row 1: group 'c' of column 'request' goes on, "
        f"and its rows before end at {tmp_path}/0.parquet, row group 0, row 4"
    )
    assert error.value.hint == (
        "data.keep_groups_whole needs the rows of a group side by side: sort the log by 'request'"
    )
