"""The rules on Gram matrices against closed forms and against projected gradient in float64."""

import itertools

import numpy as np
import pytest
import torch

from raysys.objectives import rules

EVERY = torch.ones(3, dtype=torch.bool)


def gram_of(gradients):
    return gradients @ gradients.T


def random_gradients(seed, tasks, width, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-spread, 0, tasks, dtype=torch.float64)[:, None]
    return torch.randn(tasks, width, generator=generator, dtype=torch.float64) * scales


def min_norm(gram):
    return rules.min_norm(gram, torch.ones(len(gram), dtype=torch.bool))


def reference(gram, steps=20_000):
    """Projected gradient on the simplex, in NumPy."""
    gram = gram.numpy()
    weights, step = np.full(len(gram), 1 / len(gram)), 1 / np.linalg.norm(gram, 2)
    for _ in range(steps):
        point = weights - step * gram @ weights
        ordered = np.sort(point)[::-1]
        shifts = (np.cumsum(ordered) - 1) / np.arange(1, len(gram) + 1)
        weights = np.maximum(point - shifts[np.nonzero(ordered > shifts)[0][-1]], 0)
    return torch.tensor(weights)


@pytest.mark.parametrize(
    ("gram", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),
        ([[1.0, 0.9], [0.9, 4.0]], [0.96875, 0.03125]),
        ([[1.0, 0, 0], [0, 4.0, 0], [0, 0, 16.0]], [16 / 21, 4 / 21, 1 / 21]),
        ([[1.0, -1.0], [-1.0, 1.0]], [0.5, 0.5]),
        ([[1.0, 2.0], [2.0, 9.0]], [1.0, 0.0]),
        ([[0.0, 0.0], [0.0, 3.0]], [1.0, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.5, 0.5]),
    ],
)
def test_min_norm_closed_forms(gram, expected):
    weights = min_norm(torch.tensor(gram, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def test_min_norm_of_two_tasks_is_the_clipped_formula():
    for seed in range(50):
        gradients = random_gradients(seed, 2, 3)
        first, second = gradients
        expected = ((second - first) @ second / (first - second).square().sum()).clamp(0, 1)
        assert float(min_norm(gram_of(gradients))[0]) == pytest.approx(float(expected), abs=1e-8)


@pytest.mark.parametrize(("tasks", "width"), [(3, 2), (3, 8), (5, 3), (5, 20), (7, 4), (7, 20), (9, 12)])
def test_min_norm_is_as_short_as_projected_gradient_finds(tasks, width):
    gram = gram_of(random_gradients(tasks + width, tasks, width, spread=0.5))
    weights, expected = min_norm(gram), reference(gram)
    assert float(weights.min()) >= 0
    assert float(weights.sum()) == pytest.approx(1, abs=1e-9)
    assert float(weights @ gram @ weights) == pytest.approx(float(expected @ gram @ expected), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("tasks", [2, 3, 7, 9])
def test_min_norm_descends_for_every_task(tasks):
    for seed in range(10):
        gradients = random_gradients(seed, tasks, 2 * tasks)
        direction = min_norm(gram_of(gradients)) @ gradients
        squared = float(direction @ direction)
        precision = 1e-6 if tasks <= 8 else 1e-4  # beyond 8 tasks it is iterated
        assert float((gradients @ direction).min()) >= squared * (1 - precision) - 1e-9
        assert squared > 0


def test_min_norm_where_a_task_has_no_gradient_is_zero():
    gradients = random_gradients(0, 4, 6)
    gradients[2] = 0
    direction = min_norm(gram_of(gradients)) @ gradients
    assert float(direction.norm()) < 1e-8


def test_min_norm_leaves_inactive_tasks_out():
    gradients = random_gradients(1, 3, 5)
    gradients[1] = 0
    active = torch.tensor([True, False, True])
    weights = rules.min_norm(gram_of(gradients), active)
    assert float(weights[1]) == 0
    torch.testing.assert_close(weights[active], min_norm(gram_of(gradients[active])), rtol=0, atol=1e-9)
    assert rules.min_norm(torch.zeros(3, 3, dtype=torch.float64), ~EVERY).tolist() == [0, 0, 0]


def test_projection_onto_the_simplex():
    one = torch.tensor(1.0)
    assert rules.project_simplex(torch.tensor([0.5, 0.3, 0.2]), EVERY, one).tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert rules.project_simplex(torch.tensor([2.0, 0.0, -1.0]), EVERY, one).tolist() == [1, 0, 0]
    masked = rules.project_simplex(torch.tensor([9.0, 1.0, 1.5]), torch.tensor([False, True, True]), one / 2)
    assert masked.tolist() == [0, 0, 0.5]


def test_moco_without_noise_converges_to_min_norm():
    gram = gram_of(random_gradients(3, 3, 4, spread=0.3))
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    for _ in range(3000):
        weights = rules.moco_step(weights, gram, EVERY, gamma=0.1, rho=0.0)
        assert float(weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(weights, min_norm(gram), rtol=0, atol=1e-6)


def test_moco_keeps_the_share_of_a_task_that_is_not_there():
    weights, active = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([True, False, True])
    gram = torch.diag(torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64))
    moved = rules.moco_step(weights, gram, active, gamma=0.1, rho=0.0)
    assert float(moved[1]) == 0.5
    assert float(moved.sum()) == pytest.approx(1)
    assert float(moved[0]) > 0.2


def pcgrad_by_hand(gradients, order):
    """Yu et al.'s algorithm on the vectors."""
    total = torch.zeros_like(gradients[0])
    for task, others in enumerate(order.tolist()):
        part = gradients[task].clone()
        for other in others:
            if other != task and part @ gradients[other] < 0:
                part -= part @ gradients[other] / gradients[other].square().sum() * gradients[other]
        total += part
    return total


def test_pcgrad_is_the_algorithm_on_vectors():
    for seed, tasks in itertools.product(range(5), (2, 3, 5)):
        gradients = random_gradients(seed, tasks, 3)
        order = rules.random_orders(torch.tensor(seed), tasks, seed=0)
        weights = rules.pcgrad(gram_of(gradients), order)
        torch.testing.assert_close(weights @ gradients, pcgrad_by_hand(gradients, order))


def test_pcgrad_without_conflict_is_the_sum_and_of_opposites_zero():
    order = rules.random_orders(torch.tensor(0), 2, seed=0)
    agreeing = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    assert rules.pcgrad(gram_of(agreeing), order).tolist() == [1, 1]
    opposite = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    assert (rules.pcgrad(gram_of(opposite), order) @ opposite).abs().max() < 1e-12
    for seed in range(20):
        gradients = random_gradients(seed, 2, 2)
        assert float((gradients @ (rules.pcgrad(gram_of(gradients), order) @ gradients)).min()) >= -1e-12


def test_random_orders_are_permutations_that_change():
    orders = [rules.random_orders(torch.tensor(step), 4, seed=1) for step in range(50)]
    assert all(sorted(row) == [0, 1, 2, 3] for order in orders for row in order.tolist())
    assert len({tuple(row) for order in orders for row in order.tolist()}) == 24
    assert torch.equal(orders[3], rules.random_orders(torch.tensor(3), 4, seed=1))
    assert not torch.equal(orders[3], rules.random_orders(torch.tensor(3), 4, seed=2))


def test_gradnorm_weights_converge_to_equal_norms():
    weights, norms = torch.ones(2, dtype=torch.float64), torch.tensor([1.0, 10.0], dtype=torch.float64)
    for step in range(2000):
        weights = rules.gradnorm_step(weights, norms, torch.ones(2), EVERY[:2], alpha=0.0, rate=0.1 / (1 + step) ** 0.5)
        assert float(weights.min()) > 0
        assert float(weights.sum()) == pytest.approx(2)
    assert weights.tolist() == pytest.approx([20 / 11, 2 / 11], abs=0.01)


def test_gradnorm_favours_the_task_that_learns_slowly():
    weights, norms = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for step in range(2000):
        rates = torch.tensor([0.9, 0.3], dtype=torch.float64)
        weights = rules.gradnorm_step(weights, norms, rates, EVERY[:2], alpha=1.0, rate=0.1 / (1 + step) ** 0.5)
    assert weights.tolist() == pytest.approx([1.5, 0.5], abs=0.01)  # mean · r, r = (1.5, 0.5)
