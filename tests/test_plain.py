from __future__ import annotations

from dataclasses import dataclass

import pytest

from raysys.errors import UserError
from raysys.plain import NOT_SET, ConfigDifference, build, config_differences, config_value, without_defaults


@dataclass(frozen=True)
class Part:
    name: str
    size: int = 1
    share: float = 0.5
    active: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...] = ()


def test_from_plain_data_and_back():
    part = build(Part, {"name": "a", "share": 1, "note": None}, "file")
    assert part == Part("a", share=1)
    assert without_defaults(part) == {"name": "a", "share": 1}
    assert without_defaults(Whole((part, Part("b")))) == {"parts": [{"name": "a", "share": 1}, {"name": "b"}]}


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ("a", "file: expected a mapping with keys name, size, share, active, note, found 'a'", None),
        ({"name": "a", "sise": 2}, "file 'a': unknown key 'sise'", "did you mean 'size'?"),
        ({"size": 2}, "file: missing key 'name'", None),
        ({"name": "a", "size": "2"}, "file 'a': size is '2', expected a whole number", None),
        ({"name": "a", "size": True}, "file 'a': size is True, expected a whole number", None),
        ({"name": "a", "size": 2.5}, "file 'a': size is 2.5, expected a whole number", None),
        ({"name": "a", "share": "1e-3"}, "file 'a': share is '1e-3', expected a number", None),
        ({"name": "a", "active": 1}, "file 'a': active is 1, expected true or false", None),
        ({"name": "a", "note": 3}, "file 'a': note is 3, expected a string", None),
        (
            {"name": False},
            "file False: name is False, expected a string",
            "YAML reads yes, no, on and off as true and false: put quotes around the word",
        ),
    ],
)
def test_mistakes_are_named(content, message, hint):
    with pytest.raises(UserError) as error:
        build(Part, content, "file")
    assert error.value.message == message
    assert error.value.hint == hint


def test_differences_of_nested_configs_are_found_by_their_keys():
    a = {
        "m": {"x": 1, "list": [1, 2], "parts": [{"k": 1}, {"k": 2}], "gone": None},
        "same": {"deep": [1]},
        "flag": True,
    }
    b = {
        "m": {"x": 2, "list": [1, 3], "parts": [{"k": 1}, {"k": 3}, {"k": 4}], "new": {"y": 0}},
        "same": {"deep": [1]},
        "flag": 1,
    }
    assert config_differences(a, b) == [
        ConfigDifference("m.x", 1, 2),
        ConfigDifference("m.list", [1, 2], [1, 3]),
        ConfigDifference("m.parts[1].k", 2, 3),
        ConfigDifference("m.parts[2]", NOT_SET, {"k": 4}),
        ConfigDifference("m.gone", None, NOT_SET),
        ConfigDifference("m.new", NOT_SET, {"y": 0}),
        ConfigDifference("flag", True, 1),
    ]
    assert config_differences(a, a) == []
    assert [config_value(value) for value in (None, True, 1, [1])] == ["null", "true", "1", "[1]"]
