"""Which types of columns each role in the schema takes, checked before any row is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from raysys.data.columns import INTEGERS, KEYS, NUMBERS, Kind, kind_of
from raysys.errors import UserError, nearest
from raysys.schema import FeatureSchema

Lists = Literal["never", "always", "either"]


@dataclass(frozen=True)
class Role:
    """What the schema uses a column for: the kinds it takes, and whether its values may or must be lists.

    `is_id` where an integer and a string of the same digits are different values; `optional` where rows that are scored
    need not have it (those that are trained on must).
    """

    column: str
    name: str
    expected: str
    kinds: tuple[Kind, ...]
    lists: Lists = "never"
    is_id: bool = False
    optional: bool = False

    def takes(self, kind: pa.DataType) -> bool:
        """Whether a column of this type can be used for it; an all-null column can, for everything."""
        element, is_list = kind_of(kind)
        if element == "null" and not is_list:
            return True
        return element in self.kinds and (self.lists == "either" or is_list == (self.lists == "always"))


def roles(schema: FeatureSchema, labels: bool) -> Iterator[Role]:
    """The roles of all columns; a column may have several."""
    for dense in schema.dense:
        yield Role(dense.name, "a dense feature", "a number", NUMBERS)
    for sparse in schema.sparse:
        kinds, words = _id_kinds(sparse.encoding)
        name = f"a sparse feature with encoding {sparse.encoding!r}"
        yield Role(sparse.name, name, f"{words}, or a list of them", kinds, "either", is_id=True)
        if sparse.weights:
            yield Role(sparse.weights, f"the weights of {sparse.name!r}", "numbers", NUMBERS, "either")
    for feature in schema.sequence_features:
        kinds, words = _id_kinds(feature.encoding)
        name = f"a sequence feature with encoding {feature.encoding!r}"
        yield Role(feature.name, name, f"a list of {words}", kinds, "always", is_id=True)
    for column in schema.extra:
        kinds = INTEGERS if column.kind in ("int", "ids") else NUMBERS
        expected = {
            "float": "a number",
            "int": "an integer",
            "vector": "a list of numbers",
            "ids": "a list of integers",
        }
        lists: Lists = "always" if column.kind in ("vector", "ids") else "never"
        yield Role(column.name, f"an extra column of kind {column.kind!r}", expected[column.kind], kinds, lists)
    if labels:
        yield from _label_roles(schema)
    if schema.example_id:
        yield Role(schema.example_id, "example_id", "an integer", INTEGERS, optional=True)
    if schema.group_id:
        yield Role(schema.group_id, "group_id", "an integer or a string", KEYS, is_id=True, optional=True)
    if schema.time:
        yield Role(schema.time, "time", "a timestamp, a date or whole seconds", (*INTEGERS, "time"), optional=True)


def check_column(role: Role, columns: pa.Schema, where: str) -> None:
    """Refuse a column that is missing or of a type that its role does not take."""
    index = columns.get_field_index(role.column)
    if index < 0:
        raise UserError(
            f"{where}: column {role.column!r} is missing ({role.name})", nearest(role.column, columns.names)
        )
    kind = columns.field(index).type
    if not role.takes(kind):
        raise UserError(
            f"{where}: column {role.column!r} has type {kind}, expected {role.expected}",
            f"the schema uses it as {role.name}",
        )


def _id_kinds(encoding: str) -> tuple[tuple[Kind, ...], str]:
    return (INTEGERS, "integers") if encoding == "index" else (KEYS, "integers or strings")


def _label_roles(schema: FeatureSchema) -> Iterator[Role]:
    for label in schema.labels:
        yield Role(label.name, "a label", "a number or a boolean", NUMBERS)
        if label.weight:
            yield Role(label.weight, f"the weight of label {label.name!r}", "a number", NUMBERS)
    if schema.weight:
        yield Role(schema.weight, "weight", "a number", NUMBERS)
