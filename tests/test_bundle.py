"""A bundle predicts what the trainer predicted, is whole or refused, and brings no code along."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from raysys.bundle import load_bundle, verify_bundle
from raysys.errors import UserError
from raysys.hashed_folder import MANIFEST, files_of, hash_files, write_manifest
from raysys.train.export import export_run


@pytest.fixture
def bundle(tiny_run, tmp_path):
    """A copy of the bundle, to be damaged."""
    return shutil.copytree(tiny_run / "bundle", tmp_path / "bundle")


def rehash(folder):
    write_manifest(folder, 1, hash_files(folder, files_of(folder)))


def in_order_of_rows(path):
    table = pq.read_table(path)
    return table.take(np.argsort(table["example_id"].to_numpy()))


def test_predictions_are_those_of_the_trainer(tiny_run, tiny_data):
    rows = pq.read_table(tiny_data / "test.parquet")
    found = load_bundle(tiny_run / "bundle").predict(rows.drop(["click", "spend"]))  # [301, 2]
    expected = in_order_of_rows(tiny_run / "predictions" / "test.parquet")
    for task, name in enumerate(("click", "spend")):
        np.testing.assert_allclose(found[:, task], expected[f"{name}_probability"].to_numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(expected["click_label"].to_numpy(), rows["click"].to_numpy())


def test_rows_as_json_has_them_give_the_same(tiny_run, tiny_data):
    bundle = load_bundle(tiny_run / "bundle")
    rows = pq.read_table(tiny_data / "test.parquet")[:20]
    as_json = json.loads(json.dumps(rows.to_pylist()))
    torch.testing.assert_close(bundle.predict(as_json), bundle.predict(rows), rtol=1e-6, atol=0)


def test_probabilities_are_corrected_for_sampling_and_then_calibrated(tiny_run, tiny_data):
    bundle = load_bundle(tiny_run / "bundle")
    rows = pq.read_table(tiny_data / "test.parquet")
    logits = bundle.model(bundle.transforms.to_batch(rows)).logits.detach().double()
    probability = torch.sigmoid(logits[:, 0])
    corrected = probability / (probability + (1 - probability) / 0.5)  # every second negative was kept
    record = json.loads((tiny_run / "run.json").read_text())
    assert record["calibration"].keys() == {"click"}
    expected = bundle.calibrators["click"](corrected)
    assert (expected - corrected).abs().max() > 0.01
    predictions = bundle.predict(rows)
    torch.testing.assert_close(predictions[:, 0], expected)
    torch.testing.assert_close(predictions[:, 1], logits[:, 1])
    assert bundle.metrics == record["metrics"]


def test_no_file_is_a_pickle(tiny_run):
    files = [tiny_run / "bundle" / name for name in files_of(tiny_run / "bundle")]
    assert {file.suffix for file in files} == {".safetensors", ".json", ".yaml", ".parquet"}
    for file in files:
        head = file.read_bytes()[:4]
        assert not head.startswith((b"\x80", b"PK"))  # of a pickle, of torch.save
        assert head == b"PAR1" or file.suffix != ".parquet"


def test_every_changed_missing_or_added_file_is_named(bundle):
    names = files_of(bundle)
    assert verify_bundle(bundle).keys() == set(names)
    for name in names:
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError) as caught:
            load_bundle(bundle)
        assert caught.value.message == f"{bundle / name} does not match its hash"
        (bundle / name).unlink()
        with pytest.raises(UserError) as caught:
            load_bundle(bundle)
        assert caught.value.message == f"{bundle / name} is missing"
        (bundle / name).write_bytes(content)
    (bundle / "more.py").touch()
    with pytest.raises(UserError) as caught:
        load_bundle(bundle)
    assert caught.value.message == f"{bundle / 'more.py'} is not in the manifest"
    (bundle / "more.py").unlink()
    (bundle / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_target_": "os.system", "command": "true"},
            "_target_ 'os.system' is refused\n  hint: allowed prefixes: raysys.",
        ),
        ({"_target_": "raysys.bundle.write_bundle"}, "it is no class of 'raysys.bundle'"),
        ({"tower": {"_target_": "subprocess.Popen", "args": ["true"]}}, "_target_ 'subprocess.Popen' is refused"),
        ({"_target_": "raysys.models.ranking.dhen.DHENN"}, "has no 'DHENN'"),
    ],
)
def test_a_config_of_others_names_allowed_classes_only(bundle, change, message):
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps(config | change))
    rehash(bundle)
    with pytest.raises(UserError) as caught:
        load_bundle(bundle)
    assert message in str(caught.value)


def test_a_model_of_the_users_own_package_trains_and_loads_where_it_is_allowed(train_tiny, tiny_data):
    folder, outcome, _ = train_tiny("model=user", "train.epochs=2")
    assert outcome.metrics["test"]["click"]["rows"] == 301
    path = export_run(folder)
    with pytest.raises(UserError, match=r"_target_ 'tinypkg\.models\.Perceptron' is refused"):
        load_bundle(path)
    bundle = load_bundle(path, allowed=("tinypkg.",))
    assert type(bundle.model).__module__ == "tinypkg.models"
    found = bundle.predict(pq.read_table(tiny_data / "test.parquet"))
    expected = in_order_of_rows(folder / "predictions" / "test.parquet")["click_probability"].to_numpy()
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6, atol=1e-6)


def test_loading_needs_neither_ray_nor_the_trainer(tiny_run):
    code = (
        "import sys; from raysys.bundle import load_bundle; load_bundle(sys.argv[1]);"
        "print([name for name in sys.modules if name == 'ray' or name.startswith('raysys.train')])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tiny_run / "bundle"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
