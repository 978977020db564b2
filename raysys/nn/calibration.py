"""Corrections of predicted probabilities: for down-sampled negatives, and a fitted map (Platt, isotonic) per task.

Fitted maps are plain data (they go into a bundle as JSON) and apply to NumPy arrays and to tensors alike; computing is in
double precision in both, so training and serving agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.errors import UserError, nearest

Values = TypeVar("Values", NDArray[Any], Tensor)

EPSILON = 1e-12


def sigmoid(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + exp(-z)) that neither overflows nor loses small probabilities."""
    tail = np.exp(-np.abs(logit))
    return np.where(logit >= 0, 1.0, tail) / (1 + tail)


def correct_sampling(probability: Values, keep_rate: float) -> Values:
    """q = p / (p + (1 - p) / r): the probability on the full log, of a model trained with a share r of the negatives."""
    return probability / (probability + (1 - probability) / keep_rate)


@dataclass(frozen=True)
class Platt:
    """q = sigmoid(slope · logit(p) + intercept). The identity is slope 1, intercept 0."""

    slope: float
    intercept: float

    def __call__(self, probability: Values) -> Values:
        """Calibrated probabilities, of the shape and dtype of `probability`."""
        if isinstance(probability, Tensor):
            logit = torch.logit(probability.double(), eps=EPSILON)
            return torch.sigmoid(self.slope * logit + self.intercept).to(probability.dtype)
        p = np.clip(probability.astype(np.float64), EPSILON, 1 - EPSILON)
        return sigmoid(self.slope * (np.log(p) - np.log1p(-p)) + self.intercept).astype(probability.dtype)


@dataclass(frozen=True)
class Isotonic:
    """A non-decreasing piecewise linear map through the points (inputs, outputs), constant outside of them."""

    inputs: tuple[float, ...]
    outputs: tuple[float, ...]

    def __call__(self, probability: Values) -> Values:
        """Calibrated probabilities, of the shape and dtype of `probability`. Distinct predictions can become equal."""
        if isinstance(probability, Tensor):
            return self._on_tensor(probability)
        return np.interp(probability, self.inputs, self.outputs).astype(probability.dtype)

    def _on_tensor(self, probability: Tensor) -> Tensor:
        x, y = (torch.tensor(v, dtype=torch.float64, device=probability.device) for v in (self.inputs, self.outputs))
        if len(x) == 1:
            return torch.full_like(probability, self.outputs[0])
        p = probability.double().clamp(x[0], x[-1])
        right = torch.searchsorted(x, p.contiguous()).clamp(1, len(x) - 1)
        share = (p - x[right - 1]) / (x[right] - x[right - 1])
        return torch.lerp(y[right - 1], y[right], share).to(probability.dtype)


Calibrator = Platt | Isotonic

_KINDS: dict[str, type[Platt] | type[Isotonic]] = {"platt": Platt, "isotonic": Isotonic}


def calibration_to_dict(calibrators: Mapping[str, Calibrator]) -> dict[str, dict[str, Any]]:
    """Calibrators by task as plain data for JSON, to which `calibration_from_dict` is the way back, bit for bit."""
    names = {kind: name for name, kind in _KINDS.items()}
    return {task: {"kind": names[type(calibrator)], **asdict(calibrator)} for task, calibrator in calibrators.items()}


def calibration_from_dict(content: Mapping[str, Mapping[str, Any]]) -> dict[str, Calibrator]:
    """Calibrators by task from plain data."""
    calibrators: dict[str, Calibrator] = {}
    for task, state in content.items():
        if state["kind"] == "platt":
            calibrators[task] = Platt(float(state["slope"]), float(state["intercept"]))
        elif state["kind"] == "isotonic":
            calibrators[task] = Isotonic(tuple(state["inputs"]), tuple(state["outputs"]))
        else:
            raise UserError(
                f"calibration of task {task!r}: unknown kind {state['kind']!r}", nearest(state["kind"], _KINDS)
            )
    return calibrators
