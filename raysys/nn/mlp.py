"""Multi-layer perceptrons: one, or several of one shape side by side."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysys.errors import UserError, check_count, nearest

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}


def activation(name: str) -> nn.Module:
    """The activation that a config names; an unknown name is a `UserError` with the nearest one."""
    if name not in _ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}", nearest(name, _ACTIVATIONS))
    return _ACTIVATIONS[name]()


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear map with Xavier weights and a bias that starts at 0."""
    check_count("the width of a layer", outputs)
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Sequential):
    """[..., inputs] → [..., widths[-1]]: after each linear map the activation, then dropout.

    out_features: the width of what comes out, `inputs` where there are no widths (then it is the identity).
    """

    def __init__(self, inputs: int, widths: Sequence[int], activation_name: str = "relu", dropout: float = 0.0) -> None:
        layers: list[nn.Module] = []
        for before, width in itertools.pairwise([inputs, *widths]):
            layers += [linear(before, width), activation(activation_name)]
            layers += [nn.Dropout(dropout)] if dropout > 0 else []
        super().__init__(*layers)
        self.out_features = widths[-1] if widths else inputs


class ParallelLinear(nn.Module):
    """`num` linear maps of one shape as one batched product, Xavier weights, biases that start at 0."""

    def __init__(self, num: int, inputs: int, outputs: int) -> None:
        super().__init__()
        check_count("the width of a layer", outputs)
        self.weight = nn.Parameter(torch.empty(num, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(num, 1, outputs))
        for matrix in self.weight:
            nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs], which all share, or [num, B, inputs] → [num, B, outputs]."""
        if x.dim() == 2:
            x = x.expand(self.weight.shape[0], -1, -1)
        return torch.baddbmm(self.bias, x, self.weight)


class ParallelMLP(nn.Module):
    """`num` MLPs of one shape side by side (towers of tasks, experts), without a loop over them."""

    def __init__(
        self, num: int, inputs: int, widths: Sequence[int], activation_name: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num = num
        self.layers = nn.ModuleList(ParallelLinear(num, *pair) for pair in itertools.pairwise([inputs, *widths]))
        self.activation = activation(activation_name)
        self.dropout = nn.Dropout(dropout)
        self.out_features = widths[-1] if widths else inputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs], which all share, or [num, B, inputs] → [num, B, widths[-1]] (the input where there are no widths)."""
        for layer in self.layers:
            x = self.dropout(self.activation(layer(x)))  # [num, B, width]
        return x if x.dim() == 3 else x.expand(self.num, -1, -1)
