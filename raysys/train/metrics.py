"""Metrics over all ranks: `Evaluator` for a whole split, `WindowMetrics` for the steps since the last log line.

Both take the model's logits with the batch they belong to; the mathematics is in `ranking_metrics`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.nn.calibration import Calibrator, correct_sampling, sigmoid
from raysys.nn.collectives import communication_device, gather_rows, global_sum, on_first_rank, rank, world_size
from raysys.schema import FeatureSchema
from raysys.train.calibration import Method, fit_calibrator
from raysys.train.ranking_metrics import EPSILON, auc, binary_metrics, calibration_bins, entropy, regression_metrics
from raysys.train.selection import calibration_by_depth
from raysys.train.slices import TaskMetrics, check_slices, slice_ids, slice_rows

if TYPE_CHECKING:
    from raysys.data.batch import Batch

_PADDING = -1  # the example id of a row of padding
_AUC_ROWS = 1 << 14
_FOLD_ROWS = 1 << 17


class Evaluator:
    """Exact metrics of a split per task and slice: on any number of ranks what one process would report, bit for bit.

    Every rank keeps its rows on the CPU, 12 bytes per task and 16 + 8 per slice column a row; `compute` brings all rows to
    rank 0, which sorts them by example id. Rows of padding are dropped. A task counts its rows of positive weight.

    slices: sparse features of one id (`max_length` 1) or extra columns of kind `int`.
    group: whether to report GAUC; it is NaN where the schema has no `group_id`.
    corrected: undo the down-sampling of negatives (`Label.negative_keep_rate`): False for rows that were sampled, too.
    calibration: fitted maps by task, applied last.
    teachers: column of a teacher's probabilities, a float extra, by task: adds 4 bytes a row, and the calibration by depth of
        selection, where the schema has a `group_id`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        slices: Sequence[str] = (),
        group: bool = True,
        corrected: bool = True,
        calibration: Mapping[str, Calibrator] | None = None,
        teachers: Mapping[str, str] | None = None,
    ) -> None:
        check_slices(schema, slices)
        self._schema, self._slices, self._corrected = schema, tuple(slices), corrected
        self._group = group and schema.group_id is not None
        self._calibration, self._teachers = dict(calibration or {}), dict(teachers or {})
        self._ids: list[Tensor] = [torch.empty(0, 2 + len(slices), dtype=torch.int64)]
        self._values: list[Tensor] = [torch.empty(0, 3 * len(schema.tasks) + len(self._teachers))]

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Add the rows of one batch; logits [B, T] in the order of the schema's labels."""
        ids = torch.stack([batch.example_id, batch.group_id, *(slice_ids(batch, name) for name in self._slices)], 1)
        scores = logits.detach().float().to(batch.labels.device)
        teachers = [cast(Tensor, batch.extra[column]).float()[:, None] for column in self._teachers.values()]
        values = torch.cat([scores, batch.labels.float(), batch.weight.float(), *teachers], 1)
        ids, values = ids.cpu(), values.cpu()
        real = ids[:, 0] != _PADDING
        self._ids.append(ids[real])
        self._values.append(values[real])

    def compute(self) -> dict[str, Any]:
        """The metrics of all rows so far, the same on every rank (collective).

        {"tasks": {task: {metric: value}}, "slices": {column: {id: {task: {metric: value}}}}, "calibration_curve": {task:
        [{prediction, label, weight}]}, "selection": {task: {labels: [...], teacher: [...]}}}; ids of slices are encoded
        (`named_slices` translates), selection is of tasks with a teacher (`_selection`). Undefined values are NaN.
        """
        rows = self._gathered()
        return on_first_rank(lambda: self._report(*rows))

    def fit_calibration(self, method: Method) -> dict[str, Calibrator]:
        """A map per binary task, fitted on all rows so far and the same on every rank (collective)."""
        rows = self._gathered()
        return on_first_rank(lambda: self._fit(method, rows[1]))

    def predictions(self) -> pa.Table:
        """This rank's rows: example_id and per task `_label` (null where its weight is 0), `_probability` and `_weight`.

        Probabilities are those that the metrics see, after all corrections; of a regression task it is the prediction.
        """
        values = torch.cat(self._values).numpy()
        columns: dict[str, Any] = {"example_id": torch.cat(self._ids)[:, 0].numpy()}
        for i, task in enumerate(self._schema.tasks):
            prediction, label, weight = self._columns(values, i)
            columns[f"{task}_label"] = pa.array(label, mask=weight == 0)
            columns[f"{task}_probability"] = prediction
            columns[f"{task}_weight"] = weight
        return pa.table(columns)

    def _gathered(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All ranks' rows in the order of their example ids; on ranks but the first nothing."""
        ids, values = gather_rows(torch.cat(self._ids)), gather_rows(torch.cat(self._values))
        if ids is None or values is None:
            return np.empty((0, 0), np.int64), np.empty((0, 0), np.float32)
        order = np.argsort(ids[:, 0].numpy(), kind="stable")
        return ids.numpy()[order], values.numpy()[order]

    def _columns(
        self, values: NDArray[np.float32], task: int, calibrated: bool = True
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Prediction, label and weight of a task, [n] each."""
        label, tasks = self._schema.labels[task], len(self._schema.tasks)
        prediction, target, weight = (values[:, task + i * tasks].astype(np.float64) for i in range(3))
        if label.kind == "binary":
            prediction = sigmoid(prediction)
            if self._corrected and label.negative_keep_rate < 1:
                prediction = correct_sampling(prediction, label.negative_keep_rate)
            if calibrated and label.name in self._calibration:
                prediction = self._calibration[label.name](prediction)
        return prediction, target, weight

    def _report(self, ids: NDArray[np.int64], values: NDArray[np.float32]) -> dict[str, Any]:
        columns = {label.name: self._columns(values, i) for i, label in enumerate(self._schema.labels)}
        curves = {}
        for label in self._schema.labels:
            if label.kind == "binary":
                prediction, target, weight = columns[label.name]
                bins = calibration_bins(target, prediction, weight)
                curves[label.name] = [
                    dict(zip(bins._fields, map(float, row), strict=True)) for row in zip(*bins, strict=True)
                ]
        return {
            "tasks": self._task_metrics(columns, ids, slice(None)),
            "slices": {
                name: {value: self._task_metrics(columns, ids, rows) for value, rows in slice_rows(ids[:, 2 + i])}
                for i, name in enumerate(self._slices)
            },
            "calibration_curve": curves,
            "selection": self._selection(columns, ids[:, 1], values) if self._group else {},
        }

    def _selection(
        self, columns: Mapping[str, tuple[NDArray[np.float64], ...]], request: NDArray[np.int64], values: Any
    ) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Calibration by depth in the request's order of predictions: of rows with a label to it, of others to the teacher."""
        found = {}
        for place, task in enumerate(self._teachers, 3 * len(self._schema.tasks)):
            prediction, label, weight = columns[task]
            teacher = values[:, place].astype(np.float64)
            taught = (weight == 0) & ~np.isnan(teacher)
            found[task] = {
                "labels": calibration_by_depth(prediction, label, weight, request),
                "teacher": calibration_by_depth(prediction, teacher, taught, request),
            }
        return found

    def _task_metrics(
        self, columns: Mapping[str, tuple[NDArray[np.float64], ...]], ids: NDArray[np.int64], rows: Any
    ) -> TaskMetrics:
        metrics: TaskMetrics = {}
        for label in self._schema.labels:
            prediction, target, weight = (column[rows] for column in columns[label.name])
            counted = weight > 0
            prediction, target, weight = prediction[counted], target[counted], weight[counted]
            if label.kind == "binary":
                group = ids[rows, 1][counted] if self._group else None
                metrics[label.name] = binary_metrics(target, prediction, weight, group)
            else:
                metrics[label.name] = regression_metrics(target, prediction, weight)
        return metrics

    def _fit(self, method: Method, values: NDArray[np.float32]) -> dict[str, Calibrator]:
        calibrators = {}
        for i, label in enumerate(self._schema.labels):
            if label.kind == "binary":
                prediction, target, weight = self._columns(values, i, calibrated=False)
                calibrators[label.name] = fit_calibrator(method, label.name, target, prediction, weight)
        return calibrators


class WindowMetrics:
    """Training metrics of the rows since the last `compute`; AUC is over the `auc_rows` most recent rows of each rank.

    A step costs no kernel and no synchronisation: tensors are kept where they are and summed up, on their device, once some
    hundred thousand rows have come together. Rows of weight 0 (padding, masked labels) do not count.
    """

    def __init__(self, schema: FeatureSchema, auc_rows: int = _AUC_ROWS) -> None:
        self._labels = schema.labels
        self._auc_rows = auc_rows
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._recent: deque[tuple[Tensor, Tensor, Tensor]] = deque()
        self._pending_rows, self._recent_rows = 0, 0
        self._sums = self._no_sums()

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Add one step's rows; logits [B, T]."""
        step = (logits.detach(), batch.labels, batch.weight)
        self._pending.append(step)
        self._pending_rows += len(logits)
        self._recent.append(step)
        self._recent_rows += len(logits)
        while self._recent_rows - len(self._recent[0][0]) >= self._auc_rows:
            self._recent_rows -= len(self._recent.popleft()[0])
        if self._pending_rows >= _FOLD_ROWS:
            self._fold()

    def compute(self) -> TaskMetrics:
        """{task: {ne, auc, log_loss, calibration, base_rate, rows}} or {rmse, rows}, the same on every rank (collective)."""
        self._fold()
        sums, rows = self._global_sums(), gather_rows(self._recent_values())
        self._sums = self._no_sums()
        return on_first_rank(lambda: self._report(sums, rows))

    def state(self) -> dict[str, Tensor]:
        """`sums` [5, T] of all ranks and `recent` [n, 3T], the rows for AUC in the order of their steps (collective).

        Whole on rank 0, on the CPU. Asks for what the reader sees to: the ranks' batches of a step have one size.
        """
        self._fold()
        sums, rows = self._global_sums(), gather_rows(self._recent_values())
        if rows is None:
            return {"sums": sums}
        by_step = rows.unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(0, 1)  # [n, 3T]
        return {"sums": sums, "recent": by_step.contiguous()}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Go on from a state; device: of the logits that will come.

        Exact on the same number of ranks, and on another one until the state's rows exceed `auc_rows` per rank: the window
        of AUC is as long as the ranks' windows together, and fills up again.
        """
        self._pending, self._pending_rows = [], 0
        self._sums = state["sums"] if rank() == 0 else self._no_sums()
        own = state["recent"][rank() :: world_size()][-self._auc_rows :].to(device)
        logits, labels, weight = own.split(len(self._labels), 1)
        self._recent = deque([(logits, labels, weight)])
        self._recent_rows = len(own)

    def _global_sums(self) -> Tensor:
        return global_sum(self._sums.to(communication_device())).cpu()

    def _recent_values(self) -> Tensor:
        """Logits, labels and weights of this rank's rows for AUC, [n, 3T]."""
        columns = 3 * len(self._labels)
        rows = torch.cat([torch.cat(step, 1).float() for step in self._recent] or [torch.empty(0, columns)])
        return rows[-self._auc_rows :]

    def _no_sums(self) -> Tensor:
        return torch.zeros(5, len(self._labels), dtype=torch.float64)

    def _fold(self) -> None:
        """Add the pending rows to the running sums of weight, weighted loss, prediction and label, and rows: [5, T]."""
        if not self._pending:
            return
        z, y, w = (torch.cat(part).double() for part in zip(*self._pending, strict=True))  # [n, T]
        self._pending, self._pending_rows = [], 0
        binary = torch.tensor([label.kind == "binary" for label in self._labels], device=z.device)
        prediction = torch.where(binary, z.sigmoid(), z)
        p = prediction.clamp(EPSILON, 1 - EPSILON)
        loss = torch.where(binary, -y * p.log() - (1 - y) * (-p).log1p(), (z - y).square())
        sums = torch.stack([w, w * loss, w * prediction, w * y, (w > 0).double()]).sum(1)
        self._sums = self._sums.to(z.device) + sums

    def _report(self, sums: Tensor, rows: Tensor | None) -> TaskMetrics:
        assert rows is not None  # rank 0
        metrics: TaskMetrics = {}
        tasks = len(self._labels)
        for i, label in enumerate(self._labels):
            weight, loss, predicted, observed, count = (float(value) for value in sums[:, i])
            mean_loss = _ratio(loss, weight)
            if label.kind == "binary":
                rate = _ratio(observed, weight)
                score, target, mass = (rows[:, i + j * tasks].numpy() for j in range(3))
                metrics[label.name] = {
                    "ne": _ratio(mean_loss, entropy(rate)),
                    "auc": auc(target, score, mass),
                    "log_loss": mean_loss,
                    "calibration": _ratio(predicted, observed),
                    "base_rate": rate,
                    "rows": int(count),
                }
            else:
                metrics[label.name] = {"rmse": mean_loss**0.5, "rows": int(count)}
        return metrics


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("nan")
