from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch

from raysys.report.events import EventTail, EventWriter, last_event, read_events


def test_events_round_trip(tmp_path, events):
    writer = EventWriter(tmp_path / "events.jsonl")
    for event in events:
        writer.write(event)
    assert read_events(tmp_path / "events.jsonl") == events


def test_what_json_lacks_becomes_null_and_arrays_become_lists(tmp_path):
    path = tmp_path / "events.jsonl"
    values = {
        "nan": math.nan,
        "inf": np.float32("-inf"),
        "scalar": np.int64(3),
        "tensor": torch.tensor([1.0, math.nan]),
        "path": tmp_path,
        7: (True,),
    }
    EventWriter(path).write({"event": "x", "time": 1, **values})

    def refuse(constant: str) -> None:
        raise AssertionError(f"not strict JSON: {constant}")

    found = json.loads(path.read_text(), parse_constant=refuse)
    expected = {"nan": None, "inf": None, "scalar": 3, "tensor": [1.0, None], "path": str(tmp_path), "7": [True]}
    assert found == {"event": "x", "time": 1, **expected}
    with pytest.raises(TypeError, match="JSON cannot hold object"):
        EventWriter(path).write({"event": "x", "value": object()})


def test_an_event_gets_the_present_time_and_a_writer_can_be_pickled(tmp_path):
    writer = pickle.loads(pickle.dumps(EventWriter(tmp_path / "events.jsonl")))
    writer.write({"event": "x"})
    assert read_events(writer.path)[0]["time"] > 1_700_000_000


def test_a_torn_last_line_is_skipped_and_does_not_swallow_the_next_event(tmp_path):
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)
    writer.write({"event": "a", "time": 1})
    with open(path, "a") as file:
        file.write('{"event": "b", "ti')
    assert [event["event"] for event in read_events(path)] == ["a"]
    assert last_event(path)["event"] == "a"
    writer.write({"event": "c", "time": 3})
    tail = EventTail(path)
    assert [event["event"] for event in tail.poll()] == ["a", "c"]
    assert tail.damaged == 1


def test_a_tail_gives_each_event_once_when_its_line_is_complete(tmp_path):
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert list(tail.poll()) == []  # not there yet
    EventWriter(path).write({"event": "a", "time": 1})
    with open(path, "a") as file:
        file.write('{"event": "b", ')
    assert [event["event"] for event in tail.poll()] == ["a"]
    with open(path, "a") as file:
        file.write('"time": 2}\n')
    assert [event["event"] for event in tail.poll()] == ["b"]
    assert list(tail.poll()) == []
    assert tail.damaged == 0


def test_the_last_event_is_found_beyond_a_window(tmp_path):
    path = tmp_path / "events.jsonl"
    assert last_event(path) is None
    EventWriter(path).write({"event": "large", "time": 1, "text": "é" * 200_000})
    assert last_event(path)["event"] == "large"
    EventWriter(path).write({"event": "small", "time": 2})
    assert last_event(path) == {"event": "small", "time": 2}
    path.write_text("no event at all")
    assert last_event(path) is None
