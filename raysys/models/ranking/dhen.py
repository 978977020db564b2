"""DHEN: layers of different interactions side by side (Zhang et al. 2022, arXiv 2203.11014)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from raysys.errors import UserError, check_count, nearest
from raysys.models.outputs import Embedded
from raysys.models.ranking.base import RankingModel, SharedArguments
from raysys.nn.attention import check_heads
from raysys.nn.interactions import (
    ConvInteraction,
    CrossInteraction,
    DotInteraction,
    LinearInteraction,
    MLPInteraction,
    SelfAttentionInteraction,
    TokenMap,
)
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema

MODULES = ("linear", "dot", "self_attention", "dcn", "conv", "mlp")
ENSEMBLES = ("sum", "weighted_sum", "softmax_sum", "concat")


@dataclass(frozen=True)
class InteractionSizes:
    """The inner sizes of the modules; what each means stands in `DHEN`."""

    rank: int = 32
    heads: int = 4
    d_ff: int | None = None
    conv_channels: int = 4
    conv_kernel: int = 3
    dot_compress: int = 4
    hidden: tuple[int, ...] = (256,)
    activation: str = "silu"

    def __post_init__(self) -> None:
        for key in ("rank", "conv_channels", "conv_kernel"):
            check_count(key, getattr(self, key))
        check_count("dot_compress", self.dot_compress, 0)
        if self.d_ff is not None:
            check_count("d_ff", self.d_ff)


class DHENLayer(nn.Module):
    """Norm(Ensemble_i Interaction_i(X) + ShortCut(X)).

    names: one of `MODULES` each. lengths: the tokens that each module gives; equal for all but `concat`, which puts them
    one after another. The shortcut is a token map, or the identity where the number of tokens stays (no parameter then).
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        names: Sequence[str],
        lengths: Sequence[int],
        *,
        ensemble: str = "sum",
        norm: bool = True,
        dropout: float = 0.0,
        sizes: InteractionSizes = InteractionSizes(),
    ) -> None:
        super().__init__()
        _check_layer(names, lengths, ensemble)
        self.ensemble = ensemble
        self.tokens_out = sum(lengths) if ensemble == "concat" else lengths[0]
        self.interactions = nn.ModuleList(
            _interaction(name, num_tokens, dim, length, sizes) for name, length in zip(names, lengths, strict=True)
        )
        initial = {"weighted_sum": 1 / len(names), "softmax_sum": 0.0}
        self.scalars = nn.Parameter(torch.full((len(names),), initial[ensemble])) if ensemble in initial else None
        self.dropout = nn.Dropout(dropout)
        self.shortcut = TokenMap(num_tokens, self.tokens_out) if num_tokens != self.tokens_out else nn.Identity()
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, num_tokens, dim] → [B, tokens_out, dim]."""
        merged = self._merge([interaction(x) for interaction in self.interactions])  # [B, tokens_out, dim]
        return self.norm(self.dropout(merged) + self.shortcut(x))

    def _merge(self, outputs: list[Tensor]) -> Tensor:
        if self.ensemble == "concat":
            return torch.cat(outputs, 1)
        if self.scalars is not None:
            scalars = self.scalars.softmax(0) if self.ensemble == "softmax_sum" else self.scalars
            outputs = [scalar * output for scalar, output in zip(scalars.unbind(), outputs, strict=True)]
        return functools.reduce(torch.add, outputs)


class DHEN(RankingModel):
    """`layers` ensemble layers on the tokens, then one MLP (`tower`) per task on all tokens side by side.

    modules: names for all layers, or a list of names for each layer, of linear, dot, self_attention, dcn, conv, mlp.
    ensemble: sum | weighted_sum (learned scalars from 1/k) | softmax_sum (the same, normalised) | concat.
    tokens_out: tokens that each module gives, one number or a number per module; equal unless the ensemble is concat.
    norm: LayerNorm over a token's columns after each layer. dropout: of each ensemble's output and of the towers.
    rank: of dcn. heads, d_ff (None is 2D): of self_attention. conv_channels, conv_kernel: of conv.
    dot_compress: columns c of dot's X W_c. hidden: widths of the MLPs in dot and mlp, none for a linear map. activation: everywhere.
    The other arguments are those of `RankingModel`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        embedding_dim: int = 64,
        layers: int = 3,
        modules: Sequence[str] | Sequence[Sequence[str]] = ("dot", "dcn", "linear"),
        ensemble: str = "sum",
        tokens_out: int | Sequence[int] = 16,
        norm: bool = True,
        rank: int = 32,
        heads: int = 4,
        d_ff: int | None = None,
        conv_channels: int = 4,
        conv_kernel: int = 3,
        dot_compress: int = 4,
        hidden: Sequence[int] = (256,),
        tower: Sequence[int] = (512, 256, 128),
        activation: str = "silu",
        dropout: float = 0.0,
        **shared: Unpack[SharedArguments],
    ) -> None:
        super().__init__(
            schema,
            embedding_dim=embedding_dim,
            tower=tower,
            activation=activation,
            dropout=dropout,
            **shared,
        )
        sizes = InteractionSizes(rank, heads, d_ff, conv_channels, conv_kernel, dot_compress, tuple(hidden), activation)
        num_tokens = len(self.tokens.names)
        self.layers = nn.Sequential()
        with seeded(self.seed, "interactions"):
            for names in _modules_per_layer(modules, layers):
                lengths = [tokens_out] * len(names) if isinstance(tokens_out, int) else list(tokens_out)
                layer = DHENLayer(
                    num_tokens,
                    embedding_dim,
                    names,
                    lengths,
                    ensemble=ensemble,
                    norm=norm,
                    dropout=dropout,
                    sizes=sizes,
                )
                self.layers.append(layer)
                num_tokens = layer.tokens_out
        self.add_towers(num_tokens * embedding_dim)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: the tokens of the last layer side by side."""
        return self.layers(self.tokens(embedded)).flatten(1)


def _modules_per_layer(modules: Sequence[str] | Sequence[Sequence[str]], layers: int) -> list[list[str]]:
    check_count("layers", layers)
    nested = [list(names) for names in modules if not isinstance(names, str)]
    if not nested:
        return [[str(name) for name in modules]] * layers
    if len(nested) != len(modules) or len(nested) != layers:
        raise UserError(
            f"modules has {len(nested)} lists for {layers} layers", "give one list of names, or one list for each layer"
        )
    return nested


def _check_layer(names: Sequence[str], lengths: Sequence[int], ensemble: str) -> None:
    if ensemble not in ENSEMBLES:
        raise UserError(f"unknown ensemble {ensemble!r}", nearest(ensemble, ENSEMBLES))
    if not names:
        raise UserError("modules is empty", f"known: {', '.join(MODULES)}")
    if len(lengths) != len(names) or min(lengths) < 1:
        raise UserError(
            f"tokens_out is {list(lengths)} for modules {list(names)}",
            "give one positive number, or one for each module",
        )
    if ensemble != "concat" and len(set(lengths)) > 1:
        raise UserError(
            f"tokens_out {list(lengths)} differ, but ensemble {ensemble!r} adds the outputs of the modules",
            "make them equal or use ensemble 'concat'",
        )


def _interaction(name: str, num_tokens: int, dim: int, length: int, sizes: InteractionSizes) -> nn.Module:
    shape, act = (num_tokens, dim, length), sizes.activation
    match name:
        case "linear":
            return LinearInteraction(num_tokens, length)
        case "dot":
            return DotInteraction(*shape, compress=sizes.dot_compress, hidden=sizes.hidden, activation_name=act)
        case "self_attention":
            check_heads(sizes.heads, dim)
            return SelfAttentionInteraction(*shape, heads=sizes.heads, d_ff=sizes.d_ff or 2 * dim, activation_name=act)
        case "dcn":
            return CrossInteraction(*shape, rank=sizes.rank)
        case "conv":
            return ConvInteraction(*shape, channels=sizes.conv_channels, kernel=sizes.conv_kernel, activation_name=act)
        case "mlp":
            return MLPInteraction(*shape, hidden=sizes.hidden, activation_name=act)
    raise UserError(f"unknown module {name!r}", nearest(name, MODULES))
