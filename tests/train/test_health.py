"""The health of tables, against what the gathered tables and the log say."""

from __future__ import annotations

import itertools
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch

from raysys.train.health import _block_starts, embedding_health, hot_ids
from raysys.train.launch import Worker, _own_process_group
from raysys.train.loop import TrainLoop
from raysys.train.state import load_weights
from raysys.train.tables import table_weights
from raysys.train.trainer import prepare


def trained_health(prepared, folder, steps=True):
    """The health of a run's tables on this rank, after training or before, and the folder's last checkpoint."""
    import dataclasses

    job = dataclasses.replace(prepared.job, folder=folder)
    loop = TrainLoop(Worker(job, torch.device("cpu"), lambda event: None, lambda: False), prepared.plan)
    if steps:
        loop.run()
    return embedding_health(loop.model, job)


def test_a_table_that_was_never_trained_says_so(tiny_config, tmp_path):
    with _own_process_group(torch.device("cpu")):
        health = trained_health(prepare(tiny_config()), tmp_path, steps=False)
    assert {table: values["never_trained_share"] for table, values in health.items()} == dict.fromkeys(health, 1.0)
    assert {table: values["rows"] for table, values in health.items()} == {
        "user": 30,
        "item": 40,
        "tag": 20,
        "brand": 6,
    }


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "data_parallel"])
def test_norms_and_trained_rows_are_those_of_the_whole_tables(gloo, tiny_config, tiny_data, tmp_path, kind):
    options = [f"train.sharding.sharding_types=[{kind}]", "train.sharding.tables={tag: {min_partition: 4}}"]
    prepared = prepare(tiny_config(*options, "trainer=ray", "train.batch_size=60", "train.max_steps=1"))
    first, second = gloo.run(2, trained_health, prepared, tmp_path)
    assert first == second
    step = prepared.job.train_step("cpu")
    initial = {name: weight.clone() for name, weight in table_weights(step).items()}
    load_weights(tmp_path / "checkpoints" / "step_00000001", step)
    for table, weight in table_weights(step).items():
        norms = weight.double().norm(dim=1)
        unmoved = (weight == initial[table]).all(dim=1).double().mean()
        assert first[table] == pytest.approx(
            {
                "rows": len(weight),
                "norm_mean": float(norms.mean()),
                "norm_p99": float(norms.quantile(0.99)),
                "never_trained_share": float(unmoved),
            }
        )
    assert 0 < first["user"]["never_trained_share"] < 1


def test_large_tables_are_sampled_in_blocks_from_end_to_end():
    assert _block_starts(250) == [0, 100, 200]
    assert _block_starts(10_000) == list(range(0, 10_000, 100))
    starts = _block_starts(1_000_000)
    assert (len(starts), starts[0], starts[-1]) == (100, 0, 999_900)
    assert min(b - a for a, b in itertools.pairwise(starts)) >= 100


def test_hot_ids_are_the_most_frequent_ones_with_their_values(tiny_config, tiny_data):
    job = prepare(tiny_config()).job
    found = hot_ids(job)
    assert found.keys() == {"user", "item", "tag", "brand"}
    train = pq.read_table(tiny_data / "train.parquet")
    known = set(job.transforms.vocabulary("user").to_pylist())
    counts = Counter(user if user in known else "(out of vocabulary)" for user in train["user"].to_pylist())
    expected = {user: count / 1500 for user, count in counts.items()}
    assert [entry["share"] for entry in found["user"]] == sorted(expected.values(), reverse=True)[:5]
    assert {entry["value"]: entry["share"] for entry in found["user"]}.items() <= expected.items()
    kept = [ids[-4:] for ids in train["history"].to_pylist()]  # a history keeps its last four events
    items = Counter(train["item"].to_pylist()) + Counter(item for ids in kept for item in ids)
    assert found["item"][0]["share"] == pytest.approx(max(items.values()) / sum(items.values()))
