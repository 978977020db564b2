"""The HSNN and its rivals on a tiny catalogue: what the record holds, what must hold exactly, and nothing is done twice."""

from __future__ import annotations

import json

import numpy as np
import pytest

from raysys.config import compose
from raysys.errors import UserError
from raysys.models.retrieval.hierarchy import exhaustive
from raysys.train.snapshots import Snapshots

ITEMS, K, QUERIES = 400, 20, 30
TINY = [
    "set=items_1e4",
    f"k={K}",
    "sets.items_1e4.seeds=[0]",
    "sets.items_1e4.nodes=[5,3]",
    f"sets.items_1e4.queries={QUERIES}",
    f"sets.items_1e4.overrides=['data.prepare.items={ITEMS}','data.prepare.train_rows=600','data.prepare.queries=40','data.shards=2']",
    "made_up=['data=synthetic_catalogue','train.retrieval={at: [20]}','train.batch_size=100','train.epochs=2']",
    "towers=['model.embedding_dim=8','model.bottom=[8]','model.deep=[8]','model.width=8','objective.negatives=50']",
    "models.hsnn=['model=hsnn','objective=hsnn','${towers}','model.hidden=[8]','train.checkpoint.every_steps=4']",
    "models.hsnn_em=['model=hsnn','objective=hsnn','objective.update=em','${towers}','model.hidden=[8]']",
    "negatives=50",
]


@pytest.fixture(scope="module")
def job(jobs):
    return jobs("compare_indexes")


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """The folder of the runs, the figures, and the config."""
    folder = tmp_path_factory.mktemp("compare_indexes")
    config = compose([*TINY, f"runs_folder={folder}/runs", f"record={folder}/records/record.json"], "compare_indexes")
    job.main(config)
    content = (folder / "records" / "record.json").read_text()
    job.main(config)
    assert (folder / "records" / "record.json").read_text() == content  # the seed is there: nothing is measured again
    return folder / "runs" / "items_1e4", json.loads(content)["sets"]["items_1e4"]["0"], config


def test_the_record_has_every_way_to_retrieve(done):
    _, figures, config = done
    assert set(figures["rows"]) == {
        "hsnn, every item",
        "hsnn",
        "disjoint k-means",
        "disjoint k-means, levels' networks",
        "hsnn, EM update, every item",
        "hsnn, EM update",
        "hsnn, EM update, disjoint k-means",
        "two towers, exact",
        "two towers, IVF",
    }
    for row in figures["rows"].values():
        assert 0 < row["scored"] <= ITEMS + 5 + 15
        for share in ("recall", "true", "taken"):
            assert 0 <= row[share] <= 1
        assert row["ms"] > 0
    for way in ("hsnn", "disjoint k-means", "disjoint k-means, levels' networks"):
        assert list(figures["rows"][way]["budgets"]) == [str(factor) for factor in config["budgets"]]
    assert (figures["items"], figures["queries"]) == (ITEMS, QUERIES)
    assert set(figures["seconds"]) == {"hsnn", "hsnn_em", "two_tower"}


def test_scoring_everything_finds_everything(done):
    _, figures, _ = done
    for way in ("hsnn, every item", "hsnn, EM update, every item", "two towers, exact"):
        assert (figures["rows"][way]["scored"], figures["rows"][way]["recall"]) == (ITEMS, 1)


def test_beams_of_all_nodes_find_everything(done, job):
    runs, _, config = done
    compared = job.Comparison(config, config["sets"]["items_1e4"], 0, Snapshots(runs / "hsnn-0"))
    index = job.build(compared.hsnn.model, compared.items)
    best = exhaustive(compared.hsnn.model, compared.test.users, compared.items, K)
    row = compared.beam(index, (5, 15), best)
    assert row["recall"] == 1
    assert row["scored"] == ITEMS + sum(len(level.path) for level in index.levels)
    narrow = compared.beam(index, (1, 1), best)
    assert narrow["recall"] < 1
    assert narrow["scored"] < row["scored"]


def test_rivals_score_no_more_than_they_may(done):
    """On the rows that choose; on those that measure about as much."""
    _, figures, _ = done
    rows = figures["rows"]
    allowed = 1.3 * rows["hsnn"]["scored"]
    for way in ("disjoint k-means", "disjoint k-means, levels' networks", "hsnn, EM update", "two towers, IVF"):
        assert rows[way]["scored"] <= allowed


def test_the_curriculum_is_followed_by_checkpoint(done):
    _, figures, _ = done
    steps = [point["step"] for point in figures["curriculum"]]
    assert steps == [4, 8, 12]
    assert [point["volatility"] is None for point in figures["curriculum"]] == [True, False, False]
    temperatures = [point["temperature"] for point in figures["curriculum"]]
    assert temperatures == pytest.approx([0.05 ** (4 / 12 / 0.7), 0.05 ** (8 / 12 / 0.7), 0.05])
    for point in figures["curriculum"]:
        assert len(point["auc"]) == len(point["usage"]) == 2
        assert all(auc["gap"] == pytest.approx(auc["soft"] - auc["hard"]) for auc in point["auc"])
        assert 1 <= point["usage"][0] <= 5 + 1e-6
        assert 1 <= point["usage"][1] <= 3 + 1e-6


def test_the_same_rows_are_asked_of_every_model(done):
    runs, _, _ = done
    rows = [Snapshots(runs / f"{kind}-0").queries("test", QUERIES) for kind in ("hsnn", "two_tower")]
    assert rows[0].rows.equals(rows[1].rows)
    items = Snapshots(runs / "hsnn-0").catalogue
    np.testing.assert_array_equal(items.keys[rows[0].own.numpy()], rows[0].rows["item_id"].to_numpy())


def test_what_is_not_there_is_named(job, capsys):
    with pytest.raises(UserError, match=r"set 'items' is not in configs/compare_indexes.yaml"):
        job.main(compose(["set=items"], "compare_indexes"))
    job.main(compose(["set=beauty", "record=/nonexistent/record.json"], "compare_indexes"))
    assert "beauty is left out: give sources.amazon_beauty=FOLDER" in capsys.readouterr().out


@pytest.mark.experiment
def test_ten_thousand_items(job, tmp_path):
    """As recorded: most of what scoring everything finds for a fraction of it, even use of nodes, and a gap that closes."""
    given = ["set=items_1e4", "sets.items_1e4.seeds=[0]", f"runs_folder={tmp_path}", f"record={tmp_path}/record.json"]
    job.main(compose(given, "compare_indexes"))
    figures = json.loads((tmp_path / "record.json").read_text())["sets"]["items_1e4"]["0"]
    found = figures["rows"]["hsnn"]
    assert found["recall"] >= 0.8
    assert found["scored"] < 0.15 * figures["items"]
    assert all(used >= 0.5 * nodes for used, nodes in zip(found["usage"], found["nodes"], strict=True))
    gaps = [[level["gap"] for level in point["auc"]] for point in figures["curriculum"]]
    assert all(last < first for first, last in zip(gaps[0], gaps[-1], strict=True))
