"""The train loop: what is stopped goes on as if nothing had happened; what goes wrong stops it everywhere."""

from __future__ import annotations

import dataclasses
import shutil

import pyarrow.parquet as pq
import pytest
import torch

from raysys.errors import UserError
from raysys.train.checkpoint import checkpoint_path, list_checkpoints
from raysys.train.launch import Worker, _own_process_group
from raysys.train.loop import NonFiniteLossError, TrainLoop, total_steps
from raysys.train.trainer import prepare

STEPS = 20  # two epochs of the tiny log in batches of 150
RUN = ["train.epochs=2", "train.evaluate_every=4", "train.early_stopping={metric: ne, patience: 50}"]


def run_loop(prepared, folder, stop_at=None):
    """One rank in this process, asked to stop in step `stop_at`: how it ended, and its events."""
    events, loop = [], None
    job = dataclasses.replace(prepared.job, folder=folder)

    def stop_wanted():
        return stop_at is not None and loop.step >= stop_at

    with _own_process_group(torch.device("cpu")):
        loop = TrainLoop(Worker(job, torch.device("cpu"), events.append, stop_wanted), prepared.plan)
        status = loop.run()
    return status, loop.step, events


def history(events):
    """What a run reports, without times and speeds: {step: (loss, parts, ...)} and {step: evaluation}."""
    steps = {e["step"]: (e["loss"], e["parts"], e["rows"], e["learning_rates"]) for e in events if e["event"] == "step"}
    evaluations = {e["step"]: e["tasks"] for e in events if e["event"] == "evaluation"}
    return steps, evaluations


@pytest.fixture(scope="module")
def undisturbed(tiny_config_in, tmp_path_factory):
    """The run that all others have to equal, for each pipeline."""
    runs = {}
    for pipeline in ("base", "sparse_dist"):
        folder = tmp_path_factory.mktemp(pipeline)
        schedule = "train.optimizers.dense.schedule={kind: cosine, warmup_steps: 3}"
        prepared = prepare(tiny_config_in(folder, *RUN, schedule, f"train.pipeline={pipeline}"))
        assert prepared.facts["total_steps"] == STEPS
        status, step, events = run_loop(prepared, folder / "run")
        assert (status, step) == ("finished", STEPS)
        runs[pipeline] = prepared, folder / "run", history(events)
    return runs


@pytest.mark.parametrize("pipeline", ["base", "sparse_dist"])
@pytest.mark.parametrize("stops", [(1,), (7,), (8,), (10,), (15,), (3, 5, 12)], ids=str)
def test_a_stopped_run_goes_on_to_the_same_losses_and_weights(undisturbed, tmp_path, tensors_of, pipeline, stops):
    prepared, expected_folder, (expected_steps, expected_evaluations) = undisturbed[pipeline]
    steps, evaluations = {}, {}
    for stop_at in (*stops, None):
        status, step, events = run_loop(prepared, tmp_path, stop_at)
        assert (status, step) == (("finished", STEPS) if stop_at is None else ("interrupted", stop_at + 1))
        for target, found in zip((steps, evaluations), history(events), strict=True):
            assert not target.keys() & found.keys()
            target |= found
    assert steps == expected_steps
    assert evaluations == expected_evaluations
    found, expected = (
        tensors_of(checkpoint_path(folder / "checkpoints", STEPS)) for folder in (tmp_path, expected_folder)
    )
    assert found == expected


def test_whole_groups_train_and_go_on_with_every_row_counted(tiny_config, tiny_data, tmp_path, tensors_of):
    options = ["train.epochs=2", "train.pipeline=sparse_dist", "data.keep_groups_whole=true"]
    with pytest.raises(UserError, match=r"group 'u\d+' of column 'user' goes on.*\n.* sort the log by 'user'"):
        prepare(tiny_config(*options))
    data = shutil.copytree(tiny_data, tmp_path / "data")
    pq.write_table(pq.read_table(data / "train.parquet").sort_by("user"), data / "train.parquet", row_group_size=400)
    prepared = prepare(tiny_config(*options, f"data.folder={data}"))
    assert prepared.facts["steps_per_epoch"] == 9, "35 users of 43 rows, 4 in a batch of about 150"
    _, _, expected = run_loop(prepared, tmp_path / "whole")
    _, _, before = run_loop(prepared, tmp_path / "stopped", stop_at=11)
    status, step, after = run_loop(prepared, tmp_path / "stopped")
    assert (status, step) == ("finished", 18)
    losses = {step: (loss, rows) for step, (loss, _, rows, *_) in history(before + after)[0].items()}
    assert losses == {step: (loss, rows) for step, (loss, _, rows, *_) in history(expected)[0].items()}
    assert [losses[step][1] for step in (9, 18)] == [1500, 3000]
    sizes = {losses[step][1] - losses[step - 1][1] for step in range(2, 9)}
    assert len(sizes) > 1
    assert all(100 < size < 250 for size in sizes)
    paths = [checkpoint_path(tmp_path / folder / "checkpoints", 18) for folder in ("whole", "stopped")]
    assert tensors_of(paths[0]) == tensors_of(paths[1])


WINDOWED = ["train.epochs=2", "train.log_every=6", "train.checkpoint={every_steps: 4, keep: 99}", "data.shards=4"]


def windows(events):
    """{step: what its event says of the steps since the one before}, flat: {"click.ne": value}."""
    found = {}
    for event in (event for event in events if event["event"] == "step"):
        metrics = {f"{task}.{name}": value for task, of in event["metrics"].items() for name, value in of.items()}
        found[event["step"]] = {"loss": event["loss"], "rows": event["rows"], **event["parts"], **metrics}
    return found


def equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=tolerance, abs=tolerance, nan_ok=True), step


@pytest.mark.parametrize("stops", [(2,), (7, 8), (5, 14)], ids=str)
def test_step_events_of_a_stopped_run_are_those_of_an_undisturbed_one(tiny_config, tmp_path, stops):
    prepared = prepare(tiny_config(*WINDOWED))
    expected = windows(run_loop(prepared, tmp_path / "a")[2])
    assert list(expected) == [6, 12, 18, 20]
    found = {}
    for stop_at in (*stops, None):
        found |= windows(run_loop(prepared, tmp_path / "b", stop_at)[2])
    equal(found, expected, 1e-12)


def windows_of_rank(prepared, folder, package):
    import sys

    sys.path.insert(0, str(package))
    return windows(run_loop(prepared, folder)[2])


def test_step_events_go_on_with_another_number_of_workers(gloo, tiny_config, tiny_package, tmp_path):
    """Dropout would differ between them; the rest of the loss agrees within the rounding of its sums."""
    alone, together = (
        prepare(tiny_config(*WINDOWED, "model.dropout=0", trainer)) for trainer in ("trainer=local", "trainer=ray")
    )
    expected = windows(run_loop(alone, tmp_path / "a")[2])
    run_loop(alone, tmp_path / "b", stop_at=7)
    found = gloo.run(2, windows_of_rank, together, tmp_path / "b", tiny_package)[0]
    assert list(found) == [12, 18, 20]
    equal(found, {step: expected[step] for step in found}, 1e-4)
    for path in (tmp_path / "b" / "checkpoints").iterdir():
        if path.name > "step_00000016":  # back from two ranks, in the middle of an interval
            shutil.rmtree(path)
    equal(windows(run_loop(alone, tmp_path / "b")[2]), {step: expected[step] for step in (18, 20)}, 1e-4)


def test_losses_change_and_dropout_is_drawn_anew_each_step(undisturbed):
    for _, _, (steps, evaluations) in undisturbed.values():
        losses = [loss for loss, *_ in steps.values()]
        assert len(set(losses)) == STEPS
        assert sorted(evaluations) == [4, 8, 12, 16, 20]
        assert list(steps)[-1] == STEPS
        rates = [rates["dense"] for *_, rates in steps.values()]
        assert rates[:3] == pytest.approx([0.001 * 2 / 3, 0.001, rates[2]])
        assert rates[-1] < rates[5] < rates[2] * 1.001
        assert steps[STEPS][2] == 3000
    base, sparse_dist = (undisturbed[pipeline][2][0] for pipeline in ("base", "sparse_dist"))
    assert [entry[0] for entry in base.values()] == pytest.approx(
        [entry[0] for entry in sparse_dist.values()], rel=1e-5
    )


def test_an_early_stop_keeps_the_best_and_the_newest(train_tiny):
    options = ["train.epochs=30", "train.optimizers.sparse.lr=0.3", "train.early_stopping={metric: ne, patience: 2}"]
    folder, outcome, events = train_tiny(*options, "run_id=a", "train.checkpoint={every_steps: 5, keep: 1}")
    curve = {
        e["step"]: e["tasks"]["click"]["ne"] for e in events if e["event"] == "evaluation" and e["split"] == "valid"
    }
    best = min(curve, key=curve.get)
    assert outcome.status == "early_stopped"
    assert outcome.step == max(curve) == best + 20 < 300
    assert outcome.best == {"step": best, "value": curve[best], "stale": 2, "evaluated": outcome.step}
    assert outcome.checkpoint == checkpoint_path(folder / "checkpoints", best)
    assert list_checkpoints(folder / "checkpoints") == [
        outcome.checkpoint,
        checkpoint_path(folder / "checkpoints", outcome.step),
    ]
    assert (
        outcome.metrics["valid"]["click"]["ne"] == curve[best]
    )  # the bundle's weights are evaluated, not the last ones
    last = [event for event in events if event["event"] in ("evaluation", "embedding_health")][-3:]
    assert [(event.get("split"), event["step"]) for event in last] == [("valid", best), ("test", best), (None, best)]
    again, repeated, events = train_tiny(
        *options, "run_id=a", "train.checkpoint={every_steps: 5, keep: 1}", "resume=auto"
    )
    assert (again, repeated.status, repeated.step) == (folder, "early_stopped", outcome.step)
    assert repeated.metrics == outcome.metrics
    assert not [event for event in events if event["event"] == "step"]


def test_checkpoints_are_written_at_intervals_and_only_some_are_kept(train_tiny):
    folder, outcome, events = train_tiny("train.checkpoint={every_steps: 3, keep: 2}")
    saved = [(event["step"], event["reason"]) for event in events if event["event"] == "checkpoint"]
    assert saved == [(3, "interval"), (6, "interval"), (9, "interval"), (10, "finished")]
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step_00000009", "step_00000010"]
    assert all(event["bytes"] > 0 for event in events if event["event"] == "checkpoint")
    assert outcome.checkpoint.name == "step_00000010"


def test_a_pipeline_that_looks_ahead_gives_way_to_evaluations(train_tiny):
    base, ahead = (train_tiny(f"train.pipeline={kind}", "train.epochs=2")[1] for kind in ("base", "sparse_dist"))
    assert ahead.metrics.keys() == {"valid", "test"}
    assert repr(ahead.metrics) == repr(base.metrics)  # some are NaN, which equals nothing


def test_valid_is_evaluated_each_epoch_and_once_at_the_end(train_tiny):
    _, _, events = train_tiny("train.epochs=2")
    found = [(event["split"], event["step"], event["epoch"]) for event in events if event["event"] == "evaluation"]
    assert found == [("valid", 10, 0), ("valid", 20, 1), ("test", 20, 1)]


@pytest.mark.parametrize(("epochs", "max_steps", "expected"), [(1, None, 10), (3, None, 30), (3, 7, 7), (1, 99, 10)])
def test_total_steps(epochs, max_steps, expected):
    assert total_steps(10, epochs, max_steps) == expected


def test_a_loss_that_is_not_finite_stops_the_run_with_step_task_and_batch(train_tiny, tiny_config, tmp_path):
    faulty = [
        "objective=faulty",
        "objective.fault=not_finite",
        "objective.step=5",
        "run_id=a",
        "train.checkpoint.every_steps=2",
    ]
    with pytest.raises(NonFiniteLossError) as caught:
        train_tiny(*faulty)
    path = tmp_path / "runs" / "a" / "not_finite_step_5_rank_0.pt"
    assert caught.value.message == f"step 5: loss, click is not finite; the batch is in {path}"
    batch = torch.load(path, weights_only=False)
    prepared = prepare(tiny_config())
    reader = prepared.job.reader(prepared.job.log("train"), training=True, rank=0, world_size=1)
    expected = [batch for batch, _ in reader.epoch()][4]
    assert torch.equal(batch.example_id, expected.example_id)
    assert [path.name for path in list_checkpoints(tmp_path / "runs" / "a" / "checkpoints")] == [
        "step_00000002",
        "step_00000004",
    ]


@pytest.mark.parametrize("every", [1, 100])
def test_exploding_weights_are_never_saved(train_tiny, tmp_path, every):
    options = ["run_id=a", "train.optimizers.dense={name: sgd, lr: 1e30}", f"train.checkpoint.every_steps={every}"]
    with pytest.raises(ValueError, match=r"step \d+: .* not finite"):
        train_tiny(*options)
    for path in list_checkpoints(tmp_path / "runs" / "a" / "checkpoints"):
        assert path.name == "step_00000001"


def train_two_ranks(prepared, folder, package):
    """How the run of this rank ended."""
    import sys

    sys.path.insert(0, str(package))
    try:
        run_loop(prepared, folder)
    except NonFiniteLossError as error:
        return error.message
    return "no error"


def test_a_bad_loss_on_one_rank_stops_both_at_the_same_step(gloo, tiny_config, tiny_package, tmp_path):
    faulty = ["objective=faulty", "objective.fault=not_finite", "objective.step=4", "objective.rank=1"]
    prepared = prepare(tiny_config(*faulty, "trainer=ray", "train.checkpoint.every_steps=1"))
    messages = gloo.run(2, train_two_ranks, prepared, tmp_path / "a", tiny_package)
    names = [f"not_finite_step_4_rank_{rank}.pt" for rank in range(2)]
    assert messages == [f"step 4: loss, click is not finite; the batch is in {tmp_path / 'a' / name}" for name in names]
    first, second = (torch.load(tmp_path / "a" / name, weights_only=False).example_id.tolist() for name in names)
    assert not (set(first) - {-1}) & set(second)
    assert [path.name for path in list_checkpoints(tmp_path / "a" / "checkpoints")] == [
        "step_00000002",
        "step_00000003",
    ]
