from __future__ import annotations

import pytest
import torch

from raysys.errors import UserError
from raysys.nn.residual_nodes import ResidualNodes, perplexity, squared_distances, usage_penalty

SEEDS = (0, 1, 2)


@pytest.fixture(params=SEEDS)
def placed(request):
    """Nodes on clustered vectors, and the vectors [600, 8]."""
    generator = torch.Generator().manual_seed(request.param)
    centres = torch.randn(12, 8, generator=generator)
    vectors = centres[torch.randint(12, (600,), generator=generator)] + 0.1 * torch.randn(600, 8, generator=generator)
    nodes = ResidualNodes([12, 6], 8)
    nodes.place(vectors, generator)
    nodes.fit(vectors)
    return nodes, vectors


@pytest.mark.parametrize("temperature", [1.0, 0.05, None])
def test_a_vector_is_what_its_levels_explain_and_what_is_left(placed, temperature):
    nodes, vectors = placed
    levels = nodes(vectors, temperature)
    left = levels[-1].residual - levels[-1].weights @ nodes.nodes[-1]
    torch.testing.assert_close(levels[-1].partial + left, vectors, atol=1e-5, rtol=0)


def test_residuals_shrink_with_the_level(placed):
    nodes, vectors = placed
    levels = nodes(vectors, None)
    left = levels[1].residual - levels[1].weights @ nodes.nodes[1]
    norms = [part.norm(dim=1).mean() for part in (levels[0].residual, levels[1].residual, left)]
    assert norms[0] > norms[1] > norms[2]


def test_soft_assignment_becomes_the_hard_one_as_the_temperature_falls(placed):
    nodes, vectors = placed
    hard = nodes(vectors, None)
    distances = [
        (nodes(vectors, temperature)[-1].partial - hard[-1].partial).norm(dim=1).mean()
        for temperature in (1.0, 0.3, 0.05, 1e-5)
    ]
    assert distances[0] > distances[1] > distances[2]
    weights = nodes(vectors, 1e-5)[0].weights
    clear = squared_distances(vectors, nodes.nodes[0]).topk(2, largest=False).values.diff(dim=1)[:, 0] > 0.01
    assert clear.any()
    torch.testing.assert_close(weights[clear], hard[0].weights[clear])


def test_hard_assignment_codes_and_pseudo_items_agree(placed):
    nodes, vectors = placed
    levels, codes = nodes(vectors, None), nodes.codes(vectors)
    for level, assignment in enumerate(levels, 1):
        assert torch.equal(assignment.weights.argmax(1), codes[:, level - 1])
        torch.testing.assert_close(nodes.pseudo_items(codes[:, :level]), assignment.partial)


def test_weights_follow_the_closed_form(placed):
    nodes, vectors = placed
    distance = (vectors[:, None].double() - nodes.nodes[0].double()).square().sum(2)
    expected = (-distance / (0.2 * nodes.scale[0].double())).softmax(1)
    torch.testing.assert_close(nodes(vectors, 0.2)[0].weights.double(), expected, atol=1e-4, rtol=0)


def test_the_penalty_is_least_for_even_use_and_1_for_a_collapse():
    even, collapsed = torch.eye(5).repeat(4, 1), torch.eye(5)[:1].repeat(20, 1)
    assert float(usage_penalty(even)) == pytest.approx(1 / 5)
    assert float(usage_penalty(collapsed)) == 1
    assert float(usage_penalty(torch.full((7, 5), 0.2))) == pytest.approx(1 / 5)  # soft everywhere is even, too
    for seed in SEEDS:
        mixed = torch.rand(20, 5, generator=torch.Generator().manual_seed(seed)).softmax(1)
        assert 1 / 5 <= float(usage_penalty(mixed)) <= 1
    assert float(perplexity(even)) == pytest.approx(5)
    assert float(perplexity(collapsed)) == pytest.approx(1)


def test_idle_nodes_are_those_that_are_nearest_to_too_few(placed):
    nodes, vectors = placed
    for _ in range(200):
        nodes.track(nodes(vectors[:1], None))  # all of the use goes to one node
    code = int(nodes.codes(vectors[:1])[0, 0])
    assert nodes.idle(0, 0.1).tolist() == [node for node in range(12) if node != code]


def test_fitting_keeps_the_numbers_of_nodes_where_vectors_stay(placed):
    nodes, vectors = placed
    before = nodes.codes(vectors)
    nodes.fit(vectors)
    assert (nodes.codes(vectors)[:, 0] == before[:, 0]).float().mean() > 0.99


@pytest.mark.parametrize("sizes", [[], [1, 4]])
def test_too_few_nodes_are_refused(sizes):
    with pytest.raises(UserError, match="nodes is"):
        ResidualNodes(sizes, 4)
