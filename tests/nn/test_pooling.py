from __future__ import annotations

import pytest
import torch

from raysys.nn.jagged import length_mask
from raysys.nn.pooling import AttentionPool, mean_pool

MASK = length_mask(torch.tensor([3, 0, 1, 4]), 4)


@pytest.fixture
def sequence():
    return torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["mean", "attention", "target"])
def pooling(request, sequence):
    """A function of (sequence, mask); the attention has a random query."""
    if request.param == "mean":
        return mean_pool
    pool = AttentionPool(6, with_target=request.param == "target")
    torch.nn.init.normal_(pool.query)
    target = torch.randn(4, 6) if request.param == "target" else None
    return lambda values, mask: pool(values, mask, target)


def test_content_of_padding_does_not_matter(pooling, sequence):
    other = sequence.masked_fill(~MASK[:, :, None], 1e6)
    assert torch.equal(pooling(sequence, MASK), pooling(other, MASK))


def test_an_empty_sequence_gives_zeros_and_finite_gradients(pooling, sequence):
    sequence.requires_grad_()
    pooled = pooling(sequence, MASK)
    assert torch.equal(pooled[1], torch.zeros(6))
    pooled.square().sum().backward()
    assert sequence.grad.isfinite().all()
    assert torch.equal(sequence.grad[~MASK], torch.zeros_like(sequence.grad[~MASK]))


def test_order_of_events_does_not_matter(pooling, sequence):
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(pooling(sequence[:, order], MASK[:, order]), pooling(sequence, MASK))


def test_one_event_is_taken_as_it_is(pooling, sequence):
    torch.testing.assert_close(pooling(sequence, MASK)[2], sequence[2, 0])


def test_mean(sequence):
    torch.testing.assert_close(mean_pool(sequence, MASK)[0], sequence[0, :3].mean(0))


def test_attention_without_target_starts_as_the_mean(sequence):
    torch.testing.assert_close(AttentionPool(6, with_target=False)(sequence, MASK), mean_pool(sequence, MASK))


def test_attention_equals_softmax_of_dot_products(sequence):
    pool = AttentionPool(6)
    torch.nn.init.normal_(pool.query)
    torch.nn.init.normal_(pool.target.weight)
    target = torch.randn(4, 6)
    query = pool.query + pool.target.weight @ target[0]
    weights = (sequence[0, :3] @ query / 6**0.5).softmax(0)
    torch.testing.assert_close(pool(sequence, MASK, target)[0], weights @ sequence[0, :3])
