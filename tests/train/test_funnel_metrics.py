from __future__ import annotations

import itertools

import numpy as np
import pytest

from raysys.errors import UserError
from raysys.train.funnel_metrics import pair_agreement, recall_at, value_recall_at

SEEDS = range(3)


def random_rows(seed, requests=30, ties=False):
    """final, early and request of 1 to 12 candidates each, in a random order."""
    rng = np.random.default_rng(seed)
    request = np.repeat(rng.permutation(1000)[:requests], rng.integers(1, 13, requests))
    rng.shuffle(request)
    final = rng.random(len(request))
    early = final + rng.normal(size=len(request))
    return (np.round(final, 1), np.round(early), request) if ties else (final, early, request)


def by_definition(final, early, request, k, n):
    """Recall@(K,N) and value recall, without ties."""
    recalls, kept, total = [], 0.0, 0.0
    for one in np.unique(request):
        rows = np.flatnonzero(request == one)
        best = rows[np.argsort(-final[rows])][:k]
        passed = set(rows[np.argsort(-early[rows])][:n])
        recalls.append(sum(row in passed for row in best) / len(best))
        kept += sum(final[row] for row in best if row in passed)
        total += final[best].sum()
    return np.mean(recalls), kept / total


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 3), (5, 5), (3, 12), (20, 4)])
def test_recall_follows_its_definition(seed, k, n):
    rows = random_rows(seed)
    expected, value = by_definition(*rows, k, n)
    assert recall_at(*rows, k, n) == pytest.approx(expected, abs=1e-12)
    assert value_recall_at(*rows, k, n) == pytest.approx(value, abs=1e-12)


def test_ties_count_as_the_mean_over_all_their_orders():
    final, early = np.array([3.0, 2.0, 2.0, 1.0]), np.array([1.0, 2.0, 2.0, 2.0])
    recalls = []
    for order in itertools.permutations(range(4)):
        for other in itertools.permutations(range(4)):
            best = np.lexsort((order, -final))[:2]
            passed = np.lexsort((other, -early))[:2]
            recalls.append(len(set(best) & set(passed)) / 2)
    assert recall_at(final, early, np.zeros(4), 2, 2) == pytest.approx(np.mean(recalls), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ties", [False, True])
def test_recall_grows_with_n_and_is_1_where_all_candidates_pass(seed, ties):
    rows = random_rows(seed, ties=ties)
    recalls = [recall_at(*rows, 3, n) for n in range(1, 13)]
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(recalls))
    assert recalls[-1] == pytest.approx(1, abs=1e-12)
    assert recalls[0] < 0.9


def test_the_final_order_itself_has_recall_1_for_every_n_from_k_on():
    final, _, request = random_rows(0)
    for k, n in [(1, 1), (3, 3), (3, 7)]:
        assert recall_at(final, 5 * final - 2, request, k, n) == pytest.approx(1, abs=1e-12)
        assert value_recall_at(final, np.exp(final), request, k, n) == pytest.approx(1, abs=1e-12)
    assert pair_agreement(final, final**3, request) == 1
    assert pair_agreement(final, -final, request) == 0


def test_a_random_order_and_a_constant_score_have_recall_n_of_c():
    rng = np.random.default_rng(0)
    request = np.repeat(np.arange(2000), 20)
    final, early = rng.random((2, len(request)))
    assert recall_at(final, np.zeros(len(request)), request, 5, 8) == pytest.approx(8 / 20, abs=1e-12)
    deviation = (0.4 * 0.6 / (5 * 2000)) ** 0.5  # at most: draws without replacement vary less
    assert recall_at(final, early, request, 5, 8) == pytest.approx(8 / 20, abs=5 * deviation)
    assert pair_agreement(final, early, request) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_adding_a_constant_to_the_scores_of_a_request_or_reordering_rows_changes_nothing(seed):
    final, early, request = random_rows(seed, ties=True)
    order = np.random.default_rng(seed).permutation(len(request))
    shifted = early + 10 * (request % 7)
    for metric in (lambda *rows: recall_at(*rows, 3, 5), lambda *rows: value_recall_at(*rows, 3, 5), pair_agreement):
        value = metric(final, early, request)
        assert 0 < value < 1
        assert metric(final[order], shifted[order], request[order]) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_agreement_counts_the_pairs_that_the_final_stage_tells_apart(seed):
    final, early, request = random_rows(seed, ties=True)
    agreed = []
    for i, j in itertools.combinations(range(len(final)), 2):
        if request[i] == request[j] and final[i] != final[j]:
            agreed.append((1 + np.sign(final[i] - final[j]) * np.sign(early[i] - early[j])) / 2)
    assert pair_agreement(final, early, request) == pytest.approx(np.mean(agreed), abs=1e-12)


def test_what_is_undefined_is_nan():
    for metric in (lambda *rows: recall_at(*rows, 1, 1), lambda *rows: value_recall_at(*rows, 1, 1), pair_agreement):
        assert np.isnan(metric([], [], []))
        assert np.isnan(metric([1.0, np.nan], [1.0, 2.0], [0, 0]))
        assert np.isnan(metric([1.0, 2.0], [np.nan, 2.0], [0, 0]))
    assert np.isnan(pair_agreement([1.0, 2.0], [1.0, 2.0], [0, 1]))
    assert np.isnan(value_recall_at([0.0, 0.0], [1.0, 2.0], [0, 0], 1, 1))


def test_errors_name_the_number_or_the_value():
    with pytest.raises(UserError, match=r"recall: n is 0\n  hint: a positive whole number"):
        recall_at([1.0], [1.0], [0], 1, 0)
    with pytest.raises(UserError, match=r"value_recall_at: a final score is -1.0\n  hint: values of 0 or more"):
        value_recall_at([-1.0], [1.0], [0], 1, 1)
