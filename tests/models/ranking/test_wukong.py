from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raysys.errors import UserError
from raysys.models.ranking.wukong import FactorizationBlock, Wukong, WukongLayer
from raysys.nn.interactions import TokenMap

N, D = 5, 8


def block_of(rank=3, hidden=(6,)):
    return FactorizationBlock(N, D, 4, rank=rank, hidden=hidden, activation_name="relu", dropout=0.0)


def layer_of(n, fm_tokens, linear_tokens, rank=3, hidden=(6,)):
    return WukongLayer(n, D, fm_tokens=fm_tokens, linear_tokens=linear_tokens, rank=rank, hidden=hidden)


@pytest.fixture
def x():
    return torch.randn(6, N, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("fm_tokens", "linear_tokens"), [(1, 1), (3, 2), (4, 7)])
def test_shapes(x, fm_tokens, linear_tokens):
    layer = layer_of(N, fm_tokens, linear_tokens)
    assert layer.tokens_out == fm_tokens + linear_tokens
    assert layer(x).shape == (6, layer.tokens_out, D)


def test_one_token_is_enough():
    assert layer_of(1, 2, 3)(torch.randn(4, 1, D)).shape == (4, 5, D)


def test_rank_n_and_identity_give_the_vanilla_factorisation_machine(x):
    block = block_of(rank=N)
    nn.init.eye_(block.project.weight)
    torch.testing.assert_close(block.products(x), torch.bmm(x, x.mT))


def test_products_equal_their_formula_at_a_cost_linear_in_the_tokens(x):
    block = block_of()
    torch.testing.assert_close(block.products(x), torch.bmm(x, x.mT) @ block.project.weight)
    with FlopCounterMode(display=False) as counter:
        block.products(x)
    assert counter.get_total_flops() == 6 * 2 * (2 * N * 3 * D)


def test_block_equals_its_formula(x):
    block = block_of()
    normed = nn.functional.layer_norm((torch.bmm(x, x.mT) @ block.project.weight).flatten(1), (N * 3,))
    hidden = torch.relu(normed @ block.mlp[0].weight.t() + block.mlp[0].bias)
    torch.testing.assert_close(block(x), (hidden @ block.output.weight.t()).view(-1, 4, D))


def test_layer_equals_its_formula(x):
    layer = layer_of(N, 3, 4)
    residual = torch.einsum("ij,bid->bjd", layer.residual.weight, x)
    linear = torch.einsum("ij,bid->bjd", layer.compression.weight, x)
    expected = torch.cat([layer.factorization(x), linear], 1) + residual
    torch.testing.assert_close(layer(x), nn.functional.layer_norm(expected, (D,)))


def test_linear_compression_is_linear(x):
    compression, y = layer_of(N, 3, 4).compression, torch.randn_like(x)
    torch.testing.assert_close(
        compression(2 * x - 3 * y), 2 * compression(x) - 3 * compression(y), rtol=1e-4, atol=1e-5
    )


def test_residual_is_the_identity_exactly_where_the_number_of_tokens_stays(x):
    same, other = layer_of(N, 3, 2), layer_of(N, 3, 3)
    assert not list(same.residual.parameters())
    assert [tuple(parameter.shape) for parameter in other.residual.parameters()] == [(N, 6)]
    nn.init.zeros_(same.factorization.output.weight)
    nn.init.zeros_(same.compression.weight)
    torch.testing.assert_close(same(x), same.norm(x))


def polynomial(layers):
    """The layers with the norms left out and no hidden layers: a polynomial of the tokens."""
    stack, n = nn.Sequential(), N
    for _ in range(layers):
        layer = layer_of(n, 3, 4, hidden=())
        layer.norm = layer.factorization.norm = nn.Identity()
        stack.append(layer)
        n = layer.tokens_out
    return stack.double()


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_reach_interactions_of_order_two_to_their_number(x, layers):
    """Along a line the (2^L + 1)-th finite difference of a polynomial of degree 2^L is 0, the 2^L-th is not."""
    stack, degree = polynomial(layers), 2**layers
    values = torch.stack([stack(step * x.double()) for step in torch.linspace(-1, 1, degree + 2, dtype=torch.double)])
    differences = values
    for _ in range(degree):
        differences = differences.diff(dim=0)
    assert differences.abs().max() > 1e-3 * values.abs().max()
    assert differences.diff(dim=0).abs().max() < 1e-12 * values.abs().max()


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_factorisation_machines_alone_are_homogeneous_of_that_degree(x, layers):
    stack = polynomial(layers)
    for layer in stack:
        nn.init.zeros_(layer.compression.weight)
        layer.residual = TokenMap(layer.compression.weight.shape[0], layer.tokens_out).double()
        nn.init.zeros_(layer.residual.weight)
    torch.testing.assert_close(stack(1.5 * x.double()), 1.5 ** (2**layers) * stack(x.double()))


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def layer_parameters(n, fm_tokens, linear_tokens, k, hidden):
    widths, out = [n * k, *hidden], fm_tokens + linear_tokens
    mlp = sum((a + 1) * b for a, b in zip(widths, hidden, strict=False)) + widths[-1] * fm_tokens * D
    residual = 0 if n == out else n * out
    return n * k + 2 * n * k + mlp + n * linear_tokens + residual + 2 * D


@pytest.mark.parametrize("hidden", [(), (6,), (6, 7)])
@pytest.mark.parametrize("tokens", [(3, 4), (3, 2)])
def test_number_of_parameters_of_a_layer(tokens, hidden):
    assert count(layer_of(N, *tokens, hidden=hidden)) == layer_parameters(N, *tokens, 3, hidden)


def test_number_of_parameters(plain_schema):
    sizes = {"fm_tokens": 4, "linear_tokens": 2, "rank": 3, "hidden": (6,)}
    model = Wukong(plain_schema, embedding_dim=D, layers=3, tower=(5,), **sizes)
    layers = layer_parameters(3, 4, 2, 3, (6,)) + 2 * layer_parameters(6, 4, 2, 3, (6,))
    assert count(model.layers) == layers
    assert count(model.towers) == (6 * D + 1) * 5 + 5 + 1


def test_shared_is_the_tokens_of_the_last_layer(schema, make_batch):
    model = Wukong(schema, embedding_dim=D, layers=2, fm_tokens=3, linear_tokens=2, hidden=(6,))
    embedded = model.embed(make_batch(schema, 4))
    expected = model.layers[1](model.layers[0](model.tokens(embedded))).flatten(1)
    assert torch.equal(model.interact(embedded), expected)
    assert expected.shape == (4, 5 * D)


@pytest.mark.parametrize("key", ["layers", "fm_tokens", "linear_tokens", "rank"])
def test_sizes_are_at_least_one(plain_schema, key):
    with pytest.raises(UserError) as caught:
        Wukong(plain_schema, embedding_dim=D, **{key: 0})
    assert (caught.value.message, caught.value.hint) == (f"{key} is 0", "at least 1 is expected")
