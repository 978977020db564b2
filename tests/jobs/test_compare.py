"""The comparison at a tiny size: two models, two trials, two seeds, and nothing is trained twice."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raysys.config import compose, instantiate, validate
from raysys.data.synthetic.criteo_shaped import criteo_shaped_schema
from raysys.schema import Sequence, SequenceFeature
from raysys.train.settings import TrainSettings

ROOT = Path(__file__).parents[2]
TINY = """{
    baseline: dlrm,
    sets: {criteo: {task: label, overrides: ['data=criteo_shaped', 'data.folder=data', 'data.prepare.rows=1200']}},
    models: {dlrm: ['model=dlrm', 'model.tower=[8]'], dcnv2: ['model=dcnv2', 'model.deep=[8]', 'model.rank=4']}}"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison, and `again(*overrides)` that starts it once more."""
    folder = tmp_path_factory.mktemp("compare")
    overrides = [
        f"+comparisons.tiny={' '.join(TINY.split())}",
        "comparison=tiny",
        "records=records",
        "page=results.md",
        "runs_folder=runs",
        "processes=1",
        "seeds=[0,1]",
        "trials=[['train.optimizers.dense.lr=0.001'],['train.optimizers.dense.lr=0.01']]",
        "all_runs=['train.batch_size=256','train.epochs=1']",
    ]

    def again(*more):
        command = [sys.executable, str(ROOT / "jobs/compare.py"), *overrides, *more]
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


def test_an_unknown_model_names_the_nearest_one(compared):
    _, again = compared
    done = again("models=[dcn]")
    assert (done.returncode, done.stderr) == (
        2,
        "error: models 'dcn' is not in configs/compare.yaml\n  hint: did you mean 'dcnv2'?\n",
    )


COMPARISONS = compose(name="compare")["comparisons"]


@pytest.mark.parametrize(
    ("comparison", "model"), [(name, model) for name, content in COMPARISONS.items() for model in content["models"]]
)
def test_every_model_of_the_comparisons_can_be_made(comparison, model, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "jobs")
    flat = importlib.import_module("compare").flat
    content, config = COMPARISONS[comparison], compose(name="compare")
    assert content["baseline"] in content["models"]
    for data in content["sets"].values():
        overrides = [*config["all_runs"], *data["overrides"], *flat(content["models"][model]), *config["trials"][-1]]
        found = compose(overrides)
        validate(TrainSettings, found["train"], "train")
    history = Sequence("history", (SequenceFeature("events", "c0", encoding="index"),), max_length=5)
    schema = criteo_shaped_schema()
    items = tuple(dataclasses.replace(feature, side="item") for feature in schema.sparse)
    schema = dataclasses.replace(schema, sparse=items, sequences=(history,))
    instantiate(found["model"], schema=schema, seed=0, device="meta")
