"""The bench of the ranking models at tiny sizes, and that both its loops do the same work. No timing is asserted."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from raysys.config import instantiate
from raysys.train.launch import launch
from raysys.train.loop import TrainLoop
from raysys.train.trainer import prepare


@pytest.fixture
def bench(monkeypatch, tmp_path, jobs):
    monkeypatch.chdir(tmp_path)
    return jobs("bench_rankers")


def test_training_and_inference_of_the_chosen_models_are_in_the_table(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_rankers.py", "--quick", "--models", "dcnv2,cetnet", "--out", "out"])
    bench.main()
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "|" in line]
    content = json.loads(Path("out/rankers.json").read_text())
    assert content["threads_per_process"] == 1
    assert [row["model"] for row in content["rows"]] == ["dcnv2", "cetnet"]
    for row in content["rows"]:
        assert any(cells[0] == row["model"] and cells[-1] in ("met", "missed") for cells in table)
        training = row["training"]
        assert len(training["turns"]) == content["settings"]["rounds"] == 2
        ratios = [turn["bare"]["wall"] / turn["raysys"]["wall"] for turn in training["turns"]]
        assert training["ratio"] == pytest.approx(sum(ratios) / 2)  # the median of two
        assert set(row["inference"]) == {"1", "512"}
        for inference in row["inference"].values():
            assert set(inference["milliseconds"]) == {"bundle", "bare", "from_rows"}
            assert all(len(turns) == 3 for turns in inference["turns"].values())


def test_every_model_of_the_configs_is_measured(bench):
    models = bench.models()
    assert {"adatt", "cetnet", "hiformer", "interformer", "ple", "xdeepfm"} < set(models)
    assert "model.tokens_out=12" in models["dhen"]  # the size that the comparison trains
    assert "objective=collaborative" in models["cetnet"]


@pytest.mark.parametrize("name", ["mmoe", "cetnet"])
def test_the_bare_loop_learns_what_raysys_learns(bench, jobs, tmp_path, name):
    loops = jobs("bench_ranker_loops")
    sizes = dataclasses.replace(bench.QUICK, steps=4, rounds=1)
    overrides = [*bench.models()[name], "data.shuffle_rows=0", "train.log_every=1"]
    if name == "cetnet":
        overrides += ["model.members.interformer.dropout=0", "objective.ramp=0"]
    config = bench.config_of(name, sizes, tmp_path / "runs", overrides)
    instantiate(config["data"]["prepare"])
    prepared = prepare(config)

    def work(worker):
        own = []
        emit = lambda event: own.append(event["loss"]) if event["event"] == "step" else None  # noqa: E731
        loop = TrainLoop(dataclasses.replace(worker, emit=emit), prepared.plan)
        bare = loops.BareLoop(prepared, loops.full_batches(loop, 8))
        bare.start_from(loop.model)
        loop.run()
        return own, [bare.step() for _ in own]

    own, bare = launch(prepared.job, work, lambda event: None, False)
    assert len(own) == 8
    assert own[-1] < own[0]
    # The same sums in another order: a few roundings a step, which Adam's division by a small root enlarges.
    assert bare == pytest.approx(own, rel=1e-3)
