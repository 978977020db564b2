"""Data and settings that a user can bring by mistake, through the entry of every run: a defined result, or an error before it starts."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raysys.errors import UserError
from raysys.train.checkpoint import list_checkpoints
from raysys.train.trainer import fit, prepare

NARROW = ["model.embedding_dim=8", "model.bottom=[8]", "model.tower=[8]", "model.dropout=0"]
MODELS = {
    "dhen": ["model.dropout=0"],
    "din": ["model=din", *NARROW, "model.deep=[8]"],
    "interformer": ["model=interformer", *NARROW, "model.hidden=[8]"],
    "cetnet": [
        *("model=cetnet", "objective=collaborative"),
        *(key.replace("model.", f"model.members.{name}.") for name in ("dhen", "interformer") for key in NARROW),
    ],
}


@pytest.fixture
def changed(tiny_data, tmp_path):
    """`changed(column=function)`: the option of a copy of the data in which these columns are other ones."""

    def change(splits=("train", "valid", "test"), **columns):
        folder = shutil.copytree(tiny_data, tmp_path / "data")
        for split in splits:
            table = pq.read_table(folder / f"{split}.parquet")
            for name, function in columns.items():
                table = table.set_column(table.schema.get_field_index(name), name, function(table[name]))
            pq.write_table(table, folder / f"{split}.parquet")
        return f"data.folder={folder}"

    return change


def steps_of(events):
    return [event for event in events if event["event"] == "step"]


def all_ones(column):
    return pa.array(np.ones(len(column), np.int8))


def of_the_first_rows(column):
    return pa.array(np.ones(len(column)), mask=np.arange(len(column)) >= 3)


def nothing(column):
    return pa.nulls(len(column), column.type)


def empty(column):
    return pa.array([[]] * len(column), column.type)


@pytest.mark.parametrize("options", [MODELS["dhen"], MODELS["cetnet"]], ids=["supervised", "collaborative"])
def test_batches_without_a_label_of_a_task_train_the_others(changed, train_tiny, options):
    """Three rows have a label of the second task: of ten batches seven at least have none."""
    _, outcome, events = train_tiny(changed(["train"], spend=of_the_first_rows), *options)
    steps = steps_of(events)
    without = [step for step in steps if step["parts"]["spend"] == 0]
    assert (outcome.status, len(steps)) == ("finished", 10)
    assert 7 <= len(without) < 10
    for step in steps:
        assert math.isfinite(step["loss"])
        assert step["parts"]["click"] > 0
    assert math.isfinite(outcome.metrics["valid"]["spend"]["rmse"])


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_task_without_a_label_in_a_split_is_an_error_before_the_run(changed, tiny_config, tmp_path, split):
    data = changed([split], spend=nothing)
    with pytest.raises(UserError) as caught:
        prepare(tiny_config(data))
    assert caught.value.message == f"{tmp_path}/data/{split}.parquet: label 'spend' is null in every row"
    assert not (tmp_path / "runs").exists()


def test_a_task_without_a_label_in_the_test_split_is_found_when_it_is_opened(changed, tiny_config, tmp_path):
    """After training, which never opens it: the trained run is kept, and goes on once the file is mended."""
    prepared = prepare(tiny_config(changed(["test"], spend=nothing)))
    with pytest.raises(UserError, match=r"test\.parquet: label 'spend' is null in every row"):
        fit(prepared, [])
    assert json.loads((prepared.job.folder / "run.json").read_text())["status"] == "failed"
    assert [path.name for path in list_checkpoints(prepared.job.folder / "checkpoints")] == ["step_00000010"]


@pytest.mark.parametrize("options", [MODELS["dhen"], MODELS["cetnet"]], ids=["supervised", "collaborative"])
def test_labels_of_one_class_train_and_leave_what_is_undefined_empty(changed, train_tiny, options):
    folder, outcome, events = train_tiny(changed(click=all_ones), *options)
    assert outcome.status == "finished"
    assert all(math.isfinite(step["loss"]) for step in steps_of(events))
    losses = [step["parts"]["click"] for step in steps_of(events)]
    assert losses[-1] < losses[0]
    metrics = outcome.metrics["test"]["click"]
    assert metrics["base_rate"] == 1
    assert all(math.isnan(metrics[name]) for name in ("ne", "auc", "gauc"))
    assert math.isfinite(metrics["log_loss"])
    recorded = json.loads((folder / "run.json").read_text())["metrics"]["test"]["click"]
    assert (recorded["ne"], recorded["auc"]) == (None, None)


def test_early_stopping_by_a_metric_that_is_never_defined_keeps_the_last_step(changed, train_tiny):
    options = ["train.early_stopping={metric: ne, patience: 2}", "train.epochs=5"]
    _, outcome, _ = train_tiny(changed(click=all_ones), *MODELS["dhen"], *options)
    assert (outcome.status, outcome.step) == ("early_stopped", 20)
    assert outcome.best["step"] is None
    assert outcome.checkpoint.name == "step_00000020"


@pytest.mark.parametrize("name", MODELS)
def test_histories_that_are_all_empty(changed, train_tiny, name):
    _, outcome, events = train_tiny(changed(history=empty), *MODELS[name], "train.max_steps=3")
    assert (outcome.status, len(steps_of(events))) == ("finished", 3)
    assert all(math.isfinite(step["loss"]) for step in steps_of(events))
    assert math.isfinite(outcome.metrics["test"]["click"]["ne"])


@pytest.mark.parametrize("name", ["din", "interformer"])
def test_of_histories_longer_than_the_maximum_the_last_events_count(changed, train_tiny, name):
    def longer(column):
        return pa.array([[7] * 30 + events[-4:] if len(events) >= 4 else events for events in column.to_pylist()])

    options = [*MODELS[name], "train.max_steps=3"]
    expected = steps_of(train_tiny(*options)[2])
    found = steps_of(train_tiny(changed(history=longer), *options)[2])
    assert [step["loss"] for step in found] == [step["loss"] for step in expected]


def test_two_members_of_one_kind_train_to_different_models(train_tiny):
    node = "{_target_: raysys.models.ranking.dlrm.DLRM, _partial_: true, embedding_dim: 8, bottom: [8], tower: [8]}"
    _, outcome, events = train_tiny(
        *("model=cetnet", "objective=collaborative", "train.max_steps=3"),
        *("~model.members", f"+model.members={{a: {node}, b: {node}}}"),
    )
    steps = steps_of(events)
    assert outcome.status == "finished"
    for step in steps:
        assert math.isfinite(step["loss"])
        assert step["parts"]["click.a"] != step["parts"]["click.b"]
        assert step["parts"]["click.distance"] > 0


@pytest.mark.parametrize(
    ("options", "lack", "message"),
    [
        (["model=din"], "sequences", "DIN needs a sequence"),
        (["model=interformer"], "sequences", "InterFormer needs a sequence"),
        (["model=cetnet"], "sequences", "InterFormer needs a sequence"),
        (["model=din"], "sides", "DIN needs an item feature that shares a table with sequence 'seen'"),
        (["model=early_stage"], "sides", "the model needs a feature of the item"),
        (["model=finalmlp", "model.contexts=[user, item]"], "sides", "contexts names 'user', but "),
        (["model=esmm"], "conversion", "ESMM needs a task for conversion, and there is no 'conversion'"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_model_that_needs_what_the_schema_lacks(changed, tiny_config, tmp_path, options, lack, message):
    data = changed([])
    path = tmp_path / "data" / "schema.yaml"
    schema = yaml.safe_load(path.read_text())
    if lack == "sequences":
        del schema["sequences"]
    for feature in schema["sparse"]:
        if lack == "sides":
            feature.pop("side", None)
    path.write_text(yaml.safe_dump(schema))
    with pytest.raises(UserError) as caught:
        prepare(tiny_config(data, *options))
    assert message in caught.value.message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model=hiformer", "model.heads=3"], "heads 3 does not divide embedding_dim 32"),
        (["model=interformer", "model.heads=3"], "heads 3 does not divide embedding_dim 64"),
        (
            ["model=interformer", "model.heads=64"],
            "heads 64 does not divide embedding_dim 64 into even widths, which rotary positions need",
        ),
        (["model=dhen", "model.modules=[self_attention]", "model.heads=3"], "heads 3 does not divide embedding_dim 64"),
        (
            ["model=finalmlp", "model.heads=3"],
            "heads 3 does not divide the last widths of first and second, 128 and 64",
        ),
        (
            ["model=cetnet", "model.members.interformer.heads=3"],
            "members.interformer: heads 3 does not divide embedding_dim 32",
        ),
        (["model=autoint", "model.heads=0"], "heads is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_heads_that_do_not_divide_a_width(tiny_config, tmp_path, options, message):
    with pytest.raises(UserError) as caught:
        prepare(tiny_config(*options))
    assert caught.value.message == message
    assert not (tmp_path / "runs").exists()
