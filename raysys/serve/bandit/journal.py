"""A write-ahead log: what was appended survives kill -9 and a power cut, and is read again in its order.

folder/
  00000003.state    a record that stands for all logs before 3, once there were any
  00000003.log      records since then
  lock              held by the one process that appends

A record is a length, a CRC-32 and a body in safetensors' format. The end of the newest log may be torn by a crash: it was not
acknowledged and is cut off. Damage before the end is an error.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from raysys.errors import UserError

_HEADER = struct.Struct("<QI")  # bytes of the body and their CRC-32
_FACTS = "facts"


@dataclass(frozen=True)
class Record:
    """One entry: its kind, plain facts, and arrays by name."""

    kind: str
    facts: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


class Journal:
    """One folder, for one process. Read everything with `records` before the first `append`."""

    def __init__(self, folder: str | Path) -> None:
        """Open or make the folder. Raises UserError where another process has it."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another process appends to this log", "give each its own folder") from None
        numbers = [int(path.stem) for path in self.folder.glob("*.state")]
        self._number = max(numbers, default=0)
        self._log = open(self._path("log"), "ab")  # noqa: SIM115
        _sync_folder(self.folder)

    @property
    def size(self) -> int:
        """Bytes of the log since the last `compact`."""
        return self._log.tell()

    def records(self) -> Iterator[Record]:
        """What `compact` was last given, then all that was appended since. A torn end is cut off.

        Raises UserError naming the file that is damaged elsewhere.
        """
        if self._path("state").exists():
            content = self._path("state").read_bytes()
            record, end = _decode(content, 0)
            if record is None or end != len(content):
                raise UserError(f"{self._path('state')} is damaged", "restore it from a copy of the folder")
            yield record
        content, start = self._path("log").read_bytes(), 0
        while start < len(content):
            record, end = _decode(content, start)
            if record is None:
                if end < len(content):
                    raise UserError(
                        f"{self._path('log')} is damaged at byte {start}", "restore it from a copy of the folder"
                    )
                self._log.truncate(start)
                self._log.seek(start)
                os.fsync(self._log.fileno())
                return
            yield record
            start = end

    def append(self, record: Record) -> None:
        """Write a record; it is on disk when this returns. After an error the journal takes no more: open it again."""
        body = _encode(record)
        try:
            self._log.write(body)
            self._log.flush()
            os.fsync(self._log.fileno())
        except OSError:
            self.close()
            raise

    def compact(self, record: Record) -> None:
        """Let `record` stand for all that was appended so far, and start an empty log."""
        self._number += 1
        temporary = self._path("tmp")
        with open(temporary, "wb") as file:
            file.write(_encode(record))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path("state"))
        self._log.close()
        self._log = open(self._path("log"), "ab")  # noqa: SIM115
        _sync_folder(self.folder)
        for path in [*self.folder.glob("*.log"), *self.folder.glob("*.state")]:
            if int(path.stem) < self._number:
                path.unlink()

    def close(self) -> None:
        """Let another process have the folder."""
        self._log.close()
        self._lock.close()

    def _path(self, kind: str) -> Path:
        return self.folder / f"{self._number:08d}.{kind}"


def _encode(record: Record) -> bytes:
    text = json.dumps({"kind": record.kind, "facts": record.facts}).encode()
    arrays = {name: np.ascontiguousarray(array) for name, array in record.arrays.items()}
    body = safetensors.numpy.save({**arrays, _FACTS: np.frombuffer(text, np.uint8)})
    return _HEADER.pack(len(body), zlib.crc32(body)) + body


def _decode(content: bytes, start: int) -> tuple[Record | None, int]:
    """The record at `start`, or None where it is damaged, and where it ends, as far as its header can be believed."""
    first = start + _HEADER.size
    if first > len(content):
        return None, len(content)
    size, checksum = _HEADER.unpack_from(content, start)
    body = content[first : first + size]
    if len(body) < size or zlib.crc32(body) != checksum:
        return None, min(first + size, len(content))
    arrays = safetensors.numpy.load(body)
    head = json.loads(arrays.pop(_FACTS).tobytes())
    return Record(head["kind"], head["facts"], arrays), first + size


def _sync_folder(folder: Path) -> None:
    """Make names of files last, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
