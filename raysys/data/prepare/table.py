"""Any log in Parquet or CSV: split, negatives down-sampled at a known rate, with the schema that the user gives."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from raysys.data.columns import integers, numbers, seconds, whole
from raysys.data.hashing import mix
from raysys.data.infer import infer_schema
from raysys.data.prepare.dataset import SPLITS, check_local, is_prepared, prepare_folder
from raysys.data.prepare.splits import TRAIN, check_split, share_split, time_cuts, time_split
from raysys.data.row_groups import RowGroupWriter
from raysys.data.source import fingerprint, open_source, read_batches
from raysys.errors import UserError, nearest
from raysys.schema import FeatureSchema

TableSplit = Literal["random", "time"]
ROW_NUMBER = "example_id"
"""The column that is added where the schema names no example id: the row's number in the source."""


def prepare(
    folder: str | Path,
    source: str | Path | None = None,
    schema: str | Path | None = None,
    split: TableSplit = "random",
    seed: int = 0,
    negative_keep_rate: Mapping[str, float] | None = None,
) -> None:
    """Write train, valid and test as Parquet, with schema.yaml, unless they are there. All columns are kept.

    source: a Parquet or CSV file, or a folder of them. schema: a YAML file; None infers one.
    split: "random" gives 80/10/10 by a hash of the example id; "time" cuts at the times that 80% and 90% of the rows come
    before (it holds all times, 8 bytes a row). Rows keep their order, and only some of them are in memory at a time.
    negative_keep_rate: {label: r} keeps this share of the rows of train where this label is 0, by a hash of the example
    id, and notes it in the schema, by which predictions are corrected.
    """
    if source is None and is_prepared(folder):
        return  # later commands need not repeat where it came from
    if source is None:
        check_local(folder)
        raise UserError(
            "table: source is not given", "name a Parquet or CSV file or folder: data.prepare.source=LOG.parquet"
        )
    if split not in get_args(TableSplit):
        raise UserError(f"table: split is {split!r}", nearest(split, get_args(TableSplit)))
    rates = dict(negative_keep_rate or {})
    arguments = {
        "data": "table",
        "source": fingerprint(source),
        "schema": None if schema is None else fingerprint(schema),
        "split": split,
        "seed": seed,
        "negative_keep_rate": rates,
    }

    def write(partial: Path) -> None:
        data = open_source(source)
        given = infer_schema(source) if schema is None else FeatureSchema.load(schema)
        _check_columns(given, data.schema, str(source))
        written = _with_rates(_with_example_id(given, data.schema, str(source)), rates)
        _copy_catalogue(given, schema, partial)
        _write_splits(data, str(source), written, split, seed, partial)
        written.save(partial / "schema.yaml")

    prepare_folder(folder, arguments, write)


def _check_columns(schema: FeatureSchema, found: pa.Schema, source: str) -> None:
    for name in schema.columns():
        if name not in found.names:
            raise UserError(f"{source}: column {name!r} of {schema.source} is missing", nearest(name, found.names))


def _with_example_id(schema: FeatureSchema, found: pa.Schema, source: str) -> FeatureSchema:
    if schema.example_id is not None:
        if not pa.types.is_integer(found.field(schema.example_id).type):
            kind = found.field(schema.example_id).type
            raise UserError(
                f"{source}: column {schema.example_id!r} has type {kind}, expected an integer",
                "without example_id in the schema rows are numbered",
            )
        return schema
    if ROW_NUMBER in found.names:
        raise UserError(
            f"{source}: has a column {ROW_NUMBER!r} that {schema.source} does not name",
            f"add: example_id: {ROW_NUMBER}",
        )
    return dataclasses.replace(schema, example_id=ROW_NUMBER)


def _with_rates(schema: FeatureSchema, rates: dict[str, float]) -> FeatureSchema:
    for label in schema.labels:
        if label.negative_keep_rate != 1:
            raise UserError(
                f"table: label {label.name!r} has negative_keep_rate {label.negative_keep_rate} in {schema.source}",
                "valid and test must hold all negatives: give the rate to the preparation, which samples train alone",
            )
    if len(rates) > 1:
        raise UserError("table: negative_keep_rate names several labels", "a row can be dropped for one label only")
    for name, rate in rates.items():
        if name not in schema.tasks:
            raise UserError(f"table: negative_keep_rate names {name!r}, which is no label", nearest(name, schema.tasks))
        kind = schema.labels[schema.tasks.index(name)].kind
        if kind != "binary" or not 0 < rate < 1:
            raise UserError(
                f"table: negative_keep_rate of the {kind} label {name!r} is {rate}",
                "a share between 0 and 1 for a binary label is expected",
            )
    labels = [dataclasses.replace(label, negative_keep_rate=rates.get(label.name, 1.0)) for label in schema.labels]
    return dataclasses.replace(schema, labels=tuple(labels))


def _copy_catalogue(schema: FeatureSchema, path: str | Path | None, folder: Path) -> None:
    if schema.catalogue is None or path is None:  # no inferred schema has one
        return
    file = Path(path).parent / schema.catalogue.file
    if not file.is_file():
        raise UserError(f"{file}: no such file", f"the catalogue of {schema.source} is expected beside it")
    shutil.copyfile(file, folder / schema.catalogue.file)


def _write_splits(
    data: pads.Dataset, source: str, schema: FeatureSchema, split: TableSplit, seed: int, folder: Path
) -> None:
    cuts = _time_cuts(data, source, schema) if split == "time" else None
    rows_seen, rows_written = 0, np.zeros(len(SPLITS), np.int64)
    with ExitStack() as stack:
        writers = [stack.enter_context(RowGroupWriter(folder / f"{name}.parquet")) for name in SPLITS]
        for batch in read_batches(data, source):
            if schema.example_id not in batch.schema.names:
                batch = batch.append_column(schema.example_id, pa.array(np.arange(rows_seen, rows_seen + len(batch))))
            rows_seen += len(batch)
            assigned, kept = _assign(batch, source, schema, cuts, seed)
            for number, writer in enumerate(writers):
                chosen = (assigned == number) & kept
                rows_written[number] += np.count_nonzero(chosen)
                writer.write(batch.filter(pa.array(chosen)))
    check_split(rows_written, split, source)


def _time_cuts(data: pads.Dataset, source: str, schema: FeatureSchema) -> tuple[int, int]:
    if schema.time is None:
        raise UserError(f"table: {schema.source} names no time column", "add `time: COLUMN`, or use split=random")
    times = []
    for batch in read_batches(data, source, [schema.time]):
        if batch[schema.time].null_count:
            raise UserError(
                f"{source}: time column {schema.time!r} has nulls", "a split by time needs the time of each row"
            )
        times.append(seconds(whole(batch[schema.time])))
    return time_cuts(np.concatenate(times))


def _assign(
    batch: pa.RecordBatch, source: str, schema: FeatureSchema, cuts: tuple[int, int] | None, seed: int
) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """[rows] the split of each row, and whether it survives the down-sampling of train."""
    hashes = mix(integers(whole(batch[schema.example_id])).view(np.uint64), seed)
    if cuts is None:
        assigned = share_split(hashes)
    else:
        assert schema.time is not None
        assigned = time_split(seconds(whole(batch[schema.time])), cuts)
    draw = (mix(hashes) >> np.uint64(11)) * 2.0**-53  # in [0, 1), independent of the split
    kept = np.ones(len(batch), np.bool_)
    for label in schema.labels:
        if label.negative_keep_rate < 1:
            negative = numbers(whole(batch[label.name])) == 0
            _check_other_labels(batch, negative, schema, label.name, source)
            kept = ~negative | (draw < label.negative_keep_rate) | (assigned != TRAIN)
    return assigned, kept


def _check_other_labels(
    batch: pa.RecordBatch, negative: NDArray[np.bool_], schema: FeatureSchema, label: str, source: str
) -> None:
    for other in schema.tasks:
        if other != label and np.any(negative & whole(batch[other]).is_valid().to_numpy(zero_copy_only=False)):
            raise UserError(
                f"{source}: label {other!r} has values where {label!r} is 0, so that dropping such rows would distort it",
                f"down-sample only where the other labels are null when {label!r} is 0",
            )
