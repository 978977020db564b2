"""Hiformer: attention between features, each with weights of its own (Gui et al. 2023, arXiv 2311.05884)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from raysys.errors import UserError, check_count
from raysys.models.heads import TaskTowers
from raysys.models.outputs import Embedded
from raysys.models.ranking.base import RankingModel, SharedArguments
from raysys.nn.random import seeded
from raysys.nn.token_attention import AttentionSizes, TokenAttentionLayer
from raysys.schema import FeatureSchema


class Hiformer(RankingModel):
    """Transformer layers over the tokens and one learned token per task; a task's tower reads its own task token.

    attention: vanilla (a Transformer without positions) | heterogeneous (projections, norms and MLP of its own for each
    token) | composite (Hiformer: keys and values of each token are computed from all tokens).
    key_dim, value_dim: columns of a head; None is half of embedding_dim / heads, rounded up, and twice that quotient.
    d_ff: inner width of the layers' MLP; None is 4 · embedding_dim.
    key_rank, value_rank: of the composite projections, a number, or below 1 a share of the L · heads · key_dim (value_dim)
    columns that they give for L tokens; None is a full matrix. composite_queries: queries, too, are composite.
    prune: in the last layer only the task tokens are queries, which changes nothing but the cost. Without it the last layer
    has weights of feature tokens that no gradient reaches.
    norm_first: norms before the attention and the MLP. dense_per_token: dense columns that share one token.
    dropout: of what the attention and the MLP of a layer add, and in the towers. activation: of layers, `bottom` and towers.

    Equations and sizes are those of two public notes on the paper that agree, and of its published parameter counts, which
    these layers have; of the paper itself only the abstract was seen, and no result on public data is known. Not said there,
    and our choice: where the norms stand, queries of deeper layers, the initial weights, the defaults of the sizes.
    The other arguments are those of `RankingModel`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        embedding_dim: int = 32,
        attention: str = "composite",
        layers: int = 1,
        heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        d_ff: int | None = None,
        key_rank: float | None = 0.25,
        value_rank: float | None = 0.25,
        composite_queries: bool = False,
        prune: bool = True,
        norm_first: bool = False,
        dense_per_token: int = 8,
        tower: Sequence[int] = (64,),
        activation: str = "gelu",
        dropout: float = 0.1,
        **shared: Unpack[SharedArguments],
    ) -> None:
        shared["head"] = shared.get("head") or partial(TaskTowers, split=True)
        super().__init__(
            schema,
            embedding_dim=embedding_dim,
            tower=tower,
            activation=activation,
            dropout=dropout,
            **shared,
        )
        _at_least_one(layers=layers, heads=heads, dense_per_token=dense_per_token)
        _at_least_one(key_dim=key_dim, value_dim=value_dim, d_ff=d_ff)
        with seeded(self.seed, "dense tokens"):
            self.tokens.split_dense(-(-schema.dense_width // dense_per_token))
        tasks = len(schema.labels)
        num_tokens = len(self.tokens.names) + tasks
        key_dim, value_dim = _head_widths(embedding_dim, heads, key_dim, value_dim)
        sizes = AttentionSizes(
            embedding_dim,
            heads,
            key_dim,
            value_dim,
            d_ff or 4 * embedding_dim,
            _rank("key_rank", key_rank, num_tokens * embedding_dim, num_tokens * heads * key_dim),
            _rank("value_rank", value_rank, num_tokens * embedding_dim, num_tokens * heads * value_dim),
        )
        with seeded(self.seed, "interactions"):
            # Small, as the embeddings of the features are: a large one would drown what the first layer adds to it.
            self.task_tokens = nn.Parameter(torch.randn(tasks, embedding_dim) * 0.02)
            self.layers = nn.Sequential(
                *(
                    TokenAttentionLayer(
                        num_tokens,
                        sizes,
                        attention=attention,
                        queries=tasks if prune and place == layers - 1 else None,
                        composite_queries=composite_queries,
                        norm_first=norm_first,
                        activation_name=activation,
                        dropout=dropout,
                    )
                    for place in range(layers)
                )
            )
        self.add_towers(tasks * embedding_dim)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, T · D]: the task tokens side by side."""
        tokens = self.tokens(embedded)  # [B, m, D]
        tasks = self.task_tokens.to(tokens.dtype).expand(tokens.shape[0], -1, -1)  # [B, T, D]
        encoded: Tensor = self.layers(torch.cat([tokens, tasks], 1))  # [B, T or m + T, D]
        return encoded[:, -tasks.shape[1] :].flatten(1)


def _at_least_one(**numbers: int | None) -> None:
    for key, value in numbers.items():
        if value is not None:
            check_count(key, value)


def _head_widths(dim: int, heads: int, key_dim: int | None, value_dim: int | None) -> tuple[int, int]:
    """Columns of a head's keys and values."""
    if (key_dim is None or value_dim is None) and dim % heads:
        fitting = ", ".join(str(number) for number in range(1, dim + 1) if dim % number == 0)
        raise UserError(
            f"heads {heads} does not divide embedding_dim {dim}",
            f"heads can be {fitting}; any number with key_dim and value_dim given",
        )
    return key_dim or -(-dim // (2 * heads)), value_dim or 2 * dim // heads


def _rank(key: str, rank: float | None, inputs: int, outputs: int) -> int | None:
    """The rank of a composite projection as a number."""
    if rank is None:
        return None
    if 0 < rank < 1:
        return min(max(1, round(rank * outputs)), inputs, outputs)
    if rank != int(rank) or not 1 <= rank <= min(inputs, outputs):
        raise UserError(
            f"{key} is {rank} for a matrix [{inputs}, {outputs}]",
            f"a whole number up to {min(inputs, outputs)}, a share below 1, or null for a full matrix is expected",
        )
    return int(rank)
