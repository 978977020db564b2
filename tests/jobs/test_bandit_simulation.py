"""The simulation's record and table, with few rounds."""

from __future__ import annotations

import json

from raysys.config import compose


def test_the_record_has_every_policy_and_seed(jobs, tmp_path, capsys):
    job = jobs("bandit_simulation")
    overrides = ["seeds=[0,1]", "rounds=300", f"record={tmp_path}/record.json"]
    job.main(compose(overrides, "bandit_simulation"))
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["rounds"] == 300
    assert len(record["figures"]) == 9
    for runs in record["figures"].values():
        assert [run["seed"] for run in runs] == [0, 1]
        assert all(abs(sum(run["quarters"]) - run["regret"]) < 1e-9 for run in runs)
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in record["figures"])
