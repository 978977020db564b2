"""A tiny MovieLens in the files of the package, and where downloads are kept between runs of the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def downloads() -> Path:
    """The folder that `make train` downloads to as well, so that a package is fetched once."""
    return REPOSITORY / "data" / "downloads"


@pytest.fixture(scope="session")
def write_movielens() -> Callable[[Path, list[tuple[int, int, int, int]]], Path]:
    """Writes ml-100k.inter, .item and .user with these (user, item, rating, time) rows."""

    def write(folder: Path, ratings: list[tuple[int, int, int, int]]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        users, items = sorted({row[0] for row in ratings}), sorted({row[1] for row in ratings})
        files = {
            "inter": [
                "user_id:token\titem_id:token\trating:float\ttimestamp:float",
                *("\t".join(map(str, row)) for row in ratings),
            ],
            "item": ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
            + [f'{item}\tThe "{item}\t{1990 + item % 9}\t{"Drama War" if item % 2 else "Comedy"}' for item in items],
            "user": ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
            + [f"{user}\t{20 + user}\t{'FM'[user % 2]}\twriter\t12345" for user in users],
        }
        for kind, lines in files.items():
            (folder / f"ml-100k.{kind}").write_text("\n".join(lines) + "\n")
        return folder

    return write


@pytest.fixture(scope="session")
def small_movielens(tmp_path_factory: pytest.TempPathFactory, write_movielens: Callable[..., Path]) -> Path:
    """20 users with 40 ratings each, many at the same second, in a random order."""
    rng = np.random.default_rng(7)
    rows = [
        (user, int(item) + 1, int(rng.integers(1, 6)), 880_000_000 + int(rng.integers(0, 25)))
        for user in range(1, 21)
        for item in rng.choice(60, 40, replace=False)
    ]
    return write_movielens(tmp_path_factory.mktemp("movielens"), [rows[i] for i in rng.permutation(len(rows))])
