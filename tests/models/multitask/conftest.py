from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from raysys.schema import Label

INPUTS = 6


@pytest.fixture
def tasks() -> Callable[[int], list[Label]]:
    """`tasks(3)`: as many binary labels."""
    return lambda count: [Label(f"task{number}") for number in range(count)]


@pytest.fixture
def x() -> torch.Tensor:
    """A shared representation [B, `INPUTS`]."""
    return torch.randn(9, INPUTS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def count_parameters() -> Callable[[nn.Module], int]:
    return lambda module: sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def shake() -> Callable[[nn.Module], nn.Module]:
    """Gives every parameter, biases too, a random value: equality then means that all are used alike."""

    def shake(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        return module

    return shake


@pytest.fixture
def separate() -> Callable[[nn.Module, nn.Module, torch.Tensor, int], torch.Tensor]:
    """`separate(networks, towers, x, task)`: logits of the plain network that is row `task` of both, levels of `networks` in turn."""

    def chain(networks: list[nn.Module], towers: nn.Module, x: torch.Tensor, task: int) -> torch.Tensor:
        for layer in [layer for network in networks for layer in network.layers] + list(towers.hidden.layers):
            x = torch.relu(x @ layer.weight[task] + layer.bias[task])
        return (x @ towers.logits.weight[task] + towers.logits.bias[task])[:, 0]

    return chain
