from __future__ import annotations

import pytest
import torch

from raysys.errors import UserError
from raysys.nn.mlp import MLP, ParallelLinear, ParallelMLP, activation


def test_mlp_is_linear_activation_linear_activation():
    mlp = MLP(3, (5, 2), "silu")
    x = torch.randn(4, 3)
    expected = torch.nn.functional.silu(x @ mlp[0].weight.t())
    expected = torch.nn.functional.silu(expected @ mlp[2].weight.t())
    torch.testing.assert_close(mlp(x), expected)
    assert mlp.out_features == 2


def test_mlp_without_widths_is_the_identity():
    x = torch.randn(4, 3)
    mlp = MLP(3, ())
    assert mlp(x) is x
    assert mlp.out_features == 3


def test_dropout_acts_in_training_only():
    mlp = MLP(3, (50,), dropout=0.5)
    x = torch.randn(8, 3)
    assert (mlp(x) == 0).sum() > (mlp.eval()(x) == 0).sum()
    torch.testing.assert_close(mlp(x), mlp(x))


def test_unknown_activation_names_the_nearest():
    with pytest.raises(UserError) as caught:
        activation("sillu")
    assert caught.value.message == "unknown activation 'sillu'"
    assert caught.value.hint == "did you mean 'silu'?"


@pytest.mark.parametrize("shared", [True, False])
def test_parallel_mlp_equals_a_loop_over_mlps(shared):
    parallel = ParallelMLP(3, 4, (6, 5), "relu")
    for layer in parallel.layers:
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(7, 4) if shared else torch.randn(3, 7, 4)
    out = parallel(x)
    assert out.shape == (3, 7, 5)
    for k in range(3):
        hidden = x if shared else x[k]
        for layer in parallel.layers:
            hidden = torch.relu(hidden @ layer.weight[k] + layer.bias[k])
        torch.testing.assert_close(out[k], hidden)


def test_parallel_mlp_without_widths_repeats_its_input():
    x = torch.randn(7, 4)
    assert torch.equal(ParallelMLP(2, 4, ())(x), torch.stack([x, x]))


def test_parallel_maps_start_different():
    weight = ParallelLinear(2, 4, 4).weight
    assert not torch.equal(weight[0], weight[1])
