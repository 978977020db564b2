"""Plain data (what YAML and JSON hold): to and from frozen dataclasses, with errors that name the wrong key, and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from raysys.errors import UserError, nearest

T = TypeVar("T")

NOT_SET = "(not set)"
"""Stands for a config key that only the other config has."""

_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int), "bool": (bool,)}
_WORDS = {"str": "a string", "int": "a whole number", "float": "a number", "bool": "true or false"}


@dataclass(frozen=True)
class ConfigDifference:
    """A key (dotted) whose value differs; a config that does not have the key has NOT_SET."""

    key: str
    a: Any
    b: Any


def build(kind: type[T], content: Any, where: str) -> T:
    """A dataclass of this kind from a mapping; an unknown or missing key or a wrong type is a `UserError` that names it."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a mapping with keys {', '.join(fields)}, found {content!r}")
    where = f"{where} {content['name']!r}" if "name" in content else where
    check_keys(content, fields, where)
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in content]
    if missing:
        raise UserError(f"{where}: missing key {missing[0]!r}")
    for name, value in content.items():
        _check_type(value, str(fields[name].type), f"{where}: {name}")
    return kind(**content)


def check_keys(content: dict[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse keys that are not known, naming the nearest known one."""
    known = list(known)
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}", hint=nearest(str(key), known))


def without_defaults(item: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their default, tuples of dataclasses as lists of mappings."""
    content = {}
    for f in dataclasses.fields(item):
        value = getattr(item, f.name)
        if isinstance(value, tuple):
            content[f.name] = [without_defaults(element) for element in value]
        elif value != f.default:
            content[f.name] = value
    return content


def config_differences(a: Any, b: Any, prefix: str = "") -> list[ConfigDifference]:
    """The leaves that differ between two nested configs; lists are compared whole unless they hold mappings."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        pairs = [(f"{prefix}.{key}" if prefix else str(key), a.get(key, NOT_SET), b.get(key, NOT_SET)) for key in keys]
    elif isinstance(a, list) and isinstance(b, list) and any(isinstance(item, dict) for item in (*a, *b)):
        size = max(len(a), len(b))
        pad_a, pad_b = [*a, *[NOT_SET] * (size - len(a))], [*b, *[NOT_SET] * (size - len(b))]
        pairs = [(f"{prefix}[{i}]", pad_a[i], pad_b[i]) for i in range(size)]
    else:
        same = a == b and isinstance(a, bool) == isinstance(b, bool)
        return [] if same else [ConfigDifference(prefix, a, b)]
    return [found for key, left, right in pairs for found in config_differences(left, right, key)]


def config_value(value: Any) -> str:
    """A value as it would be written on the command line: `null`, `true`."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _check_type(value: Any, annotation: str, where: str) -> None:
    base, _, optional = annotation.partition(" | ")
    if base not in _TYPES or (value is None and optional == "None"):
        return
    # bool is a subclass of int: `max_length: true` is a mistake all the same.
    if not isinstance(value, _TYPES[base]) or (isinstance(value, bool) and base != "bool"):
        raise UserError(f"{where} is {value!r}, expected {_WORDS[base]}", _quote_hint(value, base))


def _quote_hint(value: Any, base: str) -> str | None:
    words = isinstance(value, bool) and base == "str"
    return "YAML reads yes, no, on and off as true and false: put quotes around the word" if words else None
