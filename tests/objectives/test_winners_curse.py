"""Why a funnel is miscalibrated, and what teaching on candidates mends: two simulations."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raysys.models.outputs import Embedded, Output
from raysys.objectives.ukdsl import UKDSL
from raysys.schema import DenseFeature, ExtraColumn, FeatureSchema, Label
from raysys.train.selection import calibration_by_depth

# --- Simulation A: selecting by a noisy estimate makes it too high for what was selected. ---

REQUEST = np.repeat(np.arange(4000), 200)

CALIBRATION = {
    0.0: (1.00, 1.00, 1.00, 1.00, 1.00),
    0.25: (1.08, 1.07, 1.06, 1.02, 1.00),
    0.5: (1.31, 1.28, 1.21, 1.07, 1.00),
    1.0: (2.23, 2.09, 1.78, 1.22, 1.00),
}


@pytest.mark.parametrize("noise", CALIBRATION)
def test_simulation_a_selection_makes_predictions_too_high(noise):
    random = np.random.default_rng(3)
    true = random.normal(-3, 1, (4000, 200))
    logit = true + random.normal(0, noise, true.shape)
    p = sigmoid(true)
    low, high = -10.0, 10.0
    for _ in range(30):  # the shift with which the mean prediction is right over all candidates
        shift = (low + high) / 2
        low, high = (low, shift) if sigmoid(logit + shift).mean() > p.mean() else (shift, high)
    tolerance = 0.1 if noise == 1.0 else 0.03
    assert selected_calibration(sigmoid(logit + shift), p) == pytest.approx(CALIBRATION[noise], abs=tolerance)
    variance = noise**2 / (1 + noise**2)  # of the true logit, given the noisy one
    points, weights = np.polynomial.hermite_e.hermegauss(21)
    mean = -3 + (logit + 3) / (1 + noise**2)
    posterior = sum(w * sigmoid(mean + variance**0.5 * x) for x, w in zip(points, weights / weights.sum(), strict=True))
    assert selected_calibration(posterior, p) == pytest.approx([1.0] * 5, abs=0.02)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def selected_calibration(prediction: np.ndarray, p: np.ndarray) -> list[float]:
    """Predicted over true for the k candidates of each request with the highest predictions, as the report shows it."""
    depths = calibration_by_depth(prediction.ravel(), p.ravel(), np.ones(p.size), REQUEST)
    return [depth["predicted"] / depth["reference"] for depth in depths]


# --- Simulation B: a student of an early stage, trained on impressions, or on candidates that the final stage scored. ---


SCHEMA = FeatureSchema(
    dense=tuple(DenseFeature(f"x{place}") for place in range(12)),
    labels=(Label("click", required=False),),
    extra=(ExtraColumn("final_click"),),
)


class Logistic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 1)

    def embed(self, batch) -> Embedded:
        return Embedded(torch.zeros(len(batch.dense), 0, 1), (), {}, batch.dense)

    def interact(self, embedded: Embedded) -> Tensor:
        return embedded.dense

    def predict(self, shared: Tensor) -> Output:
        return Output(self.head(shared), shared, shared[:, None])


def test_simulation_b_distillation_finds_more_of_the_final_top_and_is_calibrated(record_figure, fit_convex):
    recall: dict[str, list[float]] = {"impressions": [], "distilled": []}
    calibration: dict[str, list[float]] = {"impressions": [], "distilled": []}
    for seed in range(5):
        for name, (found, predicted_over_true) in two_stages(seed, fit_convex).items():
            recall[name].append(found)
            calibration[name].append(predicted_over_true)
            record_figure(f"{name}_recall", found, seed=seed)
            record_figure(f"{name}_calibration", predicted_over_true, seed=seed)
    assert all(after > before for before, after in zip(recall["impressions"], recall["distilled"], strict=True))
    assert np.mean(recall["impressions"]) == pytest.approx(0.470, abs=0.1)
    assert np.mean(recall["distilled"]) == pytest.approx(0.585, abs=0.1)
    assert np.mean(calibration["impressions"]) > 3
    assert calibration["distilled"] == pytest.approx([1] * 5, abs=0.05)


def two_stages(seed: int, fit_convex) -> dict[str, tuple[float, float]]:
    """Recall@(5,10) and calibration over all candidates of a student of impressions, and of one of final-stage scores."""
    random = torch.Generator().manual_seed(seed)
    click, quality = torch.randn(24, generator=random), torch.randn(24, generator=random)
    quality[12:] = 0
    click, quality = 1.5 * click / click.norm(), 1.5 * quality / quality.norm()
    x = torch.randn(2000, 100, 24, generator=random)
    p = (x @ click - 3).sigmoid()
    bid = torch.exp(0.5 * torch.randn(2000, 100, generator=random))
    value = bid * p - (x @ quality - 3).sigmoid()
    clicked = torch.bernoulli(p, generator=random)
    seen, train = x[..., :12], slice(0, 1000)
    shown = value[train].topk(3).indices
    kept = torch.rand(1000, 100, generator=random).topk(20).indices
    impressions = student_rows(gather(seen[train], shown), gather(clicked[train], shown), None)
    distilled = student_rows(gather(seen[train], kept), None, gather(p[train], kept))
    results = {}
    for name, batch in (("impressions", impressions), ("distilled", distilled)):
        model = Logistic()
        fit_convex(model, UKDSL(SCHEMA, teachers={"click": "final_click"}), batch)
        with torch.no_grad():
            predicted = model.head(seen[1000:])[..., 0].sigmoid()
        calibration = float(predicted.sum() / p[1000:].sum())
        results[name] = (recall_at(bid[1000:] * predicted, value[1000:]), calibration)
    return results


def gather(values: Tensor, places: Tensor) -> Tensor:
    index = places if values.dim() == 2 else places[..., None].expand(*places.shape, values.shape[2])
    return values.gather(1, index).flatten(0, 1)


def student_rows(x: Tensor, labels: Tensor | None, teacher: Tensor | None) -> SimpleNamespace:
    shown, blank = labels is not None, torch.full((len(x),), float("nan"))
    return SimpleNamespace(
        dense=x,
        labels=torch.zeros(len(x), 1) if labels is None else labels[:, None],
        label_mask=torch.full((len(x), 1), shown),
        weight=torch.full((len(x), 1), float(shown)),
        example_id=torch.arange(len(x)),
        extra={"final_click": blank if teacher is None else teacher},
    )


def recall_at(score: Tensor, value: Tensor) -> float:
    """The share of the final top 5 among the student's top 10."""
    top, candidates = value.topk(5).indices, score.topk(10).indices
    return float((top[..., None] == candidates[:, None]).any(2).float().mean())
