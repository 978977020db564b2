"""Copies of rows laid beside them before the lookup, with some of their ids left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch

COPIED = "copied_rows"
"""The entry of `Batch.extra` that says of which rows the last rows of a batch are copies: [k]."""


def with_copies(batch: Batch, rows: Tensor, features: Container[str], chance: float, random: torch.Generator) -> Batch:
    """The batch, and after its B rows copies of `rows` [k], in which each id of `features` is left out with a `chance`.

    To everyone else copies are rows of padding: without labels or weight, and with example id -1.
    """
    taken = torch.cat([torch.arange(len(batch), device=rows.device), rows])  # [B + k]
    own = torch.arange(len(taken), device=rows.device) < len(batch)

    def take(value: Any) -> Any:
        return _take_jagged(value, taken) if isinstance(value, KeyedJaggedTensor) else value[taken]

    def thinned(bags: KeyedJaggedTensor | None) -> KeyedJaggedTensor | None:
        return None if bags is None else _thin(_take_jagged(bags, taken), ~own, features, chance, random)

    sparse = thinned(batch.sparse)
    assert sparse is not None
    return dataclasses.replace(
        batch,
        **{name: take(getattr(batch, name)) for name in ("dense", "labels", "group_id", "time")},
        label_mask=batch.label_mask[taken] & own[:, None],
        weight=batch.weight[taken] * own[:, None],
        example_id=batch.example_id[taken].where(own, -1),
        sparse=sparse,
        weighted=thinned(batch.weighted),
        sequences=None if batch.sequences is None else take(batch.sequences),
        extra={name: take(value) for name, value in batch.extra.items()} | {COPIED: rows},
    )


def _take_jagged(bags: KeyedJaggedTensor, rows: Tensor) -> KeyedJaggedTensor:
    """The bags of these rows, for each key."""
    if not bags.keys():
        return bags
    lengths, starts = (
        part.view(len(bags.keys()), -1)[:, rows].flatten() for part in (bags.lengths(), bags.offsets()[:-1])
    )
    shift = starts - (lengths.cumsum(0) - lengths)  # from a value's place to where it stood before
    place = torch.arange(int(lengths.sum()), device=rows.device) + shift.repeat_interleave(lengths)
    weights = bags.weights_or_none()
    return KeyedJaggedTensor(
        bags.keys(), bags.values()[place], None if weights is None else weights[place], lengths=lengths
    )


def _thin(
    bags: KeyedJaggedTensor, rows: Tensor, features: Container[str], chance: float, random: torch.Generator
) -> KeyedJaggedTensor:
    """Without each id of `features` in the rows marked, [B] bool, with a chance."""
    if not bags.keys():
        return bags
    lengths = bags.lengths()  # [F · B]
    names = bags.keys()
    chosen = torch.tensor([name in features for name in names], device=rows.device)
    bag = torch.arange(len(lengths), device=rows.device).repeat_interleave(lengths)  # of each id
    drawn = torch.rand(len(bag), generator=random, device=rows.device) < chance
    kept = ~(drawn & (chosen[:, None] & rows).flatten()[bag])
    weights = bags.weights_or_none()
    return KeyedJaggedTensor(
        bags.keys(),
        bags.values()[kept],
        None if weights is None else weights[kept],
        lengths=torch.zeros_like(lengths).index_add(0, bag, kept.to(lengths.dtype)),
    )
