"""Ranked requests on disk, as `jobs/skew.py` reads them: the raw rows that the final ranker got, and what it said of them."""

from __future__ import annotations

import json
import logging
import uuid
from pathlib import Path

import pyarrow as pa

from raysys.serve.plan import point_of
from raysys.serve.settings import ServedLogSettings
from raysys.serve.stages import Predictions
from raysys.strict_json import to_plain

log = logging.getLogger("ray.serve")


class ServedLog:
    """A file a replica, and the one before it, in the folder of the settings. Not synchronised: it is a sample."""

    def __init__(self, settings: ServedLogSettings) -> None:
        self._settings = settings
        self._name = uuid.uuid4().hex
        self._number = 0
        Path(settings.folder).mkdir(parents=True, exist_ok=True)

    def wants(self, request_id: str) -> bool:
        """Whether this request is in the sample; one without an id, as health checks are, never is."""
        return bool(request_id) and point_of(request_id, "served") < self._settings.share

    def add(self, request_id: str, version: str, rows: pa.Table, found: Predictions) -> None:
        """Append one request. A disk that takes nothing costs the sample, not the request: it is logged as an error."""
        entry = {"request_id": request_id, "model_version": version, "rows": to_plain(rows.to_pylist())}
        line = json.dumps(entry | {"predictions": found.values.tolist()})
        try:
            if self._file.exists() and self._file.stat().st_size + len(line) > self._settings.max_bytes:
                self._path(self._number - 1).unlink(missing_ok=True)
                self._number += 1
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            log.error("log of served requests: %s", error)

    @property
    def _file(self) -> Path:
        return self._path(self._number)

    def _path(self, number: int) -> Path:
        return Path(self._settings.folder) / f"{self._name}-{number:06d}.jsonl"
