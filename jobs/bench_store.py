"""Measure the feature stores and the databases that the embedded one was chosen among: a table, and OUT/store.json.

A row has an id, three sparse columns, a bag, four floats and a title, with nulls. Each store has processes of its own, with
one thread: one that builds, one that reads, two that read at once, and one that writes. Latencies are medians and 99th
percentiles by the wall clock. LMDB and RocksDB are no dependencies: `pip install lmdb rocksdict`, then `--kinds`. Redis
needs a server that may be emptied: `--redis redis://127.0.0.1:6379/0 --kinds Redis`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import bench_result
import numpy as np
import psutil
import pyarrow as pa
import redis
from bench_store_rivals import LMDB, Database, RocksDB, SQLite
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from raysys.serve.redis_store import RedisStore
from raysys.serve.store import ArrowStore, Found
from raysys.strict_json import to_plain

KEY, SEED, CANDIDATES = "item_id", 0, 200
FLOATS = tuple(f"x{number}" for number in range(4))
SCHEMA = pa.schema(
    {KEY: pa.int64(), "brand": pa.int64(), "category": pa.int64(), "shop": pa.string()}
    | {"tags": pa.list_(pa.int32()), "title": pa.string()}
    | dict.fromkeys(FLOATS, pa.float32())
)
LOOKUPS = {1: 2000, CANDIDATES: 300}
SECONDS = 2.0  # of reading for throughput
DATABASES: dict[str, type[Database]] = {"LMDB": LMDB, "SQLite": SQLite, "RocksDB": RocksDB}
KINDS = ("Arrow", "SQLite", "LMDB", "RocksDB", "Redis")
LIBRARIES = ("lmdb", "rocksdict", "redis")


class Readable(Protocol):
    """What is measured of a store."""

    def get(self, keys: NDArray[np.int64]) -> Found:
        """Rows of keys."""

    def put(self, rows: pa.Table) -> None:
        """Add or replace rows."""


def item_rows(count: int) -> pa.Table:
    """Rows of items with ids from a range ten times as large, and one null in twenty."""
    generator = np.random.default_rng(SEED)
    words = np.array([f"word{number}" for number in range(5000)])

    def holes(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind, mask=generator.random(count) < 0.05)

    offsets = np.concatenate([[0], np.cumsum(generator.integers(0, 10, count))]).astype(np.int32)
    columns = {
        KEY: pa.array(_keys(count)),
        "brand": holes(generator.integers(0, 1000, count), pa.int64()),
        "category": holes(generator.integers(0, 50, count), pa.int64()),
        "shop": holes(words[generator.integers(0, 5000, count)], pa.string()),
        "tags": pa.ListArray.from_arrays(offsets, pa.array(generator.integers(0, 10_000, offsets[-1]), pa.int32())),
        "title": pa.array([" ".join(title) for title in words[generator.integers(0, 5000, (count, 4))]]),
    }
    floats = {name: holes(generator.standard_normal(count), pa.float32()) for name in FLOATS}
    return pa.table(columns | floats, schema=SCHEMA)


def build(kind: str, place: str, count: int) -> dict[str, Any]:
    """Make a store of `count` rows; how long that took and what it takes of the disk (Redis: of the server's memory)."""
    rows = item_rows(count)
    if kind == "Redis":
        redis.Redis.from_url(place).flushdb()
    started = time.perf_counter()
    if kind == "Arrow":
        ArrowStore.create(place, rows, KEY)
    elif kind == "Redis":
        RedisStore.create(place, "bench", rows, KEY, timeout_s=30)
        seconds = time.perf_counter() - started
        return {"build_s": seconds, "size_mib": redis.Redis.from_url(place).info()["used_memory"] / 2**20}
    else:
        DATABASES[kind](Path(place), SCHEMA, KEY, writes=True).put(rows)
    seconds = time.perf_counter() - started
    files = [path for path in Path(place).rglob("*") if path.is_file()]
    return {"build_s": seconds, "size_mib": sum(path.stat().st_blocks * 512 for path in files) / 2**20}


def read(kind: str, place: str, count: int) -> dict[str, Any]:
    """Latencies of look-ups, and what opening and reading takes of time and of memory, shared pages of files included."""
    keys, generator = _keys(count), np.random.default_rng(SEED + 1)
    item_rows(100).to_batches()[0].take(pa.array([0]))  # Arrow loads its functions at their first use
    memory, started = psutil.Process().memory_info().rss, time.perf_counter()
    store = _open(kind, place)
    found: dict[str, Any] = {"open_ms": (time.perf_counter() - started) * 1000}
    assert store.get(keys[:CANDIDATES])[1].all()
    for size, times in LOOKUPS.items():
        asked = [generator.choice(keys, size) for _ in range(times)]
        taken = [_seconds(lambda some=some: store.get(some)) * 1e6 for some in asked]  # type: ignore[misc]
        found[f"p50_{size}_us"], found[f"p99_{size}_us"] = np.percentile(taken, [50, 99]).tolist()
    found["memory_mib"] = (psutil.Process().memory_info().rss - memory) / 2**20
    return found


def rows_per_second(kind: str, place: str, count: int) -> float:
    """Of look-ups of `CANDIDATES` keys, one after another."""
    keys, store = _keys(count), _open(kind, place)
    asked = np.random.default_rng(os.getpid()).choice(keys, (1000, CANDIDATES))
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        store.get(asked[done % len(asked)])
        done += 1
    return done * CANDIDATES / (time.perf_counter() - started)


def write(kind: str, place: str, count: int) -> dict[str, Any]:
    """Milliseconds of updates of 1 and of `CANDIDATES` rows, medians of 5."""
    rows = item_rows(count).slice(0, CANDIDATES)
    store = _open(kind, place, writes=True)
    sizes = {1: "update_1_ms", CANDIDATES: "update_200_ms"}
    return {
        name: float(np.median([_seconds(lambda size=size: store.put(rows.slice(0, size))) for _ in range(5)])) * 1000  # type: ignore[misc]
        for size, name in sizes.items()
    }


def measure(kind: str, count: int, redis_url: str | None) -> dict[str, Any]:
    """All columns of one store of so many rows."""
    with tempfile.TemporaryDirectory() as folder, _processes(2) as two:
        place = redis_url if kind == "Redis" and redis_url else str(Path(folder) / "store")
        row: dict[str, Any] = {"kind": kind, "rows": count}
        for step in (build, read):
            with _processes(1) as one:
                row |= one.submit(step, kind, place, count).result()
        rates = [two.submit(rows_per_second, kind, place, count) for _ in range(2)]
        row["two_readers_rows_s"] = sum(rate.result() for rate in rates)
        with _processes(1) as one:
            row |= one.submit(write, kind, place, count).result()
    return row


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The table."""
    names = [name for name in rows[0] if name not in ("kind", "rows")]
    table = Table(box=None, header_style="bold")
    for title in ("rows", "store", *names):
        table.add_column(title, justify="left" if title == "store" else "right")
    for row in rows:
        cells = [f"{row[name]:,.2f}" if row[name] < 10 else f"{row[name]:,.0f}" for name in names]
        table.add_row(f"{row['rows']:,}", row["kind"], *cells)
    console.print(table)


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of store.json")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="sizes of the table")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["Arrow", "SQLite"], help="what to measure")
    parser.add_argument("--redis", help="the URL of a Redis server that may be emptied")
    options = parser.parse_args()
    if "Redis" in options.kinds and not options.redis:
        parser.error("Redis needs --redis URL")
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    about = bench_result.machine()
    about["versions"] |= {name: version(name) for name in LIBRARIES if find_spec(name)}
    rows = [measure(kind, count, options.redis) for count in options.rows for kind in options.kinds]
    about["load_after"] = os.getloadavg()[0]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "store.json"
    path.write_text(json.dumps(to_plain({**about, "seed": SEED, "rows": rows}), indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 170)
    show(rows, console)
    console.print(str(path), highlight=False, soft_wrap=True)


def _keys(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(SEED).permutation(10 * count)[:count]


def _open(kind: str, place: str, writes: bool = False) -> Readable:
    if kind == "Arrow":
        return ArrowStore(place)
    if kind == "Redis":
        return RedisStore(place, "bench", timeout_s=30)
    return DATABASES[kind](Path(place), SCHEMA, KEY, writes)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


if __name__ == "__main__":
    main()
