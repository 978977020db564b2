"""Encoded rows to a `Batch` of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.data.rows import Jagged, Rows
from raysys.schema import FeatureSchema

Part = tuple[Rows, int, int]
"""Rows [start, stop) of encoded rows."""


class Collator:
    """Puts parts of encoded rows together into a batch; `single` names the features that are in `Rows.ids`."""

    def __init__(self, schema: FeatureSchema, single: Sequence[str]) -> None:
        self._schema = schema
        self._single = {name: row for row, name in enumerate(single)}

    def __call__(self, parts: Sequence[Part], size: int) -> Batch:
        """A batch of `size` rows: those of the parts, one after another, then padding."""
        schema, tasks = self._schema, len(self._schema.labels)

        def array(name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: int = 0) -> Tensor:
            return _fill([rows.arrays[name][start:stop] for rows, start, stop in parts], (size, *shape), dtype, fill)

        return Batch(
            dense=array("dense", (schema.dense_width,), torch.float32),  # [B, D]
            sparse=self._sparse(parts, size),
            labels=array("labels", (tasks,), torch.float32),  # [B, T]
            label_mask=array("label_mask", (tasks,), torch.bool),
            weight=array("weight", (tasks,), torch.float32),
            example_id=array("example_id", (), torch.int64, fill=-1),  # [B]
            group_id=array("group_id", (), torch.int64),
            time=array("time", (), torch.int64),
            weighted=_bags([feature.name for feature in schema.weighted], parts, size, weighted=True),
            sequences=_bags([feature.name for feature in schema.sequence_features], parts, size),
            extra=self._extra(parts, size),
        )

    def _sparse(self, parts: Sequence[Part], size: int) -> KeyedJaggedTensor:
        """The unweighted features; single ids are copied in blocks of all features: one by one is most of the work."""
        none = np.empty((len(self._single), 0), np.int64)  # for a batch of nothing but padding
        ids = np.concatenate([none, *(rows.ids[:, start:stop] for rows, start, stop in parts)], axis=1)  # [F, n]
        complete = bool(ids.min(initial=0) >= 0)
        keyed = _Keyed([feature.name for feature in self._schema.unweighted], size)
        for name in keyed.names:
            if name in self._single:
                keyed.add_single(ids[self._single[name]], complete)
            else:
                keyed.add_bags([(rows.bags[name], start, stop) for rows, start, stop in parts])
        return keyed.tensor()

    def _extra(self, parts: Sequence[Part], size: int) -> dict[str, Tensor | KeyedJaggedTensor]:
        extra: dict[str, Tensor | KeyedJaggedTensor] = {}
        for column in self._schema.extra:
            if column.kind == "ids":
                keyed = _Keyed([column.name], size)
                keyed.add_bags([(rows.extra_bags[column.name], start, stop) for rows, start, stop in parts])
                extra[column.name] = keyed.tensor()
            else:
                shape = (size, column.width) if column.kind == "vector" else (size,)
                dtype = torch.int64 if column.kind == "int" else torch.float32
                pieces = [rows.extra[column.name][start:stop] for rows, start, stop in parts]
                extra[column.name] = _fill(pieces, shape, dtype, 0)
        return extra


class _Keyed:
    """The keys of a `KeyedJaggedTensor`, added one after another in the order of `names`."""

    def __init__(self, names: list[str], size: int, weighted: bool = False) -> None:
        self.names = names
        self._lengths = np.zeros((len(names), size), np.int32)  # [F, B]
        self._values: list[NDArray[np.int64]] = []
        self._weights: list[NDArray[np.float32]] | None = [] if weighted else None
        self._length_per_key: list[int] = []

    def add_single(self, ids: NDArray[np.int64], complete: bool) -> None:
        """At most one id per row: -1 where there is none, unless `complete`."""
        present = True if complete else ids >= 0
        self._lengths[len(self._length_per_key), : len(ids)] = present
        self._values.append(ids if complete else ids[present])
        self._length_per_key.append(len(self._values[-1]))

    def add_bags(self, bags: list[tuple[Jagged, int, int]]) -> None:
        """Rows [start, stop) of each."""
        lengths, row, count = self._lengths[len(self._length_per_key)], 0, 0
        for bag, start, stop in bags:
            span = bag.span(start, stop)
            self._values.append(bag.values[span])
            if self._weights is not None:
                assert bag.weights is not None
                self._weights.append(bag.weights[span])
            lengths[row : row + stop - start] = bag.lengths[start:stop]
            row += stop - start
            count += len(self._values[-1])
        self._length_per_key.append(count)

    def tensor(self) -> KeyedJaggedTensor:
        """All keys together, weighted where that was asked for."""
        return KeyedJaggedTensor(
            keys=self.names,
            values=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *self._values])),
            weights=None
            if self._weights is None
            else torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *self._weights])),
            lengths=torch.from_numpy(self._lengths.reshape(-1)),
            stride=self._lengths.shape[1],
            length_per_key=self._length_per_key,  # known here; from a tensor on a GPU it would cost a synchronisation
        )


def _bags(names: list[str], parts: Sequence[Part], size: int, weighted: bool = False) -> KeyedJaggedTensor | None:
    if not names:
        return None
    keyed = _Keyed(names, size, weighted)
    for name in names:
        keyed.add_bags([(rows.bags[name], start, stop) for rows, start, stop in parts])
    return keyed.tensor()


def _fill(pieces: list[NDArray[Any]], shape: tuple[int, ...], dtype: torch.dtype, fill: int) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    array, rows = tensor.numpy(), sum(map(len, pieces))
    if pieces:
        np.concatenate(pieces, out=array[:rows])
    array[rows:] = fill
    return tensor
