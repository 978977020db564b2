from __future__ import annotations

import numpy as np
import pytest

from raysys.models.retrieval.baselines import CountBaselines

ITEMS = 30


def test_scores_by_hand():
    counted = CountBaselines(np.array([0, 1, 2, 1, 2, 2, 3]), np.array([3, 2, 2]), 5)  # 0 1 2, 1 2, 2 3
    scores = counted.scores(
        np.array([0, 1]), np.array([2, 0])
    )  # of a user who had 0 and then 1, and of one who had nothing
    popularity = np.array([1, 2, 3, 1, 0]) / 4
    np.testing.assert_allclose(scores["popularity"], [popularity, popularity])
    np.testing.assert_allclose(scores["last item (Markov)"], [popularity + 2 * (np.arange(5) == 2), popularity])
    together = [1 / np.sqrt(2), 1 / np.sqrt(2), 1 / np.sqrt(3) + 2 / np.sqrt(6), 1 / 4 - 1, 0 - 1]
    np.testing.assert_allclose(scores["co-occurrence"], [together, popularity - 1], rtol=1e-6)


@pytest.fixture(params=[0, 1, 2])
def sequences(request):
    rng = np.random.default_rng(request.param)
    return [rng.choice(ITEMS, rng.integers(1, 8), replace=False) for _ in range(60)]


def scored(sequences, histories):
    counted = CountBaselines(np.concatenate(sequences), np.array([len(one) for one in sequences]), ITEMS)
    return counted.scores(np.concatenate(histories), np.array([len(one) for one in histories]))


def test_counts_are_those_of_loops(sequences):
    histories = [one[:-1] for one in sequences if len(one) > 1]
    scores = scored(sequences, histories)
    for row, history in enumerate(histories):
        follows, together = np.zeros(ITEMS), np.zeros(ITEMS)
        for one in sequences:
            for place in np.flatnonzero(one[:-1] == history[-1]):
                follows[one[place + 1]] += 1
        holding = np.array([sum(item in one for one in sequences) for item in range(ITEMS)])
        for item in range(ITEMS):
            for had in set(history) - {item}:
                both = sum(item in one and had in one for one in sequences)
                together[item] += both / np.sqrt(max(holding[item] * holding[had], 1))
        np.testing.assert_array_equal(np.floor(scores["last item (Markov)"][row]), follows)
        found = scores["co-occurrence"][row]
        np.testing.assert_allclose(found[together > 0], together[together > 0], rtol=1e-5)
        assert (found[together == 0] < 0).all()


def test_a_row_has_the_same_scores_whichever_rows_it_is_scored_with(sequences):
    scores = scored(sequences, sequences)
    for row, history in enumerate(sequences):
        alone = scored(sequences, [history])
        assert all(np.array_equal(alone[name][0], scores[name][row]) for name in scores)
