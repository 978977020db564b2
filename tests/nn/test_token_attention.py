"""What must hold for Hiformer's layer, by the parameter counts of its paper, and for AutoInt's."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from raysys.errors import UserError
from raysys.nn.token_attention import (
    ATTENTIONS,
    AttentionSizes,
    CompositeLinear,
    InteractingLayer,
    TokenAttentionLayer,
    TokenLinear,
    TokenNorm,
)

L, D = 5, 8
SIZES = AttentionSizes(D, heads=2, key_dim=3, value_dim=5, d_ff=12)
LOW = dataclasses.replace(SIZES, key_rank=7, value_rank=9)
PUBLISHED = AttentionSizes(128, heads=4, key_dim=16, value_dim=64, d_ff=512)


@pytest.fixture
def x():
    return torch.randn(6, L, D, generator=torch.Generator().manual_seed(0))


def layer_of(attention, *, queries=None, sizes=SIZES, seed=0, **keys):
    """A layer whose norms and biases are not the identity either."""
    torch.manual_seed(seed)
    layer = TokenAttentionLayer(L, sizes, attention=attention, queries=queries, **keys)
    for parameter in layer.parameters():
        if parameter.std() == 0:
            nn.init.normal_(parameter, mean=1.0)
    return layer


def count(*modules) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def published(attention, **ranks):
    with torch.device("meta"):
        return TokenAttentionLayer(38, dataclasses.replace(PUBLISHED, **ranks), attention=attention)


def test_published_sizes_of_keys_and_values():  # item 1
    layers = {
        1_556_480: published("heterogeneous"),
        59_146_240: published("composite"),
        15_876_096: published("composite", key_rank=128, value_rank=1024),
    }
    for expected, layer in layers.items():
        assert count(layer.attention.key, layer.attention.value) == expected
    # What the paper reports beyond keys and values is the same number for all three, within its rounding.
    reported = dict(zip(layers, (2.36e6, 59.95e6, 16.68e6), strict=True))
    assert all(abs(total - size - 803_700) < 5_000 for size, total in reported.items())


def test_published_size_of_a_heterogeneous_layer():  # item 1
    size = count(published("heterogeneous"))
    assert size == 8_137_472 == 38 * (4 * 128 * 160 + 2 * 128 * 512 + 640 + 4 * 128)
    assert abs(size - (10.50e6 - 2.36e6)) < 10_000  # what a second layer adds by the paper, rounded twice to 10,000


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("queries", [None, 2])
def test_tied_weights_are_a_vanilla_layer(x, queries, norm_first):  # item 2
    keys = {"queries": queries, "norm_first": norm_first}
    vanilla, own = layer_of("vanilla", **keys), layer_of("heterogeneous", seed=1, **keys)
    shared = dict(vanilla.named_parameters())
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            assert shared[name].shape[0] == 1 < parameter.shape[0]
            parameter.copy_(shared[name].expand_as(parameter))
    torch.testing.assert_close(own(x), vanilla(x))


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_vanilla_layer_is_a_transformer_layer_of_torch(x, norm_first):  # item 2
    sizes = AttentionSizes(D, heads=2, key_dim=D // 2, value_dim=D // 2, d_ff=12)
    layer = layer_of("vanilla", sizes=sizes, norm_first=norm_first)
    torch_layer = nn.TransformerEncoderLayer(D, 2, 12, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    attention, (up, _, down) = layer.attention, layer.mlp
    pairs = {
        "self_attn.in_proj_weight": torch.cat(
            [part.weight[0].t() for part in (attention.query, attention.key, attention.value)]
        ),
        "self_attn.out_proj.weight": attention.output.weight[0].t(),
        "linear1.weight": up.weight[0].t(),
        "linear1.bias": up.bias[0, 0],
        "linear2.weight": down.weight[0].t(),
        "linear2.bias": down.bias[0, 0],
        "norm1.weight": layer.attention_norm.weight[0],
        "norm1.bias": layer.attention_norm.bias[0],
        "norm2.weight": layer.mlp_norm.weight[0],
        "norm2.bias": layer.mlp_norm.bias[0],
    }
    biases = {name: torch.zeros_like(p) for name, p in torch_layer.named_parameters() if name not in pairs}
    assert biases.keys() == {"self_attn.in_proj_bias", "self_attn.out_proj.bias"}
    torch_layer.load_state_dict(pairs | biases)
    torch.testing.assert_close(torch_layer(x), layer(x))


def test_block_diagonal_composites_are_heterogeneous(x):  # item 3
    own, composite = layer_of("heterogeneous"), layer_of("composite", composite_queries=True, seed=1)
    weights = own.state_dict()
    for name in ("query", "key", "value"):
        key = f"attention.{name}.weight"
        weights[key] = torch.block_diag(*weights[key])
    composite.load_state_dict(weights)
    torch.testing.assert_close(composite(x), own(x))


def test_factors_of_full_rank_give_the_full_layer(x):  # item 4
    limits = {"key_rank": L * SIZES.heads * SIZES.key_dim, "value_rank": L * D}
    full = layer_of("composite")
    low = layer_of("composite", sizes=dataclasses.replace(SIZES, **limits), seed=1)
    weights = full.state_dict()
    for name in ("key", "value"):
        u, s, vh = torch.linalg.svd(weights[f"attention.{name}.weight"], full_matrices=False)
        weights |= {f"attention.{name}.down": u * s, f"attention.{name}.weight": vh}
    low.load_state_dict(weights)
    torch.testing.assert_close(low(x), full(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_singular_values_below_the_cut_bound_the_error(x, rank):  # item 4
    torch.manual_seed(0)
    full, low = CompositeLinear(L, D, L, 6, None), CompositeLinear(L, D, L, 6, rank)
    u, s, vh = torch.linalg.svd(full.weight.detach(), full_matrices=False)
    low.load_state_dict({"down": u[:, :rank] * s[:rank], "weight": vh[:rank]})
    errors = (low(x) - full(x)).flatten(1).norm(dim=1)
    assert (errors <= s[rank] * x.flatten(1).norm(dim=1) * (1 + 1e-5)).all()
    assert (errors > 0).all()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    ("attention", "sizes", "composite_queries"),
    [
        ("vanilla", SIZES, False),
        ("heterogeneous", SIZES, False),
        ("composite", SIZES, False),
        ("composite", LOW, False),
        ("composite", SIZES, True),
    ],
)
def test_a_pruned_layer_gives_the_last_rows_of_the_whole_one(x, attention, sizes, composite_queries, norm_first):
    # item 5: the values and the gradients, of the input and of the weights that both have
    keys = {"sizes": sizes, "composite_queries": composite_queries, "norm_first": norm_first}
    whole, pruned = layer_of(attention, **keys), layer_of(attention, queries=2, seed=1, **keys)
    weights, shapes = whole.state_dict(), {name: value.shape for name, value in pruned.state_dict().items()}
    kept = {name: _last(value, shapes[name]) for name, value in weights.items()}
    pruned.load_state_dict(kept)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = whole(inputs[0])[:, -2:], pruned(inputs[1])
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in pruned.named_parameters():
        torch.testing.assert_close(parameter.grad, _last(gradients[name], shapes[name]), rtol=1e-4, atol=1e-5)


def _last(value, shape):
    """The part of a whole layer's weight that belongs to the last tokens."""
    if value.dim() == 2 and value.shape[0] == shape[0]:
        return value[:, -shape[1] :]  # the columns of a composite query
    return value[-shape[0] :]


@pytest.mark.parametrize("sizes", [SIZES, LOW])
@pytest.mark.parametrize("queries", [None, 2])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_sums_to_one_and_the_queries_come_out(x, attention, queries, sizes):  # item 6
    layer = layer_of(attention, queries=queries, sizes=sizes)
    weights = layer.attention.weights(x)
    assert weights.shape == (6, 2, queries or L, L)
    torch.testing.assert_close(weights.sum(3), torch.ones(6, 2, queries or L))
    assert layer(x).shape == (6, queries or L, D)
    assert layer(x[:1]).shape == (1, queries or L, D)


ORDER = torch.tensor([3, 0, 4, 1, 2])


def test_vanilla_layers_do_not_know_the_order_of_tokens(x):  # item 7
    layer = layer_of("vanilla")
    torch.testing.assert_close(layer(x[:, ORDER]), layer(x)[:, ORDER])


def test_heterogeneous_tokens_move_together_with_their_weights(x):  # item 7
    layer, moved = layer_of("heterogeneous"), layer_of("heterogeneous", seed=1)
    moved.load_state_dict({name: value[ORDER] for name, value in layer.state_dict().items()})
    torch.testing.assert_close(moved(x[:, ORDER]), layer(x)[:, ORDER])
    assert not torch.allclose(layer(x[:, ORDER]), layer(x)[:, ORDER], atol=0.1)


def test_composite_tokens_move_together_with_blocks_of_rows_and_columns(x):  # item 7
    layer, moved = layer_of("composite"), layer_of("composite", seed=1)
    weights = {}
    for name, value in layer.state_dict().items():
        if value.dim() == 2 and value.shape[0] == L * D:
            blocks = value.unflatten(0, (L, D)).unflatten(2, (L, -1))  # [L, D, L, outputs]
            weights[name] = blocks[ORDER][:, :, ORDER].flatten(2).flatten(0, 1)
        else:
            weights[name] = value[ORDER]
    moved.load_state_dict(weights)
    torch.testing.assert_close(moved(x[:, ORDER]), layer(x)[:, ORDER])
    assert not torch.allclose(layer(x[:, ORDER]), layer(x)[:, ORDER], atol=0.1)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("queries", [None, 2])
@pytest.mark.parametrize("sizes", [SIZES, LOW])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_all_weights_of_all_tokens_get_a_gradient(x, attention, sizes, queries, norm_first):  # item 8
    layer = layer_of(attention, sizes=sizes, queries=queries, norm_first=norm_first)
    output = layer(x)
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).all(), name


def test_a_pruned_layer_has_no_weights_of_tokens_that_do_not_ask():  # item 8
    layer = layer_of("heterogeneous", queries=2)
    tokens = {name: value.shape[0] for name, value in layer.named_parameters()}
    assert {name for name, number in tokens.items() if number != 2} == {
        "attention.key.weight",
        "attention.value.weight",
    }
    assert tokens["attention.key.weight"] == tokens["attention.value.weight"] == L


def test_keys_and_values_grow_linearly_at_a_fixed_rank_and_else_by_the_square():  # item 9
    def weights(tokens, sizes):
        attention = TokenAttentionLayer(tokens, sizes).attention
        return count(attention.key, attention.value)

    assert weights(2 * L, LOW) == 2 * weights(L, LOW)
    assert weights(2 * L, SIZES) == 4 * weights(L, SIZES)


def test_initial_weights_keep_the_scale_of_their_input():
    x = torch.randn(64, 30, 16)
    torch.manual_seed(0)
    for module in (
        TokenLinear(1, 16, 32),
        TokenLinear(30, 16, 32),
        CompositeLinear(30, 16, 30, 32, None),
        CompositeLinear(30, 16, 30, 32, 100),
    ):
        assert module(x).std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("tokens", [1, L])
def test_a_norm_is_that_of_torch_with_weights_for_each_token(x, tokens):
    norm = TokenNorm(tokens, D)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for place in range(L):
        own = place % tokens
        expected = nn.functional.layer_norm(x[:, place], (D,), norm.weight[own], norm.bias[own])
        torch.testing.assert_close(norm(x)[:, place], expected)


def test_impossible_layers():
    with pytest.raises(UserError, match="unknown attention 'hetero'") as caught:
        TokenAttentionLayer(L, SIZES, attention="hetero")
    assert caught.value.hint == "did you mean 'heterogeneous'?"
    with pytest.raises(UserError, match="composite_queries with attention 'vanilla'"):
        TokenAttentionLayer(L, SIZES, attention="vanilla", composite_queries=True)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_interacting_layer_is_its_formula(x, scaled):
    layer, expected = InteractingLayer(D, 2, 3, scaled), torch.empty(6, L, 6)
    for head in range(2):
        columns = slice(3 * head, 3 * head + 3)
        query, key, value = (x @ part.weight[columns].t() for part in (layer.query, layer.key, layer.value))
        scores = torch.einsum("bid,bjd->bij", query, key) / (math.sqrt(3) if scaled else 1)
        expected[:, :, columns] = scores.softmax(2) @ value
    torch.testing.assert_close(layer(x), (expected + x @ layer.residual.weight.t()).relu())


def test_an_interacting_layer_does_not_know_the_order_of_tokens(x):
    layer = InteractingLayer(D, 2, 3)
    torch.testing.assert_close(layer(x[:, ORDER]), layer(x)[:, ORDER])


def test_an_interacting_layer_without_values_is_its_residual(x):
    layer = InteractingLayer(D, 2, 3)
    nn.init.zeros_(layer.value.weight)
    assert torch.equal(layer(x), layer.residual(x).relu())
