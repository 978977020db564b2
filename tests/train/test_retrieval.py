from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from raysys.bundle import load_bundle
from raysys.config import compose
from raysys.errors import UserError
from raysys.report.html import write_report
from raysys.train.export import export_run
from raysys.train.launch import Worker
from raysys.train.loop import TrainLoop
from raysys.train.predict import predict
from raysys.train.trainer import fit, prepare

USERS, ITEMS, TOPICS = 60, 40, 5
SCHEMA = {
    "tables": {
        "user": {"num_embeddings": USERS + 1, "embedding_dim": 8},
        "item": {"num_embeddings": ITEMS + 1, "embedding_dim": 8},
        "topic": {"num_embeddings": TOPICS + 1, "embedding_dim": 8},
    },
    "dense": [{"name": "age", "side": "user", "transform": "standardize"}],
    "sparse": [
        {"name": "user", "table": "user", "side": "user"},
        {"name": "item", "table": "item", "side": "item"},
        {"name": "topic", "table": "topic", "side": "item"},
    ],
    "sequences": [{"name": "history", "features": [{"name": "history", "table": "item"}], "max_length": 6}],
    "labels": [{"name": "click"}],
    "example_id": "row",
    "group_id": "user",
    "catalogue": {"key": "item"},
}
MODELS = {
    "two_tower": ["model=two_tower", "model.embedding_dim=8", "objective=sampled_softmax", "objective.negatives=16"],
    "sasrec": ["model=sasrec", "objective=next_item"],
    "hsnn": ["model=hsnn", "model.embedding_dim=8", "model.nodes=[5,4]", "objective=hsnn", "objective.negatives=16"],
}
TRAIN = [
    "data.shards=6",
    "data.shuffle_rows=200",
    "train.batch_size=60",
    "train.retrieval={exclude: seen, at: [3, 10]}",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Users walk through the items of their topic: histories tell what comes next."""
    folder, rng = tmp_path_factory.mktemp("retrieval"), np.random.default_rng(0)
    keys = rng.permutation(1000)[:ITEMS]
    rows = []
    for user in range(USERS):
        walk = keys[np.flatnonzero(np.arange(ITEMS) % TOPICS == user % TOPICS)]
        walk = np.roll(walk, rng.integers(len(walk)))
        for place in range(1, len(walk)):
            rows.append(
                {
                    "user": f"u{user}",
                    "age": float(user % 7),
                    "item": int(walk[place]),
                    "topic": int(np.flatnonzero(keys == walk[place])[0] % TOPICS),
                    "history": walk[max(0, place - 6) : place].tolist(),
                    "seen": walk[:place].tolist(),
                    "click": 1,
                    "split": "test" if place == len(walk) - 1 else "valid" if place == len(walk) - 2 else "train",
                }
            )
    for number, row in enumerate(rows):
        row["row"] = number
    for split in ("train", "valid", "test"):
        part = [{k: v for k, v in row.items() if k != "split"} for row in rows if row["split"] == split]
        pq.write_table(pa.Table.from_pylist(part), folder / f"{split}.parquet", row_group_size=64)
    pq.write_table(pa.table({"item": keys, "topic": np.arange(ITEMS) % TOPICS}), folder / "items.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    return folder


@pytest.fixture
def config(data, tmp_path):
    def make(name, *overrides, folder=data):
        common = ["data=table", f"data.folder={folder}", "data.prepare=null", f"runs_folder={tmp_path}/runs", *TRAIN]
        return compose([*common, *MODELS[name], *overrides], "train")

    return make


def run(config):
    prepared, events = prepare(config), []
    fit(prepared, [events.append])
    return prepared.job.folder, events


@pytest.mark.parametrize("name", MODELS)
def test_each_model_learns_through_the_one_loop(name, config):
    folder, events = run(config(name, "train.epochs=15", "train.early_stopping={metric: ndcg@10, patience: 15}"))
    record = json.loads((folder / "run.json").read_text())
    found = record["metrics"]["test"]
    assert found["click"]["rows"] == USERS
    assert found["click"]["recall@3"] > 3 * 3 / (
        ITEMS - 6
    )  # three times what chance finds among the items that are left
    assert found["click: popularity"]["rows"] == USERS
    assert set(record["intervals"]["test"]["click"]) >= {"recall@3", "ndcg@10", "mrr"}
    assert [event["metrics"] for event in events if event["event"] == "step"][-1] == {}
    bundle = load_bundle(export_run(folder))
    assert type(bundle.model).__name__.lower() == name.replace("_", "")
    assert "Recall@10" in write_report(folder).read_text()
    with pytest.raises(UserError, match="scores are no probabilities"):
        bundle.predict([{"user": "u1"}])
    with pytest.raises(UserError, match="scores are no probabilities"):
        predict(folder, str(folder / "none.parquet"), folder / "scores", {"kind": "local"})


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_goes_on_to_the_same_weights(name, config):
    whole, _ = run(config(name, "run_id=whole", "train.epochs=2"))
    steps = json.loads((whole / "run.json").read_text())["step"]
    half = ["run_id=half", "train.epochs=2", f"train.checkpoint.every_steps={steps // 2}"]
    folder, _ = run(config(name, *half))
    for path in sorted((folder / "checkpoints").iterdir())[1:]:
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    again, events = run(config(name, *half, "resume=auto"))
    assert any(event["event"] == "resumed" for event in events)
    a, b = (load_bundle(export_run(one)).model.state_dict() for one in (whole, again))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=0, atol=1e-6)


def train_here(prepared, folder):
    """Losses of all steps, and what is measured in the end, on this rank."""
    events, job = [], dataclasses.replace(prepared.job, folder=folder)
    loop = TrainLoop(Worker(job, torch.device("cpu"), events.append, lambda: False), prepared.plan)
    loop.run()
    losses = [event["loss"] for event in events if event["event"] == "step"]
    return losses, loop.evaluate("test", predictions=folder / "ranks", baselines=True)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("two_tower", ["objective.negatives=0"]),
        ("two_tower", ["objective.negatives=0", "objective.refined=true", "objective.log_q=streaming"]),
        ("two_tower", ["objective.negatives=0", "objective.hard_negatives=true", "data.keep_groups_whole=true"]),
        ("sasrec", ["model.dropout=0"]),
        ("sasrec", ["model.dropout=0", "data.keep_groups_whole=true"]),
    ],
)
def test_any_number_of_workers_trains_and_measures_the_same(name, overrides, data, config, gloo, tmp_path):
    """Losses stay together for 12 steps, so gradients are those of the global batch; a quarter of the rows is no positive."""
    folder, found = tmp_path / "data", {}
    shutil.copytree(data, folder)
    train = pq.read_table(data / "train.parquet")
    shown = pa.array((train["row"].to_numpy() % 4 > 0).astype(np.int8))
    pq.write_table(train.set_column(train.column_names.index("click"), "click", shown), folder / "train.parquet")
    for workers in (1, 2, 3):
        trainer = ["trainer=local"] if workers == 1 else ["trainer=ray", f"trainer.workers={workers}"]
        settings = ["train.max_steps=12", "train.log_every=1", "train.evaluation_batch_size=16", "train.epochs=9"]
        prepared = prepare(config(name, *overrides, *trainer, *settings, folder=folder))
        found[workers] = gloo.run(workers, train_here, prepared, tmp_path / f"run{workers}")
    ((losses, one),) = found[1]
    assert losses[-1] < losses[0]
    for others, evaluation in (*found[2], *found[3]):
        np.testing.assert_allclose(others, losses, rtol=1e-4)
        for task, metrics in one.tasks.items():  # weights differ by rounding, which may swap two items
            assert evaluation.tasks[task] == pytest.approx(metrics, abs=0.02 if task == "click" else 1e-12)
    first, *others = (
        pq.read_table(tmp_path / f"run{workers}" / "ranks").sort_by("example_id") for workers in (1, 2, 3)
    )
    assert first.num_rows == USERS
    for other in others:
        assert other.drop_columns("click_rank").equals(first.drop_columns("click_rank"))
        assert abs(other["click_rank"].to_numpy() - first["click_rank"].to_numpy()).max() <= 1


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("two_tower", ["train.retrieval=null"], "SampledSoftmax trains retrieval from a catalogue"),
        ("two_tower", ["train.calibration=platt"], "train.calibration is 'platt'"),
        ("two_tower", ["train.slices=[user]"], "train.slices is"),
        ("two_tower", ["train.retrieval={task: clik}"], "train.retrieval.task is 'clik'"),
        ("two_tower", ["train.retrieval={exclude: seenn}"], "column 'seenn' is missing"),
        ("sasrec", ["train.early_stopping={metric: auc}"], "metric is 'auc', which retrieval does not have"),
    ],
)
def test_wrong_settings_end_before_anything_starts(name, overrides, message, config, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare(config(name, *overrides))
    assert message in caught.value.message
    assert not (tmp_path / "runs").exists()


def test_a_ranking_model_does_not_take_settings_of_retrieval(config):
    ranker = compose(["model=dlrm", "objective=supervised"], "train")
    with pytest.raises(UserError, match="DLRM is a ranking model, and"):
        prepare(config("two_tower") | {key: ranker[key] for key in ("model", "objective")})


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (None, "items.parquet: no such file"),
        ({"item": [1, 1], "topic": [0, 0]}, "item 1 is there 2 times"),
        ({"item": ["a", "b"], "topic": [0, 0]}, "items are known by an integer"),
        ({"thing": [1], "topic": [0]}, "column 'item' is missing"),
        ({"item": [1], "topic": [0]}, "is not in the catalogue"),
    ],
)
def test_a_catalogue_that_does_not_fit_is_named(items, message, data, config, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        if path.name != "items.parquet":
            (folder / path.name).write_bytes(path.read_bytes())
    if items is not None:
        pq.write_table(pa.table(items), folder / "items.parquet")
    with pytest.raises(UserError) as caught:
        prepare(config("two_tower", folder=folder))
    assert message in str(caught.value)
