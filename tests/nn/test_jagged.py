from __future__ import annotations

import pytest
import torch

from raysys.nn.jagged import length_mask, pad, pool

LENGTHS = torch.tensor([2, 0, 3, 1])
OFFSETS = torch.tensor([0, 2, 2, 5, 6])


@pytest.fixture
def values():
    return torch.arange(12.0).reshape(6, 2).requires_grad_()


def test_pad_and_mask(values):
    padded = pad(values, OFFSETS, 4)
    mask = length_mask(LENGTHS, 4)
    assert padded.shape == (4, 4, 2)
    assert torch.equal(padded[mask], values)
    assert torch.equal(padded[~mask], torch.zeros(10, 2))
    assert torch.equal(mask.sum(1), LENGTHS)


def test_pad_cuts_what_is_too_long(values):
    assert torch.equal(pad(values, OFFSETS, 2)[2], values[2:4])


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("offsets", [OFFSETS, OFFSETS.int()])
def test_pool_equals_a_loop_and_empty_rows_are_zeros(values, mean, offsets):
    pooled = pool(values, offsets, mean=mean)
    rows = values.split(LENGTHS.tolist())
    for row, vector in zip(rows, pooled, strict=True):
        expected = row.sum(0) / (max(len(row), 1) if mean else 1)
        torch.testing.assert_close(vector, expected)


def test_weighted_pool(values):
    weights = torch.rand(6)
    torch.testing.assert_close(pool(values, OFFSETS, weights)[2], (values[2:5] * weights[2:5, None]).sum(0))


def test_gradients_of_pad_and_pool(values):
    (pool(values, OFFSETS, mean=True).sum() + pad(values, OFFSETS, 3).sum()).backward()
    share = torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 1.0])
    torch.testing.assert_close(values.grad, (share + 1)[:, None].expand(6, 2))
