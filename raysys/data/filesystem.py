"""Files at a path or at any URI that pyarrow or fsspec knows: the one place that opens either."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

from raysys.errors import UserError, first_line


def is_uri(path: str | Path) -> bool:
    """Whether it is a URI, not a local path."""
    return "://" in str(path)


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI and the path within it, absolute where it is local."""
    if not is_uri(path):
        return pafs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        return pafs.FileSystem.from_uri(path)
    except pa.ArrowInvalid:  # not one of Arrow's own
        try:
            filesystem, root = fsspec.core.url_to_fs(path)
        except (ValueError, ImportError) as error:
            raise UserError(f"{path}: cannot be opened: {first_line(error)}") from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), root


def exists(path: str) -> bool:
    """Whether there is a file or a folder."""
    filesystem, root = resolve(path)
    return filesystem.get_file_info(root).type != pafs.FileType.NotFound


def read_text(path: str) -> str:
    """The text of a UTF-8 file; a FileNotFoundError where there is none."""
    filesystem, root = resolve(path)
    if filesystem.get_file_info(root).type != pafs.FileType.File:
        raise FileNotFoundError(path)
    with filesystem.open_input_file(root) as file:
        return str(file.read(), "utf-8")
