"""UKDSL, SCR and LSPR in the train loop: on a log of a funnel, on one worker and on two, and what the report says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from raysys.config import compose
from raysys.errors import UserError
from raysys.report.events import EventWriter
from raysys.report.html import render_report
from raysys.report.record import load_record
from raysys.train.checkpoint import checkpoint_path
from raysys.train.launch import Worker, _own_process_group
from raysys.train.loop import TrainLoop
from raysys.train.sharding import unwrap
from raysys.train.tables import gather_table, table_weights
from raysys.train.trainer import Prepared, fit, prepare

CANDIDATES, SHOWN = 20, 4
SCHEMA = {
    "tables": {
        "user": {"num_embeddings": 40, "embedding_dim": 8},
        "item": {"num_embeddings": 100, "embedding_dim": 8},
        "tag": {"num_embeddings": 30, "embedding_dim": 8},
    },
    "dense": [{"name": f"x{i}"} for i in range(4)],
    "sparse": [
        {"name": "user", "table": "user", "side": "user", "encoding": "index"},
        {"name": "item", "table": "item", "side": "item", "encoding": "index"},
        {"name": "tags", "table": "tag", "encoding": "index", "max_length": 4},
    ],
    "sequences": [
        {"name": "seen", "features": [{"name": "history", "table": "item", "encoding": "index"}], "max_length": 5}
    ],
    "labels": [{"name": "click", "required": False}],
    "group_id": "request",
    "example_id": "row",
    "extra": [
        {"name": "teacher_click"},
        {"name": "u"},
        {"name": "rank", "kind": "int"},
    ],
}


def funnel(first: int, requests: int) -> pa.Table:
    """Candidates of requests, ranked by a teacher with a noisy logit, of which the first few were shown: the others lack a click.

    The teacher spoke on all but a tenth of them.
    """
    rng, rows = np.random.default_rng(first), requests * CANDIDATES
    x = rng.normal(size=(requests, CANDIDATES, 4))
    logit = x @ [1.0, -0.7, 0.4, 0.0] - 1.5
    noisy = logit + rng.normal(0, 0.7, logit.shape)
    order = np.argsort(-noisy, 1)
    x, logit, noisy = x[np.arange(requests)[:, None], order], *(np.take_along_axis(v, order, 1) for v in (logit, noisy))
    rank = np.tile(np.arange(CANDIDATES) + 1, requests)
    click = rng.random(rows) < 1 / (1 + np.exp(-logit.ravel()))
    tags, history = ([rng.integers(0, high, rng.integers(0, 6)) for _ in range(rows)] for high in (30, 100))
    return pa.table(
        {
            **{f"x{i}": x[..., i].ravel() for i in range(4)},
            "user": np.repeat(rng.integers(0, 40, requests), CANDIDATES),
            "item": rng.integers(0, 100, rows),
            "tags": tags,
            "history": history,
            "click": pa.array(click.astype(np.int8), mask=rank > SHOWN),
            "request": np.repeat(np.arange(first, first + requests), CANDIDATES),
            "row": np.arange(rows) + first * CANDIDATES,
            "teacher_click": pa.array(1 / (1 + np.exp(-noisy.ravel())), mask=rng.random(rows) < 0.1),
            "u": np.where(rank > SHOWN, 2.0, 1.0),
            "rank": rank,
        }
    )


def write_funnel(folder: Path, requests: dict[str, int]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    for i, (split, count) in enumerate(requests.items()):
        pq.write_table(funnel(1000 * i, count), folder / f"{split}.parquet", row_group_size=200)
    return folder


@pytest.fixture(scope="module")
def funnel_data(tmp_path_factory) -> Path:
    return write_funnel(tmp_path_factory.mktemp("funnel"), {"train": 60, "valid": 20})


TEACHER = "+objective.teachers={click: teacher_click}"
MASKED = [  # every row the same way, as workers draw numbers of their own
    "objective.perturbation.feature_mask=0.9999999",
    "objective.perturbation.exclude=[x0,user,tags]",
    "objective.perturbation.dense_noise=1e-12",
]
DROPPED = [
    "objective.perturbation.feature_mask=0",
    "objective.perturbation.dense_noise=0",
    "objective.perturbation.id_drop=0.9999999",
]
RANKED = ["objective.value.factors=[click]", "objective.bid=u", "objective.rank_weight=0.5"]
OBJECTIVES = {
    "ukdsl": ["objective=ukdsl", TEACHER, "objective.sampling_weight=u", "objective.labeled_share=0.3"],
    "corrected": ["objective=ukdsl", TEACHER, "objective.teacher_rank=rank", "objective.rank_buckets=[1,3]"],
    "listwise": ["objective=ukdsl", TEACHER, "objective.loss=listwise", "data.keep_groups_whole=true"],
    "early_stage": ["objective=early_stage", TEACHER],
    "ranked": ["objective=early_stage", TEACHER, *RANKED, "data.keep_groups_whole=true"],
    "scr": ["objective=scr", "objective.lambda_=5", "objective.unlabeled=true", *MASKED],
    "lspr": ["objective=lspr", "objective.alpha=0.5", *MASKED],
    "groups": ["objective=lspr", "objective.balance=ratio", "objective.balance_groups=user", *MASKED],
    "dropped": ["objective=lspr", "objective.alpha=0.5", *DROPPED],
}
TRAINING = [
    "data=table",
    "model=dlrm",
    "model.embedding_dim=8",
    "model.bottom=[8]",
    "train.optimizers.sparse={name: sgd, lr: 0.3}",
    "train.optimizers.dense={name: sgd, lr: 0.3}",
    "train.epochs=1",
    "train.batch_size=300",
    "train.log_every=1",
]


def config(data: Path, folder: Path, *options: str) -> dict:
    return compose([*TRAINING, f"data.folder={data}", f"runs_folder={folder}", *options], "train")


def train_here(prepared: Prepared) -> dict:
    """What this rank of a process group finds: losses by step, whole weights and what the objective remembers."""
    events: list[dict] = []
    loop = TrainLoop(Worker(prepared.job, torch.device("cpu"), events.append, lambda: False), prepared.plan)
    loop.run()
    step = unwrap(loop.model)
    dense = {name: value.detach() for name, value in step.named_parameters() if "embeddings" not in name}
    tables = {name: gather_table(value) for name, value in table_weights(loop.model).items()}
    return {
        "losses": [(event["loss"], *event["parts"].values()) for event in events if event["event"] == "step"],
        "weights": {**dense, **tables, **dict(step.objective.named_buffers())},
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_workers_train_as_one_does(gloo, funnel_data, tmp_path, name):
    found = {}
    for workers in (1, 2):
        trainer = [
            "trainer=ray",
            f"trainer.workers={workers}",
            "trainer.device=cpu",
        ]  # for the plan; Ray does not start
        prepared = prepare(config(funnel_data, tmp_path / str(workers), *OBJECTIVES[name], *trainer))
        assert prepared.facts["world_size"] == workers
        found[workers] = gloo.run(workers, train_here, prepared)
    one, (first, second) = found[1][0], found[2]
    assert len(one["losses"]) == 4
    losses = torch.tensor([first["losses"], second["losses"]])
    torch.testing.assert_close(losses.mean(0), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-6)
    assert first["weights"].keys() == one["weights"].keys()
    for key, value in one["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("pipeline", ["base", "sparse_dist"])
def test_a_stopped_run_leaves_out_the_same_ids_when_it_goes_on(funnel_data, tmp_path, tensors_of, pipeline):
    options = ["objective=lspr", "objective.perturbation.id_drop=0.3", "objective.perturbation.history_crop=0.5"]
    prepared = prepare(config(funnel_data, tmp_path, *options, f"train.pipeline={pipeline}"))
    for folder, stops in (("whole", [None]), ("stopped", [2, None])):
        for stop_at in stops:
            job, loops = replace(prepared.job, folder=tmp_path / folder), []
            wanted = partial(lambda stop_at, loops: stop_at is not None and loops[0].step >= stop_at, stop_at, loops)
            with _own_process_group(torch.device("cpu")):
                loops.append(TrainLoop(Worker(job, torch.device("cpu"), lambda event: None, wanted), prepared.plan))
                assert loops[0].run() == ("finished" if stop_at is None else "interrupted")
    whole, stopped = (tensors_of(checkpoint_path(tmp_path / name / "checkpoints", 4)) for name in ("whole", "stopped"))
    assert whole == stopped


def test_a_run_with_a_teacher_says_how_right_it_is_on_what_it_ranks_first(funnel_data, tmp_path):
    prepared, events = prepare(config(funnel_data, tmp_path, *OBJECTIVES["ukdsl"])), []
    fit(prepared, [EventWriter(prepared.job.folder / "events.jsonl").write, events.append])
    (selection,) = [event["selection"]["click"] for event in events if event["event"] == "evaluation"]
    rows = pq.read_table(funnel_data / "valid.parquet")
    labelled, taught = rows.filter(pc.field("click").is_valid()), rows.filter(pc.field("click").is_null())
    for part, column in (("labels", labelled["click"]), ("teacher", taught["teacher_click"])):
        assert [one["depth"] for one in selection[part]] == [1, 5, None]
        assert selection[part][-1]["rows"] == len(column) - column.null_count
        assert selection[part][-1]["reference"] == pytest.approx(pc.sum(column).as_py(), rel=1e-5)
    assert selection["labels"][0]["rows"] + selection["teacher"][0]["rows"] <= 20  # one of each request
    assert "Predicted over true · click · valid" in render_report(load_record(prepared.job.folder))


def test_a_loss_within_a_request_needs_whole_requests(funnel_data, tmp_path):
    options = [*OBJECTIVES["listwise"][:-1], "data.keep_groups_whole=false"]
    with pytest.raises(UserError) as error:
        prepare(config(funnel_data, tmp_path, *options))
    assert error.value.message == "UKDSL has a loss within a request, and batches may cut requests"
    assert error.value.hint == "data.keep_groups_whole=true"
