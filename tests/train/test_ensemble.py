"""An ensemble on the one train path: sharded tables of several members, schedules of its objective, checkpoints, bundles."""

from __future__ import annotations

import dataclasses
import sys

import pyarrow.parquet as pq
import pytest
import torch

from raysys.bundle import load_bundle
from raysys.config import instantiate
from raysys.models.ensemble.cetnet import CETNet
from raysys.train.checkpoint import checkpoint_path
from raysys.train.export import export_run
from raysys.train.launch import Worker, _own_process_group
from raysys.train.loop import TrainLoop
from raysys.train.tables import find_tables
from raysys.train.trainer import prepare

ENSEMBLE = [
    "model=cetnet",
    "~model.members.interformer",
    "+model@model.members.dlrm=dlrm",
    "+model.members.dlrm._partial_=true",
    *(f"model.members.{name}.{key}" for name in ("dhen", "dlrm") for key in ("bottom=[8]", "tower=[8]")),
    *(f"model.members.{name}.embedding_dim=8" for name in ("dhen", "dlrm")),
    "model.members.dhen.layers=1",
    "model.members.dhen.hidden=[8]",
    "model.members.dhen.tokens_out=4",
    "model.members.dhen.dropout=0",
    "objective=collaborative",
    "objective.ramp=0.8",
    "objective.peer_weight=1",
]


def run_loop(prepared, folder, stop_at=None):
    """One rank of the run, asked to stop in step `stop_at`: its losses by step, and the loop."""
    events, loop = [], None
    job = dataclasses.replace(prepared.job, folder=folder)
    with _own_process_group(torch.device("cpu")):
        worker = Worker(job, torch.device("cpu"), events.append, lambda: stop_at is not None and loop.step >= stop_at)
        loop = TrainLoop(worker, prepared.plan)
        loop.run()
    return {e["step"]: (e["loss"], e["parts"]) for e in events if e["event"] == "step"}, loop


def losses_of_rank(prepared, folder, package):
    sys.path.insert(0, str(package))
    losses, loop = run_loop(prepared, folder)
    return losses, sorted({table.path.rpartition(".")[2] for table in find_tables(loop.model)})


@pytest.fixture(scope="module")
def alone(tiny_config_in, tmp_path_factory):
    """The run on one worker that all others have to equal."""
    folder = tmp_path_factory.mktemp("alone")
    prepared = prepare(tiny_config_in(folder, *ENSEMBLE))
    return prepared, folder / "run", run_loop(prepared, folder / "run")[0]


def check(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for step, (loss, parts) in expected.items():
        assert found[step][0] == pytest.approx(loss, rel=tolerance, abs=tolerance), step
        assert found[step][1] == pytest.approx(parts, rel=tolerance, abs=tolerance), step


LAYOUTS = [
    ["train.pipeline=sparse_dist"],
    ["train.sharding.sharding_types=[row_wise]", "train.pipeline=sparse_dist"],
    ["train.sharding.sharding_types=[data_parallel]"],
    ["train.sharding.sharding_types=[column_wise]", "train.sharding.dense_parallel=fsdp"],
]


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: options[0].rpartition("=")[2])
def test_two_workers_train_as_one(gloo, alone, tiny_config, tiny_package, tmp_path, options):
    prepared = prepare(tiny_config(*ENSEMBLE, "trainer=ray", *options))
    results = gloo.run(2, losses_of_rank, prepared, tmp_path / "run", tiny_package)
    check(results[0][0], alone[2], 1e-4)
    assert results[0][1] == ["bags", "ids_8"]


@pytest.mark.parametrize("stop_at", [1, 6])
def test_a_stopped_run_goes_on_to_the_same_losses_and_weights(alone, tmp_path, tensors_of, stop_at):
    prepared, folder, expected = alone
    before, _ = run_loop(prepared, tmp_path, stop_at)
    after, loop = run_loop(prepared, tmp_path)
    check(before | after, expected, 0)
    last = max(expected)
    assert loop.step == last == 10
    paths = [checkpoint_path(at / "checkpoints", last) for at in (folder, tmp_path)]
    assert tensors_of(paths[0]) == tensors_of(paths[1])


def test_the_peer_term_is_ramped_by_the_steps_of_the_run(alone):
    for step, (_, parts) in alone[2].items():
        share = min(1.0, (step - 1) / 8)
        for task in ("click", "spend"):
            expected = 0.5 * parts[f"{task}.fused"] + 0.25 * (parts[f"{task}.dhen"] + parts[f"{task}.dlrm"])
            assert parts[task] == pytest.approx(expected + share * parts[f"{task}.peers"], rel=1e-5)


def test_members_are_clipped_by_themselves(tiny_config):
    prepare(tiny_config(*ENSEMBLE, "train.optimizers.clip={model.members.dhen: 1.0, model.members.dlrm: 1.0}"))


def test_a_bundle_predicts_as_the_model(train_tiny, tiny_data, tiny_config):
    folder, _, _ = train_tiny(*ENSEMBLE, "run_id=ensemble")
    bundle = load_bundle(export_run(folder))
    rows = pq.read_table(tiny_data / "test.parquet")
    predicted = pq.read_table(folder / "predictions" / "test.parquet").sort_by("example_id")
    found = bundle.predict(rows)[:, 0].numpy()
    assert found == pytest.approx(predicted["click_probability"].to_numpy(), rel=1e-5)
    assert isinstance(instantiate(tiny_config(*ENSEMBLE)["model"], schema=bundle.schema), CETNet)
