"""ESMM: the conversion rate after a click, learned over all impressions (Ma et al., SIGIR 2018)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysys.errors import UserError
from raysys.models.heads import Head, TaskTowers
from raysys.models.outputs import Output
from raysys.schema import Label


class ESMM(nn.Module):
    """With s the sigmoid and z of the head `inner`: p(click) = s(z_click), p(click and conversion) = s(z_click) s(z_conversion).

    The label `conversion` is that of all impressions, "clicked and converted": 0 where there was no click, not missing. The
    rate after a click, s(z_conversion), has no loss of its own; z_conversion is `Output.extra["conversion_given_click"]`.
    All other tasks are those of `inner` (None is `TaskTowers`). tower, activation, dropout: as in `Head`.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        inputs: int,
        *,
        click: str = "click",
        conversion: str = "conversion",
        inner: Head | None = None,
        tower: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if click == conversion:
            raise UserError(f"click and conversion are both {click!r}", "name two tasks")
        self.click = _binary_task(labels, "click", click)
        self.conversion = _binary_task(labels, "conversion", conversion)
        self.inner = (inner or TaskTowers)(labels, inputs, tower=tower, activation=activation, dropout=dropout)

    def forward(self, shared: Tensor) -> Output:
        """[B, inputs] → logits [B, T], that of `conversion` being of the product."""
        output: Output = self.inner(shared)
        columns = list(output.logits.unbind(1))
        after_click = columns[self.conversion]
        columns[self.conversion] = logit_of_product(columns[self.click], after_click)
        extra = output.extra | {"conversion_given_click": after_click}
        return dataclasses.replace(output, logits=torch.stack(columns, 1), extra=extra)


def logit_of_product(first: Tensor, second: Tensor) -> Tensor:
    """The logit of s(a) s(b), s the sigmoid: -log(e^-a + e^-b + e^(-a-b)), which is exact near 0 and 1, too."""
    a, b = first.float(), second.float()
    return -torch.logsumexp(torch.stack([-a, -b, -a - b]), 0).to(first.dtype)


def _binary_task(labels: Sequence[Label], key: str, name: str) -> int:
    names = [label.name for label in labels]
    if name not in names:
        raise UserError(f"ESMM needs a task for {key}, and there is no {name!r}", f"{key} can be {', '.join(names)}")
    if labels[names.index(name)].kind != "binary":
        raise UserError(f"ESMM needs a binary task for {key}, and {name!r} is a regression", "name another task")
    return names.index(name)
