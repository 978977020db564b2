"""Any checkpoint of a run becomes a bundle, wherever the run's folder has gone since."""

from __future__ import annotations

import shutil

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from raysys.bundle import load_bundle, verify_bundle
from raysys.errors import UserError
from raysys.train.checkpoint import checkpoint_path, list_checkpoints
from raysys.train.export import export_run, open_run


@pytest.fixture
def run(train_tiny):
    """The folder of a run whose best checkpoint is not its newest one."""
    options = ["train.epochs=30", "train.optimizers.sparse.lr=0.3", "train.early_stopping={metric: ne, patience: 1}"]
    folder, outcome, _ = train_tiny(*options)
    assert outcome.best["step"] < outcome.step
    return folder


def test_the_best_checkpoint_is_exported_unless_another_is_named(run, tmp_path):
    best, newest = list_checkpoints(run / "checkpoints")
    assert export_run(run) == run / "bundle"
    assert export_run(run, output=tmp_path / "again") == tmp_path / "again"
    assert verify_bundle(run / "bundle") == verify_bundle(tmp_path / "again")
    export_run(run, checkpoint=newest, output=tmp_path / "newest")
    export_run(run, checkpoint=best, output=tmp_path / "best")
    weights = {
        name: load_file(folder / "model.safetensors")
        for name, folder in (("default", run / "bundle"), ("best", tmp_path / "best"), ("newest", tmp_path / "newest"))
    }
    for name, value in weights["default"].items():
        assert torch.equal(value, weights["best"][name])
    assert any(not torch.equal(value, weights["newest"][name]) for name, value in weights["default"].items())
    assert not [name for name in weights["default"] if name.startswith("objective")]


def test_a_bundle_is_replaced_as_a_whole(run):
    (export_run(run) / "old.json").touch()
    assert not (export_run(run) / "old.json").exists()
    assert [path.name for path in run.glob("bundle*")] == ["bundle"]


def test_a_run_may_have_moved(run, tmp_path, tiny_data):
    rows = pq.read_table(tiny_data / "test.parquet")
    expected = load_bundle(export_run(run)).predict(rows)
    moved = tmp_path / "elsewhere"
    shutil.move(run, moved)
    shutil.rmtree(moved / "bundle")
    assert torch.equal(load_bundle(export_run(moved)).predict(rows), expected)


def test_what_is_no_run_or_has_no_checkpoint_is_named(run, tmp_path):
    with pytest.raises(UserError, match=r"nothing: no run \(run\.json is missing\)\n  hint: raysys runs lists them"):
        export_run(tmp_path / "nothing")
    with pytest.raises(UserError, match="step_00000099"):
        export_run(run, checkpoint=checkpoint_path(run / "checkpoints", 99))
    shutil.rmtree(run / "checkpoints")
    (run / "run.json").write_text((run / "run.json").read_text().replace('"checkpoint": "', '"was": "'))
    with pytest.raises(UserError, match="the run has no checkpoint"):
        open_run(run)
