from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from sklearn.metrics import log_loss, roc_auc_score

from raysys.config import instantiate
from raysys.data.reader import ParquetLog, Reader
from raysys.data.synthetic import (
    SyntheticSpec,
    bayes_metrics,
    planted_interactions,
    prepare,
    prepare_criteo_shaped,
    true_probabilities,
)
from raysys.data.synthetic.log import make_rows
from raysys.data.synthetic.spec import STRENGTHS, TRUTH
from raysys.data.synthetic.write import SHARD_ROWS, Shard, plan_shards, write_log
from raysys.data.synthetic.zipf import IdFactors, head_shares
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.schema import FeatureSchema

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
NOTHING = dict.fromkeys(STRENGTHS, 0.0)
ONE_TASK = {"tasks": ("click",), "base_rates": (0.3,), "funnel": ()}


def rows_of(spec: SyntheticSpec, rows: int = SHARD_ROWS) -> pa.Table:
    return make_rows(spec, Shard(0, 0, rows, "train"), rows)


def only(kind: str, **changes) -> SyntheticSpec:
    """A log of one task in which nothing but one kind moves the click."""
    return SyntheticSpec(**{**NOTHING, "missing": 0.0, **ONE_TASK, kind: 1.0, **changes})


def logits(spec: SyntheticSpec, table: pa.Table) -> np.ndarray:
    truth = true_probabilities(spec, table)
    return np.log(truth / (1 - truth))


def largest_deviation(values: np.ndarray, *columns: np.ndarray) -> float:
    """The mean of a combination of ids (of 100 rows or more) that is farthest from the mean of all, in standard errors."""
    _, cell = np.unique(np.stack(columns), axis=1, return_inverse=True)
    parts = [part for number in range(cell.max() + 1) if len(part := values[cell == number]) >= 100]
    return max(abs(part.mean() - values.mean()) / (part.std() / math.sqrt(len(part))) for part in parts)


def explained(values: np.ndarray, *columns: np.ndarray) -> float:
    """The share of the variance that the mean of each combination of the columns' ids explains."""
    _, cell = np.unique(np.stack(columns), axis=1, return_inverse=True)
    means = np.bincount(cell, values) / np.bincount(cell)
    return 1 - ((values - means[cell]) ** 2).mean() / values.var()


def shuffled(table: pa.Table, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    history = pa.array([rng.permutation(events) for events in table["history"].to_pylist()], table["history"].type)
    return table.set_column(table.column_names.index("history"), "history", history)


# The files


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "one"
    prepare(folder, rows=90_000, processes=1)
    return folder


def test_rows_are_the_same_for_any_number_of_processes(log, tmp_path):
    prepare(tmp_path / "two", rows=90_000, processes=2)
    names = sorted(path.relative_to(log) for path in log.glob("*/*.parquet"))
    assert [str(name) for name in names] == [
        "test/part-000003.parquet",
        "train/part-000000.parquet",
        "train/part-000001.parquet",
        "valid/part-000002.parquet",
    ]
    for name in names:
        assert (log / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


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


def test_prepare_does_nothing_where_the_log_is_complete(log):
    before = {path: path.stat().st_mtime_ns for path in log.rglob("*")}
    prepare(log, rows=90_000)
    assert {path: path.stat().st_mtime_ns for path in log.rglob("*")} == before


def test_prepare_never_replaces_other_data(log, tmp_path):
    with pytest.raises(UserError, match=r"one: was prepared with third_order = 0\.6, not 0\.1") as caught:
        prepare(log, rows=90_000, spec=SyntheticSpec(third_order=0.1))
    assert caught.value.hint == "name another folder, or remove this one"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no prepared data"):
        prepare(tmp_path, rows=1000)


def test_a_log_that_fails_half_way_leaves_nothing_behind(tmp_path):
    def plan():
        shard, *_ = plan_shards(1000)
        return [(shard, lambda: rows_of(SyntheticSpec(), shard.rows)), (shard, lambda: 1 / 0)]

    with pytest.raises(ZeroDivisionError):
        write_log(tmp_path / "log", SyntheticSpec().schema(), {}, plan, processes=1)
    assert list(tmp_path.iterdir()) == []


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


# The truth


def test_the_truth_is_a_function_of_the_columns_that_a_model_sees(log):
    spec = SyntheticSpec()
    table = pq.read_table(log / "test")
    truth = true_probabilities(spec, table.select(spec.schema().columns(labels=False)))
    stored = np.stack([table[task + TRUTH] for task in spec.tasks])
    # The logits are sums in single precision; in slices of another length the order of its operations may differ.
    np.testing.assert_allclose(truth, stored, rtol=1e-5)
    np.testing.assert_allclose(true_probabilities(spec, table.slice(1000, 77)), stored[:, 1000:1077], rtol=1e-5)


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


@pytest.mark.parametrize("kind", STRENGTHS)
def test_each_kind_has_its_strength_and_the_set_correlation_of_tasks(kind):
    spec = SyntheticSpec(**{**NOTHING, kind: 0.8}, correlation=0.3)
    deviation, correlation = [], []
    values = logits(spec, rows_of(spec))
    # 65,536 rows: the standard error of a correlation is at most 1/256, that of a deviation sqrt((kurtosis - 1) / 4) / 256,
    # and products of three factors have a kurtosis up to 3 * 1.8^3.
    deviation = values.std(1)
    assert np.abs(deviation - 0.8).max() < 0.8 * 4 * math.sqrt((3 * 1.8**3 - 1) / 4) / 256
    correlation = np.corrcoef(values)[np.triu_indices(3, 1)]
    assert np.abs(correlation - 0.3).max() < 4 * math.sqrt(3 * 1.8**3) / 256


@pytest.mark.parametrize("correlation", [-0.4, 0.0, 0.9, 1.0])
def test_tasks_have_the_set_correlation(correlation):
    spec = SyntheticSpec(correlation=correlation)
    found = np.corrcoef(logits(spec, rows_of(spec)))[np.triu_indices(3, 1)]
    assert np.abs(found - correlation).max() < 4 * 2 / 256


SMALL = {"cardinalities": (5, 6, 7, 8), "exponent": 0.7}


@pytest.mark.parametrize(("kind", "count"), [("pairwise", "num_pairs"), ("heterogeneous", "num_heterogeneous")])
def test_a_pair_has_no_effect_of_its_single_columns(kind, count):
    spec = only(kind, **SMALL, **{"num_pairs": 0, "num_heterogeneous": 0, count: 1})
    table = rows_of(spec)
    ((a, b),) = planted_interactions(spec)[kind]
    values = logits(spec, table)[0]
    assert explained(values, table[a], table[b]) > 1 - 1e-6
    for name in ("c0", "c1", "c2", "c3"):
        assert largest_deviation(values, table[name]) < 5


def test_third_order_has_no_pairwise_marginal():
    spec = only("third_order", **SMALL, num_triples=1, num_pairs=0, num_heterogeneous=0)
    table = rows_of(spec)
    (triple,) = planted_interactions(spec)["third_order"]
    values = logits(spec, table)[0]
    assert explained(values, *(table[name] for name in triple)) > 1 - 1e-6
    for a, b in itertools.combinations(["c0", "c1", "c2", "c3"], 2):
        assert largest_deviation(values, table[a], table[b]) < 5
    # And so it is in the labels: what a pair tells about the click is only how far the logit spreads, not its mean.
    click = table["click"].to_numpy().astype(float)
    share = {size: max(explained(click, *(table[name] for name in part)) for part in itertools.combinations(triple, size))
             for size in (2, 3)}  # fmt: skip
    assert share[3] > 0.1 > 10 * share[2]


def test_a_heterogeneous_pair_has_a_matrix_of_its_own():
    def fits(kind: str) -> dict[str, float]:
        spec = only(kind, cardinalities=(50,) * 10)
        table = rows_of(spec, 20_000)
        values = logits(spec, table)[0]
        values = values - values.mean()
        factors = {
            name: IdFactors(0, name, c, spec.exponent)(table[name].to_numpy()) for name, c in spec.fields.items()
        }
        outer = np.stack(  # [pairs, 4, 4, N]: products of each factor of one id with each of the other
            [factors[a][:, None] * factors[b][None] for a, b in planted_interactions(spec)[kind]]
        )
        features = {
            "a strength for each pair": np.einsum("prrn->pn", outer),
            "one matrix": outer.sum(0).reshape(16, -1),
            "a matrix for each pair": outer.reshape(96, -1),
        }
        centred = {name: (x - x.mean(1, keepdims=True)).T for name, x in features.items()}
        residual = {name: np.linalg.lstsq(x, values, rcond=None)[1][0] for name, x in centred.items()}
        return {name: 1 - r / (values**2).sum() for name, r in residual.items()}

    homogeneous, heterogeneous = fits("pairwise"), fits("heterogeneous")
    assert homogeneous["a strength for each pair"] > 1 - 1e-6
    assert heterogeneous["a matrix for each pair"] > 1 - 1e-6
    assert heterogeneous["a strength for each pair"] < 0.6
    assert heterogeneous["one matrix"] < 0.6


def test_pairwise_and_heterogeneous_pairs_are_different_pairs():
    planted = planted_interactions(SyntheticSpec())
    assert [len(planted[kind]) for kind in ("pairwise", "heterogeneous", "third_order")] == [6, 6, 4]
    assert len(set(planted["pairwise"] + planted["heterogeneous"])) == 12


def test_the_order_of_the_history_matters():
    spec = only("order")
    table = rows_of(spec, 4000)
    change = logits(spec, shuffled(table))[0] - logits(spec, table)[0]
    several = pc.list_value_length(table["history"]).to_numpy() > 4
    assert (np.abs(change[several]) > 1e-3).mean() > 0.9
    # A shuffled history is an independent draw for long histories: the variance of the difference is about twice 1.
    assert 1 < change.var() < 3


def test_the_mean_over_all_orders_of_a_history_is_nothing():
    spec = only("order")
    orders = list(itertools.permutations([3, 14, 159]))
    row = {name: pa.array([2] * 6, pa.int32()) for name in spec.fields}
    table = pa.table(row | {"history": pa.array(orders, pa.list_(pa.int32()))})
    empty = table.set_column(table.column_names.index("history"), "history", pa.array([[]] * 6, pa.list_(pa.int32())))
    assert logits(spec, table).mean() == pytest.approx(logits(spec, empty).mean(), abs=1e-5)
    assert logits(spec, table).std() > 0.01


def test_the_bag_of_the_history_has_no_order():
    spec = only("history")
    table = rows_of(spec, 1000)
    np.testing.assert_allclose(logits(spec, shuffled(table)), logits(spec, table), atol=1e-5)
    empty = pc.list_value_length(table["history"]).to_numpy() == 0
    assert np.ptp(logits(spec, table)[0][empty]) < 1e-6 < 1 < np.ptp(logits(spec, table)[0][~empty])


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


@pytest.mark.parametrize("kind", ["dense", "pairwise", "heterogeneous", "third_order"])
def test_a_missing_feature_adds_nothing(kind):
    spec = only(kind, missing=0.2)
    table = rows_of(spec, 1000)
    for name in [name for name in table.column_names if name[0] in "cd" and name[1:].isdigit()]:
        nothing = pa.nulls(table.num_rows, table[name].type)
        table = table.set_column(table.column_names.index(name), name, nothing)
    assert np.ptp(logits(spec, table)) < 1e-6


@pytest.mark.parametrize("drift", [0.0, 0.3, 1.0])
def test_effects_drift_as_far_as_set(drift):
    spec = only("effects", drift=drift)
    table = rows_of(spec)
    time = table["time"].to_numpy()
    at = {}
    for name, moment in (("start", time[0]), ("end", time[-1])):
        column = pa.array(np.full(SHARD_ROWS, moment))
        at[name] = logits(spec, table.set_column(table.column_names.index("time"), "time", column))[0]
        assert at[name].std() == pytest.approx(1, abs=0.03)
    assert np.corrcoef(at["start"], at["end"])[0, 1] == pytest.approx(1 - drift, abs=4 * 2 / 256)


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


def test_a_billion_ids_need_no_memory():
    spec = SyntheticSpec(num_users=2**31 - 1, num_items=10**9, exponent=0.5)
    table = rows_of(spec, 20_000)
    assert table["user_id"].to_numpy().max() > 2**30
    assert logits(spec, table).std() == pytest.approx(math.sqrt(sum(getattr(spec, k) ** 2 for k in STRENGTHS)), rel=0.2)


# Bayes metrics


def test_bayes_metrics_agree_with_scikit_learn(log):
    found = bayes_metrics(log / "train", ["click", "conversion"])
    table = pq.read_table(log / "train")
    for task in ("click", "conversion"):
        seen = table.filter(table[task].is_valid())
        label, truth = seen[task].to_numpy(), seen[task + TRUTH].to_numpy()
        rate = label.mean()
        assert found[task]["rows"] == len(label)
        assert found[task]["base_rate"] == pytest.approx(rate)
        assert found[task]["calibration"] == pytest.approx(truth.mean() / rate)
        assert found[task]["log_loss"] == pytest.approx(log_loss(label, truth))
        assert found[task]["ne"] == pytest.approx(log_loss(label, truth) / log_loss(label, np.full(len(label), rate)))
        assert found[task]["auc"] == pytest.approx(roc_auc_score(label, truth), abs=1e-5)
    stored = json.loads((log / "prepared.json").read_text())
    assert stored["rows"] == {"train": 74_999, "valid": 7500, "test": 7501}
    assert stored["bayes"]["train"]["click"] == found["click"]


def test_bayes_metrics_of_one_class_are_not_defined(tmp_path):
    path = tmp_path / "log.parquet"
    columns = {"a": pa.array([1, 1, None]), "a" + TRUTH: pa.array([0.5, 0.5, 0.9])}
    pq.write_table(pa.table(columns | {"b": pa.nulls(3, pa.int8()), "b" + TRUTH: pa.array([0.5] * 3)}), path)
    found = bayes_metrics(path, ["a", "b"])
    assert found["a"]["log_loss"] == pytest.approx(math.log(2))
    assert found["a"]["rows"] == 2
    assert math.isnan(found["a"]["ne"])
    assert math.isnan(found["a"]["auc"])
    assert found["b"]["rows"] == 0
    assert all(math.isnan(value) for key, value in found["b"].items() if key != "rows")


def test_bayes_metrics_name_a_missing_column(tmp_path):
    pq.write_table(pa.table({"click": pa.array([1])}), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=r"log\.parquet: no column 'click_true_probability'"):
        bayes_metrics(tmp_path / "log.parquet", ["click"])


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cardinalities": (10, 1)}, "synthetic: cardinality of c1 is 1\n  hint: expected 2 to 2,147,483,647 ids"),
        ({"missing": 1.0}, "synthetic: missing is 1.0\n  hint: expected a share in [0, 1)"),
        ({"drift": 2}, "synthetic: drift is 2\n  hint: expected a number in [0, 1]"),
        ({"order": -1}, "synthetic: order is -1\n  hint: expected a standard deviation, not negative"),
        ({"base_rates": (0.1,)}, "synthetic: 3 tasks, but 1 base_rates\n  hint: give one rate per task"),
        ({"base_rates": (0.1, 0.1, 1.0)}, "synthetic: base_rates is 1.0\n  hint: expected rates in (0, 1)"),
        (
            {"correlation": -0.6},
            "synthetic: correlation is -0.6\n  hint: expected a number in [-0.5, 1], as no 3 tasks can be less correlated "
            "with each other",
        ),
        (
            {"funnel": (("click", "conversions"),)},
            "synthetic: funnel names task 'conversions', which does not exist\n  hint: did you mean 'conversion'?",
        ),
        (
            {"funnel": (("like", "click"),)},
            "synthetic: funnel (like, click) runs backwards\n  hint: list 'like' first in tasks",
        ),
    ],
)
def test_an_impossible_spec_names_the_key(changes, message):
    with pytest.raises(UserError) as caught:
        SyntheticSpec(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_pairs": 2},
            "synthetic: pairwise has 2 independent parts, too few for 3 tasks of a set correlation\n"
            "  hint: raise num_pairs or set pairwise to 0",
        ),
        (
            {"history_length": 0, "history": 0},
            "synthetic: order has 0 independent parts, too few for 3 tasks of a set correlation\n"
            "  hint: raise history_length or set order to 0",
        ),
        (
            {"num_pairs": 40},
            "synthetic: 46 different interactions of 2 c columns are wanted, but 10 columns have only 45\n"
            "  hint: lower num_pairs or num_heterogeneous, or give more cardinalities",
        ),
    ],
)
def test_interactions_that_cannot_be_planted_name_the_key(changes, message, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "log", rows=100, spec=SyntheticSpec(**changes), processes=1)
    assert str(caught.value) == message


def test_too_few_rows_to_split(tmp_path):
    with pytest.raises(UserError, match="rows is 5"):
        prepare(tmp_path / "log", rows=5, processes=1)


def test_a_log_without_optional_parts(tmp_path):
    spec = SyntheticSpec(
        cardinalities=(), num_dense=0, history_length=0, missing=0, **ONE_TASK, **NOTHING | {"effects": 1}
    )
    spec = dataclasses.replace(spec, num_pairs=0, num_heterogeneous=0, num_triples=0)
    prepare(tmp_path / "log", rows=1000, spec=spec, processes=1)
    assert FeatureSchema.load(tmp_path / "log" / "schema.yaml").sequences == ()


# Criteo-shaped


@pytest.fixture(scope="module")
def criteo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("criteo") / "log"
    prepare_criteo_shaped(folder, rows=2000, processes=1)
    return folder


def test_criteo_shaped_rows_are_those_of_the_published_benchmark(criteo):
    """Sums and single rows of the 2,000 rows that the benchmark's own script writes."""
    tables = [pq.read_table(criteo / split) for split in ("train", "valid", "test")]
    assert [table.num_rows for table in tables] == [1666, 167, 167]
    table = pa.concat_tables(tables)
    assert pc.sum(table["label"]).as_py() == 450
    sums = [pc.sum(table[f"c{field}"]).as_py() for field in range(26)]
    assert sums == [
        *(281929, 142372, 10086095, 6064028, 83904, 10443, 1844996, 163873, 730, 9337074, 1000631, 10904089, 568835),
        *(11593, 2091940, 9875958, 4615, 983513, 364483, 1353, 11963559, 8384, 6737, 8986350, 37177, 4556985),
    ]
    truth = table["label" + TRUTH].to_numpy()
    assert truth.sum() == pytest.approx(443.2217865392684, rel=1e-12)
    assert truth[[0, 1, -1]] == pytest.approx(
        [0.15269808469080662, 0.028296189604010535, 0.34584602165460554], rel=1e-12
    )
    last = table.slice(1999).to_pylist()[0]
    assert [last[f"c{field}"] for field in range(6)] == [38, 3, 71, 41, 24, 5]
    assert [last["i0"], last["i12"]] == pytest.approx([2.4343185424804688, 0.23367370665073395], rel=1e-6)


def test_criteo_shaped_rows_are_the_same_for_any_number_of_processes(criteo, tmp_path):
    prepare_criteo_shaped(tmp_path / "log", rows=2000, processes=2)
    for path in criteo.glob("*/*.parquet"):
        assert path.read_bytes() == (tmp_path / "log" / path.relative_to(criteo)).read_bytes()


def test_criteo_shaped_schema(criteo):
    schema = FeatureSchema.load(criteo / "schema.yaml")
    assert (len(schema.dense), len(schema.sparse), schema.tasks) == (13, 26, ("label",))
    assert {table.embedding_dim for table in schema.tables} == {16}
    assert {feature.encoding for feature in schema.sparse} == {"index"}
    assert set(pq.read_table(criteo / "test").column_names) - set(schema.columns()) == {"label" + TRUTH}


def test_criteo_shaped_truth_has_the_published_auc(tmp_path):
    prepare_criteo_shaped(tmp_path / "log", rows=120_000, processes=1)
    found = bayes_metrics(tmp_path / "log" / "train", ["label"])["label"]
    # The variance of an AUC is at most A (1 - A) / min(positives, negatives).
    error = math.sqrt(0.8223 * (1 - 0.8223) / (found["base_rate"] * found["rows"]))
    assert abs(found["auc"] - 0.8223) < 0.002 + 4 * error


@pytest.mark.experiment
def test_criteo_shaped_truth_has_the_published_auc_at_full_size(tmp_path):
    prepare_criteo_shaped(tmp_path / "log")
    metrics = {
        split: bayes_metrics(tmp_path / "log" / split, ["label"])["label"] for split in ("train", "valid", "test")
    }
    assert [metrics[split]["rows"] for split in metrics] == [499_999, 50_000, 50_001]
    assert abs(metrics["test"]["auc"] - 0.822) < 0.002
    assert sum(found["auc"] * found["rows"] for found in metrics.values()) / 600_000 == pytest.approx(0.822, abs=0.003)


# Configs


def test_the_configs_prepare_what_they_say(tmp_path):
    for name in ("synthetic", "criteo_shaped"):
        config = OmegaConf.create({"data": OmegaConf.load(CONFIGS / f"{name}.yaml")})
        config.data.folder = str(tmp_path / name)
        config.data.prepare.rows = 100
        config.data.prepare.processes = 1
        instantiate(OmegaConf.to_container(config.data.prepare, resolve=True))
        assert (tmp_path / name / "schema.yaml").exists()


def test_the_config_shows_every_default():
    content = OmegaConf.to_container(OmegaConf.load(CONFIGS / "synthetic.yaml").prepare.spec)
    del content["_target_"]
    assert SyntheticSpec(**content) == SyntheticSpec()
    assert list(content) == [f.name for f in dataclasses.fields(SyntheticSpec)]
