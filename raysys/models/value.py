"""What showing an item is worth: one formula for every stage of a ranking funnel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raysys.errors import UserError, nearest
from raysys.schema import FeatureSchema

Numbers = TypeVar("Numbers", bound=Any)
"""A tensor or an array; bids and all probabilities are of one kind and broadcast."""


@dataclass(frozen=True)
class Value:
    """V = bid · Π P(factor) + Σ_q w_q P(q). The order of a stage is that of V with its own probabilities.

    factors: tasks whose probabilities multiply the bid: [click] where a click is paid, [click, conversion] where that of
        `conversion` is P(conversion | click), [conversion] where it is P(click and conversion), [] where showing is paid.
    events: w_q by task, below 0 for what should not happen.

    Bids and w_q are settings of the business and no weights of a model: they may change without training.
    """

    factors: Sequence[str] = ()
    events: Mapping[str, float] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks whose probabilities it reads, each once."""
        return tuple(dict.fromkeys([*self.factors, *self.events]))

    def __call__(self, bid: Numbers, probabilities: Mapping[str, Numbers]) -> Numbers:
        """The value of each candidate, of the shape of `bid`."""
        value = bid
        for task in self.factors:
            value = value * probabilities[task]
        for task, weight in self.events.items():
            value = value + weight * probabilities[task]
        return value

    def check(self, schema: FeatureSchema, where: str) -> None:
        """Raise a `UserError` that names the key under `where` whose task is no binary one of the schema."""
        kinds = {label.name: label.kind for label in schema.labels}
        for key, tasks in (("factors", self.factors), ("events", self.events)):
            for task in tasks:
                if kinds.get(task) != "binary":
                    binary = [name for name, kind in kinds.items() if kind == "binary"]
                    raise UserError(f"{where}.{key}: no binary task {task!r} in {schema.source}", nearest(task, binary))
