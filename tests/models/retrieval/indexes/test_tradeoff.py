"""What the curve says of beams is what searching with them scores and finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysys.models.retrieval.hierarchy import exhaustive
from raysys.models.retrieval.indexes.exact import Exact
from raysys.models.retrieval.indexes.hierarchical import Hierarchical
from raysys.models.retrieval.indexes.tradeoff import InvertedLists, tradeoff

ITEMS, WIDTH, NODES, K = 800, 8, (7, 5), 20


@pytest.fixture(params=[0, 1])
def parts(request, make_hsnn):
    """A model, its index, users, and what scoring every item finds."""
    model, items, users = make_hsnn(NODES, ITEMS, 12, request.param)
    index = Hierarchical(model, beams=(1, 1))
    order = np.random.default_rng(request.param).permutation(ITEMS)
    index.add(order, items[torch.from_numpy(order)].numpy())
    return model, index, users, exhaustive(model, users, items, K)


def test_the_curve_is_what_searching_gives(parts):
    model, index, users, wanted = parts
    curve = tradeoff(model, index, users, wanted)
    assert curve.first[0] == 1
    assert curve.first[-1] == len(index.levels[0].path)
    for row, column in ((0, 0), (1, 3), (2, 8), (-1, -1)):
        index.beams = (int(curve.first[row]), range(curve.scored.shape[1])[column] + 1)
        found = index.beam(users.numpy(), K)
        shares = [np.isin(best, ids).mean() for ids, best in zip(found.ids, wanted, strict=True)]
        assert curve.recall[row, column] == pytest.approx(np.mean(shares))
        assert curve.scored[row, column] == pytest.approx(found.scored.mean())
    assert curve.recall[-1, -1] == 1
    assert curve.scored[-1, -1] == sum(len(level.path) for level in index.levels) + ITEMS


def test_the_rules_choose_the_cheapest_and_the_best(parts):
    curve = tradeoff(*parts)
    for wanted in (0.3, 0.8, 1.0):
        beams = curve.cheapest(wanted)
        scored, recall = at(curve, beams)
        assert recall >= wanted - 1e-9
        assert not ((curve.recall >= wanted) & (curve.scored < scored)).any()
        again = at(curve, curve.best_within(scored))
        assert again[0] <= scored
        assert again[1] >= recall
    assert curve.best_within(0) == (1, 1)


def at(curve, beams):
    place = np.flatnonzero(curve.first == beams[0])[0], beams[1] - 1
    return curve.scored[place], curve.recall[place]


def test_inverted_lists_count_what_they_compare(fill):
    filled = fill(Exact)
    lists, queries = InvertedLists(filled.vectors, 1), filled.queries
    scored = lists.scored(queries)
    assert (np.diff(scored, axis=1) >= 0).all()
    assert scored.shape[1] == round(len(filled.vectors) ** 0.5)
    assert (scored[:, -1] == scored.shape[1] + len(filled.vectors)).all()
    probes = lists.probes_within(queries, 800)
    assert scored[:, probes - 1].mean() <= 800 < scored[:, probes].mean()
    true = np.argsort(-queries @ filled.vectors.T, 1)[:, :10]
    np.testing.assert_array_equal(np.sort(lists.search(queries, 10, scored.shape[1]), 1), np.sort(true, 1))
    near = lists.search(queries, 10, probes)
    assert 0.5 < np.mean([np.isin(a, b).mean() for a, b in zip(true, near, strict=True)]) <= 1
