from __future__ import annotations

import pyarrow as pa
import pytest

from raysys.errors import UserError


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    return error.value.message


def set_column(table: pa.Table, name: str, values: object) -> pa.Table:
    column = values if isinstance(values, pa.Array) else pa.array(values)
    return table.set_column(table.schema.get_field_index(name), name, column)


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("price", [1.0, float("nan"), 2.0], "rows, row 1: dense column 'price' holds nan, expected a finite number"),
        ("price", [1.0, None, float("-inf")], "rows, row 2: dense column 'price' holds -inf, expected a finite number"),
        ("price", [1.0, 1e39, 2.0], "rows, row 1: dense column 'price' holds 1e+39, expected a finite number"),
        ("visits", [1.0, 0.0, float("inf")], "rows, row 2: dense column 'visits' holds inf, expected a finite number"),
        ("price", ["a", "b", "c"], "rows: column 'price' has type string, expected a number"),
        ("click", [0, 1, 2], "rows, row 2: label 'click' holds 2, expected 0 or 1"),
        ("click", [0.5, 1, 1], "rows, row 0: label 'click' holds 0.5, expected 0 or 1"),
        ("click", [0, None, 1], "rows, row 1: label 'click' is null"),
        ("rating", [0, None, float("nan")], "rows, row 2: label 'rating' holds nan, expected a finite number"),
        ("row_weight", [1, None, 1], "rows, row 1: weight column 'row_weight' is null"),
        ("row_weight", [1, 1, -2], "rows, row 2: weight column 'row_weight' holds -2, expected 0 or more"),
        (
            "rating_weight",
            [1, float("inf"), 1],
            "rows, row 1: weight column 'rating_weight' holds inf, expected a finite number",
        ),
        ("id", [1, None, 2], "rows, row 1: example_id column 'id' is null"),
        ("id", [1, -1, 2], "rows, row 1: example_id is -1, which stands for padding"),
        ("user", [1, 2, 3], "rows: column 'user' has type int64, fitted was string"),
        ("user", [["a"], ["b"], []], "rows: column 'user' has type list<item: string>, fitted was string"),
        ("item", [[1], [2], []], "rows: column 'item' has type list<item: int64>, fitted was integer"),
        ("when", [1, None, 2], "rows, row 1: time column 'when' is null"),
        ("when", ["a", "b", "c"], "rows: column 'when' has type string, expected a timestamp, a date or whole seconds"),
        (
            "slot",
            [1, None, 5],
            "rows, row 2: column 'slot' holds id 5, but table 'slots' has num_embeddings 5",
        ),
        ("slot", [1, -1, 0], "rows, row 1: column 'slot' holds id -1, but table 'slots' has num_embeddings 5"),
        ("slot", ["1", "2", "3"], "rows: column 'slot' has type string, expected integers, or a list of them"),
        ("slot", [1.0, 2.0, 3.0], "rows: column 'slot' has type double, expected integers, or a list of them"),
        (
            "slots_seen",
            [None, [1, None], [4, 9, 0]],
            "rows, row 2: column 'slots_seen' holds id 9, but table 'slots' has num_embeddings 5",
        ),
        (
            "history_action",
            [[1], [1, 2], [1, 2]],
            "rows, row 0: sequence 'history' has columns of unequal lengths: history_item 2, history_action 1",
        ),
        (
            "history_action",
            [[1, 1], [1, None], [1, 2]],
            "rows, row 1: column 'history_action' of sequence 'history' has a null inside a list",
        ),
        ("history_action", [1, 2, 3], "rows: column 'history_action' has type int64, expected a list of integers"),
        (
            "topic_weights",
            [[1.0], [1.0, 2.0], []],
            "rows, row 2: bag 'topics' has columns of unequal lengths: topics 1, topic_weights 0",
        ),
        (
            "topic_weights",
            [[1.0], [1.0, None], [1.0]],
            "rows, row 1: weight column 'topic_weights' of 'topics' holds [1.0, None], expected finite numbers",
        ),
        ("position", [1, None, 1], "rows, row 1: extra column 'position' is null"),
        ("vector", [[1.0, 2.0], None, [1.0, 2.0]], "rows, row 1: extra column 'vector' holds 0 numbers, expected 2"),
    ],
)
def test_bad_values_are_named(transforms, make_table, column, values, expected):
    table = make_table(3, seed=0)
    events = pa.array([[1, 2], [1, 2], [1, 2]])
    table = set_column(set_column(table, "history_item", events), "history_action", events)
    table = set_column(table, "topics", [[1], [2, 3], [4]])
    table = set_column(table, "topic_weights", [[1.0], [1.0, 2.0], [1.0]])
    transforms.to_batch(table)
    with pytest.raises(UserError) as error:
        transforms.to_batch(set_column(table, column, values))
    assert message(error) == expected


def test_a_missing_feature_is_named_with_the_nearest_column(transforms, make_table):
    rows = [
        {("usr" if key == "user" else key): value for key, value in row.items()} for row in make_table(3, 0).to_pylist()
    ]
    with pytest.raises(UserError) as error:
        transforms.rows_to_batch(rows)
    assert message(error) == "rows: column 'user' is missing (a sparse feature with encoding 'vocab')"
    assert error.value.hint == "did you mean 'usr'?"


def test_bad_requests(transforms, make_table):
    rows = make_table(2, seed=0).to_pylist()
    with pytest.raises(UserError, match=r"^rows: none are given$"):
        transforms.rows_to_batch([])
    with pytest.raises(UserError, match=r"^rows: column 'item' has values of different types: "):
        transforms.rows_to_batch([{**rows[0], "item": "x"}, {**rows[1], "item": 3}])
    with pytest.raises(UserError) as error:
        transforms.rows_to_batch([{**rows[0], "when": "yesterday"}])
    assert message(error) == "rows: time 'yesterday' is not ISO 8601"
