from __future__ import annotations

import numpy as np
import pytest
import torch

from raysys.errors import UserError
from raysys.models.retrieval.hsnn import HSNN
from raysys.models.retrieval.indexes.hierarchical import Hierarchical, volatility
from raysys.schema import Catalogue, DenseFeature, FeatureSchema, Label, SparseFeature, Table

ITEMS, WIDTH, NODES = 500, 8, (6, 4)


def make_model(seed):
    schema = FeatureSchema(
        tables=(Table("user", 20, 8), Table("item", 20, 8)),
        dense=(DenseFeature("x", "item"),),
        sparse=(SparseFeature("user", "user", "user"), SparseFeature("item", "item", "item")),
        labels=(Label("click"),),
        catalogue=Catalogue("item"),
    )
    return HSNN(
        schema, nodes=NODES, embedding_dim=8, deep=[8], width=WIDTH, hidden=[8, 4], bottom=[4], seed=seed
    ).eval()


@pytest.fixture(params=[0, 1, 2])
def parts(request):
    """A model with nodes on its items, ids and vectors of the items, and 9 users."""
    model, generator = make_model(request.param), torch.Generator().manual_seed(request.param)
    vectors = torch.nn.functional.normalize(torch.randn(ITEMS, WIDTH, generator=generator), dim=1)
    users = torch.nn.functional.normalize(torch.randn(9, WIDTH, generator=generator), dim=1)
    model.quantizer.place(vectors, generator)
    ids = np.random.default_rng(request.param).permutation(10 * ITEMS)[:ITEMS]
    return model, ids, vectors.numpy(), users.numpy()


def build(parts, beams=NODES, budget=None):
    model, ids, vectors, _ = parts
    index = Hierarchical(model, beams=beams, budget=budget)
    index.add(ids, vectors)
    return index


def exhaustive(parts, k):
    model, ids, vectors, users = parts
    with torch.inference_mode():
        scores = model.score(torch.from_numpy(users), torch.from_numpy(vectors))
    best = scores.topk(k, 1)
    return ids[best.indices.numpy()], best.values.numpy()


def state(index):
    return [index._ids, index._vectors.numpy(), index._codes, *(level.first for level in index._levels)]


def test_a_beam_of_all_nodes_finds_what_scoring_everything_finds(parts):
    index = build(parts, beams=(NODES[0], NODES[0] * NODES[1]))
    found = index.beam(parts[3], 20)
    ids, scores = exhaustive(parts, 20)
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    clear = np.abs(np.diff(scores, axis=1)).min(1) > 1e-4
    assert clear.any()
    np.testing.assert_array_equal(found.ids[clear], ids[clear])
    assert (found.scored == sum(len(level.path) for level in index._levels) + ITEMS).all()


def test_recall_does_not_fall_as_beams_widen(parts):
    wanted, recalls = exhaustive(parts, 20)[0], []
    for width in (1, 2, 4, 6):
        found = build(parts, beams=(width, 24)).beam(parts[3], 20)
        recalls.append([len(np.intersect1d(a, b)) for a, b in zip(found.ids, wanted, strict=True)])
    assert (np.diff(recalls, axis=0) >= 0).all()
    assert np.sum(recalls[0]) < np.sum(recalls[-1]) == wanted.size


def test_narrow_beams_score_what_they_say(parts):
    index = build(parts, beams=(2, 3))
    model, _, _, users = parts
    found = index.beam(users, 5)
    with torch.inference_mode():
        scores = model.score_level(torch.from_numpy(users), index._levels[0].vectors, 1).numpy()
    for row, best in enumerate(np.argsort(-scores, 1)[:, :2]):
        children = np.concatenate([np.arange(*index._levels[0].first[node : node + 2]) for node in best])
        with torch.inference_mode():
            second = model.score_level(torch.from_numpy(users[row : row + 1]), index._levels[1].vectors[children], 2)
        leaves = children[np.argsort(-second[0].numpy())[:3]]
        items = np.concatenate([np.arange(*index._levels[1].first[leaf : leaf + 2]) for leaf in leaves])
        assert found.scored[row] == len(index._levels[0].path) + len(children) + len(items)
        assert set(found.ids[row]) - {-1} <= set(index._ids[items])


def test_a_budget_takes_leaves_in_the_order_of_their_scores(parts):
    whole, some = build(parts), build(parts, budget=30)
    a, b = whole.beam(parts[3], 10), some.beam(parts[3], 10)
    assert (b.scored <= a.scored).all()
    assert (b.scored < a.scored).any()
    assert (some.search(parts[3], ITEMS)[0] >= 0).sum(1).max() == 30
    assert (b.scores[:, 0] <= a.scores[:, 0] + 1e-5).all()


def test_every_item_has_one_path_and_no_node_is_empty(parts):
    index = build(parts)
    assert sorted(index._ids) == sorted(parts[1])
    for level, below in zip(index._levels, [len(index._levels[1].path), ITEMS], strict=True):
        assert (np.diff(level.first) > 0).all()
        assert (level.first[0], level.first[-1]) == (0, below)


def test_adding_and_removing_restores_the_index(parts):
    index = build(parts)
    before = [part.copy() for part in state(index)]
    new = np.random.default_rng(5).normal(size=(30, WIDTH)).astype(np.float32)
    index.add(np.arange(100_000, 100_030), new)
    assert len(index) == ITEMS + 30
    index.remove(np.arange(100_000, 100_030)[::-1])
    for a, b in zip(before, state(index), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_new_item_is_found_at_once(parts):
    index, (model, _, _, users) = build(parts), parts
    wide = Hierarchical(model, beams=(NODES[0], 24))
    wide.add(index._ids, index._vectors.numpy())
    with torch.inference_mode():
        gradient_free = model.score(torch.from_numpy(users), torch.from_numpy(users)).numpy().diagonal()
    wide.add(np.array([10**9]), users[:1])
    assert 10**9 in wide.search(users[:1], ITEMS)[0]
    assert gradient_free[0] == pytest.approx(
        wide.search(users[:1], ITEMS + 1)[1][wide.search(users[:1], ITEMS + 1)[0] == 10**9][0], abs=1e-4
    )


def test_adding_an_item_that_is_there_replaces_it(parts):
    index = build(parts)
    index.add(parts[1][:1], parts[2][1:2])
    assert len(index) == ITEMS
    np.testing.assert_array_equal(index._vectors[np.flatnonzero(index._ids == parts[1][0])[0]], parts[2][1])


def test_an_empty_index_finds_nothing(parts):
    ids, scores = Hierarchical(parts[0], beams=NODES).search(parts[3], 4)
    assert (ids == -1).all()
    assert (scores == -np.inf).all()


def test_save_and_load_with_its_model_only(parts, tmp_path):
    index = build(parts, beams=(3, 5), budget=100)
    index.save(tmp_path / "index")
    loaded = Hierarchical.load(tmp_path / "index", model=parts[0])
    assert (loaded.beams, loaded.budget) == ((3, 5), 100)
    for a, b in zip(index.search(parts[3], 7), loaded.search(parts[3], 7), strict=True):
        np.testing.assert_array_equal(a, b)
    other = make_model(9)
    other.quantizer.place(torch.from_numpy(parts[2]), torch.Generator().manual_seed(9))
    with pytest.raises(UserError, match="not of this model"):
        Hierarchical.load(tmp_path / "index", model=other)


def test_volatility_is_the_share_of_items_whose_node_changed(parts):
    index, same = build(parts), build(parts)
    assert volatility(index, same) == [0, 0]
    moved = np.roll(parts[2], 1, axis=0)
    same.add(parts[1][:100], moved[:100])
    codes = {int(i): c for i, c in zip(index.codes()["ids"], index.codes()["codes"], strict=True)}
    expected = np.mean([codes[int(i)] != c for i, c in zip(same.codes()["ids"], same.codes()["codes"], strict=True)], 0)
    np.testing.assert_allclose(volatility(index, same), expected)
    assert max(expected) <= 0.2


@pytest.mark.parametrize(
    ("beams", "budget", "message"), [((4,), None, "beams is"), ((0, 4), None, "beams is"), (NODES, 0, "budget is 0")]
)
def test_wrong_settings_are_refused(parts, beams, budget, message):
    with pytest.raises(UserError, match=message):
        Hierarchical(parts[0], beams=beams, budget=budget)


def test_scores_of_shared_and_of_own_candidates_agree(parts):
    model, _, vectors, users = parts
    users, vectors = torch.from_numpy(users), torch.from_numpy(vectors)
    for level in range(3):
        shared = model.score_level(users, vectors, level)
        own = model.score_own(users, vectors.expand(len(users), -1, -1), level)
        torch.testing.assert_close(shared, own, atol=1e-5, rtol=1e-5)
