"""The comparison at a tiny size: two models, two trials, two seeds, and nothing is trained twice."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysys.config import compose, instantiate, validate
from raysys.data.synthetic.criteo_shaped import criteo_shaped_schema
from raysys.schema import Label, Sequence, SequenceFeature
from raysys.train.settings import TrainSettings

ROOT = Path(__file__).parents[2]
TINY = """{
    baseline: dlrm,
    sets: {criteo: {task: label, overrides: ['data=criteo_shaped', 'data.folder=data', 'data.prepare.rows=1200']}},
    models: {dlrm: ['model=dlrm', 'model.tower=[8]'], dcnv2: ['model=dcnv2', 'model.deep=[8]', 'model.rank=4']}}"""

OVERRIDES = [
    f"+comparisons.tiny={' '.join(TINY.split())}",
    "comparison=tiny",
    "page=results.md",
    "runs_folder=runs",
    "processes=1",
    "seeds=[0,1]",
    "trials=[['train.optimizers.dense.lr=0.001'],['train.optimizers.dense.lr=0.01']]",
    "all_runs=['train.batch_size=256','train.epochs=1']",
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison, and `again(*overrides)` that starts it once more."""
    folder = tmp_path_factory.mktemp("compare")

    def again(*more):
        command = [sys.executable, str(ROOT / "jobs/compare.py"), *OVERRIDES, "records=records", *more]
        return subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )

    done = again()
    assert done.returncode == 0, done.stderr
    return folder, again


def test_every_model_has_its_trials_and_the_seeds_of_the_best(compared):
    folder, _ = compared
    runs = [json.loads(line) for line in (folder / "records/tiny-criteo.jsonl").read_text().splitlines()]
    for model in ("dlrm", "dcnv2"):
        own = [(run["trial"], run["seed"]) for run in runs if run["model"] == model]
        assert own in ([(0, 0), (1, 0), (0, 1)], [(0, 0), (1, 0), (1, 1)])
    assert [set(run["versus"]) for run in runs] == [set()] * 3 + [{"label"}] * 3
    assert runs[0]["parameters"]["dense"] > 0
    assert "| `dcnv2` |" in (folder / "results.md").read_text()


def test_what_has_a_record_is_not_trained_again(compared):
    folder, again = compared
    before = (folder / "records/tiny-criteo.jsonl").read_text()
    assert again().returncode == 0
    assert (folder / "records/tiny-criteo.jsonl").read_text() == before


def test_workers_of_a_killed_comparison_end_and_record_nothing_more(compared):
    folder, _ = compared
    command = [sys.executable, str(ROOT / "jobs/compare.py"), *OVERRIDES, "records=killed"]
    records = folder / "killed/tiny-criteo.jsonl"
    with subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}) as job:
        wait_until(lambda: records.exists() and records.read_text().count("\n") >= 1)
        children = [int(child) for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
        job.kill()
        before = records.read_text().count("\n")
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert records.read_text().count("\n") <= before + 1  # a run may have been at its last line


def wait_until(holds):
    limit = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_an_unknown_model_names_the_nearest_one(compared):
    _, again = compared
    done = again("models=[dcn]")
    assert (done.returncode, done.stderr) == (
        2,
        "error: models 'dcn' is not in configs/compare.yaml\n  hint: did you mean 'dcnv2'?\n",
    )


@pytest.mark.parametrize("comparison", compose(name="compare")["comparisons"])
def test_every_model_of_the_comparisons_can_be_made(comparison, jobs):
    contests = jobs("compare").contests
    sources = {"online_retail": "folder", "amazon_beauty": "folder"}
    history = Sequence("history", (SequenceFeature("events", "c0", encoding="index"),), max_length=5)
    schema = criteo_shaped_schema()
    items = tuple(dataclasses.replace(feature, side="item") for feature in schema.sparse)
    labels = (*schema.labels, Label("click"), Label("click_and_conversion"))
    schema = dataclasses.replace(schema, sparse=items, sequences=(history,), labels=labels)
    for contest in contests(compose(name="compare") | {"comparison": comparison, "sources": sources}):
        for overrides in contest.models.values():
            found = compose([*contest.overrides, *overrides, *contest.trials[-1]])
            validate(TrainSettings, found["train"], "train")
            instantiate(found["model"], schema=schema, seed=0, device="meta")


def test_a_set_may_add_overrides_and_models(jobs):
    contests = jobs("compare").contests
    given = {"task": "label", "overrides": [], "models": {"dlrm": ["model.dropout=0.1"], "esmm": ["model=esmm"]}}
    made = {
        "baseline": "dcnv2",
        "sets": {"made": given},
        "models": {"dcnv2": ["model=dcnv2"], "dlrm": [["model=dlrm", "seed=1"]]},
    }
    (contest,) = contests(compose(name="compare") | {"comparisons": {"one": made}})
    assert contest.models == {
        "dcnv2": ["model=dcnv2"],
        "dlrm": ["model=dlrm", "seed=1", "model.dropout=0.1"],
        "esmm": ["model=esmm"],
    }
