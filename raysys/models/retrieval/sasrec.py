"""SASRec: the next item of a sequence by causal self-attention (Kang and McAuley, ICDM 2018, arXiv 1808.09781)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.errors import UserError
from raysys.models.embeddings import Embeddings
from raysys.models.outputs import Embedded
from raysys.models.retrieval.base import RetrievalModel, key_feature
from raysys.nn.attention import check_heads
from raysys.nn.mlp import linear
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema


class SASRec(RetrievalModel):
    """Item embeddings and learned positions, `blocks` of causal attention and a pointwise MLP, ⟨h_t, e_i⟩ with the same e.

    Each block: x + attention(norm(x)), then x + mlp(norm(x)), dropout on what is added; a LayerNorm at the end. The only
    sequence of the schema must have one column, of the table of the item's id. Positions are counted from the most recent
    event, so that a history that was cut keeps its last positions. The user's vector is the state after the last event,
    zeros where there is none.

    width K is that of the item table. init_scale: as in `Embeddings`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        blocks: int = 2,
        heads: int = 1,
        dropout: float = 0.3,
        init_scale: float | None = 0.02,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        part = sequence_part(schema)
        self.sequence = part.sequences[0]
        self.width = part.tables[0].embedding_dim
        check_heads(heads, self.width, "the item table's embedding_dim")
        self.embeddings = Embeddings(part, self.width, seed, device, init_scale)
        with seeded(seed, "blocks"):
            self.positions = nn.Parameter(torch.randn(self.sequence.max_length, self.width) * 0.02)
            self.blocks = nn.ModuleList(CausalBlock(self.width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(self.width)
        self.dropout = nn.Dropout(dropout)

    def states(self, embedded: Embedded) -> Tensor:
        """[B, L, K]: after each event of the sequence, what is known then; padding holds no meaning."""
        events, mask = embedded.sequences[self.sequence.name]  # [B, L, K], [B, L]
        age = (mask.sum(1, keepdim=True) - 1 - torch.arange(mask.shape[1], device=mask.device)).clamp(min=0)
        x = self.dropout(events * self.width**0.5 + self.positions[age])
        for block in self.blocks:
            x = block(x)
        states: Tensor = self.norm(x)
        return states

    def encode_users(self, embedded: Embedded) -> Tensor:
        """[R, K]: the state after the last event."""
        mask = embedded.sequences[self.sequence.name][1]
        return last_event(self.states(embedded), mask)

    def encode_items(self, embedded: Embedded) -> Tensor:
        """[R, K]: the embedding of the row's item."""
        return embedded.tokens[:, 0]


class CausalBlock(nn.Module):
    """Self-attention over the events up to each one, then an MLP on each, both as residuals of a normalised input."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mix, self.output = linear(dim, 3 * dim), linear(dim, dim)
        self.pointwise = nn.Sequential(linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), linear(dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]. Padding stands at the end, where no earlier event attends to it."""
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.mix(self.norms[0](x)).chunk(3, 2)
        )  # [B, H, L, D/H]
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + self.dropout(self.output(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.pointwise(self.norms[1](x)))


def last_event(states: Tensor, mask: Tensor) -> Tensor:
    """[B, L, D], mask [B, L] → [B, D]: of the last event that is there, zeros for an empty sequence."""
    length = mask.sum(1)
    place = (length - 1).clamp(min=0)[:, None, None].expand(-1, 1, states.shape[2])
    return states.gather(1, place)[:, 0] * (length > 0)[:, None]


def sequence_part(schema: FeatureSchema) -> FeatureSchema:
    """The schema with the item's id and the sequence of such ids alone; a UserError where it has not just that one."""
    key = key_feature(schema)
    item = next(feature for feature in schema.sparse if feature.name == key)
    fitting = [s for s in schema.sequences if len(s.features) == 1 and s.features[0].table == item.table]
    if len(fitting) != 1:
        raise UserError(
            f"{schema.source}: {len(fitting)} sequences have one column of table {item.table!r}, the table of {key!r}",
            "SASRec reads one sequence of item ids: correct the schema's sequences",
        )
    table = schema.table(item.table)
    return dataclasses.replace(schema, tables=(table,), dense=(), sparse=(item,), sequences=(fitting[0],))
