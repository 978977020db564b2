"""`jobs/release.py` makes a release of three runs, with the index that its config names."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raysys.models.retrieval.indexes.hnsw import HNSW
from raysys.serve.release import Release
from raysys.serve.stages import RetrieverStage
from raysys.serve.store import ArrowStore

ROOT = Path(__file__).parents[2]


def run_job(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["release.py", *arguments])
    runpy.run_path(str(ROOT / "jobs" / "release.py"), run_name="__main__")


def test_a_release_of_three_runs(stage_bundles, release, tmp_path, monkeypatch, capsys):
    runs = [f"{stage}={bundle.parent}" for stage, bundle in stage_bundles().items()]
    index = "index._target_=raysys.models.retrieval.indexes.hnsw.HNSW"
    run_job(monkeypatch, *runs, f"output={tmp_path / 'v7'}", f"users={tmp_path / 'users'}", index)
    assert "release v7" in capsys.readouterr().out
    assert len(ArrowStore(tmp_path / "users")) == 50
    made = Release.open(tmp_path / "v7")
    model = made.bundle("retriever").model
    assert isinstance(made.index(model), HNSW)
    user = pa.table({"user": [3], "age": [25.0], "liked": pa.array([[]], pa.list_(pa.int64()))})
    none = np.zeros(0, np.int64)
    (found,), (expected,) = (RetrieverStage(one).retrieve(user, [10], [none]) for one in (made, release))
    np.testing.assert_array_equal(found.ids, expected.ids)  # of 40 items the graph finds what exhaustive search finds
    with pytest.raises(SystemExit):
        run_job(monkeypatch, *runs, f"output={tmp_path / 'v7'}")
    assert "is there already" in capsys.readouterr().err
