"""One split of a log: a Parquet file or a folder of them, checked from its footers and read row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raysys.data.columns import Source, agree, type_word
from raysys.data.filesystem import resolve
from raysys.data.roles import Role, check_column, roles
from raysys.errors import UserError, first_line
from raysys.schema import FeatureSchema

_DAMAGED = "the file was cut short or changed while written or copied: write it again"


@dataclass(frozen=True)
class LogFile:
    """One Parquet file: `name` as the user knows it, `path` within its file system, `first_row` within the log."""

    name: str
    path: str
    first_row: int
    metadata: pq.FileMetaData
    schema: pa.Schema


class ParquetLog:
    """One split: a file, or a folder of *.parquet files in the order of their paths, at any pyarrow or fsspec URI.

    Opening reads the footers only and checks that every file is whole and has the schema's columns in types that their
    roles take, that there are rows, and that each label has a value somewhere. `labels=False` is for logs to be scored,
    which need not have columns for example_id, group_id and time either.
    """

    def __init__(self, path: str | Path, schema: FeatureSchema, labels: bool = True) -> None:
        self.path = str(path)
        self.schema = schema
        self.labels = labels
        self._filesystem, root = resolve(self.path)
        self.files = self._open(root)
        self.num_rows = sum(file.metadata.num_rows for file in self.files)
        self.types = self._check_types()
        self.columns = list(self.types)
        if self.num_rows == 0:
            raise UserError(f"{self.path}: no rows", "a split needs at least one row")
        for name in schema.tasks if labels else ():
            self._check_label(name)

    def row_groups(self) -> Iterator[tuple[int, int]]:
        """The rows [start, stop) of each row group, numbered within the log."""
        for file in self.files:
            start = file.first_row
            for group in range(file.metadata.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                yield start, stop
                start = stop

    def num_values(self, columns: list[str]) -> int:
        """How many values these columns hold in all, each element of a list counted."""
        count = 0
        for file in self.files:
            groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
            chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
            count += sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
        return count

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows of these columns (default: `columns`) in memory."""
        batches = [batch for _, batch in self.scan(columns=columns)]
        tables = [pa.Table.from_batches([batch]) for batch in batches]
        return pa.concat_tables(tables, promote_options="permissive").combine_chunks()

    def iter_batches(self, columns: list[str] | None = None, batch_size: int = 65536) -> Iterator[pa.RecordBatch]:
        """The rows in order, at most `batch_size` at a time, never across a row group."""
        for _, batch in self.scan(columns=columns, batch_size=batch_size):
            yield batch

    def scan(
        self, start: int = 0, stop: int | None = None, columns: list[str] | None = None, batch_size: int = 65536
    ) -> Iterator[tuple[Source, pa.RecordBatch]]:
        """Rows [start, stop) in order, with where each batch comes from; a damaged page is a `UserError`.

        Rows before `start` in its row group are decoded and dropped: Parquet cannot be entered in the middle.
        """
        columns = self.columns if columns is None else columns
        stop = self.num_rows if stop is None else stop
        for file in self.files:
            if file.first_row < stop and file.first_row + file.metadata.num_rows > start:
                yield from self._scan_file(file, start - file.first_row, stop - file.first_row, columns, batch_size)

    def _scan_file(
        self, file: LogFile, start: int, stop: int, columns: list[str], batch_size: int
    ) -> Iterator[tuple[Source, pa.RecordBatch]]:
        first = 0  # number of the row group's first row within the file
        with self._parquet(file) as parquet:
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first < stop and first + rows > start:
                    row = first
                    for batch in _read_group(parquet, file.name, group, columns, batch_size):
                        begin, end = max(start - row, 0), min(stop - row, len(batch))
                        if begin < end:
                            name = f"{file.name}, row group {group}"
                            yield Source(name, row + begin, file.first_row + row + begin), batch[begin:end]
                        row += len(batch)
                        if row >= stop:
                            return
                first += rows

    @contextmanager
    def _parquet(self, file: LogFile) -> Iterator[pq.ParquetFile]:
        remote = not isinstance(self._filesystem, pafs.LocalFileSystem)
        with self._filesystem.open_input_file(file.path) as handle:
            # pre_buffer joins the reads of a row group's columns, which pays where each read is a request.
            yield pq.ParquetFile(handle, metadata=file.metadata, pre_buffer=remote, page_checksum_verification=True)

    def _open(self, root: str) -> tuple[LogFile, ...]:
        paths = self._paths(root)
        names = [self.path if path == root else self.path.rstrip("/") + path[len(root.rstrip("/")) :] for path in paths]
        with ThreadPoolExecutor(max_workers=16) as pool:  # a folder in an object store: one request each
            footers = list(pool.map(self._footer, paths, names))
        files, first_row = [], 0
        for path, name, (metadata, schema) in zip(paths, names, footers, strict=True):
            files.append(LogFile(name, path, first_row, metadata, schema))
            first_row += metadata.num_rows
        return tuple(files)

    def _paths(self, root: str) -> list[str]:
        info = self._filesystem.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            raise UserError(f"{self.path}: no such file or folder", "a Parquet file or a folder of them is expected")
        if info.type == pafs.FileType.File:
            return [root]
        found = self._filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
        paths = sorted(entry.path for entry in found if entry.is_file and _is_data(entry.path[len(root) :]))
        if not paths:
            raise UserError(f"{self.path}: no *.parquet file in this folder", "a folder of Parquet files is expected")
        return paths

    def _footer(self, path: str, name: str) -> tuple[pq.FileMetaData, pa.Schema]:
        try:
            with self._filesystem.open_input_file(path) as handle:
                if handle.size() == 0:
                    raise UserError(f"{name}: the file is empty (0 bytes)", _DAMAGED)
                parquet = pq.ParquetFile(handle)
                return parquet.metadata, parquet.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{name}: not a whole Parquet file ({first_line(error)})", _DAMAGED) from error

    def _check_types(self) -> dict[str, pa.DataType]:
        """The type of each column of the schema; files must agree on whether ids are numbers or strings, alone or lists."""
        types: dict[str, pa.DataType] = {}
        for role in self._roles():
            for file in self.files:
                check_column(role, file.schema, file.name)
                kind = file.schema.field(role.column).type
                known = types.setdefault(role.column, kind)
                if role.is_id and not agree(type_word(kind), type_word(known)):
                    raise UserError(
                        f"{file.name}: column {role.column!r} has type {kind}, but {known} in another file",
                        "write all files of a split with the same types",
                    )
                if "null" in type_word(known):
                    types[role.column] = kind
        return types

    def _roles(self) -> Iterator[Role]:
        """Those that this log must fill; what only some files have, all must."""
        for role in roles(self.schema, self.labels):
            if self.labels or not role.optional or any(role.column in file.schema.names for file in self.files):
                yield role

    def _check_label(self, name: str) -> None:
        for file in self.files:
            paths = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
            for group in range(file.metadata.num_row_groups):
                statistics = file.metadata.row_group(group).column(paths.index(name)).statistics
                if statistics is None or not statistics.has_null_count:
                    nulls = self._count_nulls(file, group, name)
                else:
                    nulls = statistics.null_count
                if nulls < file.metadata.row_group(group).num_rows:
                    return
        raise UserError(f"{self.path}: label {name!r} is null in every row", "remove the label or give it values")

    def _count_nulls(self, file: LogFile, group: int, name: str) -> int:
        with self._parquet(file) as parquet:
            return sum(batch[0].null_count for batch in _read_group(parquet, file.name, group, [name], 65536))


def split_path(folder: str, split: str) -> str:
    """The Parquet file `<folder>/<split>.parquet`, or the folder `<folder>/<split>` of Parquet files."""
    filesystem, root = resolve(folder)
    base, address = f"{root.rstrip('/')}/{split}", f"{folder.rstrip('/')}/{split}"
    file, directory = filesystem.get_file_info([f"{base}.parquet", base])
    if file.type == pafs.FileType.File:
        return f"{address}.parquet"
    if directory.type == pafs.FileType.Directory:
        return address
    raise UserError(f"{folder}: no split {split!r}", f"{address}.parquet or {address}/*.parquet is expected")


def _is_data(path: str) -> bool:
    """Whether a path below a folder is a part of the data; writers put what is not whole yet below _ or . names."""
    return path.endswith(".parquet") and not any(part.startswith(("_", ".")) for part in path.split("/"))


def _read_group(
    parquet: pq.ParquetFile, name: str, group: int, columns: list[str], batch_size: int
) -> Iterator[pa.RecordBatch]:
    threads = pa.cpu_count() > 1  # the size of Arrow's pool, which follows OMP_NUM_THREADS
    try:
        yield from parquet.iter_batches(batch_size, row_groups=[group], columns=columns, use_threads=threads)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}, row group {group}: cannot be read ({first_line(error)})", _DAMAGED) from error
