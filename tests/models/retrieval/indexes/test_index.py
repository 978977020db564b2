"""All indexes behind the one interface: what is found, what is removed, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.data.synthetic.vectors import clustered_vectors
from raysys.errors import UserError
from raysys.models.retrieval.indexes.exact import Exact
from raysys.models.retrieval.indexes.hnsw import HNSW
from raysys.models.retrieval.indexes.index import NO_ITEM, IdMap
from raysys.models.retrieval.indexes.ivf_pq import IVFPQ

K = 100
SEEDS = (0, 1, 2)


def best(ids, vectors, queries, k=K):
    """The reference, in float64: ids [Q, k] and scores [Q, k]."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids[order], np.take_along_axis(scores, order, 1)


def ann_recall(found, truth):
    """|found ∩ true| / k, the mean over queries."""
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]) / truth.shape[1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("items", [3000, 20_000])
def test_the_defaults_find_95_percent_of_the_true_100_best(kind, fill, seed, items):
    made = fill(kind, seed, items)
    found, scores = made.index.search(made.queries, K)
    truth, _ = best(made.ids, made.vectors, made.queries)
    assert found.dtype == np.int64
    assert scores.dtype == np.float32
    assert found.shape == scores.shape == (50, K)
    assert ann_recall(found, truth) >= (0.999 if kind is Exact else 0.95)  # float32 may swap the last ones
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(np.unique(row)) == K for row in found)


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_are_the_inner_products_of_the_items_beside_them(kind, fill, seed):
    made = fill(kind, seed)
    found, scores = made.index.search(made.queries, K)
    order = np.argsort(made.ids)
    rows = order[np.searchsorted(made.ids[order], found)]
    expected = np.einsum("qkd,qd->qk", made.vectors[rows].astype(np.float64), made.queries)
    # Unit vectors, in float32, or with columns rounded to half precision: 2^-11 of the vector's length at most.
    assert np.abs(scores - expected).max() < (2**-11 if kind is IVFPQ else 32 * 2**-24)


def test_exact_search_is_the_reference_over_blocks_of_items_and_queries(fill, monkeypatch):
    monkeypatch.setattr("raysys.models.retrieval.indexes.exact.ITEMS", 128)
    monkeypatch.setattr("raysys.models.retrieval.indexes.exact.QUERIES", 7)
    made = fill(Exact)
    found, scores = made.index.search(made.queries, 300)
    truth, expected = best(made.ids, made.vectors, made.queries, 300)
    assert ann_recall(found, truth) >= 0.999
    np.testing.assert_allclose(scores, expected, atol=32 * 2**-24)


@pytest.mark.parametrize("kind", [Exact, HNSW])
def test_an_index_of_few_items_returns_them_all_and_then_none(kind):
    vectors, queries = clustered_vectors(5, 3, 32)
    index = kind(32)
    index.add(np.arange(5), vectors)
    found, scores = index.search(queries, 8)
    assert (np.sort(found[:, :5], 1) == np.arange(5)).all()
    assert np.isfinite(scores[:, :5]).all()
    assert (found[:, 5:] == NO_ITEM).all()
    assert np.isneginf(scores[:, 5:]).all()


def test_a_row_of_fewer_than_k_items_ends_with_none(kind, fill):
    made = fill(kind)
    made.index.remove(made.ids[20:])
    found, scores = made.index.search(made.vectors[:20], 50)
    assert ((found == NO_ITEM) == np.isneginf(scores)).all()
    assert (found[:, 0] == made.ids[:20]).all()
    assert (found[:, 20:] == NO_ITEM).all()
    assert np.isin(found, [*made.ids[:20], NO_ITEM]).all()


def test_an_empty_index_finds_nothing(kind):
    index = kind(32)
    found, scores = index.search(np.ones((2, 32), np.float32), 3)
    assert len(index) == 0
    assert (found == NO_ITEM).all()
    assert np.isneginf(scores).all()
    index.add(np.zeros(0, np.int64), np.zeros((0, 32), np.float32))
    index.remove(np.zeros(0, np.int64))
    assert len(index) == 0


def test_adding_a_known_id_replaces_its_vector(kind, fill):
    made = fill(kind)
    moved, ids = -made.vectors[:10], made.ids[:10]
    made.index.add(ids, moved)
    assert len(made.index) == len(made.ids)
    found, scores = made.index.search(moved, K)
    assert (found[:, 0] == ids).all()
    np.testing.assert_allclose(scores[:, 0], 1, atol=2**-10)
    assert all(len(np.unique(row)) == K for row in found)
    found, _ = made.index.search(made.vectors[:10], K)
    assert not (found == ids[:, None]).any()  # where it was it is no longer


@pytest.mark.parametrize("seed", SEEDS)
def test_removed_items_never_come_back_until_they_are_added_again(kind, fill, seed):
    made = fill(kind, seed)
    before, _ = made.index.search(made.queries, K)
    half = len(made.ids) // 2
    made.index.remove(made.ids[:half])
    assert len(made.index) == half
    found, _ = made.index.search(np.concatenate([made.queries, made.vectors[:half]]), K)
    assert not np.isin(found, made.ids[:half]).any()
    truth, _ = best(made.ids[half:], made.vectors[half:], made.queries)
    assert ann_recall(found[: len(made.queries)], truth) >= 0.95
    made.index.add(made.ids[:half], made.vectors[:half])
    after, _ = made.index.search(made.queries, K)
    assert len(made.index) == len(made.ids)
    assert ann_recall(after, before) >= (1 if kind is Exact else 0.95)


def test_recall_holds_while_items_come_and_go(kind):
    items, share = 3000, 500
    vectors, queries = clustered_vectors(2 * items, 50, 32, seed=3)
    generator = np.random.default_rng(3)
    ids, live = generator.permutation(10 * items)[: 2 * items], np.arange(items)
    index = kind(32)
    index.add(ids[live], vectors[live])
    for start in range(items, 2 * items, share):
        out, new = generator.choice(live, share, replace=False), np.arange(start, start + share)
        index.remove(ids[out])
        index.add(ids[new], vectors[new])
        live = np.append(np.setdiff1d(live, out), new)
        found, _ = index.search(queries, K)
        assert ann_recall(found, best(ids[live], vectors[live], queries)[0]) >= 0.95
        assert np.isin(found, ids[live]).all()
    assert len(index) == items


def test_all_items_may_be_removed(kind, fill):
    made = fill(kind)
    made.index.remove(made.ids)
    assert len(made.index) == 0
    assert (made.index.search(made.queries, 3)[0] == NO_ITEM).all()
    made.index.add(made.ids[:500], made.vectors[:500])
    assert np.isin(made.index.search(made.queries, 3)[0], made.ids[:500]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index, ids, vectors: index.add(ids, vectors[:-1]), "3 ids and 2 vectors"),
        (lambda index, ids, vectors: index.add(ids[[0, 1, 1]], vectors), "item id 11 is given twice"),
        (lambda index, ids, vectors: index.add(np.array([1, -1, 2]), vectors), "item id -1 stands for no item"),
        (lambda index, ids, vectors: index.add(ids.astype(float), vectors), r"float64 of shape \[3\]"),
        (lambda index, ids, vectors: index.add(ids, vectors[:, :-1]), r"shape \[3, 31\]\n  hint: \[n, 32\]"),
        (lambda index, ids, vectors: index.add(ids, vectors * [[1], [np.nan], [1]]), "vectors: row 1 holds NaN"),
        (lambda index, ids, vectors: index.remove(np.array([10, 999])), "item id 999 is not in the index"),
        (lambda index, ids, vectors: index.remove(np.array([10, 10])), "item id 10 is given twice"),
        (lambda index, ids, vectors: index.search(vectors[:, :-1], 1), r"queries have shape \[3, 31\]"),
        (lambda index, ids, vectors: index.search(vectors * np.inf, 1), "queries: row 0 holds NaN or infinity"),
        (lambda index, ids, vectors: index.search(vectors, 0), "k is 0"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(kind, call, message):
    vectors, _ = clustered_vectors(300, 1, 32)
    index, ids = kind(32), np.arange(10, 310)
    index.add(ids, vectors)
    before = index.search(vectors, 5)
    with pytest.raises(UserError, match=message):
        call(index, ids[:3], vectors[:3])
    assert len(index) == 300
    for expected, got in zip(before, index.search(vectors, 5), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_ivf_pq_says_what_it_cannot_learn_from():
    vectors, _ = clustered_vectors(255, 1, 32)
    with pytest.raises(UserError, match="which brought 255"):
        IVFPQ(32).add(np.arange(255), vectors)
    with pytest.raises(UserError, match="vectors have 31"):
        IVFPQ(31)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_map_of_ids_agrees_with_a_dict(seed):
    generator = np.random.default_rng(seed)
    known: dict[int, int] = {}
    found = IdMap(np.zeros(0, np.int64), np.zeros(0, np.int64))
    for step in range(60):
        new = np.setdiff1d(generator.integers(-50, 50, 8), list(known))
        slots = generator.integers(0, 10**6, len(new))
        found.insert(new, slots)
        known |= dict(zip(new.tolist(), slots.tolist(), strict=True))
        some = generator.permutation(list(known))[:5]
        if step % 2:
            found.delete(some)
            known = {item: slot for item, slot in known.items() if item not in some}
        else:
            found.move(some, some + 7)
            known |= {item: item + 7 for item in some.tolist()}
        asked = np.arange(-60, 60)
        assert found.find(asked).tolist() == [known.get(item, -1) for item in asked.tolist()]
        assert len(found) == len(known)
