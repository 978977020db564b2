"""What is fitted on the training split, and the one function from raw rows to a `Batch`, for training and for serving."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys.data.batch import Batch
from raysys.data.collate import Collator
from raysys.data.columns import Source, agree, type_word, whole
from raysys.data.encode import Normalizer, encode_dense, encode_extra, encode_labels, encode_row_ids, no_labels
from raysys.data.fit import fit
from raysys.data.ids import IdTable, encode_bag, encode_list, encode_sequence, encode_single
from raysys.data.log import ParquetLog
from raysys.data.roles import check_column, roles
from raysys.data.rows import Rows
from raysys.data.vocabulary import Vocabulary
from raysys.errors import UserError
from raysys.schema import FeatureSchema

FORMAT = 1
"""The version of the saved form."""
REQUEST = Source("rows")
"""Where raw rows come from that are not of a log."""
_CHECKED = 1000  # sets of columns that are remembered as checked


class Transforms:
    """Vocabularies, normalisers and the hash seed of a schema: plain data, the same in training and serving."""

    def __init__(
        self,
        schema: FeatureSchema,
        seed: int,
        types: dict[str, str],
        normalizers: dict[str, Normalizer],
        vocabularies: dict[str, Vocabulary],
    ) -> None:
        self.schema = schema
        self.seed = seed
        self.normalizers = normalizers
        self.types = types  # of the columns that hold ids: "integer", "list<string>", … as fitted
        self._vocabularies = vocabularies
        self._tables = {
            table.name: IdTable(
                table.name, table.num_embeddings, schema.encoding(table.name), seed, vocabularies.get(table.name)
            )
            for table in schema.tables
        }
        self._single = [f for f in schema.unweighted if types[f.name] in ("integer", "string")]
        self._bags = [feature for feature in schema.sparse if feature not in self._single]
        self.collate = Collator(schema, [feature.name for feature in self._single])
        self._checked: set[tuple[pa.Schema, bool]] = set()

    @classmethod
    def fit(cls, schema: FeatureSchema, log: ParquetLog, seed: int = 0) -> Transforms:
        """Fit on the training split: a vocabulary holds the num_embeddings - 1 most frequent values of its table."""
        types = {role.column: type_word(log.types[role.column]) for role in roles(schema, labels=False) if role.is_id}
        normalizers, vocabularies = fit(schema, log)
        return cls(schema, seed, types, normalizers, vocabularies)

    def vocabulary(self, table: str) -> pa.Array | None:
        """The values of a `vocab` table: id i > 0 is value[i - 1], id 0 any other value; None with other encodings."""
        return self._vocabularies[table].values if table in self._vocabularies else None

    def to_batch(self, rows: pa.Table | pa.RecordBatch, pad_to: int | None = None, labels: bool = True) -> Batch:
        """A batch of these raw rows and then padding up to `pad_to` rows.

        `labels=False` masks all labels and needs no label columns. Where the columns for example_id, group_id or time
        are not there, they are the row number, 0 and 0.
        """
        encoded = self.encode(rows, labels=labels)
        size = len(encoded) if pad_to is None else pad_to
        assert size >= len(encoded), f"{len(encoded)} rows do not fit into pad_to={pad_to}"
        return self.collate([(encoded, 0, len(encoded))], size)

    def rows_to_batch(self, rows: list[dict[str, Any]], labels: bool = False) -> Batch:
        """`to_batch` of rows as JSON has them; a feature may be null or absent in some rows, but not absent in all.

        Times are seconds, ISO 8601 text or datetime; keys that the schema does not name are ignored.
        """
        if not rows:
            raise UserError("rows: none are given")
        given = {key for row in rows for key in row}
        names = [name for name in self.schema.columns(labels) if name in given]
        columns = {name: _array(name, [row.get(name) for row in rows], name == self.schema.time) for name in names}
        ignored = {name: pa.nulls(len(rows)) for name in given - set(names)}  # named in the hint for a missing column
        return self.to_batch(pa.table(columns | ignored), labels=labels)

    def encode(self, rows: pa.Table | pa.RecordBatch, source: Source = REQUEST, labels: bool = True) -> Rows:
        """The raw rows in numpy, from which batches are cut; `source` names them in errors and numbers them."""
        self._check(rows.schema, source, labels)
        schema, num_rows = self.schema, rows.num_rows
        given = set(rows.schema.names)
        columns = {name: whole(rows[name]) for name in schema.columns(labels) if name in given}
        arrays: dict[str, Any] = encode_row_ids(columns, schema, num_rows, source)
        arrays["dense"] = encode_dense(columns, schema, self.normalizers, num_rows, source)
        arrays |= encode_labels(columns, schema, num_rows, source) if labels else no_labels(schema, num_rows)
        ids = np.empty((len(self._single), num_rows), np.int64)  # [F, n]
        for row, feature in enumerate(self._single):
            ids[row] = encode_single(feature, columns[feature.name], self._tables[feature.table], source)
        bags = {bag.name: encode_bag(bag, columns, self._tables[bag.table], source) for bag in self._bags}
        for sequence in schema.sequences:
            bags |= encode_sequence(sequence, columns, self._tables, source)
        return Rows(
            num_rows,
            arrays,
            ids,
            bags,
            {e.name: encode_extra(columns[e.name], e, source) for e in schema.extra if e.kind != "ids"},
            {e.name: encode_list(columns[e.name]) for e in schema.extra if e.kind == "ids"},
        )

    def save(self, folder: Path) -> None:
        """Write transforms.json and vocabulary/<table>.parquet: the same bytes for the same transforms."""
        (folder / "vocabulary").mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "seed": self.seed,
            "schema": self.schema.to_dict(),
            "types": self.types,
            "normalizers": {name: dataclasses.asdict(value) for name, value in self.normalizers.items()},
        }
        (folder / "transforms.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for table, vocabulary in self._vocabularies.items():
            pq.write_table(pa.table({"value": vocabulary.values}), _vocabulary_path(folder, table))

    @classmethod
    def load(cls, folder: Path) -> Transforms:
        """Read what `save` wrote."""
        path = folder / "transforms.json"
        if not path.exists():
            raise UserError(f"{path}: no such file", "a folder written with a checkpoint or a bundle is expected")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(f"{path}: format {content['format']}, expected {FORMAT}", "use the version that wrote it")
        schema = FeatureSchema.from_dict(content["schema"], source=str(path))
        vocabularies = {
            table.name: Vocabulary(whole(pq.read_table(_vocabulary_path(folder, table.name))["value"]))
            for table in schema.tables
            if schema.encoding(table.name) == "vocab"
        }
        normalizers = {name: Normalizer(**value) for name, value in content["normalizers"].items()}
        return cls(schema, content["seed"], content["types"], normalizers, vocabularies)

    def _check(self, columns: pa.Schema, source: Source, labels: bool) -> None:
        """Refuse missing columns and wrong types, once for each set of columns."""
        if (columns, labels) in self._checked:
            return
        for role in roles(self.schema, labels):
            if role.optional and role.column not in columns.names:
                continue
            check_column(role, columns, source.name)
            kind = columns.field(role.column).type
            if role.is_id and not agree(type_word(kind), self.types[role.column]):
                raise UserError(
                    f"{source.name}: column {role.column!r} has type {kind}, fitted was {self.types[role.column]}",
                    "5, '5' and [5] are different things: write the column with one type everywhere",
                )
        if len(self._checked) > _CHECKED:  # requests with every combination of null columns
            self._checked.clear()
        self._checked.add((columns, labels))


def _array(name: str, values: list[Any], is_time: bool) -> pa.Array:
    if is_time:
        values = [_parse_time(value) if isinstance(value, str) else value for value in values]
    try:
        try:
            return pa.array(values)
        except OverflowError:  # integers beyond 2**63, alone or in lists
            lists = any(isinstance(value, list) for value in values)
            return pa.array(values, pa.list_(pa.uint64()) if lists else pa.uint64())
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(f"rows: column {name!r} has values of different types: {error}") from error


def _parse_time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not read Z
    except ValueError:
        raise UserError(
            f"rows: time {text!r} is not ISO 8601", "write it as 2024-05-31T12:00:00Z or in seconds"
        ) from None


def _vocabulary_path(folder: Path, table: str) -> Path:
    return folder / "vocabulary" / f"{quote(table, safe='')}.parquet"
