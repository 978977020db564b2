"""The bench at tiny sizes: its structure, and that the sides of a comparison do the same work. No timing is asserted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysys.config import compose, instantiate
from raysys.data.synthetic import prepare_criteo_shaped
from raysys.data.synthetic.criteo_shaped import criteo_shaped_schema
from raysys.models.flops import flops_per_row

JOBS = Path(__file__).parents[2] / "jobs"
BARE = JOBS / "bench_bare.py"


@pytest.fixture(scope="module")
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What `bench.py --quick` wrote and printed."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(JOBS / "bench.py"), "--quick", "--sections", "sparse", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(JOBS.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, json.loads((folder / "out" / "bench.json").read_text()), result.stdout


def test_the_bare_loop_is_short_and_knows_nothing_of_raysys():
    source = BARE.read_text()
    assert len(source.splitlines()) <= 120
    check = (
        f"import sys; sys.path.insert(0, {str(JOBS)!r}); import bench_bare, bench_models; "
        "assert not [name for name in sys.modules if name.split('.')[0] in ('raysys', 'ray')]"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=200)


@pytest.mark.soak
def test_the_json_says_what_was_measured_and_where(quick):
    _, content, _ = quick
    assert content["cpus"] >= 1
    assert content["threads_per_process"] == 1
    assert set(content["versions"]) == {"torch", "torchrec", "ray", "pyarrow"}
    assert set(content["seconds"]) == {"sparse"}
    assert [(row["section"], row["target"]) for row in content["rows"]] == [("sparse", 3.0), ("sparse", None)]


@pytest.mark.soak
def test_every_figure_is_the_median_of_the_ratios_of_its_rounds(quick):
    _, content, _ = quick
    row = content["rows"][0]
    rates = row["detail"]["rows_per_second"]
    assert set(rates) == {"fused", "rowwise", "plain"}
    ratios = [a / b for a, b in zip(rates["fused"]["turns"], rates["plain"]["turns"], strict=True)]
    assert row["detail"]["ratios"] == pytest.approx(ratios)
    assert len(ratios) == content["settings"]["rounds"]
    assert row["value"] == pytest.approx(sum(ratios) / 2)  # the median of two
    assert all(rate > 0 for side in rates.values() for rate in side["turns"])


@pytest.mark.soak
def test_a_missed_row_has_a_profile_and_a_met_one_none(quick):
    folder, content, output = quick
    for row in content["rows"]:
        assert row["met"] is (None if row["target"] is None else row["value"] >= row["target"])
        assert (row["profile"] is not None) == (row["met"] is False)
        if row["profile"]:
            assert (folder / row["profile"]).read_text().startswith("milliseconds of a step")
            assert row["profile"] in output


class _Rival:
    """Counts its turns, and fails in the one that is named."""

    def __init__(self, fails: int = 0):
        self.turns, self.fails, self.closed = 0, fails, False

    def turn(self):
        self.turns += 1
        if self.turns == self.fails:
            raise RuntimeError("the rival ended")
        return float(self.turns)

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log") / "data"
    prepare_criteo_shaped(folder, rows=1800, processes=1)
    return str(folder)


def test_rivals_have_their_turn_after_each_of_the_train_loop(jobs, log, tmp_path):
    raysys, rival = jobs("bench_raysys"), _Rival()
    run = raysys.Run("dlrm", 1, log, tmp_path, 64, 5, 2, on_ray=False)
    timing = raysys.time_run(run, {"other": rival})
    assert timing.rates["other"] == [2.0, 3.0]  # without the first turn
    assert len(timing.rates["raysys"]) == 2
    assert all(rate > 0 for rate in timing.rates["raysys"])
    assert timing.facts["dense_parameters"] == 173_969
    assert rival.closed


def test_a_rival_that_fails_ends_the_measurement(jobs, log, tmp_path):
    raysys, rival = jobs("bench_raysys"), _Rival(fails=2)
    with pytest.raises(RuntimeError, match="the rival ended"):
        raysys.time_run(raysys.Run("dlrm", 1, log, tmp_path, 64, 5, 2, on_ray=False), {"other": rival})
    assert rival.closed


def test_the_reader_is_timed_over_a_whole_pass(jobs, log):
    rates = jobs("bench_raysys").read(log, 64)
    assert next(rates) > 0
    assert next(rates) > 0


def test_both_sides_of_end_to_end_have_the_same_size(jobs):
    bare, models, raysys = jobs("bench_bare"), jobs("bench_models"), jobs("bench_raysys")
    schema = criteo_shaped_schema()
    for name, experiment in raysys.EXPERIMENTS.items():
        config = compose([f"experiment={experiment}"])
        yardstick = bare.Model(name, "cpu")
        ours = instantiate(config["model"], schema=schema, device="meta")
        assert models.dense_parameters(yardstick) == models.dense_parameters(ours)
        assert models.flops_per_row(yardstick) == flops_per_row(
            lambda small, node=config["model"]: instantiate(node, schema=small), schema
        )


@pytest.mark.parametrize("name", ["dlrm", "dcn"])
def test_the_bare_loop_computes_what_torchrecs_class_computes(jobs, name):
    bare, models = jobs("bench_bare"), jobs("bench_models")
    ours, published = bare.Model(name, "cpu"), models.Published(name, "cpu")
    # Both register tables, dense part and head in this order. TorchRec's dense part ends in a ReLU, ours does not.
    weights = list(ours.state_dict().values())
    published.load_state_dict(dict(zip(published.state_dict(), weights, strict=True)))
    ours.dense.append(torch.nn.ReLU())
    batch = _batch(bare)
    with torch.no_grad():
        for a, b in zip(ours(batch), published(batch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _batch(bare, rows: int = 6):
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randint(size, (rows,), generator=generator) for size in bare.ROWS])
    sparse = bare.KeyedJaggedTensor(bare.FIELDS, ids, lengths=torch.ones(len(ids), dtype=torch.int32))
    labels = torch.randint(2, (rows,), generator=generator).float()
    return bare.Batch(torch.randn(rows, 13, generator=generator), sparse, labels)


@pytest.mark.parametrize("pipeline", ["base", "sparse_dist"])
@pytest.mark.parametrize("name", ["dlrm", "dcn", "dhen"])
def test_the_bare_loop_trains_every_weight(jobs, process_group, name, pipeline):
    bare = jobs("bench_bare")
    torch.manual_seed(0)
    model, before, losses = bare.Model(name), {}, []
    model.register_forward_pre_hook(lambda *_: None if before else before.update(_weights(model)))
    model.register_forward_hook(lambda module, inputs, output: losses.append(output[0].item()))
    rates = bare.run(model, [_batch(bare)], torch.device("cpu"), 5, pipeline)
    assert next(rates) > 0
    assert len(losses) == 10  # a turn to warm up, and the one that is timed
    assert losses[-1] < losses[0]
    after = _weights(model)
    assert after.keys() == before.keys()
    assert [key for key in after if torch.equal(after[key], before[key])] == []


def _weights(model):
    state = model.state_dict().items()
    return {key: (v.local_shards()[0].tensor if hasattr(v, "local_shards") else v).clone() for key, v in state}


def test_batches_of_the_bare_loop_are_dealt_out_to_the_processes(jobs, tmp_path):
    bare = jobs("bench_bare")
    columns = {name: torch.arange(11.0).numpy() + k for k, name in enumerate(bare.DENSE)}
    columns |= {name: torch.arange(11).numpy() + 100 * k for k, name in enumerate(bare.FIELDS)}
    pq.write_table(pa.table({**columns, "label": torch.arange(11).numpy() % 2}), tmp_path / "log.parquet")
    parts = [bare.read_batches(str(tmp_path / "log.parquet"), 2, rank, 2) for rank in range(2)]
    assert [[int(batch.dense_features[0, 0]) for batch in part] for part in parts] == [[0, 4, 8], [2, 6]]
    batch = parts[1][0]
    assert batch.dense_features[:, 1].tolist() == [3.0, 4.0]
    assert batch.sparse_features["c2"].values().tolist() == [202, 203]
    assert batch.labels.tolist() == [0.0, 1.0]


def test_fused_and_plain_adagrad_give_the_same_weights(jobs, process_group):
    sparse = jobs("bench_sparse")
    generator = torch.Generator().manual_seed(0)
    sides = [sparse.fused_trainer(50, 8, sparse.EmbOptimType.EXACT_ADAGRAD), sparse.plain_trainer(50, 8)]
    before = sides[0].weight().clone()
    for _ in range(5):
        ids, gradient = sparse.zipf_ids(50, (16, 3), generator), torch.randn(16, 8, generator=generator)
        for side in sides:
            side.step(ids, gradient)
    fused, plain = (side.weight() for side in sides)
    assert (fused - before).abs().max() > 0.01
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_zipf_ids_cover_the_table_and_are_skewed(jobs):
    sparse = jobs("bench_sparse")
    ids = sparse.zipf_ids(1000, (2000, 26), torch.Generator().manual_seed(0))
    counts = torch.bincount(ids.flatten(), minlength=1000).sort(descending=True).values
    assert len(counts) == 1000  # none beyond the table
    # Under density x^-1.1 on [1, 1001] the share of [1, 2] is (1 - 2^-0.1) / (1 - 1001^-0.1) = 0.134.
    assert counts[0] / counts.sum() == pytest.approx(0.134, abs=0.01)


def test_a_row_is_met_by_its_target(jobs):
    row = jobs("bench_result").Row
    assert row("s", "n", 0.9, 0.9).met is True
    assert row("s", "n", 0.89, 0.9).met is False
    assert row("s", "n", 1.06, 1.0, 0.05).met is False
    assert row("s", "n", 0.96, 1.0, 0.05).met is True
    assert row("s", "n", math.nan, 0.9).met is False
    assert row("s", "n", 2.0).met is None


def test_a_rival_that_dies_says_why(jobs, tmp_path):
    rivals = jobs("bench_rival")
    options = {"data": str(tmp_path / "nowhere"), "batch_size": 8}
    with rivals.Rival("bench_raysys:read", options, tmp_path / "log") as rival, pytest.raises(RuntimeError) as error:
        rival.turn()
    assert "schema.yaml: no such schema" in str(error.value)


def test_operators_stand_side_by_side_with_the_largest_difference_first(jobs):
    text = jobs("bench_profile").side_by_side({"bare": {"mm": 5.0, "add": 1.0}, "raysys": {"mm": 5.5, "stack": 2.0}})
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["stack", "0.000", "2.000", "+2.000"],
        ["add", "1.000", "0.000", "-1.000"],
        ["mm", "5.000", "5.500", "+0.500"],
    ]
