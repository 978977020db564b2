"""Where two tasks that conflict end up: the large gradient wins, the small one, or neither."""

from __future__ import annotations

import functools

import pytest
import torch

from raysys.objectives.balance import Balanced
from raysys.objectives.multibalance import MultiBalance
from raysys.objectives.supervised import Supervised
from raysys.objectives.weighting import MGDA
from raysys.schema import FeatureSchema

SCHEMA = FeatureSchema.from_dict({"labels": [{"name": "a"}, {"name": "b"}]})


def conflict(make, sigma, steps=4000):
    """Mean of the last 500 points of descent on ½ |r - (1, 0)|² and 50 |r - (-1, 0)|² from (0, 2), with noisy gradients."""
    objective, random = make(SCHEMA), torch.Generator().manual_seed(0)
    minima, factor = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[1.0], [100.0]])
    point, visited = torch.tensor([0.0, 2.0]), []
    for _ in range(steps):
        found = factor * (point - minima + sigma * torch.randn(2, 2, generator=random))
        if isinstance(objective, Balanced):
            direction = objective.direction(found[:, None], torch.ones(2))[0]
            direction = direction / (objective.magnitudes().sum() if isinstance(objective, MultiBalance) else 1)
        else:
            direction = found.sum(0) / 101
        point = point - 0.02 * direction
        visited.append(point)
    return torch.stack(visited[-500:]).mean(0).tolist()


CONFLICTS = {
    "sum": (Supervised, (-0.98, -0.98, -0.99)),
    "raw": (MGDA, (0.79, 0.79, 0.52)),
    **{
        rule: (functools.partial(MultiBalance, rule=rule, warmup_steps=0), (0.0, 0.0, -0.01))
        for rule in ("minnorm", "moco", "normeq")
    },
}


@pytest.mark.experiment
@pytest.mark.parametrize("name", CONFLICTS)
def test_where_two_conflicting_tasks_meet(name, record_figure):
    make, expected = CONFLICTS[name]
    for sigma, place in zip((0.0, 0.1, 0.5), expected, strict=True):
        x, y = conflict(make, sigma)
        record_figure(f"{name}, noise {sigma}", x, seed=0)
        assert x == pytest.approx(place, abs=0.01 if sigma == 0 else 0.03)
        assert abs(y) < 0.04


@pytest.mark.parametrize(("name", "place"), [("sum", -0.98), ("minnorm", 0.0), ("normeq", 0.0)])
def test_conflicting_tasks_meet_in_the_middle_where_magnitudes_are_balanced(name, place):
    x, _ = conflict(CONFLICTS[name][0], sigma=0.1, steps=1000)
    assert x == pytest.approx(place, abs=0.1)
