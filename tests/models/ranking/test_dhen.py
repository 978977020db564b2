"""Items 1 to 9 of what must hold for DHEN (items about one module stand in tests/nn/test_interactions.py)."""

from __future__ import annotations

import pytest
import torch

from raysys.errors import UserError
from raysys.models.ranking.dhen import DHEN, ENSEMBLES, MODULES, DHENLayer, InteractionSizes

M, D = 5, 8
SIZES = InteractionSizes(rank=3, heads=2, d_ff=16, conv_channels=2, dot_compress=2, hidden=(6,))


def layer_of(names, lengths, num_tokens=M, **keys):
    return DHENLayer(num_tokens, D, names, lengths, sizes=SIZES, **keys)


@pytest.fixture
def x():
    return torch.randn(6, M, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("names", [MODULES, ("dot", "dcn"), ("conv",), ("linear", "linear")])
def test_shapes(names, ensemble, x):  # item 1
    lengths = list(range(1, len(names) + 1)) if ensemble == "concat" else [4] * len(names)
    layer = layer_of(names, lengths, ensemble=ensemble)
    assert layer.tokens_out == (sum(lengths) if ensemble == "concat" else 4)
    assert layer(x).shape == (6, layer.tokens_out, D)


@pytest.mark.parametrize("ensemble", ["sum", "weighted_sum", "softmax_sum"])
def test_sums_need_equal_lengths(ensemble):  # item 1
    with pytest.raises(UserError) as caught:
        layer_of(("dot", "dcn"), (4, 3), ensemble=ensemble)
    assert (
        caught.value.message == f"tokens_out [4, 3] differ, but ensemble {ensemble!r} adds the outputs of the modules"
    )


def test_shortcut_is_the_identity_exactly_where_the_number_of_tokens_stays(x):  # item 2
    same, other = layer_of(("linear",), (M,), norm=False), layer_of(("linear",), (M - 1,), norm=False)
    assert not list(same.shortcut.parameters())
    assert [tuple(parameter.shape) for parameter in other.shortcut.parameters()] == [(M, M - 1)]
    torch.nn.init.zeros_(same.interactions[0].output.weight)
    assert torch.equal(same(x), x)


def test_a_linear_layer_without_norm_is_linear(x):  # item 3
    layer, y = layer_of(("linear",), (3,), norm=False), torch.randn_like(x)
    torch.testing.assert_close(layer(2 * x - 3 * y), 2 * layer(x) - 3 * layer(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens_out", [M, 3])
def test_without_modules_a_layer_is_its_norm_of_the_shortcut(x, tokens_out):  # item 7
    layer = layer_of(MODULES, [tokens_out] * len(MODULES))
    for interaction in layer.interactions:
        torch.nn.init.zeros_(interaction.output.weight)
    torch.testing.assert_close(layer(x), layer.norm(layer.shortcut(x)))


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_every_module_of_every_layer_is_trained(ensemble, schema, make_batch):  # item 8
    model = DHEN(schema, embedding_dim=D, layers=3, modules=MODULES, ensemble=ensemble, tokens_out=3, heads=2)
    model(make_batch(schema, 32)).logits.sum().backward()
    for name, parameter in model.layers.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias adds the same to all scores of a query, which the softmax does not see.
        gradient = parameter.grad.chunk(3)[2] if name.endswith("in_proj_bias") else parameter.grad
        assert gradient.abs().sum() > 0, name


def test_weighted_sums_start_as_the_mean(x):
    outputs = {}
    for ensemble in ("sum", "weighted_sum", "softmax_sum"):
        torch.manual_seed(0)
        layer = layer_of(("dot", "dcn"), (M, M), ensemble=ensemble, norm=False)
        outputs[ensemble] = layer(x) - x
    torch.testing.assert_close(outputs["weighted_sum"], outputs["sum"] / 2)
    torch.testing.assert_close(outputs["softmax_sum"], outputs["sum"] / 2)


def module_weights(name: str, m: int, out: int) -> int:
    """Weights of a module counted by hand, without biases and LayerNorms."""
    h = SIZES.hidden[0]
    return {
        "linear": m * out,
        "dot": D * 2 + (m * (m - 1) // 2 + m * 2) * h + h * out * D,
        "self_attention": 4 * D * D + 2 * D * 16 + m * out,
        "dcn": 2 * m * D * 3 + m * out,
        "conv": 2 * 9 + 2 + m * out,
        "mlp": m * D * h + h * out * D,
    }[name]


def module_biases(name: str, m: int) -> int:
    """Biases, and the two LayerNorms of an encoder layer."""
    h = SIZES.hidden[0]
    return {
        "linear": 0,
        "dot": h,
        "self_attention": 3 * D + D + 16 + D + 2 * 2 * D,
        "dcn": m * D,
        "conv": 2 + 1,
        "mlp": h,
    }[name]


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("tokens_out", [3, M])
def test_number_of_parameters_of_a_module(name, tokens_out):  # item 9
    module = layer_of((name,), (tokens_out,)).interactions[0]
    matrices = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)
    assert matrices == module_weights(name, M, tokens_out)
    assert count(module) == matrices + module_biases(name, M)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_number_of_parameters_of_a_layer(ensemble):  # item 9
    lengths = [2, 3, 1, 2, 4, 1] if ensemble == "concat" else [3] * 6
    total = sum(lengths) if ensemble == "concat" else 3
    modules = sum(module_weights(n, M, out) + module_biases(n, M) for n, out in zip(MODULES, lengths, strict=True))
    scalars = 6 if ensemble in ("weighted_sum", "softmax_sum") else 0
    assert count(layer_of(MODULES, lengths, ensemble=ensemble)) == modules + scalars + M * total + 2 * D


def test_parameters_grow_linearly_with_the_layers(plain_schema):  # item 9
    counts = [count(DHEN(plain_schema, embedding_dim=D, layers=n, tokens_out=4).layers) for n in (1, 2, 3, 4)]
    assert counts[3] - counts[2] == counts[2] - counts[1] > 0


def test_layers_may_differ(plain_schema, make_batch):
    model = DHEN(
        plain_schema,
        embedding_dim=D,
        layers=2,
        modules=[["dot", "linear"], ["self_attention", "conv"]],
        ensemble="concat",
        tokens_out=[3, 2],
    )
    assert [type(i).__name__ for i in model.layers[1].interactions] == ["SelfAttentionInteraction", "ConvInteraction"]
    assert model(make_batch(plain_schema, 4)).shared.shape == (4, 5 * D)


def test_order_of_tokens_is_part_of_the_model(plain_schema, make_batch):  # item 6
    model = DHEN(plain_schema, embedding_dim=D).eval()
    embedded = model.embed(make_batch(plain_schema, 4))
    first = model.interact(embedded)
    embedded.tokens = embedded.tokens.flip(1)
    assert not torch.allclose(first, model.interact(embedded), atol=1e-3)


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({"modules": ["dott"]}, "unknown module 'dott'", "did you mean 'dot'?"),
        ({"modules": []}, "modules is empty", "known: linear, dot, self_attention, dcn, conv, mlp"),
        (
            {"modules": ["self_attention"], "heads": 3},
            "heads 3 does not divide embedding_dim 8",
            "heads can be 1, 2, 4, 8",
        ),
        (
            {"modules": ["self_attention"], "heads": 0},
            "heads 0 does not divide embedding_dim 8",
            "heads can be 1, 2, 4, 8",
        ),
        ({"rank": 0}, "rank is 0", "at least 1 is expected"),
        ({"conv_kernel": 0}, "conv_kernel is 0", "at least 1 is expected"),
        ({"conv_channels": 0}, "conv_channels is 0", "at least 1 is expected"),
        ({"dot_compress": -1}, "dot_compress is -1", "at least 0 is expected"),
        ({"d_ff": 0}, "d_ff is 0", "at least 1 is expected"),
        ({"hidden": [8, 0]}, "the width of a layer is 0", "at least 1 is expected"),
        ({"ensemble": "summ"}, "unknown ensemble 'summ'", "did you mean 'sum'?"),
        ({"layers": 0}, "layers is 0", "at least 1 is expected"),
        (
            {"modules": [["dot"], ["dcn"]]},
            "modules has 2 lists for 3 layers",
            "give one list of names, or one list for each layer",
        ),
        (
            {"tokens_out": [4, 4]},
            "tokens_out is [4, 4] for modules ['dot', 'dcn', 'linear']",
            "give one positive number, or one for each module",
        ),
        ({"activation": "sillu"}, "unknown activation 'sillu'", "did you mean 'silu'?"),
    ],
)
def test_impossible_configs(plain_schema, keys, message, hint):
    with pytest.raises(UserError) as caught:
        DHEN(plain_schema, embedding_dim=D, **keys)
    assert caught.value.message == message
    assert caught.value.hint == hint
