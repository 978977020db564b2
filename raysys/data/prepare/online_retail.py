"""Online Retail II: which items does a customer buy, and which of them come back? Two years of a British wholesaler of gifts.

The data are of the UCI repository (https://doi.org/10.24432/C5CG6D; Chen 2012), CC BY 4.0: 1,067,371 lines of invoices
from December 2009 to December 2011. They must be there already: nothing is fetched.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysys.data.columns import integers, numbers, seconds, whole
from raysys.data.prepare.dataset import SPLITS, check_local, is_prepared, prepare_folder, write_table
from raysys.data.prepare.online_retail_features import HISTORY, Draw, Log, build
from raysys.data.source import SUFFIXES, fingerprint, open_source, read_batches
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

Group = Literal["request", "user"]
PUBLISHED = "publishes online_retail_II.xlsx: https://archive.ics.uci.edu/dataset/502/online+retail+ii"
COLUMNS = {  # without capitals, blanks and underscores: the type that each has, in CSV files as well
    "description": pa.string(),
    "quantity": pa.int64(),
    "invoicedate": None,
    "price": pa.float64(),
    "customerid": pa.float64(),
    "country": pa.string(),
}
NO_PRODUCT = r"(?i)^(postage|dotcom postage|carriage|next day carriage|manual|discount|bank charges|adjustment by .*|.* commission|this is a test product\.)$"
"""Titles of lines that are no goods: 2,900 of the lines that name a customer."""


def prepare(
    folder: str | Path,
    source: str | Path | None = None,
    negatives: int = 1,
    draw: Draw = "uniform",
    train_rows: int | None = 200_000,
    group: Group = "request",
    seed: int = 0,
    embedding_dim: int = 16,
    history_length: int = HISTORY,
) -> None:
    """Write train, valid, test and items as Parquet, with schema.yaml, unless they are there.

    source: a folder of Parquet or CSV files (or one file) with the columns of the published workbook, whose sheets may
    overlap. negatives: items drawn for each one bought, with `seed`: "uniform" or "popular" as `draw` says, see
    `online_retail_features`. train_rows: whole requests are left out by their hash until train has no more rows, and the same share of the other splits; None keeps
    all. group: whose rows GAUC and losses within a group compare, those of one "request" (a basket) or of one "user".
    history_length: the most recent purchases that schema.yaml has a model read; the files have 50.
    """
    if source is None and is_prepared(folder):
        return  # later commands need not repeat where it came from
    if source is None:
        check_local(folder)
        raise UserError(
            "online_retail: source is not given", f"the UCI repository {PUBLISHED}; data.prepare.source=FOLDER"
        )
    for key, choice, known in (("group", group, get_args(Group)), ("draw", draw, get_args(Draw))):
        if choice not in known:
            raise UserError(f"online_retail: {key} is {choice!r}", nearest(choice, known))
    for key, value in (("negatives", negatives), ("train_rows", train_rows)):
        if value is not None and value < 1:
            raise UserError(f"online_retail: {key} is {value}", "a positive whole number is expected")
    arguments = {
        "data": "online-retail-ii",
        "source": fingerprint(source),
        "negatives": negatives,
        "draw": draw,
        "train_rows": train_rows,
        "group": group,
        "seed": seed,
        "embedding_dim": embedding_dim,
        "history_length": history_length,
    }

    def write(partial: Path) -> None:
        parts, catalogue = build(read_log(source), negatives, draw, train_rows, seed)
        online_retail_schema(parts[0], catalogue, group, embedding_dim, history_length).save(partial / "schema.yaml")
        for name, part in zip(SPLITS, parts, strict=True):
            write_table(partial / f"{name}.parquet", part)
        write_table(partial / "items.parquet", catalogue)

    prepare_folder(folder, arguments, write)


def online_retail_schema(
    train: pa.Table,
    catalogue: pa.Table,
    group: Group = "request",
    embedding_dim: int = 16,
    history_length: int = HISTORY,
) -> FeatureSchema:
    """The schema of a prepared folder; a table has a row for each value (of all items, else of `train`) and one for others.

    `purchase` is the task; `returned`, within 60 days, has a label where something was bought and the 60 days were seen.
    """
    sizes = {name: pc.count_distinct(train[name]).as_py() for name in ("country", "hour", "weekday")}
    sizes |= {"user": pc.count_distinct(train["user_id"]).as_py(), "item": len(catalogue)}
    sizes["word"] = pc.count_distinct(pc.list_flatten(catalogue["words"])).as_py()
    return FeatureSchema(
        tables=tuple(Table(name, size + 1, embedding_dim) for name, size in sizes.items()),
        dense=(
            DenseFeature("user_purchases", "user", "log_standardize"),
            DenseFeature("user_returns", "user", "log_standardize"),
            DenseFeature("user_price", "user", "log_standardize"),
            DenseFeature("user_days_since", "user", "log_standardize", missing_flag=True),
            DenseFeature("item_purchases", "item", "log_standardize"),
            DenseFeature("item_returns", "item", "log_standardize"),
            DenseFeature("item_price", "item", "log_standardize"),
        ),
        sparse=(
            SparseFeature("user_id", "user", "user"),
            SparseFeature("country", "country", "user"),
            SparseFeature("item_id", "item", "item"),
            SparseFeature("words", "word", "item", max_length=8, pooling="mean"),
            SparseFeature("hour", "hour", "context"),
            SparseFeature("weekday", "weekday", "context"),
        ),
        sequences=(Sequence("history", (SequenceFeature("history_item", "item"),), "user", history_length),),
        labels=(Label("purchase"), Label("returned", required=False)),
        example_id="example_id",
        group_id=f"{group}_id",
        time="time",
        catalogue=Catalogue("item_id"),
    )


def read_log(source: str | Path) -> Log:
    """The lines that name a customer, an article and a price, of all files of a folder."""
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    tables = [_read(file) for file in files if file.name.lower().endswith(tuple(SUFFIXES))]
    if not tables:
        sheets = any(file.suffix == ".xlsx" for file in files)
        raise UserError(
            f"{source}: no Parquet or CSV file",
            "save each sheet of the workbook as CSV" if sheets else f"the UCI repository {PUBLISHED}",
        )
    lines = pa.concat_tables(tables)
    titles = pc.utf8_trim_whitespace(lines["description"])
    known = pc.and_(pc.is_valid(lines["customerid"]), pc.greater(lines["price"], 0))
    product = pc.and_(pc.greater(pc.utf8_length(titles), 0), pc.invert(pc.match_substring_regex(titles, NO_PRODUCT)))
    kept = pc.fill_null(pc.and_(known, product), False)
    lines, titles = lines.filter(kept), titles.filter(kept)
    names = pc.unique(titles).sort()
    return Log(
        user=numbers(whole(lines["customerid"])).astype(np.int64),
        item=integers(whole(pc.index_in(titles, value_set=names))),
        time=seconds(whole(lines["invoicedate"])),
        quantity=integers(whole(lines["quantity"])),
        price=numbers(whole(lines["price"])),
        country=whole(lines["country"]),
        titles=names,
    )


def _read(file: Path) -> pa.Table:
    """One file, with the columns and types of `COLUMNS`."""
    found = {re.sub("[^a-z]", "", name.lower()): name for name in open_source(file).schema.names}
    found = {"price": found.get("unitprice", ""), **found}
    for column in COLUMNS:
        if not found.get(column):
            raise UserError(f"{file}: has no column for {column!r}", nearest(column, found))
    types = {found[column]: kind for column, kind in COLUMNS.items() if kind is not None}
    names = [found[column] for column in COLUMNS]
    data = open_source(file, types)
    schema = pa.schema([data.schema.field(name) for name in names])
    if not pa.types.is_timestamp(schema.field(found["invoicedate"]).type):
        kind = schema.field(found["invoicedate"]).type
        raise UserError(
            f"{file}: column {found['invoicedate']!r} has type {kind}", "times like 2009-12-01 07:45:00 are expected"
        )
    table = pa.Table.from_batches(read_batches(data, str(file), names), schema).rename_columns(list(COLUMNS))
    try:
        return table.cast(pa.schema([(column, kind or pa.timestamp("ms")) for column, kind in COLUMNS.items()]))
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: not the columns that were expected: {error}") from None
