"""The schema of a log: what each column is, which table embeds it and what is predicted.

A schema is plain data (a YAML file beside the Parquet files). It knows nothing of tensors, models or files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from raysys.errors import UserError, nearest
from raysys.plain import build, check_keys, without_defaults

Side = Literal["user", "item", "context", "position"]
Encoding = Literal["index", "hash", "vocab"]
DenseTransform = Literal["none", "log", "standardize", "log_standardize"]
Pooling = Literal["sum", "mean"]
LabelKind = Literal["binary", "regression"]
ExtraKind = Literal["float", "int", "vector", "ids"]

MAX_NUM_EMBEDDINGS = 2**32
"""The most rows a table may have: the hash is spread over them with 32-bit arithmetic."""


def _read_local(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Table:
    """An embedding table: `num_embeddings` rows of `embedding_dim` columns (row 0 is the out-of-vocabulary row of a `vocab` table)."""

    name: str
    num_embeddings: int
    embedding_dim: int = 16


@dataclass(frozen=True)
class DenseFeature:
    """A number per row. `log` is sign(x) ln(1 + |x|); `standardize` uses mean and deviation of the training split.

    A null becomes `default` (before the transform); with `missing_flag` a second dense column says 1 where it was null.
    """

    name: str
    side: Side = "context"
    transform: DenseTransform = "none"
    default: float = 0.0
    missing_flag: bool = False


@dataclass(frozen=True)
class SparseFeature:
    """One id per row (`max_length` 1) or a bag of at most `max_length` ids (the last ones are kept), looked up in `table`.

    `weights` names a list column with one weight per id of the bag.
    """

    name: str
    table: str
    side: Side = "context"
    encoding: Encoding = "vocab"
    max_length: int = 1
    pooling: Pooling = "sum"
    weights: str | None = None


@dataclass(frozen=True)
class SequenceFeature:
    """One column of a sequence: an id per event, looked up in `table`."""

    name: str
    table: str
    encoding: Encoding = "vocab"


@dataclass(frozen=True)
class Sequence:
    """Columns of equal length, oldest event first; the `max_length` most recent events are kept."""

    name: str
    features: tuple[SequenceFeature, ...]
    side: Side = "user"
    max_length: int = 50


@dataclass(frozen=True)
class Label:
    """A task. A null label is masked where the label is not `required`, and an error where it is.

    `negative_keep_rate` r < 1 says that the training split kept only this share of the negatives: predictions p are
    corrected with q = p / (p + (1 - p) / r) in metrics of other splits and in the bundle. `weight` names a column.
    """

    name: str
    kind: LabelKind = "binary"
    required: bool = True
    weight: str | None = None
    negative_keep_rate: float = 1.0


@dataclass(frozen=True)
class ExtraColumn:
    """A column that reaches `Batch.extra` unchanged: `float` and `int` [B], `vector` [B, width], `ids` jagged."""

    name: str
    kind: ExtraKind = "float"
    width: int = 1


@dataclass(frozen=True)
class Catalogue:
    """The item table: a file with one row per item that has the `item` features, keyed by column `key`."""

    key: str
    file: str = "items.parquet"


@dataclass(frozen=True)
class FeatureSchema:
    """All columns of a log that a model may see, by role. Columns that are not named here never reach a batch."""

    tables: tuple[Table, ...] = ()
    dense: tuple[DenseFeature, ...] = ()
    sparse: tuple[SparseFeature, ...] = ()
    sequences: tuple[Sequence, ...] = ()
    labels: tuple[Label, ...] = ()
    example_id: str | None = None
    group_id: str | None = None
    time: str | None = None
    weight: str | None = None
    extra: tuple[ExtraColumn, ...] = ()
    catalogue: Catalogue | None = None
    _: dataclasses.KW_ONLY
    source: str = field(default="schema", compare=False)
    """Where the schema was read from, for error messages."""

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the labels, in the order of the columns of `labels [B, T]` and `logits [B, T]`."""
        return tuple(label.name for label in self.labels)

    @property
    def dense_width(self) -> int:
        """Columns of `Batch.dense`: one per dense feature, then one per missing flag."""
        return len(self.dense) + sum(feature.missing_flag for feature in self.dense)

    @property
    def sequence_features(self) -> tuple[SequenceFeature, ...]:
        """The columns of all sequences, in order."""
        return tuple(feature for sequence in self.sequences for feature in sequence.features)

    @property
    def id_features(self) -> tuple[SparseFeature | SequenceFeature, ...]:
        """All features that an embedding table stands behind."""
        return (*self.sparse, *self.sequence_features)

    @property
    def unweighted(self) -> tuple[SparseFeature, ...]:
        """The sparse features of `Batch.sparse`."""
        return tuple(feature for feature in self.sparse if feature.weights is None)

    @property
    def weighted(self) -> tuple[SparseFeature, ...]:
        """The sparse features of `Batch.weighted`."""
        return tuple(feature for feature in self.sparse if feature.weights is not None)

    def table(self, name: str) -> Table:
        """The table of this name."""
        return next(table for table in self.tables if table.name == name)

    def encoding(self, table: str) -> Encoding:
        """The one encoding of all features of a table."""
        return next(feature.encoding for feature in self.id_features if feature.table == table)

    def columns(self, labels: bool = True) -> list[str]:
        """The columns to read, in schema order, each once; `labels=False` for scoring logs that have none."""
        names: list[str] = [feature.name for feature in self.dense]
        for feature in self.sparse:
            names += [feature.name] + ([feature.weights] if feature.weights else [])
        names += [feature.name for feature in self.sequence_features] + [column.name for column in self.extra]
        if labels:
            names += [label.name for label in self.labels] + [label.weight for label in self.labels if label.weight]
            names += [self.weight] if self.weight else []
        names += [name for name in (self.example_id, self.group_id, self.time) if name]
        return list(dict.fromkeys(names))

    def to_dict(self) -> dict[str, Any]:
        """Plain data without keys that hold their default, in the shape of the YAML file."""
        content: dict[str, Any] = {
            "tables": {
                t.name: {"num_embeddings": t.num_embeddings, "embedding_dim": t.embedding_dim} for t in self.tables
            }
        }
        for key in ("dense", "sparse", "sequences", "labels", "extra"):
            if getattr(self, key):
                content[key] = [without_defaults(item) for item in getattr(self, key)]
        for key in ("example_id", "group_id", "time", "weight"):
            if getattr(self, key) is not None:
                content[key] = getattr(self, key)
        if self.catalogue is not None:
            content["catalogue"] = dataclasses.asdict(self.catalogue)
        return content

    def save(self, path: str | Path) -> None:
        """Write the YAML file."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, width=150, default_flow_style=None, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")

    def fingerprint(self) -> str:
        """A hash of the content, the same on every machine."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str = "schema") -> FeatureSchema:
        """Build and check a schema; a wrong key or value is a `UserError` that names it and the nearest valid one."""
        if not isinstance(content, dict):
            raise UserError(f"{source}: expected a mapping, found {type(content).__name__}")
        check_keys(content, [f.name for f in dataclasses.fields(cls) if f.name != "source"], source)
        values: dict[str, Any] = {}
        for key in ("example_id", "group_id", "time", "weight"):
            values[key] = content.get(key)
            if not isinstance(values[key], str | None):
                raise UserError(f"{source}: {key} is {values[key]!r}, expected the name of a column")
        values["tables"] = tuple(_build_table(name, row, source) for name, row in _tables(content, source).items())
        kinds: dict[str, type] = {"dense": DenseFeature, "sparse": SparseFeature, "labels": Label, "extra": ExtraColumn}
        for key, kind in kinds.items():
            values[key] = tuple(build(kind, row, f"{source}: {key}") for row in _list(content, key, source))
        values["sequences"] = tuple(_build_sequence(row, source) for row in _list(content, "sequences", source))
        if content.get("catalogue") is not None:
            values["catalogue"] = build(Catalogue, content["catalogue"], f"{source}: catalogue")
        return cls(**values, source=source)

    @classmethod
    def load(cls, path: str | Path, read: Callable[[str], str] = _read_local) -> FeatureSchema:
        """Read a YAML file; `read` gives the text of one at a URI."""
        try:
            content = yaml.safe_load(read(str(path)))
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such schema", hint="make a first one with: raysys schema LOG.parquet"
            ) from None
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        return cls.from_dict(content, source=str(path))


def _list(content: dict[str, Any], key: str, where: str) -> list[Any]:
    items = content.get(key) or []
    if not isinstance(items, list):
        raise UserError(f"{where}: {key} is {items!r}, expected a list")
    return items


def _tables(content: dict[str, Any], source: str) -> dict[str, Any]:
    tables = content.get("tables") or {}
    if not isinstance(tables, dict):
        raise UserError(f"{source}: tables is {tables!r}, expected a mapping from table name to its num_embeddings")
    return tables


def _build_table(name: Any, content: Any, source: str) -> Table:
    where = f"{source}: table {name!r}"
    return build(Table, {**content, "name": name} if isinstance(content, dict) else content, where)


def _build_sequence(content: Any, source: str) -> Sequence:
    sequence = build(Sequence, content, f"{source}: sequences")
    where = f"{source}: sequence {sequence.name!r}"
    rows = _list(content, "features", where)
    return dataclasses.replace(sequence, features=tuple(build(SequenceFeature, row, where) for row in rows))


def _validate(schema: FeatureSchema) -> None:
    _check_tables(schema)
    _check_values(schema)
    _check_unique(schema)
    tables = {table.name for table in schema.tables}
    encodings: dict[str, str] = {}
    for feature in schema.id_features:
        if feature.table not in tables:
            raise UserError(
                f"{schema.source}: feature {feature.name!r} names table {feature.table!r}, which does not exist",
                nearest(feature.table, tables),
            )
        if encodings.setdefault(feature.table, feature.encoding) != feature.encoding:
            raise UserError(
                f"{schema.source}: feature {feature.name!r} has encoding {feature.encoding!r}, but table {feature.table!r} is already "
                f"used with {encodings[feature.table]!r}",
                "features that share a table share its encoding",
            )
    unused = sorted(tables - encodings.keys())
    if unused:
        raise UserError(
            f"{schema.source}: table {unused[0]!r} is used by no feature", "remove it or name it in a feature"
        )


def _check_values(schema: FeatureSchema) -> None:
    named: tuple[Any, ...] = (
        *schema.dense,
        *schema.sparse,
        *schema.sequences,
        *schema.sequence_features,
        *schema.labels,
        *schema.extra,
    )
    for item in named:
        _check_choices(schema, item)
        for key in ("max_length", "width"):
            _check_positive(schema, repr(item.name), key, getattr(item, key, 1))
    for feature in schema.dense:
        if not math.isfinite(feature.default):
            raise UserError(f"{schema.source}: {feature.name!r} has default {feature.default}", "give a finite number")
    for sequence in schema.sequences:
        if not sequence.features:
            raise UserError(f"{schema.source}: sequence {sequence.name!r} has no features", "name at least one column")
    for label in schema.labels:
        if not 0 < label.negative_keep_rate <= 1:
            raise UserError(
                f"{schema.source}: label {label.name!r} has negative_keep_rate {label.negative_keep_rate}",
                "a rate in (0, 1] is expected",
            )


def _check_tables(schema: FeatureSchema) -> None:
    for table in schema.tables:
        for key in ("num_embeddings", "embedding_dim"):
            _check_positive(schema, f"table {table.name!r}", key, getattr(table, key))
        if table.num_embeddings > MAX_NUM_EMBEDDINGS:
            raise UserError(
                f"{schema.source}: table {table.name!r} has num_embeddings {table.num_embeddings}",
                f"at most {MAX_NUM_EMBEDDINGS} (2**32) are supported",
            )


def _check_choices(schema: FeatureSchema, item: Any) -> None:
    kinds = LabelKind if isinstance(item, Label) else ExtraKind
    choices = {
        "side": Side,
        "encoding": Encoding,
        "transform": DenseTransform,
        "pooling": Pooling,
        "kind": kinds,
    }
    for key, allowed in choices.items():
        value = getattr(item, key, None)
        if hasattr(item, key) and value not in get_args(allowed):
            hint = nearest(str(value), get_args(allowed))
            raise UserError(f"{schema.source}: {item.name!r} has {key} {value!r}", hint)


def _check_positive(schema: FeatureSchema, owner: str, key: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{schema.source}: {owner} has {key} {value!r}", "a positive whole number is expected")


def _check_unique(schema: FeatureSchema) -> None:
    groups: dict[str, list[str]] = {
        "feature": [feature.name for feature in schema.dense] + [feature.name for feature in schema.id_features],
        "sequence": [s.name for s in schema.sequences],
        "label": list(schema.tasks),
    }
    for kind, names in groups.items():
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"{schema.source}: {kind} {twice[0]!r} is named twice")
    inputs = {*groups["feature"], *(feature.weights for feature in schema.sparse)}
    leaks = [task for task in schema.tasks if task in inputs]
    if leaks:
        raise UserError(
            f"{schema.source}: label {leaks[0]!r} is also a feature",
            "a label as a feature gives the answer away: remove it",
        )
