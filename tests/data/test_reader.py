from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data import blocks
from raysys.data.batch import Batch
from raysys.data.log import ParquetLog
from raysys.data.reader import Position, Reader
from raysys.data.schedule import Schedule
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.schema import DenseFeature, FeatureSchema, Label, SparseFeature, Table

ROWS = 1003
START = Position()
SIMPLE = FeatureSchema(
    (Table("t", 50),),
    dense=(DenseFeature("x"),),
    sparse=(SparseFeature("item", "t", encoding="index"),),
    labels=(Label("y"),),
)


@pytest.fixture(scope="module")
def simple_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose number is their dense feature; without example_id in the schema the reader numbers them itself."""
    numbers = np.arange(ROWS)
    folder = tmp_path_factory.mktemp("simple")
    pq.write_table(
        pa.table({"x": numbers.astype(np.float32), "item": numbers % 50, "y": numbers % 2}),
        folder / "train.parquet",
        row_group_size=130,
    )
    return folder / "train.parquet"


@pytest.fixture(params=["kept", "streamed"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading: row groups kept in memory, and streamed because the log is too large for that."""
    if request.param == "streamed":
        monkeypatch.setattr(blocks, "KEEP_BYTES", 0)


@pytest.fixture
def make_reader(simple_path: Path, memory: None) -> Callable[..., Reader]:
    log = ParquetLog(simple_path, SIMPLE)
    transforms = Transforms.fit(SIMPLE, log)

    def make(**options: int) -> Reader:
        return Reader(log, transforms, **{"batch_size": 64, "shuffle_rows": 30, "prefetch": 0} | options)

    return make


def real_ids(batch: Batch) -> list[int]:
    return batch.example_id[batch.example_id >= 0].tolist()


def epoch_ids(reader: Reader, position: Position = START) -> list[list[int]]:
    return [real_ids(batch) for batch, _ in reader.epoch(position)]


def joined(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def global_ids(make: Callable[..., Reader], world_size: int, **options: int) -> list[list[int]]:
    """The sorted ids of each global batch."""
    ranks = [epoch_ids(make(rank=rank, world_size=world_size, **options)) for rank in range(world_size)]
    return [sorted(joined(parts)) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("batch_size", [64, 100, 7, 1001, 5000])
def test_global_batches_are_the_same_for_every_number_of_workers(make_reader, batch_size):
    alone = global_ids(make_reader, 1, batch_size=batch_size)
    assert sorted(joined(alone)) == list(range(ROWS)), "every row once"
    assert [len(batch) for batch in alone[:-1]] == [batch_size] * (len(alone) - 1)
    for world_size in (2, 3, 4, 5, 12):
        assert global_ids(make_reader, world_size, batch_size=batch_size) == alone, world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_all_ranks_take_as_many_steps_of_the_same_size(make_reader, world_size):
    readers = [make_reader(rank=rank, world_size=world_size, batch_size=100) for rank in range(world_size)]
    epochs = [[len(batch) for batch, _ in reader.epoch()] for reader in readers]
    assert all(sizes == epochs[0] for sizes in epochs)
    assert {reader.steps_per_epoch for reader in readers} == {len(epochs[0])} == {11}
    assert set(epochs[0][:-1]) == {reader.local_batch_size for reader in readers}
    assert epochs[0][-1] <= 3, "three rows are left"


def test_a_rank_without_rows_gets_a_batch_of_padding(make_reader):
    last = [list(make_reader(rank=rank, world_size=5, batch_size=100).epoch())[-1][0] for rank in range(5)]
    assert sorted(len(real_ids(batch)) for batch in last) == [0, 0, 1, 1, 1]
    empty = next(batch for batch in last if not real_ids(batch))
    assert len(empty) == 1
    assert empty.example_id.tolist() == [-1]
    assert not empty.weight.any()
    assert not empty.label_mask.any()
    assert empty.sparse.keys() == ["item"]
    assert empty.sparse.lengths().tolist() == [0]


def test_rows_stay_together(make_reader):
    for batch, _ in make_reader(batch_size=100, world_size=2).epoch():
        real = batch.example_id >= 0
        assert torch.equal(batch.dense[real, 0].long(), batch.example_id[real])
        assert torch.equal(batch.labels[real, 0].long(), batch.example_id[real] % 2)
        assert torch.equal(batch.sparse["item"].values(), batch.example_id[real] % 50)
        assert torch.equal(batch.sparse["item"].lengths(), real.int())


def test_shuffling_differs_by_epoch_and_seed_and_is_repeated_by_the_same(make_reader):
    first = epoch_ids(make_reader())
    assert epoch_ids(make_reader()) == first
    for other in (make_reader(seed=1), make_reader(seed=-1)):
        assert epoch_ids(other) != first
        assert sorted(joined(epoch_ids(other))) == list(range(ROWS))
    reader = make_reader()
    epochs = [epoch_ids(reader, Position(epoch)) for epoch in range(3)]
    assert epochs[0] == first
    assert len({tuple(joined(ids)) for ids in epochs}) == 3
    for ids in epochs:
        assert sorted(joined(ids)) == list(range(ROWS))


def test_without_shuffling_every_shard_is_in_file_order(make_reader):
    reader = make_reader(shuffle_rows=0, shards=3)
    ids = np.array(joined(epoch_ids(reader)))
    for shard in range(3):
        start, stop = Schedule(ROWS, 64, 3).shard(shard)
        own = ids[(ids >= start) & (ids < stop)]
        assert own.tolist() == list(range(start, stop))
    assert joined(epoch_ids(make_reader(shuffle_rows=0, shards=1))) == list(range(ROWS))


def test_shuffling_mixes_within_blocks(make_reader):
    ids = np.array(joined(epoch_ids(make_reader(shards=1, shuffle_rows=100))))
    distance = np.abs(ids - np.arange(ROWS))
    assert distance.max() < 100
    assert distance.mean() > 20, "a third of a block is expected"


def test_resuming_at_every_step_gives_the_undisturbed_rest(make_reader):
    reader = make_reader(prefetch=2)
    whole = list(reader.epoch(Position(epoch=1)))
    for step in range(reader.steps_per_epoch):
        position = whole[step][1]
        assert position.epoch == 1
        assert position.step == step + 1
        assert sum(position.cursors) == sum(len(real_ids(batch)) for batch, _ in whole[: step + 1])
        saved = Position.from_dict(json.loads(json.dumps(position.to_dict())))
        assert saved == position
        rest = list(make_reader().epoch(saved))
        assert [p for _, p in rest] == [p for _, p in whole[step + 1 :]]
        for (batch, _), (expected, _) in zip(rest, whole[step + 1 :], strict=True):
            assert torch.equal(batch.dense, expected.dense)
            assert torch.equal(batch.sparse.values(), expected.sparse.values())
            assert batch.example_id.tolist() == expected.example_id.tolist()


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (4, 1)])
def test_resuming_with_another_number_of_workers(make_reader, before, after):
    alone = global_ids(make_reader, 1)
    positions = [position for _, position in make_reader(rank=before - 1, world_size=before).epoch()]
    for step in (0, 5, 14):
        rest = [epoch_ids(make_reader(rank=rank, world_size=after), positions[step]) for rank in range(after)]
        assert [sorted(joined(parts)) for parts in zip(*rest, strict=True)] == alone[step + 1 :]


def test_a_position_of_another_log_or_batch_size_is_refused(make_reader):
    position = next(iter(make_reader().epoch()))[1]
    reader = make_reader(batch_size=65)
    with pytest.raises(UserError) as error:
        reader.epoch(position)
    assert error.value.message == (
        f"{reader.log.path}: the saved position (step 1, rows {list(position.cursors)}) is none of this log"
    )
    assert error.value.hint == (
        "resume with the data, the keys of data, train.batch_size and seed that it was saved with"
    )
    with pytest.raises(UserError):
        make_reader().epoch(Position(step=17))


@pytest.mark.parametrize("layout", ["one row group", "row groups of 1 row", "several files"])
def test_the_layout_of_the_files_does_not_matter(make_reader, simple_path, tmp_path, layout):
    table = pq.read_table(simple_path)
    folder = tmp_path / "train"
    folder.mkdir()
    if layout == "several files":
        for number, start in enumerate(range(0, ROWS, 170)):
            pq.write_table(table.slice(start, 170), folder / f"{number}.parquet", row_group_size=50)
    else:
        pq.write_table(table, folder / "all.parquet", row_group_size=1 if "1" in layout else ROWS)
    log = ParquetLog(f"file://{folder}", SIMPLE)
    for rank in range(2):
        reader = Reader(log, Transforms.fit(SIMPLE, log), 64, rank=rank, world_size=2, shuffle_rows=30)
        assert epoch_ids(reader) == epoch_ids(make_reader(rank=rank, world_size=2))


def test_more_workers_than_rows_or_shards(make_reader, simple_path, tmp_path):
    with pytest.raises(UserError) as error:
        make_reader(world_size=13)
    assert error.value.message == "data.shards is 12, but there are 13 workers"
    assert error.value.hint == "each worker reads at least one shard: set data.shards to 13 or more"
    path = tmp_path / "two.parquet"
    pq.write_table(pq.read_table(simple_path).slice(0, 2), path)
    log = ParquetLog(path, SIMPLE)
    transforms = Transforms.fit(SIMPLE, log)
    assert [len(list(Reader(log, transforms, 10, rank=r, world_size=2).epoch())) for r in range(2)] == [1, 1]
    with pytest.raises(UserError) as error:
        Reader(log, transforms, 10, world_size=3)
    assert error.value.message == f"{path}: 2 rows for 3 workers"


def tensors(batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    for f in dataclasses.fields(Batch):
        value = getattr(batch, f.name)
        for name, item in value.items() if f.name == "extra" else [(f.name, value)]:
            if isinstance(item, KeyedJaggedTensor):
                yield f"{name} values", item.values()
                yield f"{name} lengths", item.lengths()
                if item.weights_or_none() is not None:
                    yield f"{name} weights", item.weights()
            else:
                yield name, item


def test_a_batch_equals_its_raw_rows_through_the_same_transforms(schema, train_path, memory):
    """Cutting, shuffling and putting together must not change what `to_batch` makes of the same rows in that order."""
    log = ParquetLog(train_path, schema)
    transforms = Transforms.fit(schema, log)
    raw = pq.read_table(train_path)
    row_of = {example: row for row, example in enumerate(raw["id"].to_pylist())}
    for rank in range(2):
        reader = Reader(log, transforms, 90, rank=rank, world_size=2, shuffle_rows=25)
        for batch, _ in reader.epoch():
            rows = raw.take([row_of[example] for example in real_ids(batch)])
            expected = transforms.to_batch(rows, pad_to=len(batch))
            for (name, found), (_, wanted) in zip(tensors(batch), tensors(expected), strict=True):
                assert found.dtype == wanted.dtype, name
                assert torch.equal(torch.nan_to_num(found, 9), torch.nan_to_num(wanted, 9)), name


def test_a_log_to_be_scored_needs_no_labels(simple_path, tmp_path):
    transforms = Transforms.fit(SIMPLE, ParquetLog(simple_path, SIMPLE))
    path = tmp_path / "new.parquet"
    pq.write_table(pq.read_table(simple_path).drop_columns(["y"]), path)
    reader = Reader(ParquetLog(path, SIMPLE, labels=False), transforms, 64, labels=False)
    batches = [batch for batch, _ in reader.epoch()]
    assert sum(len(real_ids(batch)) for batch in batches) == ROWS
    assert not any(batch.label_mask.any() or batch.weight.any() for batch in batches)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_bad_value_is_named_by_file_and_row_group(schema, make_table, tmp_path, memory, prefetch):
    table = make_table(100, seed=0)
    prices = table["price"].to_pylist()
    prices[77] = float("nan")
    path = tmp_path / "train.parquet"
    column = table.schema.get_field_index("price")
    pq.write_table(table.set_column(column, "price", pa.array(prices, pa.float32())), path, row_group_size=30)
    log = ParquetLog(path, schema)
    reader = Reader(log, Transforms.fit(schema, log), 10, prefetch=prefetch)
    with pytest.raises(UserError) as error:
        list(reader.epoch())
    place = f"{path}, row group 2, row 77"
    assert error.value.message == f"{place}: dense column 'price' holds nan, expected a finite number"


def test_a_damaged_page_is_found_while_training(simple_path, tmp_path, memory):
    path = tmp_path / "train.parquet"
    pq.write_table(pq.read_table(simple_path), path, row_group_size=130, write_page_checksum=True)
    log = ParquetLog(path, SIMPLE)
    transforms = Transforms.fit(SIMPLE, log)
    chunk = pq.read_metadata(path).row_group(3).column(0)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(Reader(log, transforms, 64).epoch())
    assert error.value.message.startswith(f"{path}, row group 3: cannot be read (")
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_an_abandoned_epoch_leaves_no_thread_and_no_open_file(make_reader, simple_path):
    epoch = make_reader(prefetch=2).epoch()
    next(epoch)
    epoch.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    files = [link.resolve() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert simple_path.resolve() not in files


def test_a_small_log_is_decoded_once(simple_path, monkeypatch):
    log = ParquetLog(simple_path, SIMPLE)
    reader = Reader(log, Transforms.fit(SIMPLE, log), 64, prefetch=0)
    scans = []
    scan = log.scan
    monkeypatch.setattr(log, "scan", lambda *arguments: scans.append(arguments[:2]) or scan(*arguments))
    for epoch in range(3):
        assert sorted(joined(epoch_ids(reader, Position(epoch)))) == list(range(ROWS))
    assert sorted(scans) == list(log.row_groups())
