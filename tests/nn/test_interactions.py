"""The modules of DHEN on their own; the numbers are those of "what must hold" for DHEN."""

from __future__ import annotations

import pytest
import torch
from torchrec.models.dlrm import InteractionArch
from torchrec.modules.crossnet import LowRankCrossNet

from raysys.nn.interactions import (
    ConvInteraction,
    CrossInteraction,
    DotInteraction,
    LinearInteraction,
    MLPInteraction,
    PairwiseDots,
    SelfAttentionInteraction,
    TokenMap,
)

M, D, L = 5, 8, 3
MODULES = {
    "linear": lambda m, n: LinearInteraction(m, n),
    "dot": lambda m, n: DotInteraction(m, D, n, compress=2, hidden=(16,), activation_name="silu"),
    "self_attention": lambda m, n: SelfAttentionInteraction(m, D, n, heads=2, d_ff=16, activation_name="silu"),
    "dcn": lambda m, n: CrossInteraction(m, D, n, rank=4),
    "conv": lambda m, n: ConvInteraction(m, D, n, channels=4, kernel=3, activation_name="silu"),
    "mlp": lambda m, n: MLPInteraction(m, D, n, hidden=(16,), activation_name="silu"),
}


@pytest.fixture
def x():
    return torch.randn(6, M, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("tokens_out", [1, L, M, M + 2])
def test_shapes(name, tokens_out, x):  # item 1
    assert MODULES[name](M, tokens_out)(x).shape == (6, tokens_out, D)


@pytest.mark.parametrize("name", MODULES)
def test_one_token_is_enough(name):
    assert MODULES[name](1, 2)(torch.randn(4, 1, D)).shape == (4, 2, D)


@pytest.mark.parametrize("name", MODULES)
def test_output_is_a_map_without_bias(name, x):  # item 7
    module = MODULES[name](M, L)
    torch.nn.init.zeros_(module.output.weight)
    assert torch.equal(module(x), torch.zeros(6, L, D))


def test_token_map_equals_its_formula(x):
    module = TokenMap(M, L)
    torch.testing.assert_close(module(x), torch.einsum("ij,bid->bjd", module.weight, x))


def test_linear_is_linear(x):  # item 3
    module, y = LinearInteraction(M, L), torch.randn_like(x)
    torch.testing.assert_close(module(2 * x - 3 * y), 2 * module(x) - 3 * module(y), rtol=1e-4, atol=1e-5)


def test_dots_equal_torchrec(x):
    expected = InteractionArch(M - 1)(x[:, 0], x[:, 1:])[:, D:]
    torch.testing.assert_close(PairwiseDots(M)(x), expected)


def test_gradient_of_dots_is_that_of_the_plain_formula():
    dots = PairwiseDots(4)
    x = torch.randn(3, 4, 5, dtype=torch.double, requires_grad=True)
    torch.autograd.gradcheck(dots, x)
    torch.autograd.gradgradcheck(dots, x)


def test_dots_of_one_token_are_none():
    assert PairwiseDots(1)(torch.randn(3, 1, D)).shape == (3, 0)


def test_dots_of_two_tokens():
    x = torch.randn(3, 2, D, requires_grad=True)
    out = PairwiseDots(2)(x)
    torch.testing.assert_close(out, (x[:, 0] * x[:, 1]).sum(1, keepdim=True))
    out.sum().backward()
    torch.testing.assert_close(x.grad, x.detach().flip(1))


def test_dots_under_autocast_run_and_train_in_bfloat16(x):
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = PairwiseDots(M)(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    expected = x.detach().sum(1, keepdim=True) - x.detach()
    torch.testing.assert_close(x.grad, expected, rtol=0.05, atol=0.05)


def test_cross_without_bias_is_homogeneous_of_degree_two(x):  # item 4
    module = CrossInteraction(M, D, M, rank=4)
    torch.testing.assert_close(module(3 * x), 9 * module(x), rtol=1e-4, atol=1e-4)


def test_cross_plus_identity_is_one_layer_of_dcn_v2(x):  # item 4
    module = CrossInteraction(M, D, M, rank=4)
    torch.nn.init.normal_(module.up.bias)
    reference = LowRankCrossNet(M * D, num_layers=1, low_rank=4)
    with torch.no_grad():
        module.output.weight.copy_(torch.eye(M))
        reference.V_kernels[0].copy_(module.down.weight)
        reference.W_kernels[0].copy_(module.up.weight)
        reference.bias[0].copy_(module.up.bias)
    torch.testing.assert_close((module(x) + x).flatten(1), reference(x.flatten(1)))


def test_attention_before_its_token_map_is_equivariant(x):  # item 6
    module, order = MODULES["self_attention"](M, L), torch.randperm(M)
    torch.testing.assert_close(module.encoder(x[:, order]), module.encoder(x)[:, order])


@pytest.mark.parametrize("name", ["linear", "conv", "self_attention"])
def test_order_of_tokens_is_part_of_the_module(name, x):  # item 6
    module = MODULES[name](M, L)
    assert not torch.allclose(module(x), module(x.flip(1)), atol=1e-3)


def test_dot_is_dlrm_and_its_top_mlp(x):  # item 5
    module = DotInteraction(M, D, L, compress=D, hidden=(16,), activation_name="relu")
    torch.nn.init.eye_(module.compress.weight)
    first = module.mlp[0]
    num_dots = M * (M - 1) // 2
    with torch.no_grad():
        first.weight[:, num_dots + D :] = 0  # of vec(X) only x_0 is left
    dlrm = InteractionArch(M - 1)(x[:, 0], x[:, 1:])  # [x_0 ‖ dots]
    weight = torch.cat([first.weight[:, num_dots : num_dots + D], first.weight[:, :num_dots]], 1)
    top = torch.relu(dlrm @ weight.t() + first.bias) @ module.output.weight.t()
    torch.testing.assert_close(module(x), top.view(-1, L, D))


def test_dot_without_compression_uses_the_products_only(x):
    module = DotInteraction(M, D, L, compress=0, hidden=(16,), activation_name="silu")
    assert module.mlp[0].in_features == M * (M - 1) // 2
    torch.testing.assert_close(module(-x), module(x))  # products do not see the sign


def test_dot_without_hidden_layers_is_linear_in_the_products(x):
    module = DotInteraction(M, D, L, compress=0, hidden=(), activation_name="silu")
    torch.testing.assert_close(module(x).flatten(1), module.dots(x) @ module.output.weight.t())


def test_conv_equals_its_formula(x):
    module = MODULES["conv"](M, L)
    planes = torch.nn.functional.silu(
        torch.nn.functional.conv2d(x[:, None], module.convolve.weight, module.convolve.bias, padding=1)
    )
    merged = torch.einsum("bcmd,c->bmd", planes, module.merge.weight[0, :, 0, 0]) + module.merge.bias
    torch.testing.assert_close(module(x), module.output(merged))
