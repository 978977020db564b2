"""Raw tables as they come: Parquet or CSV, a file or a folder, read batch by batch in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from raysys.data.filesystem import resolve
from raysys.errors import UserError, first_line

SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".csv.gz": "csv", ".tsv": "tsv", ".tsv.gz": "tsv"}
_ENDS = 65_536


def open_source(path: str | Path, types: Mapping[str, pa.DataType] | None = None) -> pads.Dataset:
    """A file, or a folder of files of one kind, at a path or at any URI that pyarrow or fsspec knows.

    CSV and TSV have a header; the types of their columns are those of the first block of each file. What stands there
    without quotes as nothing, NA, null or nan is null. types: of columns of a CSV file, whatever they look like.
    """
    path = str(path)
    filesystem, _, listed = _list(path)
    files = [file.path for file in listed if _kind(file.path)]
    if not files:
        raise UserError(f"{path}: no Parquet or CSV file", f"known endings: {', '.join(SUFFIXES)}")
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"{path}: holds {' and '.join(sorted(kinds))} files", "a folder with files of one kind is expected"
        )
    kind = kinds.pop()
    layout: pads.FileFormat = pads.ParquetFileFormat()
    if kind != "parquet":
        layout = pads.CsvFileFormat(
            pacsv.ParseOptions(delimiter="," if kind == "csv" else "\t"),
            convert_options=pacsv.ConvertOptions(
                strings_can_be_null=True, quoted_strings_can_be_null=False, column_types=types
            ),
        )
    try:
        return pads.dataset(files, format=layout, filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as {kind}: {first_line(error)}") from None


def is_text(path: str | Path) -> bool:
    """Whether it is a CSV or TSV file, or a folder with such files and no Parquet."""
    kinds = {_kind(file.path) for file in _list(str(path))[2]} - {""}
    return bool(kinds) and "parquet" not in kinds


def read_batches(
    source: pads.Dataset, name: str, columns: Sequence[str] | None = None, batch_size: int = 65_536
) -> Iterator[pa.RecordBatch]:
    """The rows in order, `columns` of them (None: all). name: what an error calls the source."""
    scanner = source.scanner(
        columns=None if columns is None else list(columns),
        batch_size=batch_size,
        batch_readahead=2,
        fragment_readahead=1,
    )
    try:
        yield from scanner.to_batches()
    except (pa.ArrowException, OSError) as error:
        hint = "all rows of a column must have the type of its first ones" if "CSV" in str(error) else None
        raise UserError(f"{name}: cannot be read: {first_line(error)}", hint) from None


def fingerprint(path: str | Path) -> str:
    """A hash of a file or of all files in a folder: names, sizes, and the first and last 64 KiB of each.

    Parquet keeps its statistics at the end, so that nearly any change is seen without reading a large log.
    """
    filesystem, root, files = _list(str(path))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path[len(root) :]}\0{file.size}\0".encode())
        with filesystem.open_input_file(file.path) as handle:
            digest.update(handle.read(_ENDS))
            handle.seek(max(file.size - _ENDS, 0))
            digest.update(handle.read())
    return digest.hexdigest()


def _list(path: str) -> tuple[pafs.FileSystem, str, list[pafs.FileInfo]]:
    """The file system, the path within it, and the file or the files below the folder, in the order of their paths."""
    filesystem, root = resolve(path)
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"{path}: no such file or folder")
    if info.type == pafs.FileType.File:
        return filesystem, root, [info]
    found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    files = [entry for entry in found if entry.is_file and not _is_hidden(entry.path[len(root) :])]
    return filesystem, root, sorted(files, key=lambda entry: entry.path)


def _is_hidden(path: str) -> bool:
    """Whether it is what Spark and others write beside the data."""
    return any(part.startswith(("_", ".")) for part in path.split("/"))


def _kind(path: str) -> str:
    return next((kind for suffix, kind in SUFFIXES.items() if path.lower().endswith(suffix)), "")
