"""Arrow columns as numpy arrays, whatever type the file gave them: kinds of columns, lists, numbers, times, ids."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Kind = Literal["integer", "unsigned", "bool", "number", "string", "binary", "time", "null", "other"]
NUMBERS: tuple[Kind, ...] = ("integer", "unsigned", "bool", "number", "null")
INTEGERS: tuple[Kind, ...] = ("integer", "unsigned", "bool", "null")
KEYS: tuple[Kind, ...] = (*INTEGERS, "string", "binary")


@dataclass(frozen=True)
class Source:
    """Where rows come from, for error messages and row numbers.

    `first_row` is the number of the first row within the file, `log_row` within the whole log.
    """

    name: str
    first_row: int = 0
    log_row: int = 0

    def at(self, row: int) -> str:
        """The place of a row, counted from the first row of this source."""
        return f"{self.name}, row {self.first_row + row}"


def is_list(kind: pa.DataType) -> bool:
    """Whether a value of this type is a list."""
    types = pa.types
    return (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def kind_of(kind: pa.DataType) -> tuple[Kind, bool]:
    """What a column holds, and whether each of its values is a list of that."""
    if is_list(kind):
        return _scalar_kind(kind.value_type), True
    return _scalar_kind(kind), False


@lru_cache(maxsize=1024)
def _scalar_kind(kind: pa.DataType) -> Kind:
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    checks: dict[Kind, bool] = {
        "null": types.is_null(kind),
        "bool": types.is_boolean(kind),
        "unsigned": types.is_uint64(kind),
        "integer": types.is_integer(kind) and not types.is_uint64(kind),
        "number": types.is_floating(kind) or types.is_decimal(kind),
        "string": types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind),
        "binary": types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind),
        "time": types.is_timestamp(kind) or types.is_date(kind),
    }
    return next((name for name, holds in checks.items() if holds), "other")


def type_word(kind: pa.DataType) -> str:
    """`integer` or `string` for what can be an id, `list<…>` of it, else the kind: types of one word give the same ids."""
    element, is_list_type = kind_of(kind)
    word = {"binary": "string", "unsigned": "integer", "bool": "integer"}.get(element, element)
    return f"list<{word}>" if is_list_type else word


def agree(found: str, known: str) -> bool:
    """Whether two type words can be those of one column; nulls only agree with everything."""
    if "list<null>" in (found, known):
        return found.startswith("list<") == known.startswith("list<") or "null" in (found, known)
    return found == known or "null" in (found, known)


def whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array from the chunks of a table's column, without a copy where there is one chunk and a plain type."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return _plain(column)


def _plain(array: pa.Array) -> pa.Array:
    """Without dictionaries and views, which few of Arrow's functions take."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_string_view(array.type) or pa.types.is_binary_view(array.type):
        array = text(array)
    return array


def flatten(column: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """The elements of a list column and the length of each list; a null list is an empty one."""
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    return _plain(column.flatten()), lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices start, start + 1, … of each (start, length), one after another."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - ends + lengths, lengths) + np.arange(total)


def present(array: pa.Array) -> NDArray[np.bool_] | None:
    """True where a value is not null, or None where all are."""
    return None if array.null_count == 0 else array.is_valid().to_numpy(zero_copy_only=False)


def numbers(array: pa.Array) -> NDArray[np.float64]:
    """Floating-point values, a null as NaN."""
    if pa.types.is_null(array.type):
        return np.full(len(array), np.nan)
    if pa.types.is_float32(array.type) or pa.types.is_float64(array.type):
        return array.to_numpy(zero_copy_only=False)  # a null becomes NaN; float32 goes to float32, which is exact
    # Integers beyond 2**53 are rounded, which a checked cast would refuse.
    return array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def integers(array: pa.Array) -> NDArray[np.int64]:
    """64-bit integers, a null as 0; unsigned ones beyond 2**63 keep their bits."""
    if pa.types.is_null(array.type):
        return np.zeros(len(array), np.int64)
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    if array.null_count:
        array = pc.fill_null(array, 0)
    values = array.to_numpy(zero_copy_only=False)
    return values.view(np.int64) if values.dtype == np.uint64 else values.astype(np.int64, copy=False)


def seconds(array: pa.Array) -> NDArray[np.int64]:
    """Seconds since 1970 (UTC) of timestamps, dates, or integers that are seconds already; rounded down."""
    if _scalar_kind(array.type) != "time":
        return integers(array)
    if pa.types.is_date(array.type):
        array = array.cast(pa.timestamp("s"), safe=False)
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[array.type.unit]
    return integers(array.cast(pa.int64())) // per_second


def is_text(array: pa.Array) -> bool:
    """Whether the values are strings or bytes, as opposed to numbers; a column of nulls only is neither."""
    return _scalar_kind(array.type) in ("string", "binary")


def text(array: pa.Array) -> pa.Array:
    """Strings or bytes as their bytes: what vocabularies and hashes of text are defined on."""
    return array.cast(pa.large_binary())
