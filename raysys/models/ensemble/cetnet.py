"""CETNet: different models side by side, each with its own tables, fused by how sure each is (Liu et al. 2024, arXiv 2411.13700)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor, nn

from raysys.data.batch import Batch
from raysys.errors import UserError
from raysys.models.embeddings import Tables
from raysys.models.outputs import Embedded, Output
from raysys.models.ranking.base import RankingModel
from raysys.models.table_sets import TableSet
from raysys.nn.fusion import confidence_log_weights, fuse
from raysys.schema import FeatureSchema

_NAME = re.compile(r"[A-Za-z0-9]+(_[A-Za-z0-9]+)*")
_STEP = 4  # fbgemm's kernels take widths that are multiples of 4


class Members(nn.ModuleDict):
    """The models of an ensemble; called, they bring what the tables returned to the tokens of each.

    The tracer of TorchRec's pipelines takes that as one step.
    """

    def forward(self, *found: Any) -> Embedded:
        """What `Assembly` takes → an `Embedded` without tokens of its own."""
        dense: Tensor = found[-1]
        members = {name: cast(Any, member).assembly(*found) for name, member in self.items()}
        return Embedded(dense[:, :0, None], (), {}, dense, members)


class CETNet(nn.Module):
    """M ranking models on the same rows: p = Σ w_i p_i, w = softmax over the models of (negation entropy of p_i / τ).

    That each model has its own tables, and that negation entropy is the confidence, stands in the paper's abstract; its
    formulas were not seen: the temperature, the stopped gradient and the treatment of several tasks are our choice. Below
    p = ½ sure means low, so at a low base rate the fused prediction is biased downwards: look at its calibration.

    members: a model of each name, built by `members[name](schema, seed=..., device=...)`; in a config a node with `_partial_`.
        Member i gets seed + i, so that two of one kind differ; one member alone is the bare model, bit for bit.
    temperature: τ; the larger, the closer to the mean. uniform: w_i = 1/M instead. A regression task is the plain mean.
    detach_weights: no gradient through the weights, so that no model lowers the loss by being too sure.
    width_share: the width of a member's tables as a share of the schema's, up to a multiple of 4; None is 1/M, so that all
        members' tables have the memory of one model's. shared_tables: all members read one set of tables of full width.

    The members' tables `<member>__<table>` live in joint collections. The model itself has no parameter.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        members: Mapping[str, Callable[..., RankingModel]],
        temperature: float = 1.0,
        uniform: bool = False,
        detach_weights: bool = True,
        width_share: float | None = None,
        shared_tables: bool = False,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        _check(members, temperature, width_share)
        self.temperature, self.uniform, self.detach_weights = temperature, uniform, detach_weights
        share = 1.0 if shared_tables else 1 / len(members) if width_share is None else width_share
        own_schema = _narrowed(schema, share)
        self.members = Members()
        sets = []
        for place, (name, build) in enumerate(members.items()):
            member = _built(name, build, schema=own_schema, seed=seed + place)
            sets.append(dataclasses.replace(member.embeddings.sets[0], prefix=f"{name}__"))
            self.members[name] = member
        self.tables = Tables([_joined(sets, seed)] if shared_tables else sets, device)
        for place, (name, own) in enumerate(zip(self.members, sets, strict=True)):
            part, member = self.tables.sets[0 if shared_tables else place], self._member(name)
            dim = member.embeddings.embedding_dim
            del member.embeddings  # its tables were on the meta device: plain numbers
            member.assembly = self.tables.make_assembly(part, dim, own)
            if any(parameter.is_meta for parameter in member.parameters()):
                raise UserError(f"members.{name} has tables besides its `embeddings`", "it cannot be a member")
        binary = torch.tensor([label.kind == "binary" for label in schema.labels])
        self.binary: Tensor
        self.register_buffer("binary", binary, persistent=False)

    @property
    def reads_sequences(self) -> bool:
        """Whether a member does, whatever tokens are made of them."""
        return any(self._member(name).reads_sequences for name in self.members)

    def embed(self, batch: Batch) -> Embedded:
        """What each member looked up, in `members`; one call of each joint collection."""
        return self.members(*self.tables.look_up(batch), batch.dense)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: the members' shared representations side by side."""
        return torch.cat([self._member(name).interact(embedded.members[name]) for name in self.members], 1)

    def predict(self, shared: Tensor) -> Output:
        """Fused logits [B, T], the members' outputs, their last layers side by side, and `extra["fusion_weights"]` [B, T, M]."""
        widths = [self._member(name).shared_width for name in self.members]
        parts = zip(self.members, shared.split(widths, 1), strict=True)
        members = {name: self._member(name).predict(part) for name, part in parts}
        logits = torch.stack([member.logits for member in members.values()], 2)  # [B, T, M]
        fused, weights = self._fused(logits.float())
        hidden = torch.cat([member.hidden for member in members.values()], 2)
        return Output(fused.to(logits.dtype), shared, hidden, members=members, extra={"fusion_weights": weights})

    def forward(self, batch: Batch) -> Output:
        """The three steps in a row."""
        embedded = self.embed(batch)
        output = self.predict(self.interact(embedded))
        output.embedded = embedded
        return output

    def _fused(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, M] → the fused logits [B, T] and the weights."""
        if self.uniform:
            log_weights = torch.full_like(logits, 1 / logits.shape[2]).log()
        else:
            log_weights = confidence_log_weights(logits, self.temperature)
        if self.detach_weights:
            log_weights = log_weights.detach()
        fused = torch.where(self.binary, fuse(logits, log_weights), logits.mean(2))
        weights = torch.where(self.binary[:, None], log_weights.detach().exp(), 1 / logits.shape[2])
        return fused, weights

    def _member(self, name: str) -> Any:
        return self.members[name]


def _built(name: str, build: Callable[..., RankingModel], **arguments: Any) -> RankingModel:
    """A member with its tables on the meta device."""
    if not callable(build):
        raise UserError(f"members.{name} is {build!r}", "a node with a _target_ and _partial_: true is expected")
    given = build.keywords.keys() & {"schema", "seed", "device"} if isinstance(build, partial) else ()
    for key in given:
        raise UserError(f"members.{name}.{key} is given", "the ensemble gives it: leave it out")
    try:
        member = build(**arguments, device="meta")
    except UserError as error:
        raise UserError(f"members.{name}: {error.message}", error.hint) from None
    if not isinstance(member, RankingModel):
        raise UserError(
            f"members.{name} is a {type(member).__name__}", "a raysys.models.ranking.base.RankingModel is expected"
        )
    return member


def _joined(sets: list[TableSet], seed: int) -> TableSet:
    """One set of tables for all members."""
    scales = {part.init_scale for part in sets}
    if len(scales) > 1:
        raise UserError(
            f"shared_tables: members have init_scale {', '.join(map(str, scales))}", "give all of them the same"
        )
    return TableSet(sets[0].schema, seed, sets[0].init_scale, any(part.use_sequences for part in sets))


def _narrowed(schema: FeatureSchema, share: float) -> FeatureSchema:
    """The schema with tables of a share of their width."""
    if share == 1:
        return schema
    tables = (
        dataclasses.replace(table, embedding_dim=_STEP * ceil(table.embedding_dim * share / _STEP))
        for table in schema.tables
    )
    return dataclasses.replace(schema, tables=tuple(tables))


def _check(members: Mapping[str, Any], temperature: float, width_share: float | None) -> None:
    if not members:
        raise UserError("members is empty", "name at least one: members={dhen: {_target_: ..., _partial_: true}}")
    for name in members:
        if not _NAME.fullmatch(name) or hasattr(nn.ModuleDict, name):
            raise UserError(
                f"a member cannot be named {name!r}",
                "letters and digits, single underscores between, no word of torch's",
            )
    if not temperature > 0:
        raise UserError(
            f"temperature is {temperature}", "a positive number is expected; the larger, the closer to the mean"
        )
    if width_share is not None and not 0 < width_share <= 1:
        raise UserError(f"width_share is {width_share}", "a number above 0, at most 1, is expected, or null for 1/M")
