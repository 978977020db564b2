"""The bench of the application on the small world, from the start to the record, over both ways to the ingress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
@pytest.mark.parametrize("proxy", ["default", "haproxy"])
def test_two_kills_and_two_swaps_harm_no_answer(release, user_store, free_port, tmp_path, proxy):
    keys = [
        f"release={release.folder}",
        f"users={user_store}",
        f"proxy={proxy}",
        f"port={free_port()}",
        "candidates=20",
    ]
    short = ["rate=20", "half_s=4", "overload_s=6", "kills=2", "kill_every_s=30", "swaps=2"]
    command = [sys.executable, str(ROOT / "jobs/bench_serve.py"), *keys, *short, f"record={tmp_path}/record.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "record.json").read_text())
    figures = record["figures"]
    assert set(figures) == {"model", "half", "overload", "kills", "swaps"}  # no saturation: its rate was given
    for part in ("half", "overload", "kills", "swaps"):
        assert figures[part]["lost_ids"] == 0, part
        assert figures[part]["statuses"]["200"] > 0
    assert figures["half"]["statuses"].keys() == {"200"}
    assert figures["overload"]["other_statuses"] == figures["overload"]["refused_without_retry_after"] == 0
    assert [event["deployment"] for event in figures["kills"]["events"]] == ["Ranker", "Cascade"]
    for event in figures["kills"]["events"]:
        assert event["replaced_s"] is not None
        assert event["under_load"]
        assert event["failed"] <= event["in_flight"]
    assert figures["kills"]["wrong"] == figures["swaps"]["wrong"] == figures["swaps"]["failed"] == 0
    assert len(figures["swaps"]["moments"]) == 2
    assert record["machine"]["threads_per_process"] == record["config"]["threads"]
    assert "| swaps, mixed or wrong answers, of 2 versions | 0 | 0 |" in done.stdout
