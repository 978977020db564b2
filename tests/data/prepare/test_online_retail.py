"""On a sample of 147 customers everything is compared with its definition, written once more row by row."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from raysys.data.log import ParquetLog
from raysys.data.prepare.online_retail import NO_PRODUCT, prepare, read_log
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.schema import FeatureSchema

SAMPLE = Path(__file__).parent / "online_retail"
SPLITS = ("train", "valid", "test")
DAY = 86_400


def read(folder):
    return {split: pq.read_table(folder / f"{split}.parquet") for split in SPLITS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "retail"
    prepare(folder, source=SAMPLE)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    """All rows with their split, in the order of the example ids."""
    found = [row | {"split": split} for split, table in read(folder).items() for row in table.to_pylist()]
    return sorted(found, key=lambda row: row["example_id"])


@pytest.fixture(scope="module")
def lines(folder):
    """The lines of the sample, read without the code under test: (time, user, item) of what was bought and returned."""
    catalogue = pq.read_table(folder / "items.parquet")
    number = dict(zip(catalogue["title"].to_pylist(), catalogue["item_id"].to_pylist(), strict=True))
    found: dict[str, set[tuple[int, int, int]]] = {"bought": set(), "returned": set()}
    for file in sorted(SAMPLE.glob("*.parquet")):
        for line in pq.read_table(file).to_pylist():
            title = (line["description"] or "").strip()
            if line["customer_id"] is not None and line["price"] > 0 and title in number:
                time = int(line["invoice_date"].replace(tzinfo=timezone.utc).timestamp())
                found["bought" if line["quantity"] > 0 else "returned"].add((time, line["customer_id"], number[title]))
    return {kind: sorted(found[kind]) for kind in found}


def starts(rows):
    """When validation and test begin."""
    return [min(row["time"] for row in rows if row["split"] == split) for split in ("valid", "test")]


def test_rows_are_in_the_order_of_time_and_those_of_a_request_together(rows):
    assert [row["example_id"] for row in rows] == list(range(len(rows)))
    order = [(SPLITS.index(row["split"]), row["time"], row["request_id"], row["item_id"]) for row in rows]
    assert order == sorted(order)
    of_request = defaultdict(set)
    for row in rows:
        of_request[row["request_id"]].add((row["split"], row["time"], row["user_id"]))
    assert all(len(found) == 1 for found in of_request.values())
    valid, test = starts(rows)
    assert max(row["time"] for row in rows if row["split"] == "train") < valid
    assert max(row["time"] for row in rows if row["split"] == "valid") < test


def test_positives_are_what_was_bought_of_items_that_sold_in_the_days_before(rows, lines):
    sold = defaultdict(list)
    for time, _, item in lines["bought"]:
        sold[item].append(time)
    expected = [
        (time, user, item)
        for time, user, item in lines["bought"]
        if any(time - 28 * DAY <= other < time for other in sold[item])
    ]
    assert [(row["time"], row["user_id"], row["item_id"]) for row in rows if row["purchase"]] == expected


def test_a_negative_sold_in_the_days_before_and_is_not_bought_in_the_request(rows, lines):
    sold, bought = defaultdict(list), set(lines["bought"])
    for time, _, item in lines["bought"]:
        sold[item].append(time)
    negatives = [row for row in rows if not row["purchase"]]
    for row in negatives:
        assert (row["time"], row["user_id"], row["item_id"]) not in bought
        assert any(row["time"] - 28 * DAY <= other < row["time"] for other in sold[row["item_id"]])
    pairs = {(row["request_id"], row["item_id"]) for row in rows}
    assert len(pairs) == len(rows)  # none is drawn twice for a request


def test_there_are_as_many_negatives_as_asked_for(rows, tmp_path):
    assert len(rows) / 2 - sum(row["purchase"] for row in rows) == pytest.approx(0, abs=len(rows) * 0.001)
    prepare(tmp_path / "three", source=SAMPLE, negatives=3)
    tables = read(tmp_path / "three")
    assert all(pc.mean(table["purchase"]).as_py() == pytest.approx(0.25, abs=0.002) for table in tables.values())


def test_uniform_draws_do_not_follow_what_sells_and_popular_ones_do(rows, lines, tmp_path):
    prepare(tmp_path / "popular", source=SAMPLE, draw="popular")
    popular = [row for table in read(tmp_path / "popular").values() for row in table.to_pylist()]
    bought = set(lines["bought"])
    found = {}
    for draw, drawn_rows in (("uniform", rows), ("popular", popular)):
        counts = {
            purchase: Counter(r["item_id"] for r in drawn_rows if r["purchase"] == purchase) for purchase in (0, 1)
        }
        items = sorted(counts[0].keys() | counts[1].keys())
        found[draw] = np.corrcoef([[counts[purchase][item] for item in items] for purchase in (0, 1)])[0, 1]
        assert not any((r["time"], r["user_id"], r["item_id"]) in bought for r in drawn_rows if not r["purchase"])
    assert found["popular"] > found["uniform"] + 0.1


def test_returned_looks_60_days_ahead_and_never_beyond_its_split(rows, lines):
    valid, _ = starts(rows)
    end = max(time for kind in lines.values() for time, _, _ in kind)
    returns = defaultdict(list)
    for time, user, item in lines["returned"]:
        returns[user, item].append(time)
    for row in rows:
        window = row["time"] + 60 * DAY
        full = window < valid if row["split"] == "train" else window <= end
        found = any(row["time"] < time <= window for time in returns[row["user_id"], row["item_id"]])
        assert row["returned"] == (int(found) if full and row["purchase"] else None)
    labelled = {split: sum(r["split"] == split and r["returned"] is not None for r in rows) for split in SPLITS}
    assert labelled == {"train": 5947, "valid": 696, "test": 832}
    assert sum(row["returned"] or 0 for row in rows if row["split"] == "train") == 307


def test_histories_hold_earlier_purchases_of_train_and_nothing_else(rows, lines):
    """Never the row itself, what was bought at the same moment, later, or in a split that is held back."""
    valid, _ = starts(rows)
    of_user = defaultdict(list)
    for time, user, item in lines["bought"]:
        of_user[user].append((time, item))
    held_back = same_moment = 0
    for row in rows[::3]:
        mine = of_user[row["user_id"]]
        past = [item for time, item in mine if time < min(row["time"], valid)]
        assert row["history_item"] == past[-50:]
        held_back += any(valid <= time < row["time"] for time, _ in mine)
        same_moment += sum(time == row["time"] for time, _ in mine) > 1
    assert held_back > 300  # there was something to leave out
    assert same_moment > 1000


def test_statistics_of_the_past_follow_their_definition(rows, lines):
    valid, _ = starts(rows)
    for row in rows[::50]:
        before = min(row["time"], valid)
        mine = [time for time, user, _ in lines["bought"] if user == row["user_id"] and time < before]
        expected = {
            "user_purchases": len(mine),
            "user_returns": sum(u == row["user_id"] and t < before for t, u, _ in lines["returned"]),
            "item_purchases": sum(i == row["item_id"] and t < before for t, _, i in lines["bought"]),
            "item_returns": sum(i == row["item_id"] and t < before for t, _, i in lines["returned"]),
        }
        assert {name: row[name] for name in expected} == expected
        days = row["user_days_since"]
        assert days == (pytest.approx((row["time"] - max(mine)) / DAY, rel=1e-6) if mine else None)
        moment = datetime.fromtimestamp(row["time"], timezone.utc)
        assert (row["hour"], row["weekday"]) == (moment.hour, moment.weekday())


def test_prices_are_means_of_earlier_lines_and_not_the_rows_own(folder, rows, lines):
    """Of the first row that sells an item again only the first sale and the usual price are known."""
    prices = defaultdict(lambda: float("inf"))
    titles = pq.read_table(folder / "items.parquet")["title"].to_pylist()
    for file in SAMPLE.glob("*.parquet"):
        for line in pq.read_table(file).to_pylist():
            if line["customer_id"] is not None and line["quantity"] > 0 and line["price"] > 0:
                time = int(line["invoice_date"].replace(tzinfo=timezone.utc).timestamp())
                key = (time, line["customer_id"], (line["description"] or "").strip())
                prices[key] = min(prices[key], line["price"])
    valid, _ = starts(rows)
    bought = [(time, item, prices[time, user, titles[item]]) for time, user, item in lines["bought"]]
    usual = np.median([price for time, _, price in bought if time < valid])
    for row in rows[::50]:
        past = [price for time, item, price in bought if item == row["item_id"] and time < min(row["time"], valid)]
        assert row["item_price"] == pytest.approx((sum(past) + usual) / (len(past) + 1), rel=1e-5)


def test_the_catalogue_has_the_item_features_as_after_training(folder, rows, lines):
    valid, _ = starts(rows)
    schema = FeatureSchema.load(folder / "schema.yaml")
    items = pq.read_table(folder / "items.parquet").to_pylist()
    features = [f.name for f in (*schema.dense, *schema.sparse) if f.side == "item"]
    assert all(name in items[0] for name in features)
    sold = Counter(item for time, _, item in lines["bought"] if time < valid)
    assert [item["item_purchases"] for item in items] == [sold[item["item_id"]] for item in items]
    cakestand = next(item for item in items if item["title"] == "REGENCY CAKESTAND 3 TIER")
    assert cakestand["words"] == ["regency", "cakestand", "3", "tier"]
    assert not any(pc.match_substring_regex(pa.array([item["title"] for item in items]), NO_PRODUCT).to_pylist())


def test_train_has_at_most_the_rows_asked_for_of_whole_requests(tmp_path, rows):
    prepare(tmp_path / "few", source=SAMPLE, train_rows=2000)
    few = [row | {"split": split} for split, table in read(tmp_path / "few").items() for row in table.to_pylist()]
    count = Counter(row["split"] for row in few)
    assert 1700 < count["train"] <= 2000
    whole = {True: Counter(), False: Counter()}
    for row in rows:
        whole[False][row["request_id"]] += row["purchase"]
    for row in few:
        whole[True][row["request_id"]] += row["purchase"]
    assert all(whole[False][request] == number for request, number in whole[True].items())
    histories = {(row["request_id"]): row["history_item"] for row in rows}
    assert all(row["history_item"] == histories[row["request_id"]] for row in few)  # also of what is no row now
    for split in ("valid", "test"):
        assert 0 < count[split] < sum(row["split"] == split for row in rows) / 2


def test_what_is_written_depends_on_arguments_alone(tmp_path, folder):
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    for file in SAMPLE.glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), shuffled / file.name)
    prepare(tmp_path / "again", source=shuffled)
    prepare(tmp_path / "seed", source=SAMPLE, seed=1)
    for name in (*(f"{split}.parquet" for split in SPLITS), "items.parquet", "schema.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "seed" / "train.parquet").read_bytes() != (folder / "train.parquet").read_bytes()
    pairs = [
        {(row["request_id"], row["item_id"]) for row in read(one)["train"].to_pylist() if row["purchase"]}
        for one in (tmp_path / "seed", folder)
    ]
    assert pairs[0] == pairs[1]


def test_csv_files_of_the_published_columns_give_the_same(tmp_path, folder):
    """As the sheets are saved: a column of numbers that ends in letters, customers as 13085.0."""
    names = {
        "invoice": "Invoice",
        "stock_code": "StockCode",
        "description": "Description",
        "quantity": "Quantity",
        "invoice_date": "InvoiceDate",
        "price": "Price",
        "customer_id": "Customer ID",
        "country": "Country",
    }
    (tmp_path / "csv").mkdir()
    for file in SAMPLE.glob("*.parquet"):
        table = pq.read_table(file)
        table = table.set_column(
            table.schema.get_field_index("customer_id"), "customer_id", table["customer_id"].cast(pa.float64())
        )
        table = table.set_column(
            table.schema.get_field_index("invoice_date"),
            "invoice_date",
            pc.strftime(table["invoice_date"], "%Y-%m-%d %H:%M:%S"),
        )
        pacsv.write_csv(
            table.rename_columns([names[name] for name in table.column_names]), tmp_path / "csv" / f"{file.stem}.csv"
        )
    prepare(tmp_path / "log", source=tmp_path / "csv")
    for split in SPLITS:
        assert pq.read_table(tmp_path / "log" / f"{split}.parquet").equals(pq.read_table(folder / f"{split}.parquet"))


def test_the_folder_trains_as_it_is_and_both_groupings_are_there(folder, tmp_path):
    schema = FeatureSchema.load(folder / "schema.yaml")
    assert schema.group_id == "request_id"
    transforms = Transforms.fit(schema, ParquetLog(folder / "train.parquet", schema))
    for split in SPLITS:
        batch = transforms.to_batch(ParquetLog(folder / f"{split}.parquet", schema).read().slice(0, 500))
        assert (batch.weight[:, 0] == 1).all()
        assert 0 < batch.label_mask[:, 1].sum() < 300
    prepare(tmp_path / "user", source=SAMPLE, group="user")
    assert FeatureSchema.load(tmp_path / "user" / "schema.yaml").group_id == "user_id"


def test_history_length_is_what_the_schema_has_a_model_read(tmp_path, rows):
    prepare(tmp_path / "log", source=SAMPLE, history_length=3)
    assert FeatureSchema.load(tmp_path / "log/schema.yaml").sequences[0].max_length == 3
    assert max(len(row["history_item"]) for row in rows) > 3


def test_a_finished_folder_needs_no_source(folder, capsys):
    prepare(folder)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="was prepared with negatives = 1, not 2"):
        prepare(folder, source=SAMPLE, negatives=2)


def write(folder, **changes):
    """One file of the first lines of the sample, with these columns instead; None leaves one out."""
    folder.mkdir(exist_ok=True)
    table = pq.read_table(SAMPLE / "year_2009_2010.parquet").slice(0, 100)
    for name, values in changes.items():
        table = table.drop_columns(name)
        if values is not None:
            table = table.append_column(name, pa.array(values))
    pq.write_table(table, folder / "year.parquet")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            "online_retail: source is not given\n  hint: the UCI repository publishes online_retail_II.xlsx: https://",
        ),
        ({"source": "nowhere"}, "nowhere: no such file or folder"),
        ({"source": "empty"}, "empty: no Parquet or CSV file\n  hint: the UCI repository publishes"),
        ({"source": "sheets"}, "sheets: no Parquet or CSV file\n  hint: save each sheet of the workbook as CSV"),
        ({"source": "price"}, "year.parquet: has no column for 'price'\n  hint: "),
        (
            {"source": "text"},
            "year.parquet: column 'invoice_date' has type string\n  hint: times like 2009-12-01 07:45:00",
        ),
        ({"source": "wrong"}, "year.parquet: not the columns that were expected: "),
        ({"source": "short"}, "online_retail: split 'time' leaves no row for train"),
        ({"source": "short", "group": "basket"}, "online_retail: group is 'basket'\n  hint: "),
        ({"source": "short", "draw": "populr"}, "online_retail: draw is 'populr'\n  hint: did you mean 'popular'?"),
        ({"source": "short", "negatives": 0}, "online_retail: negatives is 0\n  hint: a positive whole number"),
        ({"source": "short", "train_rows": 0}, "online_retail: train_rows is 0\n  hint: a positive whole number"),
    ],
)
def test_errors_name_what_is_wrong(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "sheets").mkdir()
    (tmp_path / "sheets" / "online_retail_II.xlsx").touch()
    write(tmp_path / "price", price=None)
    write(tmp_path / "text", invoice_date=["01/12/2009 07:45"] * 100)
    write(tmp_path / "wrong", price=["cheap"] * 100)
    write(tmp_path / "short")
    if "source" in arguments:
        arguments = arguments | {"source": tmp_path / arguments["source"]}
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "log", **arguments)
    assert message in str(error.value)
    assert not (tmp_path / "log").exists()


def test_lines_without_a_customer_an_article_or_a_price_are_left_out(tmp_path):
    customer = [None, *range(1, 100)]
    title = ["BAG", "POSTAGE", "Manual", " ", None, *["BAG "] * 95]
    price = [1.0] * 6 + [0.0] * 4 + [1.0] * 90
    log = read_log(write(tmp_path / "some", customer_id=customer, description=title, price=price))
    assert log.user.tolist() == [5, *range(10, 100)]
    assert log.titles.to_pylist() == ["BAG"]
