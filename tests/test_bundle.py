"""A bundle predicts what the trainer predicted, is whole or refused, and brings no code along."""

from __future__ import annotations

import io
import json
import pickle
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
from raysys.models.quantized_tables import FORMATS
from raysys.train.export import export_run
from raysys.train.metrics import Evaluator


@pytest.fixture
def bundle(tiny_run, tmp_path):
    """A copy of the bundle, to be damaged."""
    return shutil.copytree(tiny_run / "bundle", tmp_path / "bundle")


@pytest.fixture(scope="module")
def with_artifacts(tiny_run, tmp_path_factory):
    """A bundle of int8 tables with an index and codes, only to be read."""
    folder = tmp_path_factory.mktemp("artifacts")
    (folder / "index" / "deep").mkdir(parents=True)
    (folder / "index" / "deep" / "lists.bin").write_bytes(bytes(range(256)) * 100)
    (folder / "index" / MANIFEST).write_text('{"kind": "ivf"}')
    np.save(folder / "codes.npy", np.arange(12).reshape(4, 3))
    output = tmp_path_factory.mktemp("bundles") / "bundle"
    return export_run(tiny_run, output=output, quantize="int8", artifacts=folder)


def is_table(name):
    """Whether this parameter is a table of a TorchRec collection."""
    return name.split(".")[-3:-2] in (["embedding_bags"], ["embeddings"])


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


def test_every_changed_cut_missing_or_added_file_is_named(with_artifacts, tmp_path):
    bundle = shutil.copytree(with_artifacts, tmp_path / "bundle")
    names = files_of(bundle)
    assert verify_bundle(bundle).keys() == set(names)
    assert {"artifacts/codes.npy", "artifacts/index/manifest.json", "artifacts/index/deep/lists.bin"} < set(names)
    for name in names:
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content[:-1])
        with pytest.raises(UserError) as caught:
            load_bundle(bundle)
        assert caught.value.message == f"{bundle / name} does not match its hash"
        (bundle / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError) as caught:
            load_bundle(bundle)
        assert caught.value.message == f"{bundle / name} does not match its hash"
        (bundle / name).unlink()
        with pytest.raises(UserError) as caught:
            load_bundle(bundle)
        assert caught.value.message == f"{bundle / name} is missing"
        (bundle / name).write_bytes(content)
    for name in ("more.py", "artifacts/index/more.bin"):
        (bundle / name).touch()
        with pytest.raises(UserError) as caught:
            load_bundle(bundle)
        assert caught.value.message == f"{bundle / name} is not in the manifest"
        (bundle / name).unlink()
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


def test_artifacts_are_found_by_name(with_artifacts, tiny_run, tmp_path):
    bundle = load_bundle(with_artifacts)
    assert set(bundle.artifacts) == {"codes.npy", "index/manifest.json", "index/deep/lists.bin"}
    assert np.load(bundle.artifact("codes.npy"), allow_pickle=False).tolist() == np.arange(12).reshape(4, 3).tolist()
    assert bundle.artifact("index/deep/lists.bin").stat().st_size == 25_600
    with pytest.raises(UserError, match=r"no artifact 'code\.npy'\n  hint: did you mean 'codes\.npy'"):
        bundle.artifact("code.npy")
    assert load_bundle(tiny_run / "bundle").artifacts == {}
    with pytest.raises(UserError, match="nothing: no such folder"):
        export_run(tiny_run, output=tmp_path / "bundle", artifacts=tmp_path / "nothing")
    assert not (tmp_path / "bundle").exists()


def test_nothing_is_unpickled(with_artifacts, tiny_run, tiny_data, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a pickle was read")

    rows = pq.read_table(tiny_data / "test.parquet")
    expected = load_bundle(tiny_run / "bundle").predict(rows)
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    with pytest.raises(AssertionError, match="a pickle was read"):
        pickle.load(io.BytesIO(b""))
    assert torch.equal(load_bundle(tiny_run / "bundle").predict(rows), expected)
    assert load_bundle(with_artifacts).predict(rows).isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_tables_take_their_bytes_on_disk_and_in_memory(tiny_run, tmp_path, kind):
    plain = load_bundle(tiny_run / "bundle").model.state_dict()
    path = export_run(tiny_run, output=tmp_path / "bundle", quantize=kind)
    stored = load_bundle(path).model.state_dict()
    tables = {name: value for name, value in plain.items() if is_table(name)}
    assert len(tables) == 4
    quantized = {name: value for name, value in stored.items() if value.dtype == torch.uint8}
    expected = sum(len(table) * FORMATS[kind].row_bytes(table.shape[1]) for table in tables.values())
    assert sum(value.nbytes for value in quantized.values()) == expected
    for name, value in stored.items():  # the rest is as it was, and no table is there in fp32
        assert name in quantized or torch.equal(value, plain[name]), name
    assert not tables.keys() & stored.keys()
    if kind == "int8":
        assert expected <= 1.02 * sum(len(table) * (table.shape[1] + 8) for table in tables.values())
    files = [folder / "model.safetensors" for folder in (path, tiny_run / "bundle")]
    saved = files[1].stat().st_size - files[0].stat().st_size
    of_names = 1000  # bytes: the header lists other tensors
    assert abs(saved - (sum(table.nbytes for table in tables.values()) - expected)) < of_names


def test_int8_tables_change_logits_by_what_half_a_step_of_each_weight_can(tiny_run, with_artifacts, tiny_data):
    """|Δz| ≤ Σ |∂z/∂w| · step / 2 to first order; the second is allowed a tenth of that."""
    plain, rounded = load_bundle(tiny_run / "bundle"), load_bundle(with_artifacts)
    batch = plain.transforms.to_batch(pq.read_table(tiny_data / "test.parquet")[:60])
    tables = [value for name, value in plain.model.named_parameters() if is_table(name)]
    steps = [(value.amax(1) - value.amin(1))[:, None].detach() / 255 for value in tables]
    logits = plain.model(batch).logits
    with torch.no_grad():
        found = (rounded.model(batch).logits - logits).abs()
    for row in range(60):
        for task in range(2):
            gradients = torch.autograd.grad(logits[row, task], tables, retain_graph=True)
            bound = sum(float((g.abs() * step).sum()) / 2 for g, step in zip(gradients, steps, strict=True))
            assert found[row, task] <= 1.1 * bound + 1e-6
    assert found.max() > 1e-5


def test_int8_tables_change_ne_by_less_than_two_parts_in_ten_thousand(tiny_run, with_artifacts, tiny_data):
    rows = pq.read_table(tiny_data / "test.parquet")
    ne = {}
    for name, folder in (("fp32", tiny_run / "bundle"), ("int8", with_artifacts)):
        bundle = load_bundle(folder)
        batch = bundle.transforms.to_batch(rows)
        with torch.no_grad():
            evaluator = Evaluator(bundle.schema)
            evaluator.update(bundle.model(batch).logits, batch)
        ne[name] = evaluator.compute()["tasks"]["click"]["ne"]
    assert ne["int8"] == pytest.approx(ne["fp32"], rel=2e-4)
    assert ne["int8"] != ne["fp32"]


def test_loading_needs_neither_ray_nor_the_trainer(tiny_run):
    code = (
        "import sys; from raysys.bundle import load_bundle; load_bundle(sys.argv[1]);"
        "print([name for name in sys.modules if name == 'ray' or name.startswith('raysys.train')])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tiny_run / "bundle"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
