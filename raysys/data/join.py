"""Rows of a batch taken out, and batches put one behind the other."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.data.columns import ranges


def append_rows(first: Batch, second: Batch) -> Batch:
    """The rows of both, of one schema and on the CPU, those of `first` first."""
    return _combine(first, second, lambda a, b: torch.cat([a, b]), _concatenate)


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    """The rows [n] of these numbers, in this order, of a batch on the CPU; a row may be taken several times."""
    return _combine(batch, batch, lambda a, _: a.index_select(0, rows), lambda a, _: _take(a, rows.numpy()))


def _combine(first: Batch, second: Batch, dense: Any, jagged: Any) -> Batch:
    def join(a: Any, b: Any) -> Any:
        if a is None:
            return None
        return jagged(a, b) if isinstance(a, KeyedJaggedTensor) else dense(a, b)

    values: dict[str, Any] = {}
    for field in dataclasses.fields(Batch):
        a, b = getattr(first, field.name), getattr(second, field.name)
        values[field.name] = {key: join(a[key], b[key]) for key in a} if isinstance(a, dict) else join(a, b)
    return Batch(**values)


def _concatenate(first: KeyedJaggedTensor, second: KeyedJaggedTensor) -> KeyedJaggedTensor:
    keys = first.keys()
    lengths = torch.cat([part.lengths().view(len(keys), part.stride()) for part in (first, second)], 1)  # [F, B1 + B2]
    weighted = first.weights_or_none() is not None
    return KeyedJaggedTensor(
        keys=keys,
        values=_interleave(first, second, first.values(), second.values()),
        weights=_interleave(first, second, first.weights(), second.weights()) if weighted else None,
        lengths=lengths.flatten(),
        stride=lengths.shape[1],
        length_per_key=[a + b for a, b in zip(first.length_per_key(), second.length_per_key(), strict=True)],
    )


def _interleave(first: KeyedJaggedTensor, second: KeyedJaggedTensor, a: Tensor, b: Tensor) -> Tensor:
    """Per key the values of the first, then those of the second."""
    pairs = zip(a.split(first.length_per_key()), b.split(second.length_per_key()), strict=True)
    return torch.cat([part for pair in pairs for part in pair] or [a])


def _take(jagged: KeyedJaggedTensor, rows: np.ndarray[Any, np.dtype[np.int64]]) -> KeyedJaggedTensor:
    keys = jagged.keys()
    lengths = jagged.lengths().view(len(keys), jagged.stride()).numpy()  # [F, B]
    starts = jagged.offsets()[:-1].view(len(keys), jagged.stride()).numpy()
    taken = lengths[:, rows]
    places = torch.from_numpy(ranges(starts[:, rows].ravel().astype(np.int64), taken.ravel().astype(np.int64)))
    weights = jagged.weights_or_none()
    return KeyedJaggedTensor(
        keys=keys,
        values=jagged.values()[places],
        weights=None if weights is None else weights[places],
        lengths=torch.from_numpy(taken.ravel()),
        stride=len(rows),
        length_per_key=taken.sum(1).tolist(),
    )
