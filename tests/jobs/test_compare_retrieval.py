"""The retrieval table on a catalogue of 30 items in the layout of the published files, and what it says of the real ones."""

from __future__ import annotations

import json
import os
from statistics import mean

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.config import compose

USERS, ITEMS = 80, 30
SHORT = ["train.epochs=3", "train.batch_size=64", "data.shards=2"]
MODELS = {
    "sasrec": ["experiment=beauty_sasrec", "data.prepare.embedding_dim=8", *SHORT],
    "two_tower": ["experiment=beauty_two_tower", "model.deep=[8]", "objective.negatives=16", *SHORT],
}


@pytest.fixture(scope="module")
def job(jobs):
    return jobs("compare_retrieval")


@pytest.fixture(scope="module")
def sequences():
    """Users walk through the items in one direction, three of four with steps of 1 and others of any size."""
    rng = np.random.default_rng(5)
    found = {}
    for user in range(1, USERS + 1):
        length = int(rng.integers(4, 10))
        walk = rng.integers(ITEMS) + (np.arange(length) if user % 4 else rng.choice(ITEMS, length, replace=False))
        found[user] = [int(item) for item in walk % ITEMS + 1]
    return found


@pytest.fixture(scope="module")
def source(sequences, tmp_path_factory):
    """The two files. Codes run against the items' numbers."""
    folder = tmp_path_factory.mktemp("source")
    lines = (" ".join(map(str, (user, *items))) for user, items in sequences.items())
    (folder / "sequences.txt").write_text("".join(f"{line}\n" for line in lines))
    catalogue = {
        "item_id": pa.array(range(1, ITEMS + 1), pa.int32()),
        "asin": [f"B{ITEMS - item:03}" for item in range(1, ITEMS + 1)],
        "title": [f"Soap {item}" for item in range(1, ITEMS + 1)],
        "attribute_ids": pa.array([[100 + item % 7] for item in range(1, ITEMS + 1)], pa.list_(pa.int32())),
    }
    pq.write_table(pa.table(catalogue), folder / "items.parquet")
    return folder


@pytest.fixture(scope="module")
def compared(job, source, tmp_path_factory):
    """The folder of the comparison, and its config."""
    folder = tmp_path_factory.mktemp("compared")
    given = [f"source={source}", f"runs_folder={folder}/runs", f"record={folder}/records/figures.json", "seeds=[0,1]"]
    config = compose(given, "compare_retrieval")
    config["models"] = {name: [*given, f"data.folder={folder}/{name}"] for name, given in MODELS.items()}
    job.main(config)
    return folder, config


def test_the_record_has_every_model_and_seed_with_its_loss(compared):
    folder, _ = compared
    record = json.loads((folder / "records/figures.json").read_text())
    assert [(run["model"], run["seed"]) for run in record["runs"]] == [
        ("sasrec", 0),
        ("two_tower", 0),
        ("sasrec", 1),
        ("two_tower", 1),
    ]
    assert [run["loss"] for run in record["runs"][:2]] == ["NextItem, full", "SampledSoftmax"]
    assert set(record["baselines"]) == {"popularity", "last item (Markov)", "co-occurrence"}
    assert record["seeds"] == [0, 1]
    for run in record["runs"]:
        trained = json.loads((folder / "runs" / f"{run['model']}-{run['seed']}" / "run.json").read_text())
        for split in ("valid", "test"):
            assert run[split].items() <= trained["metrics"][split]["next"].items()
        assert run["best_step"] == trained["best"]["step"] <= run["steps"]


def test_recall_by_order_is_that_of_the_rows_whose_code_stands_after_the_one_before(compared, sequences):
    """The walk ascends in the numbers of items, and so descends in their codes, but where it begins anew or jumps."""
    folder, _ = compared
    record = json.loads((folder / "records/figures.json").read_text())
    after = [items[-1] < items[-2] for items in sequences.values()]
    found = pq.read_table(folder / "runs" / "sasrec-0" / "predictions" / "test.parquet").sort_by("example_id")
    for name, ordered in (
        ("next", record["runs"][0]["ordered"]),
        ("next: popularity", record["baselines"]["popularity"]),
    ):
        hits = [rank <= 10 for rank in found[f"{name}_rank"].to_pylist()]
        parts = {side: [hit for hit, is_after in zip(hits, after, strict=True) if is_after == side] for side in (0, 1)}
        assert ordered["recall@10 after"] == pytest.approx(mean(parts[1]))
        assert ordered["recall@10 before"] == pytest.approx(mean(parts[0]))
        assert ordered["share after"] == pytest.approx(mean(after))
    assert 0 < mean(after) < 0.5


def test_what_has_a_record_is_not_trained_again_and_the_table_is_printed(compared, job, capsys):
    folder, config = compared
    before = (folder / "records/figures.json").read_text()
    job.main(config)
    assert (folder / "records/figures.json").read_text() == before
    printed = capsys.readouterr().out
    runs = [run for run in json.loads(before)["runs"] if run["model"] == "two_tower"]
    recall = [run["test"]["recall@10"] for run in runs]
    row = next(line for line in printed.splitlines() if line.startswith("| two_tower |"))
    deviation = abs(recall[0] - recall[1]) / 2**0.5
    assert row.split(" | ")[1:4:2] == ["SampledSoftmax", f"{mean(recall):.4f} ± {deviation:.4f}"]
    assert printed.index("| popularity | counts |") < printed.index("| sasrec | NextItem, full |")


def test_only_what_is_missing_in_the_record_is_trained(compared, job, tmp_path):
    folder, config = compared
    record = json.loads((folder / "records/figures.json").read_text())
    kept = record["runs"][:3]
    (tmp_path / "figures.json").write_text(json.dumps(record | {"runs": kept}))
    job.main(config | {"record": str(tmp_path / "figures.json"), "runs_folder": str(tmp_path / "runs")})
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two_tower-1"]
    runs = json.loads((tmp_path / "figures.json").read_text())["runs"]
    assert runs[:3] == kept
    assert runs[3]["test"] == record["runs"][3]["test"]


@pytest.mark.experiment
def test_on_beauty_all_items_teach_more_than_one_negative_and_more_than_counting(job, tmp_path, record_figure):
    source = os.environ.get("AMAZON_BEAUTY")
    if source is None:
        pytest.skip("AMAZON_BEAUTY=FOLDER names the folder with sequences.txt.gz and items.parquet")
    given = [
        f"source={source}",
        f"data_folder={tmp_path}",
        f"runs_folder={tmp_path}/runs",
        f"record={tmp_path}/record.json",
    ]
    config = compose([*given, "seeds=[0]"], "compare_retrieval")
    config["models"] = {name: config["models"][name] for name in ("sasrec_full", "sasrec_bce")}
    job.main(config)
    record = json.loads((tmp_path / "record.json").read_text())
    found = {run["model"]: run["test"]["recall@10"] for run in record["runs"]}
    for name, value in found.items():
        record_figure(f"test recall@10 of {name}", value, seed=0)
    assert found["sasrec_full"] > found["sasrec_bce"] + 0.015
    assert found["sasrec_full"] > record["baselines"]["last item (Markov)"]["recall@10"]
