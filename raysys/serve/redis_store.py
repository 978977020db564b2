"""The feature store in Redis: for features that change while they are served, and for machines that share one store.

Keys of a store named NAME, where N is a version:
  NAME:newest    N, set when all rows of N are there
  NAME:N         a hash from key to row, a JSON list of the columns' values
  NAME:N:about   Arrow schema (base64) and the name of the key, as JSON
"""

from __future__ import annotations

import base64
import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raysys.data.columns import kind_of
from raysys.errors import UserError, first_line
from raysys.serve.store import Found, Keys
from raysys.serve.store_rows import as_rows, check_keys, missing_rows, with_keys

OLD_SECONDS = 3600
"""How long a version stays readable after it was replaced, and what a process that died wrote of one before it was whole."""
BLOCK = 1000
"""Rows of one command."""


@dataclass(frozen=True)
class _Version:
    number: int
    key: str
    schema: pa.Schema


class RedisStore:
    """A `FeatureStore` in a Redis database. `put` is seen at once by all readers of the same version.

    A version is one Redis hash, which on a Redis Cluster lives on one of its machines. Types: integers, floats, truth
    values, text, and lists of them, which JSON gives back exactly. Errors of the connection are redis's own exceptions.
    """

    def __init__(self, url: str, name: str, timeout_s: float = 1.0) -> None:
        """Read the newest version of a store. url: redis://host:port/database. timeout_s: of every call.

        Raises UserError where the client is not installed, the server does not answer, or no such store is there.
        """
        self._redis, self._name = _connect(url, timeout_s), name
        self._opened = self._open()

    @classmethod
    def create(cls, url: str, name: str, rows: pa.Table, key: str, timeout_s: float = 1.0) -> RedisStore:
        """Write rows, one for each key, as the newest version of a store, which need not exist yet."""
        _write(_connect(url, timeout_s), name, rows, key)
        return cls(url, name, timeout_s)

    @property
    def schema(self) -> pa.Schema:
        """The columns and their types."""
        return self._opened.schema

    @property
    def key(self) -> str:
        """The name of the key's column."""
        return self._opened.key

    @property
    def version(self) -> int:
        """The number of the version that is read."""
        return self._opened.number

    def __len__(self) -> int:
        return int(self._redis.hlen(f"{self._name}:{self.version}"))

    def get(self, keys: Keys) -> Found:
        """See `FeatureStore.get`. Raises UserError where this version was replaced more than an hour ago."""
        opened = self._opened  # another thread may refresh meanwhile
        asked = check_keys(keys, opened.schema, opened.key)
        if not len(asked):
            return missing_rows(opened.schema, 0), np.zeros(0, bool)
        place = f"{self._name}:{opened.number}"
        with self._redis.pipeline(transaction=False) as pipe:
            values, exists = pipe.hmget(place, asked.to_pylist()).exists(f"{place}:about").execute()
        if not exists:
            raise UserError(f"feature store {self._name}: version {opened.number} is no longer there", "call refresh()")
        found = np.array([value is not None for value in values])
        if not found.any():
            return with_keys(missing_rows(opened.schema, len(asked)), opened.key, asked), found
        empty = [None] * len(opened.schema)
        columns = zip(*(empty if value is None else json.loads(value) for value in values), strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, opened.schema, strict=True)]
        return with_keys(pa.RecordBatch.from_arrays(arrays, schema=opened.schema), opened.key, asked), found

    def some_keys(self, count: int) -> list[Any]:
        """See `FeatureStore.some_keys`."""
        opened = self._opened
        keys = itertools.islice(self._redis.hscan_iter(f"{self._name}:{opened.number}", count=count), count)
        array = pa.array([key.decode() for key, _ in keys], pa.string())
        return array.cast(opened.schema.field(opened.key).type).to_pylist()

    def put(self, rows: pa.Table) -> None:
        """See `FeatureStore.put`. Raises UserError where the version that is read is no longer the newest."""
        added = as_rows(rows, self.key, self.schema)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.watch(f"{self._name}:newest")  # replaced before the end of the transaction: an error of redis
            if int(pipe.get(f"{self._name}:newest")) != self.version:
                raise UserError(f"feature store {self._name}: version {self.version} was replaced", "call refresh()")
            pipe.multi()
            _set_rows(pipe, f"{self._name}:{self.version}", added, self.key)
            pipe.execute()

    def replace(self, rows: pa.Table) -> None:
        """See `FeatureStore.replace`."""
        _write(self._redis, self._name, rows, self.key)
        self.refresh()

    def refresh(self) -> bool:
        """See `FeatureStore.refresh`."""
        newest = self._open()
        newer, self._opened = newest.number != self.version, newest
        return newer

    def _open(self) -> _Version:
        number = self._redis.get(f"{self._name}:newest")
        about = None if number is None else self._redis.get(f"{self._name}:{int(number)}:about")
        if about is None:
            raise UserError(f"feature store {self._name} is not in this Redis", "make one: RedisStore.create")
        content = json.loads(about)
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["schema"])))
        return _Version(int(number), content["key"], schema)


def _connect(url: str, timeout_s: float) -> Any:
    try:
        import redis
    except ImportError:
        raise UserError("the Redis feature store needs the redis client", "pip install 'raysys[redis]'") from None
    try:
        client = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        client.ping()
    except (redis.exceptions.RedisError, ValueError) as error:
        raise UserError(f"feature store: Redis at {url} does not answer: {first_line(error)}") from None
    return client


def _write(client: Any, name: str, rows: pa.Table, key: str) -> None:
    """Write all rows under a new number, then point to it; the version before goes later, for those who read it."""
    batch = as_rows(rows, key)
    _check_types(batch.schema)
    number = client.incr(f"{name}:versions")
    place = f"{name}:{number}"
    for start in range(0, batch.num_rows, BLOCK):
        with client.pipeline(transaction=False) as pipe:
            _set_rows(pipe, place, batch.slice(start, BLOCK), key)
            pipe.expire(place, OLD_SECONDS).execute()
    about = {"key": key, "schema": base64.b64encode(batch.schema.serialize()).decode()}
    with client.pipeline(transaction=True) as pipe:
        pipe.persist(place).set(f"{place}:about", json.dumps(about)).getset(f"{name}:newest", number)
        before = pipe.execute()[-1]
    if before is not None:
        old = f"{name}:{int(before)}"
        client.pipeline().expire(old, OLD_SECONDS).expire(f"{old}:about", OLD_SECONDS).execute()


def _set_rows(pipe: Any, place: str, rows: pa.RecordBatch, key: str) -> None:
    if rows.num_rows:
        values = map(json.dumps, zip(*(column.to_pylist() for column in rows.columns), strict=True))
        pipe.hset(place, mapping=dict(zip(rows[key].to_pylist(), values, strict=True)))


def _check_types(schema: pa.Schema) -> None:
    for field in schema:
        kind, _ = kind_of(field.type)
        if kind not in ("integer", "unsigned", "bool", "number", "string", "null") or pa.types.is_decimal(field.type):
            raise UserError(
                f"feature store: column {field.name!r} has type {field.type}, which Redis rows cannot hold",
                "cast it to an integer or text, or take the embedded store",
            )
