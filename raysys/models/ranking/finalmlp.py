"""FinalMLP: two gated MLPs with a bilinear fusion (Mao et al. 2023, arXiv 2304.00902)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from raysys.errors import UserError, nearest
from raysys.models.outputs import Embedded
from raysys.models.ranking.base import PlainArguments, RankingModel
from raysys.nn.factorization import BilinearFusion
from raysys.nn.mlp import MLP, linear
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema

CONTEXTS = ("learned", "user", "item", "context", "position")


class FeatureGate(nn.Module):
    """x ⊙ 2 sigmoid(MLP(c)), x = vec(X): what a stream sees of each element of the tokens, by a context c.

    context: the places of the tokens that make up c, side by side; none for a learned vector [D], one gate for all rows.
    hidden: hidden widths of the MLP, whose activation is relu.
    """

    places: Tensor

    def __init__(self, num_tokens: int, dim: int, context: Sequence[int], hidden: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("places", torch.tensor(context, dtype=torch.int64), persistent=False)
        # Not zeros: with biases of 0 the relu would pass no gradient to any weight.
        self.learned = None if context else nn.Parameter(torch.randn(dim))
        self.hidden = MLP(max(1, len(context)) * dim, hidden)
        self.output = linear(self.hidden.out_features, num_tokens * dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, m, D] → [B, mD]."""
        context = x.index_select(1, self.places).flatten(1) if self.learned is None else self.learned  # [B, ·] or [D]
        return x.flatten(1) * (2 * self.output(self.hidden(context)).sigmoid())


class FinalMLP(RankingModel):
    """[u ‖ v ‖ Σ_h u_h^T W_h v_h], u = MLP_1(x ⊙ g_1), v = MLP_2(x ⊙ g_2), then a linear map per task (`tower` is empty).

    There is one bilinear form for each task, and the linear map contains the paper's w_u·u + w_v·v + Σ_h u_h^T W_h v_h + b.
    first, second: widths of the two MLPs. heads: groups h of the fusion; divides the last width of both.
    contexts: of the gates g_1 and g_2, each `learned` (a vector, the same for all rows) or a side of the schema: user, item,
    context or position, the tokens of its features. gate: hidden widths of the gates' MLPs.
    The other arguments are those of `RankingModel`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        first: Sequence[int] = (256, 128),
        second: Sequence[int] = (128, 64),
        heads: int = 4,
        contexts: Sequence[str] = ("learned", "learned"),
        gate: Sequence[int] = (64,),
        tower: Sequence[int] = (),
        **shared: Unpack[PlainArguments],
    ) -> None:
        super().__init__(schema, tower=tower, **shared)
        if len(contexts) != 2:
            raise UserError(f"contexts is {list(contexts)}", "give two, one for each stream: [user, item]")
        num_tokens = len(self.tokens.names)
        places = [_places(schema, context, self.tokens.names) for context in contexts]
        with seeded(self.seed, "interactions"):
            self.gates = nn.ModuleList(FeatureGate(num_tokens, self.embedding_dim, place, gate) for place in places)
            self.first = MLP(num_tokens * self.embedding_dim, first, self.activation, self.dropout)
            self.second = MLP(num_tokens * self.embedding_dim, second, self.activation, self.dropout)
            widths = self.first.out_features, self.second.out_features
            _check_heads(heads, *widths)
            self.fusion = BilinearFusion(*widths, heads, len(schema.labels))
        self.add_towers(sum(widths) + len(schema.labels))

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: the two streams, then the bilinear form of each task."""
        x = self.tokens(embedded)  # [B, m, D]
        u, v = self.first(self.gates[0](x)), self.second(self.gates[1](x))
        return torch.cat([u, v, self.fusion(u, v)], 1)


def _places(schema: FeatureSchema, context: str, names: Sequence[str]) -> list[int]:
    """The places of the tokens of a side's features, none for a learned context."""
    if context not in CONTEXTS:
        raise UserError(f"unknown context {context!r} in contexts", nearest(context, CONTEXTS))
    if context == "learned":
        return []
    found = [names.index(feature.name) for feature in schema.sparse if feature.side == context]
    if not found:
        sides = sorted({feature.side for feature in schema.sparse})
        raise UserError(
            f"contexts names {context!r}, but {schema.source} has no sparse feature of side {context!r}",
            f"a context can be {', '.join(['learned', *sides])}",
        )
    return found


def _check_heads(heads: int, first: int, second: int) -> None:
    if heads < 1 or first % heads or second % heads:
        fitting = ", ".join(str(n) for n in range(1, min(first, second) + 1) if first % n == 0 and second % n == 0)
        raise UserError(
            f"heads {heads} does not divide the last widths of first and second, {first} and {second}",
            f"heads can be {fitting}",
        )
