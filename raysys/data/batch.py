"""The one batch type that models, objectives and the train loop see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass(eq=False)  # a batch is itself: comparing tensors has no truth value, and pipelines keep batches in dicts
class Batch(Pipelineable):
    """B rows of a log, encoded. Rows of padding have weight 0, `example_id` -1 and empty bags.

    dense: [B, D] float32, the schema's dense features and then its missing flags.
    sparse: unweighted ids by feature; weighted: bags with a weight per id; sequences: ids by sequence feature.
    labels, label_mask, weight: [B, T]; a masked label is 0 with mask False and weight 0.
    example_id, group_id, time: [B] int64, `example_id` unique over the whole log.
    extra: the columns that the schema names as `extra`.

    Ids are int64 and lengths int32, as in TorchRec's own data sets; `sparse` has no keys where the schema has no
    unweighted feature, `weighted` and `sequences` are None where the schema has none.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    labels: Tensor
    label_mask: Tensor
    weight: Tensor
    example_id: Tensor
    group_id: Tensor
    time: Tensor
    weighted: KeyedJaggedTensor | None = None
    sequences: KeyedJaggedTensor | None = None
    extra: dict[str, Tensor | KeyedJaggedTensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.dense.shape[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """A copy on `device`; the batch itself where it is there already."""
        if self.dense.device == device:
            return self
        return self._map(lambda value: value.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, so that the transfer to a GPU overlaps with computing."""
        return self._map(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors."""
        for value in self._values():
            value.record_stream(stream)

    def _map(self, function: Callable[[Any], Any]) -> Batch:
        values: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, dict):
                values[f.name] = {key: function(item) for key, item in value.items()}
            else:
                values[f.name] = None if value is None else function(value)
        return Batch(**values)

    def _values(self) -> list[Any]:
        values = [getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"]
        return [value for value in values if value is not None] + list(self.extra.values())
