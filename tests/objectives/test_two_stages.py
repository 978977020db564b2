"""Two stages of ranking, simulated: what an early model that sees half of the features gains from what it learns of."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raysys.models.outputs import Embedded, Output
from raysys.models.value import Value
from raysys.objectives.early_stage import EarlyStageLoss
from raysys.schema import ExtraColumn, FeatureSchema, Label
from raysys.train.funnel_metrics import recall_at

FEATURES, SEEN, REQUESTS, CANDIDATES, SHOWN, SCORED = 24, 12, 1000, 100, 3, 20
SCHEMA = FeatureSchema(
    labels=(Label("click", required=False), Label("hide", required=False)),
    extra=(ExtraColumn("final_click"), ExtraColumn("final_hide")),
)
FINAL = Value(["click"], {"hide": -1.0})
CLICKS = Value(["click"])
METHODS = {  # what it learns from, and the value that it ranks by, worst first
    "bid only": (None, Value()),
    "click, impressions": (0.0, CLICKS),
    "click and hide, impressions": (0.0, FINAL),
    "click, final stage": (1.0, CLICKS),
    "click and hide, final stage": (1.0, FINAL),
}


class Logistic(nn.Module):
    """A linear logit for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(SEEN, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def embed(self, batch) -> Embedded:
        return Embedded(torch.zeros(len(batch.dense), 0, 1), (), {}, batch.dense)

    def interact(self, embedded: Embedded) -> Tensor:
        return embedded.dense

    def predict(self, shared: Tensor) -> Output:
        return Output(self.head(shared), shared, shared[:, None])


def train(share: float, batch, fit_convex) -> Logistic:
    """To the optimum of the convex loss."""
    objective = EarlyStageLoss(
        SCHEMA, teachers={"click": "final_click", "hide": "final_hide"}, soft_share={"click": share, "hide": share}
    )
    model = Logistic()
    fit_convex(model, objective, batch, max_iter=60)
    return model


def simulate(seed: int, fit_convex) -> dict[str, tuple[float, float]]:
    """By method: Recall@(5,10) of 100 candidates, and the click's predicted over true probabilities on all of them."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(FEATURES, 2, generator=random)
    weights[SEEN:, 1] = 0  # what hides depend on is seen
    weights = 1.5 * weights / weights.norm(dim=0)
    x = torch.randn(2 * REQUESTS, CANDIDATES, FEATURES, generator=random)
    p = (x @ weights - 3).sigmoid()  # [requests, candidates, 2]
    bid = torch.exp(torch.randn(2 * REQUESTS, CANDIDATES, generator=random) / 2)
    value = FINAL(bid, {"click": p[..., 0], "hide": p[..., 1]})
    labels, seen = torch.bernoulli(p, generator=random), x[..., :SEEN]
    shown = value[:REQUESTS].topk(SHOWN).indices
    scored = torch.rand(REQUESTS, CANDIDATES, generator=random).topk(SCORED).indices
    batch = rows(chosen(seen, shown), chosen(labels, shown), chosen(seen, scored), chosen(p, scored))
    models = {share: train(share, batch, fit_convex) for share in (0.0, 1.0)}
    request = np.repeat(np.arange(REQUESTS), CANDIDATES)
    found = {}
    for name, (share, formula) in METHODS.items():
        early = torch.zeros_like(p[REQUESTS:])
        if share is not None:
            with torch.no_grad():
                early = models[share].head(seen[REQUESTS:]).sigmoid()
        score = formula(bid[REQUESTS:], {"click": early[..., 0], "hide": early[..., 1]})
        recall = recall_at(value[REQUESTS:].flatten(), score.flatten(), request, 5, 10)
        found[name] = recall, float(early[..., 0].sum() / p[REQUESTS:, :, 0].sum())
    return found


def chosen(values: Tensor, places: Tensor) -> Tensor:
    """The candidates at `places` of each training request, one after another."""
    index = places[..., None].expand(*places.shape, values.shape[2])
    return values[:REQUESTS].gather(1, index).flatten(0, 1)


def rows(x_shown: Tensor, labels: Tensor, x_scored: Tensor, p: Tensor) -> SimpleNamespace:
    """Impressions with labels, then candidates with the final stage's probabilities."""
    unlabelled, unscored = torch.zeros_like(p), torch.full_like(labels, torch.nan)
    final = torch.cat([unscored, p])
    mask = torch.cat([torch.ones_like(labels), unlabelled])
    return SimpleNamespace(
        dense=torch.cat([x_shown, x_scored]),
        labels=torch.cat([labels, unlabelled]),
        label_mask=mask.bool(),
        weight=mask,
        example_id=torch.arange(len(mask)),
        extra={"final_click": final[:, 0], "final_hide": final[:, 1]},
    )


def test_what_the_final_stage_says_of_all_candidates_beats_impressions_and_a_second_task_helps(
    record_figure, fit_convex
):
    """The order of the five methods holds for every seed; trained on impressions alone it over-predicts all others."""
    recalls: dict[str, list[float]] = {name: [] for name in METHODS}
    for seed in range(5):
        found = simulate(seed, fit_convex)
        for name, (recall, calibration) in found.items():
            recalls[name].append(recall)
            record_figure(f"{name}: recall", recall, seed=seed)
            record_figure(f"{name}: calibration", calibration, seed=seed)
        order = [recalls[name][-1] for name in METHODS]
        assert order == sorted(order)
        assert found["click, impressions"][1] > 2.5
        assert found["click, final stage"][1] == pytest.approx(1, abs=0.05)
    means = {name: float(np.mean(values)) for name, values in recalls.items()}
    # What an implementation in NumPy gave; recalls deviate by 0.07 between seeds, which draw other weights.
    expected = dict(zip(METHODS, (0.318, 0.470, 0.500, 0.585, 0.604), strict=True))
    assert means == pytest.approx(expected, abs=0.1)
