from __future__ import annotations

import pytest
import torch

from raysys.errors import UserError
from raysys.models.ranking.dcn import DCNv2

D, WIDTH = 8, 24  # three tokens


def model_of(schema, **keys):
    return DCNv2(schema, embedding_dim=D, deep=(), **keys)


@pytest.fixture
def x():
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", [None, 4])
def test_cross_of_zeros_is_the_identity(plain_schema, x, rank):
    cross = model_of(plain_schema, rank=rank).cross
    for parameter in cross.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(cross(x), x)


@pytest.mark.parametrize("rank", [None, 4])
def test_cross_equals_its_formula(plain_schema, x, rank):
    cross = model_of(plain_schema, rank=rank, cross_layers=2).cross
    expected = x
    for layer in range(2):
        torch.nn.init.normal_(cross.bias[layer])
        weight = cross.kernels[layer] if rank is None else cross.W_kernels[layer] @ cross.V_kernels[layer]
        expected = x * (expected @ weight.t() + cross.bias[layer].flatten()) + expected
    torch.testing.assert_close(cross(x), expected)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_give_a_polynomial_of_their_number_plus_one(plain_schema, x, layers):
    """Along a line the (L+2)-th finite difference of a polynomial of degree L+1 is 0, the (L+1)-th is not."""
    cross = model_of(plain_schema, rank=4, cross_layers=layers).double().cross
    steps = torch.arange(layers + 3, dtype=torch.double)
    values = torch.stack([cross((1 + step / 4) * x.double()) for step in steps])
    differences = values
    for _ in range(layers + 1):
        differences = differences.diff(dim=0)
    assert differences.abs().max() > 1e-4
    assert differences.diff(dim=0).abs().max() < 1e-11 * values.abs().max()


def test_full_rank_product_equals_full_matrix(plain_schema, x):
    full, low = model_of(plain_schema, rank=None).cross, model_of(plain_schema, rank=WIDTH).cross
    with torch.no_grad():
        for layer in range(3):
            full.kernels[layer].copy_(low.W_kernels[layer] @ low.V_kernels[layer])
    torch.testing.assert_close(full(x), low(x), rtol=1e-4, atol=1e-5)


def test_stacked_and_parallel(plain_schema, make_batch):
    batch = make_batch(plain_schema, 5)
    stacked = DCNv2(plain_schema, embedding_dim=D, deep=(7,))
    x = stacked.tokens(stacked.embed(batch)).flatten(1)
    torch.testing.assert_close(stacked(batch).shared, stacked.deep(stacked.cross(x)))
    parallel = DCNv2(plain_schema, embedding_dim=D, deep=(7,), structure="parallel")
    expected = torch.cat([parallel.cross(x), parallel.deep(x)], 1)
    torch.testing.assert_close(parallel(batch).shared, expected)


def test_wrong_structure_and_rank(plain_schema):
    with pytest.raises(UserError) as caught:
        DCNv2(plain_schema, structure="paralel")
    assert caught.value.hint == "did you mean 'parallel'?"
    with pytest.raises(UserError, match="rank is 0"):
        DCNv2(plain_schema, rank=0)
    with pytest.raises(UserError, match="cross_layers is -1"):
        DCNv2(plain_schema, cross_layers=-1)
