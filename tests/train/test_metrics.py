from __future__ import annotations

import datetime
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raysys.errors import UserError
from raysys.nn.calibration import Platt
from raysys.schema import FeatureSchema
from raysys.train import slices
from raysys.train.metrics import Evaluator, WindowMetrics
from raysys.train.ranking_metrics import auc, binary_metrics, expected_calibration_error, regression_metrics

RANKS, ROWS, BATCH = 3, 700, 128
SCHEMA = FeatureSchema.from_dict(
    {
        "tables": {"country": {"num_embeddings": 10}, "tag": {"num_embeddings": 10}},
        "sparse": [{"name": "country", "table": "country"}, {"name": "tags", "table": "tag", "max_length": 5}],
        "labels": [
            {"name": "click", "negative_keep_rate": 0.5},
            {"name": "dwell", "kind": "regression", "required": False},
            {"name": "like", "required": False},
        ],
        "extra": [{"name": "surface", "kind": "int"}],
        "group_id": "user",
    }
)


def make_rows() -> dict[str, torch.Tensor]:
    """A log with three tasks: `dwell` masked in places, `like` without a positive."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, 3, generator=random)
    labels = torch.stack(
        [
            (torch.rand(ROWS, generator=random) < logits[:, 0].sigmoid()).float(),
            logits[:, 1] + torch.randn(ROWS, generator=random),
            torch.zeros(ROWS),
        ],
        1,
    )
    weight = torch.rand(ROWS, 3, generator=random) + 0.5
    weight[::3, 1] = 0
    return {
        "logits": logits,
        "labels": labels * (weight > 0),
        "weight": weight,
        "example_id": torch.randperm(ROWS, generator=random),
        "group_id": torch.randint(0, 60, (ROWS,), generator=random),
        "surface": torch.randint(0, 3, (ROWS,), generator=random),
    }


def batches(rows: dict[str, torch.Tensor], padding: int = 5) -> list[SimpleNamespace]:
    """The rows cut into batches that end with padding, as far as `Evaluator` looks at them."""
    cut = []
    for start in range(0, len(rows["logits"]), BATCH):
        part = {name: column[start : start + BATCH] for name, column in rows.items()}
        fill = {"logits": 99.0, "example_id": -1}
        part = {
            name: torch.cat([column, torch.full((padding, *column.shape[1:]), fill.get(name, 0)).to(column.dtype)])
            for name, column in part.items()
        }
        cut.append(SimpleNamespace(**part, extra={"surface": part["surface"]}))
    return cut


def rows_of_rank(rank: int) -> dict[str, torch.Tensor]:
    """Unequal shares; the last rank has none."""
    share = [slice(0, 450), slice(450, ROWS), slice(0, 0)][rank]
    return {name: column[share] for name, column in make_rows().items()}


def evaluated(rows: dict[str, torch.Tensor], **options) -> Evaluator:
    evaluator = Evaluator(SCHEMA, **options)
    for batch in batches(rows):
        evaluator.update(batch.logits, batch)
    return evaluator


def windowed(rows: dict[str, torch.Tensor], **options) -> WindowMetrics:
    window = WindowMetrics(SCHEMA, **options)
    for batch in batches(rows):
        window.update(batch.logits, batch)
    return window


def work(rank: int, folder: Path) -> None:
    """One rank of the process group: everything that is collective, left in a file."""
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=limit)
    evaluator = evaluated(rows_of_rank(rank), slices=["surface"])
    result = {"metrics": evaluator.compute(), "window": windowed(rows_of_rank(rank)).compute()}
    rows = rows_of_rank(rank)
    rows["labels"][:, 2] = rows["labels"][:, 0]  # `like` needs both classes for a fit
    result["platt"] = evaluated(rows).fit_calibration("platt")
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, folder], env=environment, check=True, timeout=120)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def test_three_ranks_report_what_one_process_reports(results):
    expected = evaluated(make_rows(), slices=["surface"]).compute()
    for result in results:
        assert repr(result["metrics"]) == repr(expected)  # bit for bit, NaN included


def test_three_ranks_fit_what_one_process_fits(results):
    rows = make_rows()
    rows["labels"][:, 2] = rows["labels"][:, 0]
    assert [result["platt"] for result in results] == [evaluated(rows).fit_calibration("platt")] * RANKS


def test_three_ranks_have_the_window_of_one_process(results):
    expected = windowed(make_rows()).compute()
    for result in results:
        assert result["window"].keys() == expected.keys()
        for task, metrics in expected.items():
            assert result["window"][task] == pytest.approx(metrics, rel=1e-9, nan_ok=True)


def click(rows: dict[str, torch.Tensor], corrected: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, probability and weight by other means."""
    p = rows["logits"][:, 0].double().sigmoid().numpy()
    p = p / (p + (1 - p) / 0.5) if corrected else p
    return rows["labels"][:, 0].double().numpy(), p, rows["weight"][:, 0].double().numpy()


@pytest.mark.parametrize("corrected", [True, False])
def test_metrics_are_those_of_the_rows_without_padding(corrected):
    from sklearn.metrics import roc_auc_score

    rows = make_rows()
    tasks = evaluated(rows, corrected=corrected).compute()["tasks"]
    label, p, weight = click(rows, corrected)
    assert tasks["click"] == pytest.approx(binary_metrics(label, p, weight, rows["group_id"].numpy()), rel=1e-9)
    assert tasks["click"]["auc"] == pytest.approx(roc_auc_score(label, p, sample_weight=weight), abs=1e-12)
    dwell = (column[:, 1].double().numpy() for column in (rows["labels"], rows["logits"], rows["weight"]))
    assert tasks["dwell"] == pytest.approx(regression_metrics(*dwell), rel=1e-9)
    assert tasks["dwell"]["rows"] == ROWS - len(range(0, ROWS, 3))
    assert {name for name, value in tasks["like"].items() if math.isnan(value)} == {"ne", "auc", "gauc", "calibration"}


def test_fitted_calibration_comes_after_the_correction():
    rows = make_rows()
    platt = Platt(0.5, -0.2)
    label, p, weight = click(rows, corrected=True)
    result = evaluated(rows, calibration={"click": platt}).compute()
    assert result["tasks"]["click"]["log_loss"] == pytest.approx(binary_metrics(label, platt(p), weight)["log_loss"])
    curve = result["calibration_curve"]["click"]
    assert set(result["calibration_curve"]) == {"click", "like"}
    errors = [point["weight"] * abs(point["prediction"] - point["label"]) for point in curve]
    assert sum(errors) / weight.sum() == pytest.approx(expected_calibration_error(label, platt(p), weight))


def test_a_fit_does_not_see_the_calibration_in_use():
    rows = make_rows()
    rows["labels"][:, 2] = rows["labels"][:, 0]
    fitted = evaluated(rows, calibration={"click": Platt(0.5, -0.2)}).fit_calibration("platt")
    assert fitted == evaluated(rows).fit_calibration("platt")
    assert list(fitted) == ["click", "like"]


def test_gauc_needs_a_group():
    assert math.isnan(evaluated(make_rows(), group=False).compute()["tasks"]["click"]["gauc"])


def test_slices_are_evaluations_of_their_rows():
    rows = make_rows()
    found = evaluated(rows, slices=["surface"]).compute()["slices"]["surface"]
    assert sorted(found) == [0, 1, 2]
    for value, tasks in found.items():
        part = {name: column[rows["surface"] == value] for name, column in rows.items()}
        expected = evaluated(part).compute()["tasks"]
        for task, metrics in expected.items():
            assert tasks[task] == pytest.approx(metrics, rel=1e-12, nan_ok=True)


def test_an_evaluator_without_rows_reports_nan():
    result = Evaluator(SCHEMA, slices=["surface"]).compute()
    assert result["tasks"]["click"].pop("rows") == 0
    assert all(math.isnan(value) for value in result["tasks"]["click"].values())
    assert result["slices"] == {"surface": {}}
    assert result["calibration_curve"] == {"click": [], "like": []}
    assert Evaluator(SCHEMA).predictions().num_rows == 0


def test_predictions_hold_what_the_metrics_saw():
    rows = make_rows()
    evaluator = evaluated(rows)
    table = evaluator.predictions()
    assert table.column_names == [
        "example_id",
        *(f"{task}_{part}" for task in SCHEMA.tasks for part in ("label", "probability", "weight")),
    ]
    assert table["example_id"].to_pylist() == rows["example_id"].tolist()
    assert table["dwell_label"].null_count == len(range(0, ROWS, 3))
    columns = [table[f"click_{part}"].to_numpy() for part in ("label", "probability", "weight")]
    assert auc(*columns) == pytest.approx(evaluator.compute()["tasks"]["click"]["auc"], abs=1e-12)


def test_slices_by_a_sparse_feature_and_its_raw_values():
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    rows = {name: column[:6] for name, column in make_rows().items()}
    ids = KeyedJaggedTensor(  # the fourth row has no country, the last one is padding
        ["country", "tags"],
        values=torch.tensor([2, 0, 2, 1, 2, 5, 5]),
        lengths=torch.tensor([1, 1, 1, 0, 1, 1, 0] + [2] + [0] * 6),
    )
    batch = batches(rows, padding=1)[0]
    batch.sparse = ids
    evaluator = Evaluator(SCHEMA, slices=["country", "surface"])
    evaluator.update(batch.logits, batch)
    found = evaluator.compute()["slices"]
    assert {value: tasks["click"]["rows"] for value, tasks in found["country"].items()} == {
        2: 3,
        slices.NO_ID: 1,
        0: 1,
        1: 1,
    }
    named = slices.named_slices(found, SCHEMA, lambda table: pa.array(["at", "ch"]) if table == "country" else None)
    assert list(named["country"]) == ["ch", "(none)", "(out of vocabulary)", "at"]
    assert set(named["surface"]) == {str(value) for value in rows["surface"].tolist()}


def test_rare_values_of_a_slice_are_one(monkeypatch):
    monkeypatch.setattr(slices, "MAX_SLICES", 2)
    parts = slices.slice_rows(np.array([5, 7, 7, 9, 5, 7, 1]))
    assert [(value, rows.tolist()) for value, rows in parts] == [(7, [1, 2, 5]), (5, [0, 4]), (slices.OTHER, [6, 3])]
    assert slices.named_slices({"surface": {slices.OTHER: {}}}, SCHEMA, lambda table: None) == {
        "surface": {"(other)": {}}
    }


@pytest.mark.parametrize(
    ("column", "hint"), [("surfaces", "did you mean 'surface'?"), ("tags", "known: country, surface")]
)
def test_a_wrong_slice_is_named(column, hint):
    with pytest.raises(UserError) as error:
        Evaluator(SCHEMA, slices=[column])
    assert error.value.message == (
        f"train.slices: {column!r} is neither a sparse feature with max_length 1 nor an extra column of kind int"
    )
    assert error.value.hint == hint


@pytest.mark.parametrize("fold_rows", [1, 300, 1 << 20])
def test_a_window_agrees_with_an_evaluation_of_its_rows(monkeypatch, fold_rows):
    monkeypatch.setattr("raysys.train.metrics._FOLD_ROWS", fold_rows)
    rows = make_rows()
    window = windowed(rows)
    found, expected = window.compute(), evaluated(rows, corrected=False).compute()["tasks"]
    for task, metrics in found.items():
        assert metrics == pytest.approx({name: expected[task][name] for name in metrics}, rel=1e-9, nan_ok=True)
    assert set(found["click"]) == {"ne", "auc", "log_loss", "calibration", "base_rate", "rows"}
    assert set(found["dwell"]) == {"rmse", "rows"}
    empty = window.compute()["click"]  # the next window starts from nothing, AUC goes on
    assert (empty["rows"], empty["auc"]) == (0, found["click"]["auc"])
    assert math.isnan(empty["ne"])


def test_a_window_keeps_only_recent_rows_for_auc():
    rows = make_rows()
    recent = {name: column[-180:] for name, column in rows.items()}  # and 10 rows of padding
    window = windowed(rows, auc_rows=190)
    label, p, weight = click(recent, corrected=False)
    assert window.compute()["click"]["auc"] == pytest.approx(auc(label, p, weight), abs=1e-12)


@pytest.mark.parametrize("auc_rows", [100, 300, 1 << 15])
@pytest.mark.parametrize("cut", [0, 1, 3, 6])
def test_a_window_goes_on_from_its_state(cut, auc_rows):
    first, second = WindowMetrics(SCHEMA, auc_rows), WindowMetrics(SCHEMA, auc_rows)
    all_batches = batches(make_rows())
    for batch in all_batches[:cut]:
        first.update(batch.logits, batch)
    second.load(first.state(), torch.device("cpu"))
    for batch in all_batches[cut:]:
        second.update(batch.logits, batch)
    found, expected = second.compute(), windowed(make_rows(), auc_rows=auc_rows).compute()
    for task, metrics in found.items():
        assert metrics == pytest.approx(expected[task], rel=1e-12, nan_ok=True)


def test_a_window_does_not_hold_the_graph_of_the_step():
    window = WindowMetrics(SCHEMA)
    batch = batches(make_rows())[0]
    window.update(batch.logits.requires_grad_() * 2, batch)
    assert not window._pending[0][0].requires_grad


if __name__ == "__main__":  # one process imports torch for all ranks; nothing has started a thread yet, so it may fork
    mp.start_processes(work, args=(Path(sys.argv[1]),), nprocs=RANKS, start_method="fork")
