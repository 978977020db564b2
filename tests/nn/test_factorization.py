from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raysys.nn.factorization import BilinearFusion, CompressedInteractions, TokenScores, pairwise_products

B, M, D = 6, 5, 4


@pytest.fixture
def x():
    return torch.randn(B, M, D, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def test_pairwise_products_are_the_sum_over_pairs(x):
    expected = sum(x[:, i] * x[:, j] for i, j in itertools.combinations(range(M), 2))
    torch.testing.assert_close(pairwise_products(x), expected)
    dots = sum((x[:, i] * x[:, j]).sum(1) for i, j in itertools.combinations(range(M), 2))
    torch.testing.assert_close(pairwise_products(x).sum(1), dots)


def test_pairwise_products_of_one_token_are_zero(x):
    torch.testing.assert_close(pairwise_products(x[:, :1]), torch.zeros(B, D, dtype=torch.double))


def test_token_scores_are_linear_in_their_own_token(x):
    scores = TokenScores(M, D).double()
    torch.testing.assert_close(scores(x), torch.einsum("bmd,md->bm", x, scores.weight))
    changed = x.clone()
    changed[:, 2] += 1
    assert (scores(changed) != scores(x)).any(0).tolist() == [False, False, True, False, False]


def cin_by_loops(x, weights):
    """The paper's formula, one number after another; weights [H', H, m] of each layer."""
    maps, sums = x, []
    for weight in weights:
        after = torch.zeros(len(x), len(weight), D, dtype=torch.double)
        for h, i, j in itertools.product(*(range(n) for n in weight.shape)):
            after[:, h] += weight[h, i, j] * maps[:, i] * x[:, j]
        maps = after
        sums.append(maps.sum(2))
    return torch.cat(sums, 1)


@pytest.mark.parametrize("maps", [(3,), (3, 2), (2, 4, 3)])
def test_cin_equals_its_formula(x, maps):
    cin = CompressedInteractions(M, maps).double()
    weights = [layer.weight.unflatten(1, (-1, M)) for layer in cin.layers]
    assert cin.out_features == sum(maps)
    torch.testing.assert_close(cin(x), cin_by_loops(x, weights))


def test_layer_k_of_a_cin_is_homogeneous_of_degree_k_plus_one(x):
    cin = CompressedInteractions(M, (3, 2, 4)).double()
    degrees = torch.tensor([2, 2, 2, 3, 3, 4, 4, 4, 4])
    torch.testing.assert_close(cin(3 * x), 3.0**degrees * cin(x))


def test_a_cin_of_one_map_of_ones_is_the_factorisation_machine(x):
    """Σ_ij ⟨x_i, x_j⟩ is twice the sum over pairs and the squared norms: the paper's remark on FM."""
    cin = CompressedInteractions(M, (1,)).double()
    torch.nn.init.ones_(cin.layers[0].weight)
    expected = 2 * pairwise_products(x).sum(1) + x.square().sum((1, 2))
    torch.testing.assert_close(cin(x)[:, 0], expected)


def test_number_of_parameters_of_a_cin():
    cin = CompressedInteractions(M, (3, 2, 4))
    assert sum(p.numel() for p in cin.parameters()) == 3 * M * M + 2 * 3 * M + 4 * 2 * M


def test_the_last_layer_of_a_cin_does_not_make_its_maps(x):
    with FlopCounterMode(display=False) as counter:
        CompressedInteractions(M, (3, 2)).double()(x)
    assert counter.get_total_flops() == 2 * B * (D * M * M * 3 + D * 3 * M + 3 * M * 2)


@pytest.mark.parametrize(("heads", "outputs"), [(1, 1), (2, 1), (2, 3), (4, 2)])
def test_bilinear_fusion_equals_its_formula(heads, outputs):
    u, v = torch.randn(B, 8, dtype=torch.double), torch.randn(B, 4, dtype=torch.double)
    fusion = BilinearFusion(8, 4, heads, outputs).double()
    expected = torch.zeros(B, outputs, dtype=torch.double)
    for b, t, h in itertools.product(range(B), range(outputs), range(heads)):
        parts = u[b].chunk(heads)[h], v[b].chunk(heads)[h]
        expected[b, t] += parts[0] @ fusion.weight[h, :, t] @ parts[1]
    torch.testing.assert_close(fusion(u, v), expected)
    assert fusion.weight.numel() == outputs * 8 * 4 // heads
    torch.testing.assert_close(fusion(2 * u, 3 * v), 6 * fusion(u, v))
