"""What the three steps of a ranking model hand on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Embedded:
    """B rows after the embedding lookup. Padded events of a sequence are zeros with mask False.

    tokens: [B, F, D], one per sparse feature, in the order of `names`, which belongs to a checkpoint.
    sequences: by the schema's name, [B, L, D] (oldest event first, padding at the end) and mask [B, L]; [B, L, CD] with the
    C columns of an event side by side in a model that separates them.
    dense: [B, Dd], as in the batch. members: what each member of an ensemble looked up for itself.
    """

    tokens: Tensor
    names: tuple[str, ...]
    sequences: dict[str, tuple[Tensor, Tensor]]
    dense: Tensor
    members: dict[str, Embedded] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> Embedded:
        """Rows [start, stop), as views."""
        return Embedded(
            self.tokens[start:stop],
            self.names,
            {name: (events[start:stop], mask[start:stop]) for name, (events, mask) in self.sequences.items()},
            self.dense[start:stop],
            {name: member.rows(start, stop) for name, member in self.members.items()},
        )


@dataclass
class Output:
    """Predictions for B rows and T tasks. `embedded` is set by who calls the steps.

    logits: [B, T], for a regression task the prediction itself. shared: [B, H], what `interact` gave.
    hidden: [B, T, H'], the last layer of each task's tower. members: the outputs of an ensemble's members.
    """

    logits: Tensor
    shared: Tensor
    hidden: Tensor
    embedded: Embedded | None = None
    members: dict[str, Output] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
