"""A first schema for a log that nobody has described yet, from names, types and values of its columns; for editing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence as Names
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raysys.data import column_names
from raysys.data.columns import INTEGERS, KEYS, NUMBERS, flatten, numbers, type_word, whole
from raysys.data.profile import ColumnProfile, TableProfile, profile
from raysys.errors import UserError, nearest
from raysys.schema import FeatureSchema

FEW_VALUES = 20  # integers with so few values are ids, with more they are numbers, unless the name says id
VOCABULARY_LIMIT = 2_000_000  # more values than that are hashed
TEXT_LENGTH = 50  # strings longer than that on average are text
MAX_LENGTH = 100  # of bags and sequences


def infer_schema(path: str | Path, labels: Names[str] = ()) -> FeatureSchema:
    """The schema of a Parquet or CSV file or folder. labels: the columns to predict; none: those whose name says so."""
    return FeatureSchema.from_dict(_Inference(profile(path), labels).content, source=f"schema inferred from {path}")


def schema_text(path: str | Path, labels: Names[str] = ()) -> str:
    """The schema as YAML for a person to edit, with what is known of each column as a comment."""
    inference = _Inference(profile(path), labels)
    FeatureSchema.from_dict(inference.content)  # raises where the content is not valid
    return _render(inference)


def write_schema(path: str | Path, output: str | Path, labels: Names[str] = ()) -> None:
    """Write `schema_text` to a file."""
    Path(output).write_text(schema_text(path, labels))


def table_size(distinct: int) -> int:
    """Rows for a table of so many values: a tenth of headroom and a row for unseen ones, rounded up to two digits."""
    needed = math.ceil(distinct * 1.1) + 1
    step = 10 ** max(len(str(needed)) - 2, 0)
    return math.ceil(needed / step) * step


def embedding_dim(distinct: int) -> int:
    """A width for a table of so many values: about 1.6 times their fourth root, a multiple of 4 as fbgemm wants, at most 64."""
    return min(64, 4 * math.ceil(1.6 * distinct**0.25 / 4))


class _Inference:
    """The content of a schema, in the shape of the YAML file, with a note on each column and table and what was left out."""

    def __init__(self, table: TableProfile, labels: Names[str]) -> None:
        self.table = table
        self.notes: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.content: dict[str, Any] = {
            "tables": {},
            "dense": [],
            "sparse": [],
            "sequences": [],
            "labels": [],
            "extra": [],
        }
        self._distinct: dict[str, int] = {}  # values of each embedding table
        self._by_stem: dict[tuple[str, str], str] = {}  # the table of a stem and type
        waiting = dict(table.columns)
        for name in self._labels(labels):
            self._add_label(waiting.pop(name))
        self._add_roles(waiting)
        lists = [column for column in waiting.values() if column.is_list]
        for column in waiting.values():
            if not column.is_list:
                self._add_single(column)
        self._add_lists(lists)
        self._finish_tables()

    def _labels(self, labels: Names[str]) -> list[str]:
        columns = self.table.columns
        for name in labels:
            if name not in columns:
                raise UserError(f"{self.table.source}: no column {name!r}", nearest(name, columns))
            if columns[name].kind not in NUMBERS or columns[name].is_list:
                found = type_word(self.table.sample.schema.field(name).type)
                raise UserError(
                    f"{self.table.source}: label {name!r} is a {found}", "a number or true/false is expected"
                )
        guessed = [name for name in columns if column_names.is_label(name) and columns[name].kind in NUMBERS]
        chosen = list(dict.fromkeys(labels)) or [name for name in guessed if not columns[name].is_list]
        if not chosen:
            raise UserError(
                f"{self.table.source}: no column's name says that it is a label",
                f"name it: --label {next(iter(columns))}",
            )
        return chosen

    def _add_label(self, column: ColumnProfile) -> None:
        values = numbers(whole(self.table.sample[column.name]))
        values = values[~np.isnan(values)]
        binary = bool(np.isin(values, (0, 1)).all())
        content = {"name": column.name, "kind": "binary" if binary else "regression"}
        self.content["labels"].append(content | ({} if column.null_share == 0 else {"required": False}))
        self._note(column, f"mean {values.mean():.4g}" if len(values) else "")

    def _add_roles(self, waiting: dict[str, ColumnProfile]) -> None:
        """Take example id, time, weight and group id; of these only the group id can be a feature as well."""
        for column in list(waiting.values()):
            name = column.name.lower()
            if column.is_list:
                continue
            if name in column_names.EXAMPLE_IDS and column.kind in INTEGERS and "example_id" not in self.content:
                self.content["example_id"] = column.name
            elif column.kind == "time" or (name in column_names.TIMES and column.kind in INTEGERS):
                if "time" in self.content:
                    self.left_out[column.name] = "a second time"
                else:
                    self.content["time"] = column.name
            elif name in column_names.WEIGHTS and column.kind in NUMBERS:
                self.content["weight"] = column.name
            else:
                continue
            self._note(column)
            del waiting[column.name]
        for word in column_names.GROUPS:
            matching = [
                column.name
                for column in waiting.values()
                if column_names.stem(column.name) == (word,) and column.kind in KEYS and not column.is_list
            ]
            if matching:
                self.content["group_id"] = matching[0]
                return

    def _add_single(self, column: ColumnProfile) -> None:
        rows = self.table.rows * (1 - column.null_share)
        all_differ = column.distinct >= rows > FEW_VALUES
        if column_names.is_label(column.name):
            self._leave_out(column, "its name says that it is a label")
        elif column.distinct <= 1 and column.kind != "other":
            self._leave_out(column, "has one value only")
        elif column.kind == "number" and column_names.names_a_thing(column.name) and self._is_whole(column):
            self._leave_out(column, "ids as floating-point numbers: write them as integers")
        elif column.kind == "number":
            self._add_dense(column)
        elif column.kind == "string" and column.text_length > TEXT_LENGTH:
            self._leave_out(column, f"text of {column.text_length:.0f} characters on average")
        elif column.kind in ("string", "binary", "bool") or (
            column.kind in INTEGERS and (column.distinct <= FEW_VALUES or column_names.is_id(column.name))
        ):
            if all_differ and column.name != self.content.get("group_id"):
                self._leave_out(column, "has another value in each row")
            else:
                self._add_sparse(column)
        elif column.kind in INTEGERS:
            self._add_dense(column)
        else:
            self._leave_out(column, f"of type {self.table.sample.schema.field(column.name).type}")

    def _is_whole(self, column: ColumnProfile) -> bool:
        values = numbers(whole(self.table.sample[column.name]))
        values = values[np.isfinite(values)]
        return bool((values == np.rint(values)).all())

    def _add_dense(self, column: ColumnProfile) -> None:
        skewed = column.high - column.median > 20 * max(column.median - column.low, 1)
        content: dict[str, Any] = {"name": column.name, "side": column_names.side_of(column.name)}
        content["transform"] = "log_standardize" if skewed else "standardize"
        self.content["dense"].append(content | ({"missing_flag": True} if column.null_share else {}))
        self._note(column, "whole numbers: if they are ids, move it to sparse" if column.kind in INTEGERS else "")

    def _add_sparse(self, column: ColumnProfile) -> None:
        content: dict[str, Any] = {
            "name": column.name,
            "table": self._table_of(column),
            "side": column_names.side_of(column.name),
        }
        if column.is_list:
            content |= {"max_length": min(max(column.lengths[1], 1), MAX_LENGTH), "pooling": "mean"}
        self.content["sparse"].append(content)
        self._note(column)

    def _add_lists(self, columns: list[ColumnProfile]) -> None:
        ids: dict[str, list[ColumnProfile]] = {}
        for column in columns:
            if column.kind == "number":
                self._add_vector(column)
            elif column.kind in (*INTEGERS, "string", "binary") and column.distinct:
                ids.setdefault(column_names.words(column.name)[0], []).append(column)
            else:
                self._leave_out(column, "has no values" if column.distinct == 0 else "its elements are no ids")
        for prefix, group in ids.items():
            if len(group) > 1 and self._have_equal_lengths(group):
                self._add_sequence(prefix, group)
                continue
            for column in group:
                if column_names.is_history(column.name):
                    self._add_sequence(column.name, [column])
                else:
                    self._add_sparse(column)

    def _add_vector(self, column: ColumnProfile) -> None:
        shortest, longest = column.lengths
        if shortest == longest > 0 and not column.null_share:
            self.content["extra"].append({"name": column.name, "kind": "vector", "width": longest})
            self._note(column)
        else:
            self._leave_out(column, "numbers in lists of different lengths")

    def _add_sequence(self, name: str, group: list[ColumnProfile]) -> None:
        features = []
        for column in group:
            features.append({"name": column.name, "table": self._table_of(column)})
            self._note(column)
        length = min(max(column.lengths[1] for column in group), MAX_LENGTH)
        self.content["sequences"].append({"name": name, "features": features, "max_length": max(length, 1)})

    def _have_equal_lengths(self, group: list[ColumnProfile]) -> bool:
        lengths = [flatten(whole(self.table.sample[column.name]))[1] for column in group]
        return all(np.array_equal(lengths[0], other) for other in lengths[1:])

    def _table_of(self, column: ColumnProfile) -> str:
        """The table of a column; a list shares that of a single id which its name ends in, as history_items with item_id."""
        stem = column_names.stem(column.name)
        kind = type_word(self.table.sample.schema.field(column.name).type).removeprefix("list<").removesuffix(">")
        ends = ["_".join(stem[i:]) for i in range(len(stem))] if column.is_list else []
        shared = next((self._by_stem[end, kind] for end in ends if (end, kind) in self._by_stem), None)
        name = (
            shared or re.sub("(_ids?|Ids?|(?<!s)s)$" if column.is_list else "(_id|Id)$", "", column.name) or column.name
        )
        if shared is None and name in self._distinct:
            name = column.name
        self._by_stem.setdefault(("_".join(stem), kind), name)
        self._distinct[name] = max(column.distinct, self._distinct.get(name, 0))
        return name

    def _finish_tables(self) -> None:
        features = [
            *self.content["sparse"],
            *(item for sequence in self.content["sequences"] for item in sequence["features"]),
        ]
        for name, distinct in self._distinct.items():
            self.content["tables"][name] = {
                "num_embeddings": table_size(distinct),
                "embedding_dim": embedding_dim(distinct),
            }
        for feature in features:
            if self._distinct[feature["table"]] > VOCABULARY_LIMIT:
                feature["encoding"] = "hash"

    def _leave_out(self, column: ColumnProfile, reason: str) -> None:
        self.left_out[column.name] = reason

    def _note(self, column: ColumnProfile, more: str = "") -> None:
        about = "" if self.table.is_exact else "about "
        facts = [f"{about}{column.distinct:,} distinct"]
        if not np.isnan(column.low):
            digits = ".4g" if column.kind == "number" else ",.0f"
            facts.append(f"{column.low:{digits}} to {column.high:{digits}}")
        if column.is_list:
            facts.append(f"{column.lengths[0]} to {column.lengths[1]} long")
        if column.null_share:
            facts.append(f"{column.null_share:.1%} null")
        self.notes[column.name] = ", ".join(facts + ([more] if more else []))


def _render(inference: _Inference) -> str:
    table, content = inference.table, inference.content
    total = "" if table.total_rows is None else f" of {table.total_rows:,}"
    looked_at = (
        f"{table.rows:,} rows" if table.is_exact else f"{table.rows:,}{total} rows were looked at: counts are estimates"
    )
    lines = [
        f"# Inferred from {table.source} ({looked_at}). Edit it: names and values were all there was to go by.",
        "tables:",
    ]
    lines += [f"  {_flow({name: row})}" for name, row in content["tables"].items()]
    for key in ("labels", "dense", "sparse", "extra"):
        lines += [f"{key}:"] if content[key] else []
        lines += [f"- {_flow(item)}  # {inference.notes[item['name']]}" for item in content[key]]
    lines += ["sequences:"] if content["sequences"] else []
    for sequence in content["sequences"]:
        lines += [f"- name: {_flow(sequence['name'])}", f"  max_length: {sequence['max_length']}", "  features:"]
        lines += [f"  - {_flow(item)}  # {inference.notes[item['name']]}" for item in sequence["features"]]
    for key in ("example_id", "group_id", "time", "weight"):
        if key in content:
            lines.append(f"{key}: {_flow(content[key])}  # {inference.notes[content[key]]}")
    lines += ["# Left out:"] if inference.left_out else []
    lines += [f"#   {name}: {reason}" for name, reason in inference.left_out.items()]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """One line of YAML; a mapping of one name to a mapping keeps its name outside the braces."""
    style = None if isinstance(value, dict) and all(isinstance(item, dict) for item in value.values()) else True
    return yaml.safe_dump(value, default_flow_style=style, sort_keys=False, width=10**9).removesuffix("\n...\n").strip()
