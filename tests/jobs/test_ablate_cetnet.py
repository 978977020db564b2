"""The ablations of CETNet, on the tiny log."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.config import compose
from raysys.errors import UserError
from raysys.train.record import read_record

SMALL = [
    "data=tiny",
    "train.batch_size=500",
    "train.max_steps=1",
    "~model.members.interformer",
    "+model@model.members.dlrm=dlrm",
    "+model.members.dlrm._partial_=true",
    *(f"model.members.{name}.{key}" for name in ("dhen", "dlrm") for key in ("bottom=[4]", "tower=[4]")),
    *(f"model.members.{name}.embedding_dim=8" for name in ("dhen", "dlrm")),
    "model.members.dhen.layers=1",
    "model.members.dhen.hidden=[]",
]
RUNS = ["cetnet", "a_no_peers", "b_uniform", "c_shared_tables", "d_copies_of_dhen"]
ALONE = ["e_dhen_alone", "f_dhen", "e_dlrm_alone", "f_dlrm"]


@pytest.fixture(scope="module")
def job(jobs):
    return jobs("ablate_cetnet")


def test_every_ablation_is_trained_and_shown(job, tiny_configs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    config = compose([*SMALL, f"runs_folder={tmp_path}"], "ablate_cetnet", str(tiny_configs))
    job.main(config)
    shown = capsys.readouterr().out
    names = [*RUNS, *ALONE]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"cetnet-{name}-0" for name in names)
    rows = [line.replace("│", " ").split() for line in shown.splitlines() if "│" in line]
    found = {row[0]: row for row in rows}
    assert list(found) == [*RUNS, "e_dhen_alone", "e_dlrm_alone", "f_average"]

    def parameters(name):
        return read_record(tmp_path / f"cetnet-{name}-0")["parameters"]

    tables = {name: parameters(name)["sparse"] for name in names}
    assert len({tables[name] for name in ("cetnet", "a_no_peers", "b_uniform", "c_shared_tables")}) == 1
    assert tables["e_dhen_alone"] == tables["cetnet"] == 2 * tables["f_dhen"]
    columns = [job.read_predictions(tmp_path / f"cetnet-f_{name}-0") for name in ("dhen", "dlrm")]
    mean = job.average(columns, ["click"])["click_probability"]
    np.testing.assert_allclose(mean, (columns[0]["click_probability"] + columns[1]["click_probability"]) / 2)
    ne = float(found["f_average"][3])
    assert ne == pytest.approx(
        job.metric_interval("ne", columns[0]["click_label"], mean, columns[0]["click_weight"])[0], abs=1e-4
    )


def test_rows_are_joined_by_their_example_id(job):
    one = {"example_id": np.array([1, 2]), "click_probability": np.array([0.1, 0.2])}
    other = {"example_id": np.array([1, 3]), "click_probability": np.array([0.1, 0.2])}
    with pytest.raises(UserError, match="the runs have scored different rows"):
        job.average([one, other], ["click"])


def test_a_model_that_is_no_ensemble_is_named(job, tiny_configs):
    with pytest.raises(UserError, match="at least two members"):
        job.ablations(compose(["data=tiny", "model=dlrm"], "ablate_cetnet", str(tiny_configs)))
