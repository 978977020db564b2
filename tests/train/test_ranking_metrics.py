from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import mean_absolute_error, mean_squared_error, roc_auc_score

from raysys.nn.calibration import correct_sampling
from raysys.train.ranking_metrics import (
    auc,
    binary_metrics,
    calibration,
    calibration_bins,
    expected_calibration_error,
    gauc,
    group_auc,
    log_loss,
    mae,
    normalized_entropy,
    regression_metrics,
    rmse,
)

P = np.arange(1, 9) / 10
Y = np.array([0, 0, 1, 0, 1, 0, 1, 1])
RARE = np.array([0, 0, 0, 0, 0, 1, 0, 1])
W = np.array([1, 2, 1, 1, 3, 1, 1, 2])
GROUP = np.repeat([0, 1, 2, 3], [4, 3, 2, 3])
GROUP_P = np.array([0.9, 0.2, 0.6, 0.4, 0.3, 0.8, 0.5, 0.7, 0.1, 0.4, 0.4, 0.4])
GROUP_Y = np.array([1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0])
SEEDS = range(5)


def random_rows(seed: int, n: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, quantised scores (many ties), weights (some 0) and groups."""
    rng = np.random.default_rng(seed)
    score = rng.integers(1, 12, n) / 12
    label = (rng.random(n) < score**2).astype(float)
    return label, score, rng.integers(0, 4, n) * rng.random(n), rng.integers(0, n // 8, n)


def slow_auc(label, score, weight) -> float:
    """The definition, pair by pair."""
    positive, negative = label == 1, label == 0
    pairs = np.sign(score[positive][:, None] - score[negative][None, :]) / 2 + 0.5
    mass = weight[positive][:, None] * weight[negative][None, :]
    return (pairs * mass).sum() / mass.sum() if mass.sum() > 0 else math.nan


@pytest.mark.parametrize(
    ("label", "weight", "expected"),
    [
        (Y, None, (0.529070, 0.763286, 0.9, 0.8125)),
        (RARE, None, (0.478387, 0.850715, 1.8, 0.916667)),
        (Y, W, (0.505428, 0.744160, 0.8, 0.857143)),
    ],
)
def test_published_vectors(label, weight, expected):
    found = [metric(label, P, weight) for metric in (log_loss, normalized_entropy, calibration, auc)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_published_groups():
    result = group_auc(GROUP_Y, GROUP_P, group=GROUP)
    np.testing.assert_allclose(result.auc, [0.75, 0.5, np.nan, 0.5])
    np.testing.assert_allclose(result.mass, [4, 3, 2, 3])
    assert gauc(GROUP_Y, GROUP_P, GROUP) == pytest.approx(0.6)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_ties_count_half_in_any_order(rows):
    assert auc(np.array([1, 0, 1, 0])[rows], np.full(4, 0.5)) == 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_auc_equals_its_definition_and_sklearn(seed):
    label, score, weight, _ = random_rows(seed)
    assert auc(label, score, weight) == pytest.approx(slow_auc(label, score, weight), abs=1e-12)
    assert auc(label, score, weight) == pytest.approx(roc_auc_score(label, score, sample_weight=weight), abs=1e-12)
    assert auc(label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_group_auc_equals_a_loop_over_groups(seed):
    label, score, weight, group = random_rows(seed)
    counted = [g for g in np.unique(group) if weight[group == g].sum() > 0]
    slow = [slow_auc(label[group == g], score[group == g], weight[group == g]) for g in counted]
    mass = np.array([weight[group == g].sum() for g in counted])
    result = group_auc(label, score, weight, group)
    np.testing.assert_allclose(result.auc, slow, atol=1e-12)
    np.testing.assert_allclose(result.mass, mass, atol=1e-12)
    defined = ~np.isnan(slow)
    assert 0 < defined.sum() < len(slow)
    expected = (np.array(slow)[defined] @ mass[defined]) / mass[defined].sum()
    assert gauc(label, score, group, weight) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_auc_sees_only_the_order(seed):
    label, score, weight, group = random_rows(seed)
    assert auc(label, np.exp(5 * score), weight) == auc(label, score, weight)
    assert auc(1 - label, score, weight) == pytest.approx(1 - auc(label, score, weight), abs=1e-12)
    assert gauc(label, score, np.full(len(label), 7), weight) == pytest.approx(auc(label, score, weight), abs=1e-12)
    order = np.random.default_rng(seed).permutation(len(label))
    shuffled = gauc(label[order], score[order], group[order], weight[order])
    assert shuffled == pytest.approx(gauc(label, score, group, weight), abs=1e-12)
    assert normalized_entropy(label, score**3, weight) != pytest.approx(normalized_entropy(label, score, weight))


def test_groups_of_one_class_do_not_contribute():
    label, score, group = [1, 0, 1, 1, 0, 0], [0.7, 0.2, 0.1, 0.9, 0.3, 0.8], [0, 0, 1, 1, 2, 2]
    assert gauc(label, score, group) == 1.0
    assert math.isnan(gauc([1, 1, 0], [0.1, 0.2, 0.3], [0, 0, 1]))


def test_many_small_groups_keep_their_precision():
    rng = np.random.default_rng(0)
    n = 200_000
    label, score = rng.integers(0, 2, n), rng.random(n)
    weight, group = 1e3 * rng.random(n), np.arange(n) // 2
    mixed = label[::2] != label[1::2]
    expected = np.where(label[::2] > label[1::2], score[::2] > score[1::2], score[::2] < score[1::2])
    result = group_auc(label, score, weight, group)
    np.testing.assert_allclose(result.auc[mixed], expected[mixed], atol=1e-7)
    assert np.isnan(result.auc[~mixed]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_log_loss_rmse_and_mae_equal_sklearn(seed):
    label, score, weight, _ = random_rows(seed)
    score = np.clip(score, 0.01, 0.99)
    assert log_loss(label, score, weight) == pytest.approx(
        sklearn_log_loss(label, score, sample_weight=weight), abs=1e-12
    )
    target = 3 * label + score**2
    assert rmse(target, score, weight) ** 2 == pytest.approx(mean_squared_error(target, score, sample_weight=weight))
    assert mae(target, score, weight) == pytest.approx(mean_absolute_error(target, score, sample_weight=weight))
    assert regression_metrics(target, score, weight)["rows"] == np.count_nonzero(weight)


@pytest.mark.parametrize("seed", SEEDS)
def test_ne_of_the_base_rate_is_one_and_weights_have_no_scale(seed):
    label, score, weight, _ = random_rows(seed)
    rate = np.full(len(label), weight @ label / weight.sum())
    assert normalized_entropy(label, rate, weight) == pytest.approx(1, abs=1e-12)
    for metric in (normalized_entropy, log_loss, calibration, auc, expected_calibration_error):
        assert metric(label, score, 37 * weight) == pytest.approx(metric(label, score, weight), abs=1e-12)


def test_a_row_of_weight_two_is_two_rows():
    label, score, _, group = random_rows(0)
    weight = np.random.default_rng(1).integers(0, 3, len(label))
    twice = np.repeat(np.arange(len(label)), weight)
    weighted = binary_metrics(label, score, weight, group)
    repeated = binary_metrics(label[twice], score[twice], None, group[twice])
    assert weighted.pop("rows") == np.count_nonzero(weight)
    assert repeated.pop("rows") == weight.sum()
    assert weighted == pytest.approx(repeated, abs=1e-12)


@pytest.mark.parametrize("factor", [0.5, 1.1])
def test_calibration_above_one_is_over_prediction(factor):
    assert calibration(Y, factor * P, W) == pytest.approx(factor * calibration(Y, P, W))
    assert calibration([0, 1], [0.9, 0.9]) > 1


def test_down_sampled_negatives_are_calibrated_after_the_correction():
    rng = np.random.default_rng(0)
    keep_rate, n = 0.1, 200_000
    truth = rng.beta(1, 15, n)
    label = (rng.random(n) < truth).astype(float)
    sampled_model = truth / (truth + (1 - truth) * keep_rate)  # what a perfect model of the sampled log predicts
    corrected = correct_sampling(sampled_model, keep_rate)
    np.testing.assert_allclose(corrected, truth, atol=1e-12)
    noise = 1 / math.sqrt(label.sum())
    assert calibration(label, corrected) == pytest.approx(1, abs=4 * noise)
    assert calibration(label, sampled_model) > 3
    np.testing.assert_allclose(correct_sampling(truth, 1.0), truth, atol=1e-15)


def test_a_model_of_the_sampled_log_is_calibrated_on_the_whole_one():
    rng = np.random.default_rng(1)
    keep_rate, n = 0.1, 200_000
    x = rng.normal(size=(n, 2))
    label = rng.random(n) < 1 / (1 + np.exp(3 - x @ [1.0, -0.5]))
    kept = label | (rng.random(n) < keep_rate)
    model = LogisticRegression(C=1e6).fit(x[kept], label[kept])
    sampled = model.predict_proba(x)[:, 1]
    noise = 1 / math.sqrt(label.sum())
    assert calibration(label, correct_sampling(sampled, keep_rate)) == pytest.approx(1, abs=4 * noise)
    assert calibration(label, sampled) > 2


def test_calibration_error_of_equal_bins():
    table = calibration_bins(Y, P, bins=4)
    np.testing.assert_allclose(table.prediction, [0.15, 0.35, 0.55, 0.75])
    np.testing.assert_allclose(table.label, [0, 0.5, 0.5, 1])
    np.testing.assert_allclose(table.weight, [2, 2, 2, 2])
    assert expected_calibration_error(Y, P, bins=4) == pytest.approx((0.15 + 0.15 + 0.05 + 0.25) / 4)
    assert expected_calibration_error(Y, np.full(8, 0.3)) == pytest.approx(0.2)  # one bin: |0.3 - 0.5|
    assert expected_calibration_error([0, 1, 1], [0, 1, 1]) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_bins_ignore_the_order_of_rows_and_lose_none(seed):
    label, score, weight, _ = random_rows(seed)
    order = np.random.default_rng(seed).permutation(len(label))
    table, shuffled = (
        calibration_bins(label, score, weight),
        calibration_bins(label[order], score[order], weight[order]),
    )
    for found, expected in zip(shuffled, table, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)
    assert table.weight.sum() == pytest.approx(weight.sum())
    assert table.weight @ table.label == pytest.approx(weight @ label)
    assert len(table.weight) <= 20


def test_bins_of_distinct_predictions_have_equal_mass():
    rng = np.random.default_rng(0)
    table = calibration_bins(rng.integers(0, 2, 4000), rng.random(4000), bins=20)
    np.testing.assert_allclose(table.weight, 200)


@pytest.mark.parametrize("label", [np.zeros(3), np.ones(3)])
def test_one_class_leaves_ne_and_auc_undefined(label):
    metrics = binary_metrics(label, [0.1, 0.5, 0.9], None, [0, 0, 1])
    assert [name for name, value in metrics.items() if math.isnan(value)] == ["ne", "auc", "gauc"] + (
        ["calibration"] if label[0] == 0 else []
    )


@pytest.mark.parametrize("n", [0, 3])
def test_no_rows_or_no_weight_leave_all_undefined(n):
    metrics = binary_metrics(np.ones(n), np.full(n, 0.5), np.zeros(n), np.zeros(n))
    assert metrics.pop("rows") == 0
    assert all(math.isnan(value) for value in metrics.values())
    metrics = regression_metrics(np.ones(n), np.ones(n), np.zeros(n))
    assert metrics.pop("rows") == 0
    assert all(math.isnan(value) for value in metrics.values())


def test_a_nan_prediction_makes_everything_nan():
    metrics = binary_metrics([0, 1, 0, 1], [0.1, np.nan, 0.2, 0.3], None, [0, 0, 1, 1])
    assert all(math.isnan(metrics[name]) for name in ("ne", "auc", "gauc", "log_loss", "calibration", "ece"))
    assert metrics["base_rate"] == 0.5


def test_certain_and_wrong_is_finite():
    assert log_loss([0.0], [1.0]) == pytest.approx(-math.log(1e-12), rel=1e-4)
    assert log_loss([1.0], [0.0]) == pytest.approx(-math.log(1e-12))


@pytest.mark.parametrize(
    ("label", "weight", "bits"), [(Y, np.ones(8), 0.763286), (RARE, np.ones(8), 0.690166), (Y, W, 0.729179)]
)
def test_torchrec_agrees_where_it_is_right(label, weight, bits):
    """Its log-loss is in bits, and its AUC of tied predictions depends on the order of the rows."""
    from torchrec.metrics.auc import compute_auc
    from torchrec.metrics.calibration import compute_calibration, get_calibration_states
    from torchrec.metrics.ne import compute_logloss, compute_ne, get_ne_states

    rows = [torch.tensor(values, dtype=torch.float64)[None] for values in (label, P, weight)]
    states = get_ne_states(*rows, eta=1e-12)
    sums = [states[name] for name in ("cross_entropy_sum", "weighted_num_samples", "pos_labels", "neg_labels")]
    assert float(compute_ne(*sums, eta=1e-12)) == pytest.approx(normalized_entropy(label, P, weight), abs=1e-6)
    found = float(compute_logloss(sums[0], sums[2], sums[3], eta=1e-12))
    assert found == pytest.approx(bits, abs=1e-6)
    assert found * math.log(2) == pytest.approx(log_loss(label, P, weight), abs=1e-6)
    ratio = compute_calibration(*get_calibration_states(*rows).values())
    assert float(ratio) == pytest.approx(calibration(label, P, weight), abs=1e-6)
    tied = torch.full((1, 4), 0.5)
    found = [
        float(compute_auc(1, [tied], [torch.tensor([label])], [torch.ones(1, 4)]))
        for label in ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0])
    ]
    assert sorted(found) == [0.0, 1.0]


def test_torchrec_has_two_other_metrics_within_groups():
    """Plain means: its gauc leaves out groups of one class or one score, its grouped AUC counts those of one class as 0.5."""
    from torchrec.metrics.auc import compute_auc_per_group
    from torchrec.metrics.gauc import get_auc_states

    label, score = (torch.tensor(values, dtype=torch.float32)[None] for values in (GROUP_Y, GROUP_P))
    states = get_auc_states(label, score, torch.ones_like(score), torch.tensor([4, 3, 2, 3]))
    assert float(states["auc_sum"] / states["num_samples"]) == pytest.approx(0.625)
    rows = [[values] for values in (score, label, torch.ones_like(score))]
    assert float(compute_auc_per_group(1, *rows, torch.tensor(GROUP))) == pytest.approx(
        0.6875
    )  # the ties as they stand
