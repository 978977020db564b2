"""A run's checkpoints give the vectors that its model gives, with the schedule of their step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysys.config import compose, instantiate
from raysys.train.recall import rank_metrics
from raysys.train.snapshots import Snapshots
from raysys.train.trainer import fit, prepare

ITEMS = 300


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshots")
    given = ["data=synthetic_catalogue", f"data.folder={folder}/data", f"data.prepare.items={ITEMS}", "data.shards=2"]
    given += ["data.prepare.train_rows=500", "data.prepare.queries=40", "model=hsnn", "model.nodes=[4,3]"]
    given += ["model.embedding_dim=8", "model.deep=[8]", "model.width=8", "model.bottom=[8]", "model.hidden=[8]"]
    given += ["objective=hsnn", "objective.negatives=50", "train.batch_size=100", "train.epochs=2", "run_id=run"]
    given += ["train.retrieval={at: [10]}", "train.checkpoint={every_steps: 5, keep: 2}", f"runs_folder={folder}"]
    config = compose(given)
    instantiate(config["data"]["prepare"])
    return folder / "run", fit(prepare(config), []).metrics["test"]["click"]


def test_the_kept_checkpoint_ranks_as_the_run_reported(run):
    folder, reported = run
    snapshots = Snapshots(folder)
    queries, items = snapshots.queries("test", 1000), snapshots.items()
    assert items.shape == (ITEMS, 8)
    with torch.no_grad():
        scores = snapshots.model.score(queries.users, items)
    own = scores.gather(1, queries.own[:, None])
    found = rank_metrics((scores >= own).sum(1).numpy(), [10])
    assert found == pytest.approx({name: reported[name] for name in found})


def test_rows_are_drawn_by_seed_with_the_row_of_their_item(run):
    snapshots = Snapshots(run[0])
    some, again, other = (snapshots.queries("valid", 9, seed) for seed in (0, 0, 1))
    assert len(some.own) == len(some.users) == 9
    assert some.rows.equals(again.rows)
    assert not some.rows.equals(other.rows)
    np.testing.assert_array_equal(snapshots.catalogue.keys[some.own.numpy()], some.rows["item_id"].to_numpy())


def test_loading_another_checkpoint_changes_weights_and_temperature(run):
    snapshots = Snapshots(run[0])
    first, last = snapshots.checkpoints
    vectors, temperature = snapshots.items(), snapshots.temperature
    assert temperature == pytest.approx(0.05)
    snapshots.load(first)
    assert snapshots.temperature == pytest.approx(0.05 ** (0.5 / 0.7))
    assert not torch.equal(snapshots.items(), vectors)
    snapshots.load(last)
    torch.testing.assert_close(snapshots.items(), vectors, rtol=0, atol=0)
