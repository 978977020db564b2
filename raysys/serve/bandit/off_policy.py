"""What a policy would have earned, from the log of another one: importance weighting with bootstrap intervals.

Dudik, Langford, Li, "Doubly Robust Policy Evaluation and Learning" (ICML 2011); self-normalisation: Swaminathan and Joachims
(NeurIPS 2015). With weight_i = target(a_i | x_i) / propensity_i and a reward model q:

    IPS    mean of weight r
    SNIPS  sum of weight r / sum of weight
    DR     mean of sum_a target(a | x) q(x, a) + weight (r - q(x, a_i))
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysys.errors import UserError
from raysys.serve.bandit.policy import Floats

_BLOCK = 100  # resamples at a time, of n counts each


@dataclass(frozen=True)
class Estimate:
    """A value per impression, and the percentile interval of its bootstrap distribution."""

    value: float
    low: float
    high: float


def evaluate(
    target: Floats,
    action: NDArray[np.int64],
    reward: Floats,
    propensity: Floats,
    model: Floats,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """IPS, SNIPS and DR of a policy with probabilities target [n, A] for contexts of a log, whose rows are independent.

    action, reward, propensity: [n], logged. model: q [n, A], not fitted on the row that it is for. Raises UserError where a
    row of `target` does not sum to 1.
    """
    wrong = np.flatnonzero(np.abs(target.sum(1) - 1) > 1e-6)
    if len(wrong):
        raise UserError(f"target: row {wrong[0]} sums to {target[wrong[0]].sum():.6f}", "probabilities of all actions")
    rows = np.arange(len(action))
    weight = target[rows, action] / propensity
    direct = (target * model).sum(1)
    residual = weight * (reward - model[rows, action])
    terms = np.stack([weight * reward, weight, direct + residual, np.ones(len(rows))], axis=1)  # [n, 4]

    def values(sums: Floats) -> Floats:  # [..., 4] to [..., 3]
        weighted, weights, robust, count = np.moveaxis(sums, -1, 0)
        return np.stack([weighted / count, weighted / np.maximum(weights, 1e-300), robust / count], axis=-1)

    rng, sums = np.random.default_rng(seed), []
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        drawn = rng.integers(0, len(rows), (size, len(rows))) + np.arange(size)[:, None] * len(rows)
        counts = np.bincount(drawn.ravel(), minlength=size * len(rows)).reshape(size, len(rows))
        sums.append(counts @ terms)
    tail = (1 - level) / 2
    low, high = np.quantile(values(np.concatenate(sums)), [tail, 1 - tail], axis=0)
    middle = values(terms.sum(0))
    return {
        name: Estimate(float(middle[place]), float(low[place]), float(high[place]))
        for place, name in enumerate(("IPS", "SNIPS", "DR"))
    }


def effective_size(target: Floats, action: NDArray[np.int64], propensity: Floats) -> float:
    """(sum of weights)² / sum of weights²: how many rows of the target's own log those of this one are worth (Kish 1965)."""
    weight = target[np.arange(len(action)), action] / propensity
    return float(weight.sum() ** 2 / max((weight**2).sum(), 1e-300))


def cross_fitted_rates(action: NDArray[np.int64], reward: Floats, actions: int, prior: float, seed: int = 0) -> Floats:
    """q [n, A]: mean rewards of actions, drawn to the mean of all by `prior` impressions of it; of the half without the row."""
    half = np.random.default_rng(seed).permutation(len(action)) % 2
    model = np.zeros((len(action), actions))
    for number in (0, 1):
        seen = half != number
        count = np.bincount(action[seen], minlength=actions)
        total = np.bincount(action[seen], reward[seen], actions)
        model[~seen] = (total + prior * reward[seen].mean()) / (count + prior)
    return model
