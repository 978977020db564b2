"""A prepared data set: one folder with the splits, schema.yaml and prepared.json, which appears when it is complete."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from raysys.data.filesystem import is_uri, read_text
from raysys.errors import UserError
from raysys.strict_json import to_plain

SPLITS = ("train", "valid", "test")


def prepare_folder(
    folder: str | Path, arguments: dict[str, Any], write: Callable[[Path], dict[str, Any] | None]
) -> None:
    """Let `write` fill a folder beside `folder` and rename it at the end; a folder with these arguments is left as it is.

    arguments: plain data that decides what is written, the source's hash included; kept in prepared.json, with the rows
    of each split and what `write` returns. Another data set in the folder is a `UserError`: nothing is overwritten.
    A folder at a URI is read, never written.
    """
    arguments = json.loads(json.dumps(arguments))
    if _is_complete(folder, arguments):
        print(f"{folder}: already prepared")
        return
    check_local(folder)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        facts = write(partial) or {}
        rows = {split: pads.dataset(_split_path(partial, split)).count_rows() for split in SPLITS}
        content = {"arguments": arguments, "rows": rows, **facts}
        (partial / "prepared.json").write_text(json.dumps(to_plain(content), indent=1) + "\n")
        partial.rename(folder)
    print(f"{folder}: prepared ({', '.join(f'{count:,} {split}' for split, count in rows.items())} rows)")


def is_prepared(folder: str | Path) -> bool:
    """Whether a `prepare` has finished this folder, at a path or URI."""
    return read_prepared(folder) is not None


def read_prepared(folder: str | Path) -> dict[str, Any] | None:
    """The content of prepared.json, or None where no `prepare` has finished this folder."""
    try:
        content: dict[str, Any] = json.loads(read_text(f"{str(folder).rstrip('/')}/prepared.json"))
    except FileNotFoundError:
        return None
    return content


def check_local(folder: str | Path) -> None:
    """Refuse to write a data set at a URI: a folder appears there file by file, not as a whole."""
    if is_uri(folder):
        raise UserError(
            f"{folder}: no prepared data set is there, and preparation writes local folders only",
            "prepare a local folder and copy it there",
        )


def _split_path(folder: Path, split: str) -> Path:
    file = folder / f"{split}.parquet"
    return file if file.exists() else folder / split


def write_table(path: Path, table: pa.Table, row_group_size: int = 8192) -> None:
    """One Parquet file. Small row groups: a reader that shuffles or resumes decodes whole groups."""
    pq.write_table(table, path, row_group_size=row_group_size, compression="zstd")


def _is_complete(folder: str | Path, arguments: dict[str, Any]) -> bool:
    prepared = read_prepared(folder)
    if prepared is None:
        path = Path(folder)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{folder}: exists and is no prepared data set", "name another folder")
        return False
    found = prepared["arguments"]
    for key in sorted(found.keys() | arguments.keys()):
        if found.get(key) != arguments.get(key):
            raise UserError(
                f"{folder}: was prepared with {key} = {found.get(key)!r}, not {arguments.get(key)!r}",
                "name another folder, or remove this one",
            )
    return True
