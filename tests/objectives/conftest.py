"""What tests of several objectives share."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raysys.schema import DenseFeature, FeatureSchema, Label, Sequence, SequenceFeature, SparseFeature, Table


@pytest.fixture(scope="session")
def full_schema() -> FeatureSchema:
    """A feature of every kind that a perturbation knows: with a default, a missing flag, of side position, a history."""
    return FeatureSchema(
        tables=(Table("item", 30, 8), Table("user", 20, 8)),
        dense=(DenseFeature("age", default=2.0), DenseFeature("price", missing_flag=True)),
        sparse=(
            SparseFeature("user_id", "user", side="user"),
            SparseFeature("item_id", "item", side="item"),
            SparseFeature("place", "user", side="position"),
        ),
        sequences=(Sequence("history", (SequenceFeature("clicked", "item"),), max_length=5),),
        labels=(Label("click"), Label("like", required=False)),
    )


@pytest.fixture
def as_two_ranks() -> Callable[..., list[Any]]:
    """What `step(batch)` gives on each of two ranks that have the rows before and from `cut` on, without processes.

    patch(name, function) has the objective call `function` in place of the collective `name`. Each half runs alone first, which
    tells what its rank contributes to each sum; then once more with the totals.
    """

    def run(
        step: Callable[[Any], Any], batch: SimpleNamespace, cut: int, patch: Callable[[str, Any], None]
    ) -> list[Any]:
        halves, sums = [_part(batch, slice(0, cut)), _part(batch, slice(cut, None))], []
        for half in halves:
            calls: list[Tensor] = []
            patch("global_sum", lambda value, calls=calls: calls.append(value.detach()) or value.detach())
            step(half)
            sums.append(calls)
        totals, results = [sum(values) for values in zip(*sums, strict=True)], []
        patch("world_size", lambda: 2)
        for half in halves:
            left = iter(totals)
            patch("global_sum", lambda value, left=left: next(left))
            results.append(step(half))
        return results

    return run


def _part(batch: SimpleNamespace, places: slice) -> SimpleNamespace:
    columns = {name: value[places] for name, value in vars(batch).items() if name != "extra"}
    return SimpleNamespace(**columns, extra={name: value[places] for name, value in batch.extra.items()})


@pytest.fixture
def fit_convex() -> Callable[..., None]:
    """Bring a model to the optimum of an objective that is convex in its parameters."""

    def fit(model: nn.Module, objective: nn.Module, batch: Any, max_iter: int = 100) -> None:
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=max_iter, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = objective(model, batch, model.embed(batch))[0]
            loss.backward()
            return loss

        optimizer.step(closure)

    return fit
