"""What is asked of a hierarchy: k-means after training, the use of nodes, and what hard assignment costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysys.models.retrieval.hierarchy import disjoint, exhaustive, soft_and_hard_auc, usage
from raysys.models.retrieval.indexes.hierarchical import Hierarchical

ITEMS, WIDTH, NODES = 600, 8, (6, 4)


@pytest.fixture(params=[0, 1, 2])
def parts(request, make_hsnn):
    """A model with nodes on its items, their vectors, and users."""
    return make_hsnn(NODES, ITEMS, 40, request.param)


def indexed(model, items):
    index = Hierarchical(model, beams=(6, 24))
    index.add(np.arange(len(items)), items.numpy())
    return index


def test_exhaustive_is_the_order_of_all_scores(parts):
    model, items, users = parts
    with torch.inference_mode():
        scores = model.score(users, items)
    np.testing.assert_array_equal(exhaustive(model, users, items, 9), scores.topk(9, 1).indices.numpy())
    assert exhaustive(model, users, items[:5], 9).shape == (40, 5)


def test_k_means_after_training_explains_more_and_leaves_the_model_as_it_was(parts):
    model, items, _ = parts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = disjoint(model, items, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    left, left_before = (m.quantizer(items, None)[-1].partial.sub(items).square().sum() for m in (made, model))
    assert left < 0.95 * left_before
    assert all(scorer is made.scorers[0] for scorer in made.scorers)
    kept = disjoint(model, items, 0, trained_levels=True)
    assert torch.equal(kept.quantizer.nodes[1], made.quantizer.nodes[1])
    assert torch.equal(kept.scorers[1].of_user.weight, model.scorers[1].of_user.weight)


def test_usage_counts_nodes_that_are_used_evenly(parts):
    model, _, _ = parts
    corners = torch.eye(WIDTH)[:6]
    with torch.no_grad():
        model.quantizer.nodes[0].copy_(10 * corners)
        model.quantizer.nodes[1].zero_()
    even = indexed(model, 10 * corners.repeat(7, 1))
    assert usage(even) == pytest.approx([6, 1])
    one = indexed(model, 10 * corners[:1].repeat(7, 1))
    assert usage(one) == pytest.approx([1, 1])


def test_soft_and_hard_agree_when_cold_and_hard_does_not_heat(parts):
    model, items, users = parts
    own, others = items[:40], items[100:400]
    cold, warm = (soft_and_hard_auc(model, users, own, others, value) for value in (1e-6, 2.0))
    for (soft, hard), (warm_soft, warm_hard) in zip(cold, warm, strict=True):
        assert soft == pytest.approx(hard, abs=1e-4)
        assert hard == warm_hard
        assert abs(warm_soft - warm_hard) > 1e-4
        assert 0 < soft < 1


def test_auc_is_of_pairs(parts):
    """With nodes on every item the hard pseudo-items are the items."""
    model, items, users = parts
    few = items[:10]
    with torch.no_grad():
        model.quantizer.nodes[0] = torch.nn.Parameter(few.clone())
        own = model.score_level(users[:4], few, 1)[torch.arange(4), torch.arange(4)]
        others = model.score_level(users[:4], few[4:], 1)
    expected = (own[:, None] > others).float().mean()
    assert soft_and_hard_auc(model, users[:4], few[:4], few[4:], 1.0)[0][1] == pytest.approx(float(expected), abs=0.03)
