"""Both stages on a sample of Online Retail II: what each may learn from, the record, and nothing is trained twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from raysys.config import compose
from raysys.errors import UserError
from raysys.schema import FeatureSchema

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "data" / "prepare" / "online_retail"
SMALL = [
    "set=online_retail",
    f"sources.online_retail={SAMPLE}",
    "sets.online_retail.value.events.returned=-0.1",  # of a final stage that has learnt nothing yet
    "seeds=[0]",
    "requests={train: 12, test: 0, candidates: 30, scored: 6}",
    "sets.online_retail.requests.test=10",
    "all_runs=['train.batch_size=512','train.epochs=1','data.shards=2']",
    "final=['model=dlrm','model.tower=[4]','model.bottom=[4]']",
    "early=['model=early_stage','model.deep=[4]','model.width=4','model.bottom=[4]']",
    "~methods.click_soft",
    "~methods.all_impressions",
]


@pytest.fixture(scope="module")
def job(jobs):
    return jobs("two_stage")


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """The folder of the set's runs and logs, and its record."""
    folder = tmp_path_factory.mktemp("two_stage")
    given = [f"runs_folder={folder}/runs", f"records={folder}/records"]
    config = compose([*SMALL, *given], "two_stage")
    node = config["sets"]["online_retail"]
    node["overrides"] = [text for text in node["overrides"] if "folder" not in text] + [f"data.folder={folder}/data"]
    job.main(config)
    runs = folder / "runs" / "online_retail"
    finished = {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/run.json")}
    job.main(config)
    assert finished == {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/run.json")}
    return runs, json.loads((folder / "records" / "online_retail.json").read_text())


def test_the_record_has_every_method_and_seed(done, job, capsys):
    runs, record = done
    assert sorted(path.parent.name for path in runs.glob("*/run.json")) == [
        "all_soft-0",
        "click_impressions-0",
        "final",
    ]
    assert list(record["figures"]) == ["bid_only", "click_impressions", "all_soft"]
    for figures in record["figures"].values():
        for found in figures.values():
            assert 0 < found["recall"]["10"] <= found["recall"]["20"] <= 1
            assert 0 < found["value_recall"] <= 1
            assert 0 < found["pair_agreement"] < 1
    assert list(record["figures"]["click_impressions"]["0"]["calibration"]) == ["purchase"]
    assert set(record["figures"]["all_soft"]["0"]["calibration"]) == {"purchase", "returned"}
    assert len(record["features"]["early"]) * 2 == len(record["features"]["final"])


def test_the_early_log_has_labels_on_impressions_and_predictions_on_candidates(done):
    runs, record = done
    rows = pq.read_table(runs / "early_log" / "train.parquet")
    shown = pc.less(rows["example_id"], 10**9).to_numpy()
    for task in ("purchase", "returned"):
        has_label, has_final = (rows[name].is_valid().to_numpy() for name in (task, f"final_{task}"))
        assert not has_label[~shown].any()
        assert np.array_equal(has_final, ~shown)
    assert np.count_nonzero(~shown) == 12 * 6
    assert np.array_equal(rows["bid"].is_valid().to_numpy(), ~shown)
    request = rows["request"].to_numpy()
    assert (np.diff(request) >= 0).all()  # side by side
    schema = FeatureSchema.load(runs / "early_log" / "schema.yaml")
    names = [feature.name for feature in (*schema.sparse, *schema.dense, *schema.sequences)]
    assert sorted(names) == sorted(record["features"]["early"])
    assert not set(rows.column_names) - set(schema.columns())


def test_no_request_of_test_is_learnt_from(done):
    runs, _ = done
    test = pq.read_table(runs / "early_log" / "candidates" / "test.parquet")
    assert len(test) == 10 * 30
    for split in ("train", "valid"):
        assert not set(test["request"].to_pylist()) & set(
            pq.read_table(runs / "early_log" / f"{split}.parquet")["request"].to_pylist()
        )
    assert test["bid"].to_numpy().min() > 0
    assert np.log(test["bid"].to_numpy()).std() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(2 * 300))


def test_the_final_stage_itself_finds_all(done, job):
    """With the final probabilities and the whole formula."""
    runs, _ = done
    test = pq.read_table(runs / "early_log" / "candidates" / "test.parquet")
    config = compose(SMALL, "two_stage")
    value = job.Value(**config["sets"]["online_retail"]["value"])
    traffic = job.instantiate(
        config["sets"]["online_retail"]["traffic"], folder=str(runs.parents[1] / "data"), source=str(SAMPLE)
    )
    experiment = job.Experiment("online_retail", config, traffic, value, [])
    final = {task: test[f"final_{task}"].to_numpy() for task in value.tasks}
    found = job.measure(experiment, test, final, value)
    assert found["recall"] == {"20": 1, "10": 1}
    assert found["value_recall"] == found["pair_agreement"] == 1
    assert found["calibration"] == {"purchase": 1, "returned": 1}


def test_what_is_not_there_is_named(job):
    with pytest.raises(UserError, match=r"set 'movie' is not in configs/two_stage.yaml"):
        job.main(compose(["set=movie"], "two_stage"))
    schema = FeatureSchema.from_dict({"dense": [{"name": "age"}], "labels": [{"name": "click"}]})
    with pytest.raises(UserError, match="early: no feature 'agee' in schema"):
        job.early_schema(schema, ["agee"])


def test_a_set_without_its_source_is_left_out(job, capsys):
    job.main(compose(["set=online_retail"], "two_stage"))
    assert capsys.readouterr().out == "online_retail is left out: give sources.online_retail=FOLDER\n"
