from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from raysys.data.synthetic import SyntheticSpec, planted_interactions, prepare, true_probabilities
from raysys.data.synthetic.log import make_rows
from raysys.data.synthetic.spec import STRENGTHS, TRUTH
from raysys.data.synthetic.write import SHARD_ROWS, Shard
from raysys.data.synthetic.zipf import IdFactors
from raysys.errors import UserError

NOTHING = dict.fromkeys(STRENGTHS, 0.0)
ONE_TASK = {"tasks": ("click",), "base_rates": (0.3,), "funnel": ()}
SMALL = {"cardinalities": (5, 6, 7, 8), "exponent": 0.7}


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


def test_a_billion_ids_need_no_memory():
    spec = SyntheticSpec(num_users=2**31 - 1, num_items=10**9, exponent=0.5)
    table = rows_of(spec, 20_000)
    assert table["user_id"].to_numpy().max() > 2**30
    assert logits(spec, table).std() == pytest.approx(math.sqrt(sum(getattr(spec, k) ** 2 for k in STRENGTHS)), rel=0.2)


def test_the_truth_is_a_function_of_the_columns_that_a_model_sees(log):
    spec = SyntheticSpec()
    table = pq.read_table(log / "test")
    truth = true_probabilities(spec, table.select(spec.schema().columns(labels=False)))
    stored = np.stack([table[task + TRUTH] for task in spec.tasks])
    # The logits are sums in single precision; in slices of another length the order of its operations may differ.
    np.testing.assert_allclose(truth, stored, rtol=1e-5)
    np.testing.assert_allclose(true_probabilities(spec, table.slice(1000, 77)), stored[:, 1000:1077], rtol=1e-5)


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
