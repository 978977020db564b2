"""Users as requests name them: their rows of the store, and what they are not shown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urldefrag

import numpy as np
import pyarrow as pa

from raysys.errors import UserError, first_line
from raysys.models.retrieval.indexes.index import Ids
from raysys.serve.messages import Scalar
from raysys.serve.problems import BadRequest, Unavailable
from raysys.serve.store import ArrowStore, FeatureStore, Found
from raysys.serve.users import SEEN

log = logging.getLogger("ray.serve")


class Visitor(NamedTuple):
    """row: [1] the user's columns and the request's context. left_out: items that are not shown to them."""

    row: pa.Table
    left_out: Ids


class Visitors:
    """place: the folder of an embedded store, or redis://HOST:PORT/DATABASE#NAME. retry_after_s: where Redis does not answer."""

    def __init__(self, place: str, retry_after_s: int = 1) -> None:
        self._store = open_store(place)
        self._retry_after_s = retry_after_s

    async def refresh(self) -> None:
        """Go on to the newest rows."""
        await asyncio.to_thread(self._store.refresh)

    async def row(self, user: int | str) -> tuple[pa.RecordBatch, bool]:
        """The row [1] of a user, null where the store does not know them, and whether it does."""
        if isinstance(user, str) != self._is_text:
            raise BadRequest(f"user: {'text' if self._is_text else 'an integer'} is expected")
        if isinstance(self._store, ArrowStore):  # mapped memory, 50 µs; a thread would take longer
            row, found = self._store.get(pa.array([user]))
        else:
            row, found = await self._from_redis(user)
        return row, bool(found[0])

    async def visitor(self, user: int | str, context: Mapping[str, Scalar], exclude: Sequence[int]) -> Visitor:
        """Raises BadRequest for a user of another type, and for a context that is a column of the store."""
        row, _ = await self.row(user)
        seen = row[SEEN][0].as_py() or [] if SEEN in row.schema.names else []
        table = pa.Table.from_batches([row])
        for name, value in context.items():
            if name in row.schema.names:
                raise BadRequest(f"context: {name!r} is a column of the user store")
            table = table.append_column(name, pa.array([value]))
        return Visitor(table, np.unique(np.array([*seen, *exclude], np.int64)))

    def parse(self, name: str) -> int | str:
        """A user's key from its text; raises BadRequest where it cannot be one."""
        if self._is_text:
            return name
        try:
            key = int(name)
        except ValueError:
            raise BadRequest("user: an integer is expected") from None
        if not -(2**63) <= key < 2**63:
            raise BadRequest("user: an integer of 64 bits is expected")
        return key

    @property
    def _is_text(self) -> bool:
        return bool(pa.types.is_large_string(self._store.schema.field(self._store.key).type))

    async def some(self, count: int) -> list[int | str]:
        """Keys of up to `count` users, to choose from."""
        keys: list[int | str] = await asyncio.to_thread(self._store.some_keys, count)
        return keys

    async def _from_redis(self, user: int | str) -> Found:
        from redis.exceptions import RedisError

        try:
            return await asyncio.to_thread(self._store.get, pa.array([user]))
        except RedisError as error:
            log.error("user store: %s", first_line(error))
            raise Unavailable("the user store does not answer", self._retry_after_s) from None

    @property
    def key(self) -> str:
        """The column that names a user."""
        return self._store.key


def open_store(place: str) -> FeatureStore:
    """The store at a folder or a Redis URL; raises UserError where there is none."""
    if not place.startswith(("redis://", "rediss://")):
        return ArrowStore(place)
    from raysys.serve.redis_store import RedisStore

    url, name = urldefrag(place)
    if not name:
        raise UserError(f"user store {place}: no name", "redis://HOST:PORT/DATABASE#NAME is expected")
    return RedisStore(url, name)
