"""The one batch type that models, objectives and the train loop see."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """B rows of a log, encoded. Rows of padding have weight 0, `example_id` -1 and empty bags.

    dense: [B, D] float32, the schema's dense features and then its missing flags.
    sparse: unweighted ids by feature; weighted: bags with a weight per id; sequences: ids by sequence feature.
    labels, label_mask, weight: [B, T]; a masked label is 0 with mask False and weight 0.
    example_id, group_id, time: [B] int64, `example_id` unique over the whole log.
    extra: the columns that the schema names as `extra`.
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
        """A copy on `device`."""
        return self._map(lambda value: value.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, so that the transfer to a GPU overlaps with computing."""
        return self._map(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors."""
        self._map(lambda value: value.record_stream(stream) or value)

    def _map(self, function) -> Batch:  # noqa: ANN001
        values = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, dict):
                values[f.name] = {key: function(item) for key, item in value.items()}
            else:
                values[f.name] = None if value is None else function(value)
        return Batch(**values)
