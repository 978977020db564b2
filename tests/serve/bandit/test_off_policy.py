"""Estimators against the truth of a synthetic bandit, and what their intervals cover."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.errors import UserError
from raysys.serve.bandit.off_policy import cross_fitted_rates, effective_size, evaluate

ACTIONS = 6


def softmax(values):
    weights = np.exp(values - values.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def draw(seed, rows=3000):
    """A log of one policy, the probabilities of another, and what that one earns on average in these contexts."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3))
    logging, target = (softmax(x @ rng.normal(size=(3, ACTIONS)) * 0.5) for _ in range(2))
    mean = softmax(x @ rng.normal(size=(3, ACTIONS)))
    action = (rng.random((rows, 1)) > logging.cumsum(1)).sum(1).clip(max=ACTIONS - 1)
    reward = (rng.random(rows) < mean[np.arange(rows), action]).astype(float)
    return target, action, reward, logging[np.arange(rows), action], mean, (target * mean).sum(1).mean()


def test_values_are_those_of_the_formulas():
    target, action, reward, propensity, mean, _ = draw(0, rows=200)
    model = mean + 0.1
    found = evaluate(target, action, reward, propensity, model, resamples=10)
    ips = weights = robust = 0.0
    for row in range(200):
        weight = target[row, action[row]] / propensity[row]
        ips, weights = ips + weight * reward[row], weights + weight
        robust += sum(target[row, a] * model[row, a] for a in range(ACTIONS))
        robust += weight * (reward[row] - model[row, action[row]])
    assert found["IPS"].value == pytest.approx(ips / 200, rel=1e-12)
    assert found["SNIPS"].value == pytest.approx(ips / weights, rel=1e-12)
    assert found["DR"].value == pytest.approx(robust / 200, rel=1e-12)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """40 logs: of 95% intervals at most 7 may miss (probability of more: below 0.002)."""
    missed = dict.fromkeys(("IPS", "SNIPS", "DR"), 0)
    for seed in range(40):
        target, action, reward, propensity, _, truth = draw(seed, rows=1000)
        model = cross_fitted_rates(action, reward, ACTIONS, prior=20)
        for name, found in evaluate(target, action, reward, propensity, model, resamples=300).items():
            missed[name] += not found.low <= truth <= found.high
    assert max(missed.values()) <= 7, missed


def test_on_its_own_log_a_policy_is_worth_its_mean_reward():
    target, action, reward, *_ = draw(3)
    logged = np.zeros_like(target)
    logged[np.arange(len(action)), action] = 1
    found = evaluate(logged, action, reward, np.ones(len(action)), np.zeros_like(target), resamples=500)
    deviation = np.sqrt(reward.var() / len(reward))
    for estimate in found.values():
        assert estimate.value == pytest.approx(reward.mean())
        assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * deviation, rel=0.2)
    assert effective_size(logged, action, np.ones(len(action))) == pytest.approx(len(action))


def test_a_good_model_makes_the_doubly_robust_interval_narrower():
    target, action, reward, propensity, mean, truth = draw(1)
    found = evaluate(target, action, reward, propensity, mean, resamples=500)
    assert found["DR"].high - found["DR"].low < found["IPS"].high - found["IPS"].low
    assert found["DR"].low <= truth <= found["DR"].high


def test_rates_are_not_fitted_on_the_row_that_they_are_for():
    _, action, reward, *_ = draw(2, rows=50)
    model = cross_fitted_rates(action, reward, ACTIONS, prior=1.0)
    for row in range(50):
        flipped = reward.copy()
        flipped[row] = 1 - flipped[row]
        changed = cross_fitted_rates(action, flipped, ACTIONS, prior=1.0)
        assert (changed[row] == model[row]).all()
        assert (changed != model).any()


def test_probabilities_that_do_not_sum_to_one_are_refused():
    target, action, reward, propensity, mean, _ = draw(0, rows=10)
    target[3] *= 0.5
    with pytest.raises(UserError, match=r"row 3 sums to 0.5"):
        evaluate(target, action, reward, propensity, mean)
