from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from raysys.data.synthetic import bayes_metrics, prepare_criteo_shaped
from raysys.data.synthetic.spec import TRUTH
from raysys.schema import FeatureSchema


@pytest.fixture(scope="module")
def criteo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("criteo") / "log"
    prepare_criteo_shaped(folder, rows=2000, processes=1)
    return folder


def test_criteo_shaped_rows_are_those_of_the_published_benchmark(criteo):
    """Sums and single rows of the 2,000 rows that the benchmark's own script writes."""
    tables = [pq.read_table(criteo / split) for split in ("train", "valid", "test")]
    assert [table.num_rows for table in tables] == [1666, 167, 167]
    table = pa.concat_tables(tables)
    assert pc.sum(table["label"]).as_py() == 450
    sums = [pc.sum(table[f"c{field}"]).as_py() for field in range(26)]
    assert sums == [
        *(281929, 142372, 10086095, 6064028, 83904, 10443, 1844996, 163873, 730, 9337074, 1000631, 10904089, 568835),
        *(11593, 2091940, 9875958, 4615, 983513, 364483, 1353, 11963559, 8384, 6737, 8986350, 37177, 4556985),
    ]
    truth = table["label" + TRUTH].to_numpy()
    assert truth.sum() == pytest.approx(443.2217865392684, rel=1e-12)
    assert truth[[0, 1, -1]] == pytest.approx(
        [0.15269808469080662, 0.028296189604010535, 0.34584602165460554], rel=1e-12
    )
    last = table.slice(1999).to_pylist()[0]
    assert [last[f"c{field}"] for field in range(6)] == [38, 3, 71, 41, 24, 5]
    assert [last["i0"], last["i12"]] == pytest.approx([2.4343185424804688, 0.23367370665073395], rel=1e-6)


def test_criteo_shaped_rows_are_the_same_for_any_number_of_processes(criteo, tmp_path):
    prepare_criteo_shaped(tmp_path / "log", rows=2000, processes=2)
    for path in criteo.glob("*/*.parquet"):
        assert path.read_bytes() == (tmp_path / "log" / path.relative_to(criteo)).read_bytes()


def test_criteo_shaped_schema(criteo):
    schema = FeatureSchema.load(criteo / "schema.yaml")
    assert (len(schema.dense), len(schema.sparse), schema.tasks) == (13, 26, ("label",))
    assert {table.embedding_dim for table in schema.tables} == {16}
    assert {feature.encoding for feature in schema.sparse} == {"index"}
    assert set(pq.read_table(criteo / "test").column_names) - set(schema.columns()) == {"label" + TRUTH}


def test_criteo_shaped_truth_has_the_published_auc(tmp_path):
    prepare_criteo_shaped(tmp_path / "log", rows=120_000, processes=1)
    found = bayes_metrics(tmp_path / "log" / "train", ["label"])["label"]
    # The variance of an AUC is at most A (1 - A) / min(positives, negatives).
    error = math.sqrt(0.8223 * (1 - 0.8223) / (found["base_rate"] * found["rows"]))
    assert abs(found["auc"] - 0.8223) < 0.002 + 4 * error


@pytest.mark.experiment
def test_criteo_shaped_truth_has_the_published_auc_at_full_size(tmp_path):
    prepare_criteo_shaped(tmp_path / "log")
    metrics = {
        split: bayes_metrics(tmp_path / "log" / split, ["label"])["label"] for split in ("train", "valid", "test")
    }
    assert [metrics[split]["rows"] for split in metrics] == [499_999, 50_000, 50_001]
    assert abs(metrics["test"]["auc"] - 0.822) < 0.002
    assert sum(found["auc"] * found["rows"] for found in metrics.values()) / 600_000 == pytest.approx(0.822, abs=0.003)
