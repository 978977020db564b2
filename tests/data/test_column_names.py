from __future__ import annotations

import pytest

from raysys.data import column_names


@pytest.mark.parametrize(
    ("name", "words", "stem"),
    [
        ("user_id", ("user", "id"), ("user",)),
        ("historyItemIds", ("history", "item", "ids"), ("history", "item")),
        ("genres", ("genre",), ("genre",)),
        ("C12", ("c12",), ("c12",)),
        ("class", ("class",), ("class",)),
        ("id", ("id",), ("id",)),
    ],
)
def test_words_and_stems(name, words, stem):
    assert column_names.words(name) == words
    assert column_names.stem(name) == stem


@pytest.mark.parametrize("name", ["click", "is_click", "Clicked", "label", "isConverted", "target"])
def test_labels(name):
    assert column_names.is_label(name)


@pytest.mark.parametrize("name", ["click_rate", "clicks_7d", "liked_items", "user"])
def test_what_is_no_label(name):
    assert not column_names.is_label(name)


def test_ids_and_sides():
    ids = [
        name
        for name in ("item_id", "movie", "zip_code", "C12", "price", "age", "num_items")
        if column_names.is_id(name)
    ]
    assert ids == ["item_id", "movie", "zip_code", "C12"]
    names = ("user_age", "item_price", "position", "hour", "history_item")
    assert [column_names.side_of(name) for name in names] == ["user", "item", "position", "context", "user"]
