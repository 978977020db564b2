from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from raysys.data.synthetic import bayes_metrics
from raysys.data.synthetic.spec import TRUTH
from raysys.errors import UserError


def test_bayes_metrics_agree_with_scikit_learn(log):
    found = bayes_metrics(log / "train", ["click", "conversion"])
    table = pq.read_table(log / "train")
    for task in ("click", "conversion"):
        seen = table.filter(table[task].is_valid())
        label, truth = seen[task].to_numpy(), seen[task + TRUTH].to_numpy()
        rate = label.mean()
        assert found[task]["rows"] == len(label)
        assert found[task]["base_rate"] == pytest.approx(rate)
        assert found[task]["calibration"] == pytest.approx(truth.mean() / rate)
        assert found[task]["log_loss"] == pytest.approx(log_loss(label, truth))
        assert found[task]["ne"] == pytest.approx(log_loss(label, truth) / log_loss(label, np.full(len(label), rate)))
        assert found[task]["auc"] == pytest.approx(roc_auc_score(label, truth), abs=1e-5)
    stored = json.loads((log / "prepared.json").read_text())
    assert stored["rows"] == {"train": 74_999, "valid": 7500, "test": 7501}
    assert stored["bayes"]["train"]["click"] == found["click"]


def test_bayes_metrics_of_one_class_are_not_defined(tmp_path):
    path = tmp_path / "log.parquet"
    columns = {"a": pa.array([1, 1, None]), "a" + TRUTH: pa.array([0.5, 0.5, 0.9])}
    pq.write_table(pa.table(columns | {"b": pa.nulls(3, pa.int8()), "b" + TRUTH: pa.array([0.5] * 3)}), path)
    found = bayes_metrics(path, ["a", "b"])
    assert found["a"]["log_loss"] == pytest.approx(math.log(2))
    assert found["a"]["rows"] == 2
    assert math.isnan(found["a"]["ne"])
    assert math.isnan(found["a"]["auc"])
    assert found["b"]["rows"] == 0
    assert all(math.isnan(value) for key, value in found["b"].items() if key != "rows")


def test_bayes_metrics_name_a_missing_column(tmp_path):
    pq.write_table(pa.table({"click": pa.array([1])}), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=r"log\.parquet: no column 'click_true_probability'"):
        bayes_metrics(tmp_path / "log.parquet", ["click"])
