from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from raysys.data.reader import ParquetLog, Reader
from raysys.data.synthetic import SyntheticSpec, prepare, true_probabilities
from raysys.data.synthetic.log import make_rows
from raysys.data.synthetic.spec import STRENGTHS, TRUTH
from raysys.data.synthetic.write import SHARD_ROWS, Shard, plan_shards
from raysys.data.synthetic.zipf import head_shares
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.schema import FeatureSchema

NOTHING = dict.fromkeys(STRENGTHS, 0.0)
ONE_TASK = {"tasks": ("click",), "base_rates": (0.3,), "funnel": ()}


def rows_of(spec: SyntheticSpec, rows: int = SHARD_ROWS) -> pa.Table:
    return make_rows(spec, Shard(0, 0, rows, "train"), rows)


def test_a_shard_needs_no_other_shard(log):
    shard = plan_shards(90_000)[1]
    assert make_rows(SyntheticSpec(), shard, 90_000).equals(pq.read_table(log / "train" / "part-000001.parquet"))
    first = pq.read_table(log / "train" / "part-000000.parquet")
    assert (
        not first["d0"].slice(0, 1000).equals(pq.read_table(log / "train" / "part-000001.parquet")["d0"].slice(0, 1000))
    )


def test_the_seed_changes_rows_and_effects():
    table = rows_of(SyntheticSpec(seed=0), 1000)
    assert not rows_of(SyntheticSpec(seed=1), 1000)["user_id"].equals(table["user_id"])
    assert (
        abs(true_probabilities(SyntheticSpec(seed=1), table) - true_probabilities(SyntheticSpec(), table)).max() > 0.1
    )


def test_splits_follow_each_other_in_time(log):
    tables = [pq.read_table(log / split) for split in ("train", "valid", "test")]
    assert [table.num_rows for table in tables] == [74_999, 7500, 7501]
    assert np.array_equal(np.concatenate([table["example_id"] for table in tables]), np.arange(90_000))
    assert (np.diff(np.concatenate([table["time"] for table in tables])) >= 0).all()


def test_the_schema_describes_the_columns(log):
    schema = FeatureSchema.load(log / "schema.yaml")
    assert schema == SyntheticSpec().schema()
    table = pq.read_table(log / "train")
    assert set(table.column_names) - set(schema.columns()) == {task + TRUTH for task in schema.tasks}
    for feature in schema.sparse:
        ids = table[feature.name].drop_null().to_numpy()
        assert 0 <= ids.min() < ids.max() < schema.table(feature.table).num_embeddings
    assert pc.list_value_length(table["history"]).unique().sort().to_pylist() == list(range(21))


def test_labels_are_drawn_from_the_truth(log):
    spec = SyntheticSpec()
    table = pa.concat_tables([pq.read_table(log / split) for split in ("train", "valid", "test")])
    for task, rate in zip(spec.tasks, spec.base_rates, strict=True):
        truth = table[task + TRUTH].to_numpy()
        assert truth.mean() == pytest.approx(rate, rel=0.1)
        labels = table[task].to_numpy()  # null is NaN
        seen = ~np.isnan(labels)
        error = math.sqrt((truth[seen] * (1 - truth[seen])).sum()) / seen.sum()
        assert abs(labels[seen].mean() - truth[seen].mean()) < 4 * error
        rare = truth[seen] < np.quantile(truth[seen], 0.2)  # also where the click is unlikely
        error = math.sqrt((truth[seen][rare] * (1 - truth[seen][rare])).sum()) / rare.sum()
        assert abs(labels[seen][rare].mean() - truth[seen][rare].mean()) < 4 * error


def test_a_conversion_is_seen_only_after_a_click():
    spec = SyntheticSpec(
        tasks=("click", "cart", "buy"), base_rates=(0.3, 0.3, 0.3), funnel=(("click", "cart"), ("cart", "buy"))
    )
    table = rows_of(spec)
    click, cart, buy = (table[task].to_numpy() for task in spec.tasks)  # null is NaN
    assert np.array_equal(np.isnan(cart), click == 0)
    assert np.array_equal(np.isnan(buy), cart != 1)
    assert 0 < np.nansum(buy) < np.nansum(cart) < click.sum()
    assert [label.required for label in spec.schema().labels] == [True, False, False]
    # Those who click are not like everybody else: with correlated tasks the rate among them is higher.
    truth = table["cart" + TRUTH].to_numpy()
    assert truth[click == 1].mean() > truth.mean() + 0.03


def test_labels_of_the_entire_space_leave_the_other_columns_as_they_are():
    plain, whole = rows_of(SyntheticSpec(), 5000), rows_of(SyntheticSpec(entire_space=True), 5000)
    new = ["click_and_conversion", "click_and_conversion" + TRUTH]
    assert [name for name in whole.column_names if name not in plain.column_names] == new
    assert whole.select(plain.column_names).equals(plain)
    both = whole["conversion"].fill_null(0).to_numpy()  # null where there was no click
    assert whole[new[0]].null_count == 0
    assert np.array_equal(whole[new[0]].to_numpy(), both)
    assert 0 < both.sum() < whole["click"].to_numpy().sum()
    click, conversion = (whole[task + TRUTH].to_numpy() for task in ("click", "conversion"))
    assert np.array_equal(whole[new[1]].to_numpy(), click * conversion)
    schema = SyntheticSpec(entire_space=True).schema()
    assert [label.name for label in schema.labels if label.required] == ["click", "like", "click_and_conversion"]


def test_of_a_funnel_of_three_steps_the_last_label_is_that_all_happened():
    funnel = (("click", "cart"), ("cart", "buy"), ("click", "buy"))
    tasks = ("click", "cart", "other", "buy")
    spec = SyntheticSpec(tasks=tasks, base_rates=(0.3,) * 4, funnel=funnel, entire_space=True)
    table = rows_of(spec, 5000)
    assert list(spec.funnel_paths) == ["click_and_cart", "click_and_cart_and_buy"]
    assert np.array_equal(table["click_and_cart_and_buy"].to_numpy(), table["buy"].fill_null(0).to_numpy())
    truth = np.prod([table[task + TRUTH].to_numpy() for task in ("click", "cart", "buy")], 0)
    assert np.allclose(table["click_and_cart_and_buy" + TRUTH].to_numpy(), truth, rtol=1e-15, atol=0)


def test_the_best_possible_metrics_of_the_entire_space_are_known(tmp_path):
    prepare(tmp_path / "log", rows=30_000, spec=SyntheticSpec(entire_space=True), processes=1)
    found = json.loads((tmp_path / "log" / "prepared.json").read_text())
    bayes = found["bayes"]["train"]["click_and_conversion"]
    assert bayes["rows"] == found["rows"]["train"] == 24_999
    assert bayes["calibration"] == pytest.approx(1, abs=4 * (bayes["base_rate"] * bayes["rows"]) ** -0.5)
    assert bayes["ne"] < 0.9


def test_folders_of_before_the_entire_space_count_as_prepared(log):
    assert "entire_space" not in json.loads((log / "prepared.json").read_text())["arguments"]
    with pytest.raises(UserError, match="was prepared with entire_space = None, not True"):
        prepare(log, rows=90_000, spec=SyntheticSpec(entire_space=True))


def test_the_missing_share_is_as_set():
    spec = SyntheticSpec(missing=0.2)
    table = rows_of(spec)
    for name in (*spec.fields, *(f"d{number}" for number in range(8))):
        if name in ("user_id", "item_id"):
            assert table[name].null_count == 0
        else:
            assert abs(table[name].null_count / SHARD_ROWS - 0.2) < 4 * math.sqrt(0.2 * 0.8 / SHARD_ROWS)
    both = pc.sum(pc.and_(table["d0"].is_null(), table["c0"].is_null())).as_py() / SHARD_ROWS
    assert abs(both - 0.04) < 4 * math.sqrt(0.04 * 0.96 / SHARD_ROWS)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.1, 2.0])
def test_ids_follow_the_zipf_exponent(exponent):
    spec = SyntheticSpec(exponent=exponent, num_users=3000)
    ids = rows_of(spec)["user_id"].to_numpy()
    shares = head_shares(3000, exponent)
    assert shares.sum() == pytest.approx(1)
    # The density is x^-exponent: so fall the shares of ids far from the first one.
    slope = math.log(shares[2000] / shares[1000]) / math.log(2001.5 / 1001.5)
    assert slope == pytest.approx(-exponent, abs=1e-3)
    for first, last in ((0, 1), (1, 10), (10, 100), (100, 3000)):
        share = shares[first:last].sum()
        found = ((ids >= first) & (ids < last)).mean()
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / SHARD_ROWS)


def test_a_log_without_optional_parts(tmp_path):
    spec = SyntheticSpec(
        cardinalities=(), num_dense=0, history_length=0, missing=0, **ONE_TASK, **NOTHING | {"effects": 1}
    )
    spec = dataclasses.replace(spec, num_pairs=0, num_heterogeneous=0, num_triples=0)
    prepare(tmp_path / "log", rows=1000, spec=spec, processes=1)
    assert FeatureSchema.load(tmp_path / "log" / "schema.yaml").sequences == ()


def test_the_truth_cannot_reach_a_model(tmp_path):
    """Batches do not change when the true probabilities in the files do."""
    prepare(tmp_path / "log", rows=1200, processes=1)
    batches = _batches(tmp_path / "log")
    for path in (tmp_path / "log" / "train").iterdir():
        table = pq.read_table(path)
        for name in [name for name in table.column_names if name.endswith(TRUTH)]:
            values = pa.array(np.random.default_rng(0).random(table.num_rows))
            table = table.set_column(table.column_names.index(name), name, values)
        pq.write_table(table, path)
    assert sum(len(batch["example_id"]) for batch in batches) >= 999
    for before, after in zip(batches, _batches(tmp_path / "log"), strict=True):
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) for key in before)


def _batches(folder: Path) -> list[dict[str, np.ndarray]]:
    """Everything that batches hold, as arrays by name."""
    schema = FeatureSchema.load(folder / "schema.yaml")
    log = ParquetLog(str(folder / "train"), schema)
    reader = Reader(log, Transforms.fit(schema, log), batch_size=300, shards=2)
    found = []
    for batch, _ in reader.epoch():
        content = {}
        for f in dataclasses.fields(batch):
            value = getattr(batch, f.name)
            if hasattr(value, "lengths"):
                content |= {f"{f.name}.values": value.values().numpy(), f"{f.name}.lengths": value.lengths().numpy()}
                content |= {f"{f.name}.{key}": np.zeros(0) for key in value.keys()}  # noqa: SIM118
            elif hasattr(value, "numpy"):
                content[f.name] = value.numpy()
            else:
                assert not value, f.name
        found.append(content)
    return found
