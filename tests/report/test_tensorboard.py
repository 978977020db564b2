from __future__ import annotations

import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raysys.report.tensorboard import TensorBoard, scalars


def write(folder, events) -> EventAccumulator:
    with TensorBoard(folder) as board:
        for event in events:
            board.update(event)
    return read(folder)


def read(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_curves_read_back(tmp_path, events):
    board = write(tmp_path, events)
    losses = board.Scalars("loss/total")
    steps = [event for event in events if event["event"] == "step"]
    assert [loss.step for loss in losses] == [event["step"] for event in steps]
    assert [loss.value for loss in losses] == pytest.approx([event["loss"] for event in steps], rel=1e-6)
    assert losses[0].wall_time == pytest.approx(steps[0]["time"])
    assert [point.step for point in board.Scalars("ne/like/valid")] == [100, 200, 300, 400, 500, 600]
    assert board.Scalars("ne/like/test")[0].value == pytest.approx(0.79634758)
    tags = board.Tags()
    for tag in (
        "auc/finish/train",
        "learning_rate/sparse",
        "speed/rows_per_second",
        "speed/seconds/backward",
        "embedding/norm_p99/item_id",
        "loss/finish",
    ):
        assert tag in tags["scalars"]
    assert "config/text_summary" in tags["tensors"]
    assert "calibration/finish/train" not in tags["scalars"]  # always undefined


def test_steps_after_a_restart_replace_those_they_repeat(tmp_path, events):
    steps = [event for event in events if event["event"] == "step"]
    again = [{**event, "loss": 99.0} for event in steps[4:8]]  # 50 to 80, after 60 had been reached
    with TensorBoard(tmp_path) as board:
        for event in (events[0], *steps[:6]):
            board.update(event)
        time.sleep(1.1)  # files are read in the order of the second in their names, then of a number that is text
        for event in again:
            board.update(event)
    board = read(tmp_path)
    assert [(point.step, point.value == 99.0) for point in board.Scalars("loss/total")] == [
        (10, False), (20, False), (30, False), (40, False), (50, True), (60, True), (70, True), (80, True),
    ]  # fmt: skip


def test_a_second_process_continues_in_the_same_folder(tmp_path, events):
    steps = [event for event in events if event["event"] == "step"]
    write(tmp_path, [events[0], *steps[:6]])
    board = write(tmp_path, [events[0], *steps[4:8]])
    assert [point.step for point in board.Scalars("loss/total")] == [10, 20, 30, 40, 50, 60, 70, 80]


def test_the_whole_training_split_does_not_mix_with_the_window():
    event = {"event": "evaluation", "split": "train", "tasks": {"like": {"ne": 0.5, "auc": None}}}
    assert list(scalars(event)) == [("ne/like/train_whole", 0.5)]
