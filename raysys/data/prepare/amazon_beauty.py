"""Amazon Beauty: which item does a user buy next? 198,502 reviews of 22,363 users and 12,101 items, in the files of S3-Rec.

The reviews are of McAuley's crawl (https://cseweb.ucsd.edu/~jmcauley/datasets.html; McAuley et al. 2015, He and McAuley
2016): for research, to be cited and not passed on. The sequences are `data/Beauty.txt` of S3-Rec. They must be there already:
nothing is fetched.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysys.data.columns import integers, ranges, whole
from raysys.data.prepare.dataset import SPLITS, check_local, is_prepared, prepare_folder, write_table
from raysys.data.prepare.splits import TEST, TRAIN, VALID
from raysys.data.source import fingerprint
from raysys.errors import UserError, first_line, nearest
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

HISTORY = 20  # most recent items of a history
SHORTEST = 3  # items of a user: one to start from, one to validate, one to test
ATTRIBUTES = 8  # no item of Beauty has more than 6
SEQUENCES = ("sequences.txt.gz", "sequences.txt")
COLUMNS = ("item_id", "title", "attribute_ids")
PUBLISHED = (
    "expected are sequences.txt.gz (a line `user item item …` for each user, as data/Beauty.txt of "
    "https://github.com/aHuiWang/CIKM2020-S3Rec) and items.parquet (item_id, title, attribute_ids)"
)

Integers = NDArray[np.int64]


def prepare(
    folder: str | Path,
    source: str | Path | None = None,
    seed: int = 0,
    embedding_dim: int = 16,
    train_rows: int | None = None,
    negatives: bool = True,
    every_event: bool = True,
    history_length: int = HISTORY,
) -> None:
    """Write train, valid, test and items as Parquet, with schema.yaml, unless they are there.

    source: a folder with sequences.txt.gz and items.parquet. seed: of the negatives, and of the users that are kept where
    `train_rows` limits the rows of train: whole users, as many as fit, in all splits (None: all users).

    Leave one out: the last item of a user tests, the one before validates, those before train, from the second on. A row's
    history is what the user had before it, in the order of the file, so that of a test row ends with the validation item.
    To each positive comes one negative, drawn evenly from the items that the user never has, at no time: as is usual, and
    so a negative in train is never an item of test. There are no times. The column `seen` has all that the user had before.

    negatives: False leaves the drawn rows out. every_event: False leaves one training row a user, that of the last item
    before validation, for models that learn from every position of a history. history_length: the most recent items of a
    history that schema.yaml has a model read.
    """
    if source is None and is_prepared(folder):
        return  # later commands need not repeat where it came from
    if source is None:
        check_local(folder)
        raise UserError("amazon_beauty: source is not given", f"data.prepare.source=FOLDER; {PUBLISHED}")
    arguments = {
        "data": "amazon-beauty",
        "source": fingerprint(source),
        "seed": seed,
        "embedding_dim": embedding_dim,
        "train_rows": train_rows,
        "negatives": negatives,
        "every_event": every_event,
        "history_length": history_length,
    }

    def write(partial: Path) -> None:
        catalogue = _read_items(Path(source))
        user, item, length = _read_sequences(Path(source), integers(whole(catalogue["item_id"])))
        if train_rows is not None:
            kept = _kept_users(length, train_rows, seed)
            user, item, length = user[kept], item[np.repeat(kept, length)], length[kept]
        rows, split = _rows(user, item, length, catalogue, seed, history_length)
        kept_rows = _wanted(rows, split, negatives, every_event)
        rows, split = rows.filter(pa.array(kept_rows)), split[kept_rows]
        for number, name in enumerate(SPLITS):
            write_table(partial / f"{name}.parquet", rows.filter(pa.array(split == number)))
        write_table(partial / "items.parquet", catalogue)
        beauty_schema(len(user), catalogue, embedding_dim, history_length).save(partial / "schema.yaml")

    prepare_folder(folder, arguments, write)


def beauty_schema(
    users: int, catalogue: pa.Table, embedding_dim: int = 16, history_length: int = HISTORY
) -> FeatureSchema:
    """The schema of a prepared folder: the task is `next`, groups are users. The title is in the catalogue alone."""
    attributes = pc.count_distinct(pc.list_flatten(catalogue["attribute_ids"])).as_py()
    sizes = {"user": users, "item": len(catalogue), "attribute": attributes}
    return FeatureSchema(
        tables=tuple(Table(name, size + 1, embedding_dim) for name, size in sizes.items()),
        dense=(DenseFeature("history_length", "user", "log_standardize"),),
        sparse=(
            SparseFeature("user_id", "user", "user"),
            SparseFeature("item_id", "item", "item"),
            SparseFeature("attribute_ids", "attribute", "item", max_length=ATTRIBUTES, pooling="mean"),
        ),
        sequences=(Sequence("history", (SequenceFeature("history_item", "item"),), max_length=history_length),),
        labels=(Label("next"),),
        example_id="example_id",
        group_id="user_id",
        catalogue=Catalogue("item_id"),
    )


def _kept_users(length: Integers, train_rows: int, seed: int) -> NDArray[np.bool_]:
    """[U] whether a user is kept: in an order that the seed draws, while the rows of train fit."""
    order = np.random.default_rng((seed, 1)).permutation(len(length))
    kept = np.zeros(len(length), bool)
    kept[order] = np.cumsum(2 * (length[order] - SHORTEST)) <= train_rows
    if not (kept & (length > SHORTEST)).any():
        raise UserError(f"data.prepare.train_rows is {train_rows}", "too few for one user's rows")
    return kept


def _wanted(rows: pa.Table, split: NDArray[np.int8], negatives: bool, every_event: bool) -> NDArray[np.bool_]:
    """[R] which rows are written."""
    positive = rows["next"].to_numpy() == 1
    kept = positive | negatives
    if not every_event:
        user, position = rows["user_id"].to_numpy(), rows["history_length"].to_numpy()
        train = np.flatnonzero(split == TRAIN)
        order = train[np.lexsort((position[train], user[train]))]
        last = np.append(user[order][1:] != user[order][:-1], True)
        longest = np.zeros(int(user.max()) + 1, np.float32)
        longest[user[order][last]] = position[order][last]
        kept &= (split != TRAIN) | (position == longest[user])
    return kept


def _rows(
    user: Integers, item: Integers, length: Integers, catalogue: pa.Table, seed: int, history_length: int
) -> tuple[pa.Table, NDArray[np.int8]]:
    """Two rows, the positive and its negative, for every item of a user but the first, and the split of each."""
    ends = np.cumsum(length)
    position = ranges(np.zeros_like(length), length)  # of each item in its sequence, from 0
    last = np.repeat(length, length) - 1
    of_item = np.select([position == last, position == last - 1], [TEST, VALID], TRAIN).astype(np.int8)
    positive = np.flatnonzero(position > 0)
    negative = _negatives(np.repeat(np.arange(len(user)), length), item, positive, catalogue, seed)
    events = np.repeat(positive, 2)
    first = (ends - length).repeat(length)[events]
    start = np.maximum(first, events - history_length)
    shown = np.stack([item[positive], negative], 1).ravel()
    place = pc.index_in(pa.array(shown), value_set=catalogue["item_id"].cast(pa.int64()))
    rows = pa.table(
        {
            "example_id": np.arange(len(events)),
            "next": np.tile(np.array([1, 0], np.int8), len(positive)),
            "user_id": np.repeat(user, length)[events],
            "history_length": position[events].astype(np.float32),
            "history_item": _lists(item, start, events - start),
            "seen": _lists(item, first, events - first),
            "item_id": shown,
            "attribute_ids": catalogue["attribute_ids"].take(place),
        }
    )
    return rows, of_item[events]


def _lists(item: Integers, start: Integers, length: Integers) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(length)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(item[ranges(start, length)]))


def _negatives(owner: Integers, item: Integers, positive: Integers, catalogue: pa.Table, seed: int) -> Integers:
    """An item for each positive that its user has nowhere in the sequence, all such items equally likely."""
    items = np.sort(integers(whole(catalogue["item_id"])))
    own = np.unique(owner * len(items) + np.searchsorted(items, item))  # (user, item), sorted by user, then item
    count = np.bincount(own // len(items))  # different items of each user
    if (count == len(items)).any():
        raise UserError("amazon_beauty: a user has all items of items.parquet", "none is left to be a negative")
    # The d-th of those that a user does not have, without drawing twice: to d comes the number of own items that are not
    # after it. The k-th own item i is preceded by i - k others, so it is not after the d-th if i - k <= d.
    first = np.cumsum(count) - count
    others = own % len(items) - (np.arange(len(own)) - first[own // len(items)])
    user = owner[positive]
    drawn = (np.random.default_rng(seed).random(len(user)) * (len(items) - count[user])).astype(np.int64)
    before = np.searchsorted(own // len(items) * len(items) + others, user * len(items) + drawn, "right") - first[user]
    return items[drawn + before]


def _read_items(source: Path) -> pa.Table:
    path = source / "items.parquet"
    if not path.is_file():
        raise UserError(f"{path}: no such file", PUBLISHED)
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: cannot be read as parquet: {first_line(error)}") from None
    for column in COLUMNS:
        if column not in table.column_names:
            raise UserError(f"{path}: column {column!r} is missing", nearest(column, table.column_names))
    return table.replace_schema_metadata().set_column(
        table.column_names.index("item_id"), "item_id", table["item_id"].cast(pa.int64())
    )


def _read_sequences(source: Path, items: Integers) -> tuple[Integers, Integers, Integers]:
    """The user of each line, the items of all lines one after another, and how many each line has."""
    path = next((source / name for name in SEQUENCES if (source / name).is_file()), None)
    if path is None:
        raise UserError(f"{source / SEQUENCES[0]}: no such file", PUBLISHED)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = pc.split_pattern(pc.utf8_trim_whitespace(pa.array(content.decode().splitlines())), " ")
    try:
        numbers = integers(pc.list_flatten(lines).cast(pa.int64()))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not the file that was expected: {first_line(error)}", PUBLISHED) from None
    words = integers(pc.list_value_length(lines))
    short = np.flatnonzero(words - 1 < SHORTEST)
    if len(short):
        raise UserError(f"{path}: line {short[0] + 1} has {words[short[0]] - 1} items, expected {SHORTEST} or more")
    starts = np.cumsum(words) - words
    item = np.delete(numbers, starts)
    unknown = np.setdiff1d(item, items)
    if len(unknown):
        raise UserError(f"{path}: item {unknown[0]} is not in items.parquet", PUBLISHED)
    return numbers[starts], item, words - 1
