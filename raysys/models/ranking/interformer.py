"""InterFormer: a stream of tokens and a stream of events that condition each other in every layer (arXiv 2411.09852)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from raysys.errors import UserError, check_count, nearest
from raysys.models.outputs import Embedded
from raysys.models.ranking.base import RankingModel, SequenceModelArguments
from raysys.models.ranking.dhen import DHENLayer, InteractionSizes
from raysys.nn.attention import MultiHeadAttention
from raysys.nn.interactions import TokenMap
from raysys.nn.mlp import MLP, activation, linear
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema

GATINGS = ("product", "literal", "none")
PFFNS = ("appendix", "full", "gdpa")


def align(sequences: Sequence[tuple[Tensor, Tensor]], shortest: int) -> tuple[Tensor, Tensor]:
    """k sequences ([B, L, D], mask [B, L], padding at the end) → events [B, T, kD] and mask [B, T], most recent first.

    Events of the same age (number of later ones) stand side by side, zeros where a sequence has none of that age.
    T is the longest L, and at least `shortest`.
    """
    length = max(shortest, *(values.shape[1] for values, _ in sequences))
    events, there = [], []
    for values, mask in sequences:
        rows, longest, _ = values.shape
        ages = torch.arange(length, device=values.device)
        place = mask.sum(1, keepdim=True) - 1 - ages  # [B, T]
        there.append(place >= 0)
        flat = place.clamp(min=0) + longest * torch.arange(rows, device=values.device)[:, None]
        moved = values.flatten(0, 1).index_select(0, flat.flatten()).view(rows, length, -1)  # [B, T, D]
        events.append(moved.masked_fill(~there[-1][:, :, None], 0.0))
    return torch.cat(events, 2), torch.stack(there).any(0)


class MaskNet(nn.Module):
    """LCE(S ⊙ sigmoid(MLP(S))): events [..., kD] → [..., D], the linear LCE after a mask that each event makes of itself."""

    def __init__(self, inputs: int, dim: int, activation_name: str) -> None:
        super().__init__()
        self.mask = nn.Sequential(MLP(inputs, [inputs], activation_name), linear(inputs, inputs), nn.Sigmoid())
        self.compress = linear(inputs, dim)

    def forward(self, events: Tensor) -> Tensor:
        """[B, T, kD] → [B, T, D]."""
        compressed: Tensor = self.compress(events * self.mask(events))
        return compressed


class Gate(nn.Module):
    """product: X ⊙ sigmoid(MLP(X)). literal: sigmoid(X ⊙ MLP(X)), as it is printed, which loses the sign. none: X.

    The MLP is that of one token, of the token's width.
    """

    def __init__(self, dim: int, mode: str, activation_name: str) -> None:
        super().__init__()
        if mode not in GATINGS:
            raise UserError(f"unknown gating {mode!r}", nearest(mode, GATINGS))
        self.mode = mode
        self.mlp = nn.Sequential(MLP(dim, [dim], activation_name), linear(dim, dim)) if mode != "none" else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, m, D] → [B, m, D]."""
        if self.mlp is None:
            return x
        return x * self.mlp(x).sigmoid() if self.mode == "product" else (x * self.mlp(x)).sigmoid()


class TokenSummary(nn.Sequential):
    """X_sum = Gate(W^T X): [B, n, D] → [B, num_summary, D]."""

    def __init__(self, num_tokens: int, num_summary: int, dim: int, gating: str, activation_name: str) -> None:
        super().__init__(TokenMap(num_tokens, num_summary), Gate(dim, gating, activation_name))


class EventSummary(nn.Module):
    """S_sum = Gate([CLS ‖ PMA ‖ recent]): the CLS tokens, `num_pma` learned queries that attend to all, the last events.

    PMA sees the CLS tokens too. Where there are fewer than `num_recent` events zeros stand in their place.
    """

    def __init__(
        self, num_cls: int, num_pma: int, num_recent: int, dim: int, heads: int, gating: str, activation_name: str
    ) -> None:
        super().__init__()
        self.num_cls, self.num_recent = num_cls, num_recent
        self.num_tokens = num_cls + num_pma + num_recent
        self.attention = None
        if num_pma:
            self.queries = nn.Parameter(nn.init.normal_(torch.empty(1, num_pma, dim), std=dim**-0.5))
            self.attention = MultiHeadAttention(dim, heads)
        self.gate = Gate(dim, gating, activation_name)

    def forward(self, s: Tensor, mask: Tensor) -> Tensor:
        """[B, num_cls + T, D], events most recent first, mask [B, num_cls + T] → [B, num_tokens, D]."""
        first = self.num_cls + self.num_recent
        cls, recent = s[:, :first].masked_fill(~mask[:, :first, None], 0.0).tensor_split([self.num_cls], 1)
        parts = [cls, recent]
        if self.attention is not None:
            parts.insert(1, self.attention(self.queries, s, mask))
        gated: Tensor = self.gate(torch.cat(parts, 1))
        return gated


class PersonalizedFFN(nn.Module):
    """A map of every event s_t that the summary X_sum [n, D] of the row's tokens makes.

    appendix: Σ_j x_j ⟨w_j, s_t⟩, of rank n at most, n·D weights. full: M s_t with M = H vec(X_sum), n·D·D² weights.
    gdpa: Σ_j act(⟨s_t, K x_j⟩ / √D) V x_j, the form that Meta's later kernels compute; its scaling and activation are ours.
    """

    def __init__(self, num_summary: int, dim: int, mode: str, activation_name: str) -> None:
        super().__init__()
        if mode not in PFFNS:
            raise UserError(f"unknown pffn {mode!r}", nearest(mode, PFFNS))
        self.mode = mode
        match mode:
            case "appendix":
                self.weight = linear(dim, num_summary, bias=False)
            case "full":
                self.weight = linear(num_summary * dim, dim * dim, bias=False)
            case "gdpa":
                self.weight = linear(dim, 2 * dim, bias=False)
                self.activation = activation(activation_name)

    def forward(self, x_sum: Tensor, s: Tensor) -> Tensor:
        """X_sum [B, n, D] and S [B, T, D] → [B, T, D]."""
        if self.mode == "appendix":
            return torch.bmm(self.weight(s), x_sum)
        if self.mode == "full":
            dim = s.shape[2]
            return torch.bmm(s, self.weight(x_sum.flatten(1)).unflatten(1, (dim, dim)))
        keys, values = self.weight(x_sum).chunk(2, 2)  # [B, n, D]
        return torch.bmm(self.activation(torch.bmm(s, keys.mT) / s.shape[2] ** 0.5), values)


class SequenceArch(nn.Module):
    """S + PFFN(X_sum, norm S), then S + MHA(norm S) with rotary positions; without the first half where pffn is None.

    The paper prints neither the residuals nor the norms (here RMSNorm): `residual` and `norm` leave them out.
    """

    def __init__(
        self, dim: int, heads: int, pffn: PersonalizedFFN | None, *, residual: bool, norm: bool, dropout: float
    ) -> None:
        super().__init__()
        self.residual = residual
        self.pffn = pffn
        self.pffn_norm = nn.RMSNorm(dim, eps=1e-6) if norm and pffn is not None else nn.Identity()
        self.attention = MultiHeadAttention(dim, heads, rotary=True)
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_sum: Tensor | None, s: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """[B, num_cls + T, D] → the same shape; positions [num_cls + T]."""
        if self.pffn is not None:
            s = self._add(s, self.pffn(x_sum, self.pffn_norm(s)))
        normed = self.attention_norm(s)
        return self._add(s, self.attention(normed, normed, mask, positions))

    def _add(self, s: Tensor, update: Tensor) -> Tensor:
        update = self.dropout(update)
        return s + update if self.residual else update


class InterFormer(RankingModel):
    """Tokens X and events S at full size through `layers` layers; only gated summaries of a few tokens cross between them.

    Before layer 1 a summary of X is put before the events as CLS tokens. In each layer the Interaction Arch, a `DHENLayer`,
    sees X and the summary of S; the Sequence Arch transforms S by the summary of X and attends to itself. A last pair of
    summaries is the shared representation: the paper's algorithm predicts from those of before the last layer, whose updates
    would then get no gradient. Several sequences are aligned at the most recent event and merged by a MaskNet.

    num_summary: tokens of a summary of X, and CLS tokens. num_pma: learned queries to S (0: none). num_recent: last events.
    pffn: appendix | full | gdpa. gating: product | literal | none. residual, norm: of the Sequence Arch.
    s2n: the Interaction Arch sees the summary of S. n2s: the Sequence Arch and the CLS tokens come from X, else there is no
    PFFN and the CLS tokens are learned constants. early_summary: S is summarised once, before layer 1, and has no layers.
    modules, rank, dot_compress, hidden: of the Interaction Arch, as in `DHEN`. heads: of all attention.
    dropout: of the updates of both arches and in the towers. sequence_pooling: pooled histories as tokens of X as well.
    The other arguments are those of `RankingModel`. Residuals, norms, gating and the order of positions are our choices.
    """

    reads_sequences = True

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        embedding_dim: int = 64,
        layers: int = 2,
        num_summary: int = 4,
        num_pma: int = 2,
        num_recent: int = 2,
        heads: int = 4,
        pffn: str = "appendix",
        gating: str = "product",
        residual: bool = True,
        norm: bool = True,
        s2n: bool = True,
        n2s: bool = True,
        early_summary: bool = False,
        modules: Sequence[str] = ("dot", "dcn"),
        rank: int = 32,
        dot_compress: int = 4,
        hidden: Sequence[int] = (256,),
        tower: Sequence[int] = (512, 256, 128),
        activation: str = "silu",
        dropout: float = 0.1,
        sequence_pooling: str = "none",
        **shared: Unpack[SequenceModelArguments],
    ) -> None:
        super().__init__(
            schema,
            embedding_dim=embedding_dim,
            tower=tower,
            activation=activation,
            dropout=dropout,
            sequence_pooling=sequence_pooling,
            **shared,
        )
        for key, number in {"layers": layers, "num_summary": num_summary}.items():
            check_count(key, number)
        for key, number in {"num_pma": num_pma, "num_recent": num_recent}.items():
            check_count(key, number, 0)
        self.names = [sequence.name for sequence in schema.sequences]
        self.num_summary, self.num_recent, self.s2n = num_summary, num_recent, s2n
        dim, num_tokens = embedding_dim, len(self.tokens.names)
        num_crossing = num_summary + num_pma + num_recent
        sizes = InteractionSizes(
            rank, heads, None, dot_compress=dot_compress, hidden=tuple(hidden), activation=activation
        )

        def token_summary() -> TokenSummary:
            return TokenSummary(num_tokens, num_summary, dim, gating, activation)

        def event_summary() -> EventSummary:
            return EventSummary(num_summary, num_pma, num_recent, dim, heads, gating, activation)

        def sequence_arch() -> SequenceArch:
            ffn = PersonalizedFFN(num_summary, dim, pffn, activation) if n2s else None
            return SequenceArch(dim, heads, ffn, residual=residual, norm=norm, dropout=dropout)

        def interaction_arch() -> DHENLayer:
            inputs = num_tokens + (num_crossing if s2n else 0)
            return DHENLayer(inputs, dim, modules, [num_tokens] * len(modules), dropout=dropout, sizes=sizes)

        # The modules of each layer; what an ablation leaves unused is not made.
        with seeded(self.seed, "interactions"):
            self.mask_net = MaskNet(len(self.names) * dim, dim, activation)
            self.cls = None if n2s else nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_summary, dim)))
            self.interactions = nn.ModuleList(interaction_arch() for _ in range(layers))
            moving = 0 if early_summary else layers
            self.sequences = nn.ModuleList(sequence_arch() for _ in range(moving))
            self.token_summaries = nn.ModuleList(token_summary() for _ in range(max(moving, 1) if n2s else 0))
            self.event_summaries = nn.ModuleList(event_summary() for _ in range(moving if s2n else 0))
            self.last_token_summary, self.last_event_summary = token_summary(), event_summary()
        self.add_towers((num_summary + num_crossing) * dim)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: the last summaries of both streams, their tokens side by side."""
        x = self.tokens(embedded)  # [B, n, D]
        s, mask, positions = self.events(embedded, x)  # [B, num_summary + T, D]
        early = None if self.sequences else self.last_event_summary(s, mask)
        for layer, interaction in enumerate(self.interactions):
            before = x
            if self.s2n:
                s_sum = self.event_summaries[layer](s, mask) if early is None else early
                x = torch.cat([x, s_sum], 1)
            x = interaction(x)
            if self.sequences:
                x_sum = self.token_summaries[layer](before) if self.cls is None else None
                s = self.sequences[layer](x_sum, s, mask, positions)
        s_sum = self.last_event_summary(s, mask) if early is None else early
        return torch.cat([self.last_token_summary(x), s_sum], 1).flatten(1)

    def events(self, embedded: Embedded, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S [B, num_summary + T, D], its mask and positions: CLS tokens (position 0), then events, the last one first."""
        aligned, mask = align([embedded.sequences[name] for name in self.names], self.num_recent)
        events = self.mask_net(aligned)
        cls = self.token_summaries[0](x) if self.cls is None else self.cls.expand(len(x), -1, -1)
        s = torch.cat([cls, events.masked_fill(~mask[:, :, None], 0.0)], 1)
        mask = torch.cat([mask.new_ones(len(x), self.num_summary), mask], 1)
        positions = torch.arange(s.shape[1], device=s.device) - self.num_summary
        return s, mask, positions.clamp(min=0)
