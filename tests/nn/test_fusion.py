"""The fusion of several models' predictions, and the distance between them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from raysys.nn.fusion import (
    confidence_log_weights,
    fuse,
    negation_entropy,
    peer_distance,
    peer_divergence,
)

TEMPERATURES = (0.01, 0.3, 1.0, 3.0, 100.0)


def random_logits(*shape: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(z: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of Bernoulli distributions with these logits, by its definition with logarithms."""
    p, q = z.sigmoid(), other.sigmoid()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def pair_divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """J of two models."""
    logits = torch.stack([first, second], -1)
    return peer_divergence(logits.sigmoid(), logits)


def test_confidence_is_the_negation_entropy_within_its_bounds():
    logits = random_logits(1000)
    p = logits.sigmoid()
    found = negation_entropy(logits)
    torch.testing.assert_close(found, p * p.log() + (1 - p) * (1 - p).log(), atol=1e-12, rtol=1e-9)
    assert (found <= 0).all()
    assert (found >= -math.log(2)).all()
    assert negation_entropy(torch.zeros(1)).item() == pytest.approx(-math.log(2))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("models", [1, 2, 5])
def test_weights_sum_to_one_follow_permutations_and_are_equal_for_equal_logits(models, temperature):
    logits = random_logits(50, models)
    log_weights = confidence_log_weights(logits, temperature)
    weights = log_weights.exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(50, dtype=torch.float64))
    assert (weights >= 0).all()
    order = torch.randperm(models, generator=torch.Generator().manual_seed(1))
    permuted = confidence_log_weights(logits[:, order], temperature)
    torch.testing.assert_close(permuted, log_weights[:, order])
    torch.testing.assert_close(fuse(logits[:, order], permuted), fuse(logits, log_weights))
    equal = confidence_log_weights(logits[:, :1].expand(-1, models), temperature).exp()
    torch.testing.assert_close(equal, torch.full_like(equal, 1 / models))


def test_weights_depend_on_the_size_of_the_logits_only_and_never_fall_with_it():
    logits = random_logits(200, 3)
    signs = torch.randint(0, 2, logits.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(confidence_log_weights(signs * logits), confidence_log_weights(logits))
    torch.testing.assert_close((-logits).sigmoid(), 1 - logits.sigmoid())
    sizes = torch.linspace(0, 100, 2001)
    others = torch.tensor([0.5, -2.0]).expand(2001, 2)
    weight = confidence_log_weights(torch.cat([sizes[:, None], others], 1))[:, 0]
    assert (weight.diff() >= 0).all()


@pytest.mark.parametrize("models", [2, 3, 10])
def test_at_temperature_one_no_weight_exceeds_two_over_models_plus_one(models):
    extreme = torch.zeros(1, models)
    extreme[0, 0] = 80.0
    torch.testing.assert_close(confidence_log_weights(extreme).exp().max(), torch.tensor(2 / (models + 1)))
    assert confidence_log_weights(random_logits(500, models, scale=20)).exp().max() <= 2 / (models + 1) + 1e-12


def test_limits_of_the_temperature_and_bounds_of_the_fused_probability():
    logits = random_logits(200, 4)
    p = logits.sigmoid()
    hot = fuse(logits, confidence_log_weights(logits, 1e9)).sigmoid()
    torch.testing.assert_close(hot, p.mean(1), rtol=1e-7, atol=0)
    surest = logits.gather(1, logits.abs().argmax(1, keepdim=True))[:, 0]
    cold = fuse(logits, confidence_log_weights(logits, 1e-9))
    torch.testing.assert_close(cold, surest)
    for temperature in TEMPERATURES:
        fused = fuse(logits, confidence_log_weights(logits, temperature)).sigmoid()
        assert (fused >= p.min(1).values - 1e-12).all()
        assert (fused <= p.max(1).values + 1e-12).all()


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.0490), (0.1, 0.0157)])
def test_below_one_half_fusion_is_biased_downwards(temperature, expected):
    logits = torch.tensor([[0.01, 0.10]]).logit()
    log_weights = confidence_log_weights(logits, temperature)
    assert fuse(logits, log_weights).sigmoid().item() == pytest.approx(expected, abs=5e-5)
    if temperature == 1:
        assert log_weights.exp()[0].tolist() == pytest.approx([0.567, 0.433], abs=5e-4)
        assert logits.sigmoid().mean().item() == pytest.approx(0.055)  # the plain mean


def test_fused_logits_are_those_of_the_weighted_probabilities_with_their_gradient():
    logits = random_logits(100, 3).requires_grad_()
    log_weights = confidence_log_weights(logits)
    fused = fuse(logits, log_weights)
    p = (log_weights.exp() * logits.sigmoid()).sum(1)
    torch.testing.assert_close(fused.sigmoid(), p, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(fused.sum(), logits, retain_graph=True), torch.autograd.grad(p.logit().sum(), logits)
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_one_model_is_itself_bit_for_bit(temperature):
    logits = random_logits(50, 1).float().requires_grad_()
    log_weights = confidence_log_weights(logits, temperature)
    fused = fuse(logits, log_weights)
    assert torch.equal(log_weights, torch.zeros(50, 1))
    assert torch.equal(fused, logits[:, 0])
    assert torch.equal(torch.autograd.grad(fused.sum(), logits)[0], torch.ones(50, 1))
    assert torch.equal(peer_divergence(logits.sigmoid(), logits), torch.zeros(50))
    assert torch.equal(peer_distance(logits), torch.zeros(50))


def test_the_divergence_of_a_pair_is_symmetric_kl_and_zero_for_equal_logits_alone():
    first, second = random_logits(500), random_logits(500, seed=1)
    found = pair_divergence(first, second)
    torch.testing.assert_close(found, 0.5 * (kl(first, second) + kl(second, first)), atol=1e-6, rtol=1e-6)
    assert (found > 0).all()
    assert torch.equal(found, pair_divergence(second, first))
    assert torch.equal(pair_divergence(first, first), torch.zeros(500, dtype=torch.float64))


def test_the_gradient_of_the_pair_is_the_sum_of_both_with_the_peer_detached():
    first, second = random_logits(100).requires_grad_(), random_logits(100, seed=1).requires_grad_()

    def half(z, peer):
        return 0.5 * (kl(z, peer.detach()) + kl(peer.detach(), z)).sum()

    joint = torch.autograd.grad(pair_divergence(first, second).sum(), (first, second))
    torch.testing.assert_close(joint, torch.autograd.grad(half(first, second) + half(second, first), (first, second)))
    p, q = first.detach().sigmoid(), second.detach().sigmoid()
    torch.testing.assert_close(joint[0], 0.5 * ((p - q) + p * (1 - p) * (first - second).detach()))


@pytest.mark.parametrize("models", [2, 3, 6])
def test_peer_terms_are_means_over_all_pairs(models):
    logits = random_logits(100, models).requires_grad_()
    pairs = [(logits[:, i], logits[:, j]) for i in range(models) for j in range(i)]
    expected = torch.stack([0.5 * (kl(z, other) + kl(other, z)) for z, other in pairs]).mean(0)
    found = peer_divergence(logits.sigmoid(), logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), logits), torch.autograd.grad(expected.sum(), logits))
    distance = torch.stack([(z - other).abs() for z, other in pairs]).mean(0)
    torch.testing.assert_close(peer_distance(logits), distance)
    gaussian = torch.stack([0.5 * (z - other).square() for z, other in pairs]).mean(0)
    torch.testing.assert_close(peer_divergence(logits, logits), gaussian)


def test_everything_is_finite_in_single_precision_up_to_100():
    grid = torch.linspace(-100, 100, 41)
    logits = torch.cartesian_prod(grid, grid).requires_grad_()
    for temperature in TEMPERATURES:
        log_weights = confidence_log_weights(logits, temperature)
        fused = fuse(logits, log_weights)
        losses = F.binary_cross_entropy_with_logits(fused, torch.ones_like(fused)) + F.softplus(fused).mean()
        total = losses + peer_divergence(logits.sigmoid(), logits).mean()
        gradient = torch.autograd.grad(total + negation_entropy(logits).mean(), logits)[0]
        for value in (log_weights, fused, total, gradient):
            assert value.isfinite().all()
