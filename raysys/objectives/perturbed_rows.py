"""Perturbed copies of looked-up rows, joined to the rows themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from raysys.data.batch import Batch
from raysys.errors import UserError, nearest
from raysys.models.outputs import Embedded, Output
from raysys.nn.collectives import global_sum, rank
from raysys.nn.random import hash64
from raysys.objectives.id_drop import with_copies
from raysys.objectives.supervised import check_key
from raysys.schema import DenseFeature, FeatureSchema, SparseFeature
from raysys.schema import Sequence as SequenceSchema


class Perturbation(nn.Module):
    """A perturbed copy of what was looked up. The lookup is not repeated, but for `id_drop`, which doubles it.

    feature_mask: the probability with which a feature of a row is set to its default: a dense column to the value of a null
        (its mean where it is standardised, its missing flag to 1), an embedding to 0, a sequence to an empty one.
    rescale: divide what is left by 1 - feature_mask, as dropout does.
    dense_noise: s of x + s · std · N(0, 1), std the deviation of the column in all batches so far.
    emb_noise: s of e · (1 + s · N(0, 1)) for each number of an embedding or an event.
    history_crop: c; of a sequence of n events the last ⌈s n⌉ are left, s uniform in 1 - c … 1 for each row.
    id_drop: the probability with which each id of a bag (a sparse feature with `max_length` above 1) is left out, before the
        lookup, by `augment`.
    exclude: features left as they are; those of side `position` always are. A model taught to do without a position or
        whatever else carries a bias would lay the bias on the rest.
    row_fraction: the share of a batch's rows that get a copy, to cap the cost. (A probability q with which each row is
        perturbed, which is the same on average at q times the weight, would save nothing.)

    Numbers come from a generator of its own, seeded by (seed, rank, step) as the train loop seeds dropout: other
    draws stay as they were, a resumed run draws the same, and ranks draw differently.
    """

    default: Tensor
    kept: Tensor
    changing: Tensor
    sums: Tensor

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        feature_mask: float = 0.1,
        rescale: bool = False,
        dense_noise: float = 0.05,
        emb_noise: float = 0.0,
        history_crop: float = 0.0,
        id_drop: float = 0.0,
        exclude: Sequence[str] = (),
        row_fraction: float = 1.0,
    ) -> None:
        super().__init__()
        check_key(
            "perturbation.feature_mask", feature_mask, 0 <= feature_mask < 1, "a number of at least 0 and below 1"
        )
        check_key("perturbation.dense_noise", dense_noise, dense_noise >= 0, "a number of at least 0")
        check_key("perturbation.emb_noise", emb_noise, emb_noise >= 0, "a number of at least 0")
        check_key("perturbation.history_crop", history_crop, 0 <= history_crop <= 1, "a number of 0 to 1")
        check_key("perturbation.id_drop", id_drop, 0 <= id_drop < 1, "a number of at least 0 and below 1")
        check_key("perturbation.row_fraction", row_fraction, 0 < row_fraction <= 1, "a number above 0 and at most 1")
        features: tuple[DenseFeature | SparseFeature | SequenceSchema, ...] = (
            *schema.dense,
            *schema.sparse,
            *schema.sequences,
        )
        self.places = {feature.name: place for place, feature in enumerate(features)}
        for name in exclude:
            if name not in self.places:
                raise UserError(
                    f"objective.perturbation.exclude: no feature {name!r} in {schema.source}",
                    nearest(name, self.places),
                )
        self.feature_mask, self.emb_noise, self.row_fraction = feature_mask, emb_noise, row_fraction
        self.dense_noise, self.scale = dense_noise, 1 / (1 - feature_mask) if rescale else 1.0
        self.history_crop, self.id_drop = history_crop, id_drop
        kept = [f.name in exclude or f.side == "position" for f in features]
        fixed = {name for name, is_kept in zip(self.places, kept, strict=True) if is_kept}
        self.bags = {f.name for f in schema.sparse if f.max_length > 1 and f.name not in fixed}
        flagged = [place for place, feature in enumerate(schema.dense) if feature.missing_flag]
        self.columns = [*range(len(schema.dense)), *flagged]  # the feature of each column of Batch.dense
        defaults = [*map(_default, schema.dense), *(1.0 for _ in flagged)]
        changing = [not kept[place] for place in range(len(schema.dense))] + [False] * len(flagged)
        self.register_buffer("kept", torch.tensor(kept, dtype=torch.bool), persistent=False)
        self.register_buffer("default", torch.tensor(defaults), persistent=False)
        self.register_buffer("changing", torch.tensor(changing, dtype=torch.float32), persistent=False)
        self.register_buffer("sums", torch.zeros(3, len(defaults), dtype=torch.float64))  # rows, Σ x, Σ x²
        self._seen: tuple[int, int] = (0, 0)

    def forward(self, embedded: Embedded, counted: Tensor) -> tuple[Tensor, Embedded]:
        """The places of the rows that have a copy, [k], and the copies; counted: [B], 0 for rows of padding.

        Collective where there is noise on dense columns.
        """
        rows = self._chosen(len(counted), self._generator("rows", counted.device))
        if len(rows) < len(counted):
            embedded = map_rows(embedded, lambda value: value[rows])
        return rows, self.perturb(embedded, counted[rows])

    def augment(self, batch: Batch, seed: int) -> Batch:
        """With copies of rows after the rows, for `id_drop`, else the batch as it is; seed: of this rank and step."""
        if self.id_drop == 0:
            return batch
        random = torch.Generator(batch.dense.device).manual_seed(hash64(f"id_drop/{seed}"))
        return with_copies(batch, self._chosen(len(batch), random), self.bags, self.id_drop, random)

    def _chosen(self, batch_size: int, random: torch.Generator) -> Tensor:
        """The rows that have a copy, in order."""
        if self.row_fraction == 1:
            return torch.arange(batch_size, device=random.device)
        count = math.ceil(self.row_fraction * batch_size)
        return torch.randperm(batch_size, generator=random, device=random.device)[:count].sort().values

    def perturb(self, embedded: Embedded, counted: Tensor) -> Embedded:
        """All that happens after the lookup, to k rows of their own; counted: [k], 0 for copies of padding (collective)."""
        random, count = self._generator("values", counted.device), len(counted)
        if self.dense_noise > 0 and self.columns:
            self._measure(embedded.dense, counted)
        chance = torch.rand(count, len(self.places), generator=random, device=counted.device)
        keep = (chance >= self.feature_mask) | self.kept  # [k, features]
        white = torch.randn(count, len(self.columns), generator=random, device=counted.device)
        noise = self.dense_noise * self._deviation() * self.changing * white
        if self.history_crop > 0:
            shares = torch.rand(count, len(self.places), generator=random, device=counted.device)
            embedded = self._cropped(embedded, 1 - self.history_crop * shares * ~self.kept)
        return self._perturb(embedded, keep, noise, random)

    def _cropped(self, embedded: Embedded, share: Tensor) -> Embedded:
        """The last events of each sequence, moved to the left; share: [k, features], the same for members of an ensemble."""
        sequences = {}
        for name, (values, mask) in embedded.sequences.items():
            length, place = mask.sum(1, keepdim=True), torch.arange(mask.shape[1], device=mask.device)
            left = (share[:, [self.places[name]]] * length).ceil().long()  # [k, 1]
            source = (place + length - left).clamp(max=mask.shape[1] - 1)  # [k, L]
            moved = values.gather(1, source[..., None].expand_as(values))
            sequences[name] = (moved * (place < left)[..., None], place < left)
        members = {name: self._cropped(part, share) for name, part in embedded.members.items()}
        return replace(embedded, sequences=sequences, members=members)

    def _perturb(self, embedded: Embedded, keep: Tensor, noise: Tensor, random: torch.Generator) -> Embedded:
        """One mask and one noise of the dense columns for all members of an ensemble."""
        dense = embedded.dense
        if self.columns:
            stretched = (self.scale - 1) * self.changing * (dense - self.default)
            dense = torch.where(keep[:, self.columns], dense + noise + stretched, self.default)
        sequences = {
            name: (self._masked(values, keep, [name], random), mask & keep[:, [self.places[name]]])
            for name, (values, mask) in embedded.sequences.items()
        }
        members = {name: self._perturb(part, keep, noise, random) for name, part in embedded.members.items()}
        tokens = self._masked(embedded.tokens, keep, embedded.names, random)
        return Embedded(tokens, embedded.names, sequences, dense, members)

    def _masked(self, values: Tensor, keep: Tensor, names: Sequence[str], random: torch.Generator) -> Tensor:
        """Embeddings [k, F, D] of F features, or the events [k, L, D] of one sequence."""
        places = [self.places[name] for name in names]
        changed = ~self.kept[places, None]  # [F, 1]
        factor = torch.where(changed, self.scale, 1.0) * keep[:, places, None]  # [k, F, 1]
        if self.emb_noise > 0:
            white = torch.randn(values.shape, generator=random, device=values.device)
            factor = factor * (1 + self.emb_noise * white * changed)
        return values * factor.to(values.dtype)

    @torch.no_grad()
    def _measure(self, dense: Tensor, counted: Tensor) -> None:
        values, weight = dense.double(), counted.double()[:, None]
        new = torch.stack([weight.expand_as(values).sum(0), (weight * values).sum(0), (weight * values**2).sum(0)])
        self.sums += global_sum(new)

    def _deviation(self) -> Tensor:
        rows, total, squares = self.sums / self.sums[0].clamp(min=1)[None]
        return (squares - total**2).clamp(min=0).sqrt().float() * (rows > 0)

    def _generator(self, part: str, device: torch.device) -> torch.Generator:
        """The train loop seeds torch anew in each step; where nobody does, calls are counted."""
        seed = torch.initial_seed()
        self._seen = (seed, self._seen[1] + 1 if seed == self._seen[0] else 0)
        return torch.Generator(device).manual_seed(hash64(f"{part}/{rank()}/{self._seen}"))


def map_rows(embedded: Embedded, function: Callable[[Tensor], Tensor]) -> Embedded:
    """`function` of every tensor of `embedded`, which all have a row of the batch in each row."""
    sequences = {name: (function(values), function(mask)) for name, (values, mask) in embedded.sequences.items()}
    members = {name: map_rows(member, function) for name, member in embedded.members.items()}
    return Embedded(function(embedded.tokens), embedded.names, sequences, function(embedded.dense), members)


def joined(first: Embedded, second: Embedded) -> Embedded:
    """The rows of both."""
    sequences = {
        name: (torch.cat([values, second.sequences[name][0]]), torch.cat([mask, second.sequences[name][1]]))
        for name, (values, mask) in first.sequences.items()
    }
    members = {name: joined(member, second.members[name]) for name, member in first.members.items()}
    tokens, dense = torch.cat([first.tokens, second.tokens]), torch.cat([first.dense, second.dense])
    return Embedded(tokens, first.names, sequences, dense, members)


def first_rows(output: Output, count: int, total: int) -> Output:
    """The first `count` of `total` rows; what has another length is not by row and stays."""
    return Output(
        output.logits[:count],
        output.shared[:count],
        output.hidden[:count],
        members={name: first_rows(member, count, total) for name, member in output.members.items()},
        extra={name: value[:count] if value.shape[:1] == (total,) else value for name, value in output.extra.items()},
    )


def _default(feature: DenseFeature) -> float:
    """What a null is after the feature's transform; the mean, where that is known after the transform only."""
    if feature.transform in ("standardize", "log_standardize"):
        return 0.0
    return (
        math.copysign(math.log1p(abs(feature.default)), feature.default)
        if feature.transform == "log"
        else feature.default
    )
