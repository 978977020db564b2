"""A compiled ranker predicts what the model does, for any number of rows, and leaves no native code behind."""

from __future__ import annotations

import dataclasses
import tempfile

import pyarrow.parquet as pq
import pytest
import torch

from raysys.bundle import load_bundle
from raysys.config import compose, instantiate
from raysys.errors import UserError
from raysys.models.ensemble.cetnet import CETNet
from raysys.models.ranking.dcn import DCNv2
from raysys.models.ranking.interformer import InterFormer
from raysys.schema import Label
from raysys.serve.compiled import CompiledRanker, compile_bundle

RANKERS = (
    "adatt autoint dcnv2 deepfm dhen din dlrm early_stage esmm finalmlp hiformer mmoe ple shared_bottom wukong xdeepfm"
)


@pytest.fixture(scope="module")
def plain(tiny_run):
    return load_bundle(tiny_run / "bundle")


@pytest.fixture(scope="module")
def built(plain, tmp_path_factory):
    """The compiled bundle, and the folder that temporary files went to."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        return compile_bundle(plain), folder


@pytest.mark.parametrize("rows", [1, 2, 7, 200, 301])
def test_predictions_are_those_of_the_model(plain, built, tiny_data, rows):
    table = pq.read_table(tiny_data / "test.parquet")[:rows]
    torch.testing.assert_close(built[0].predict(table), plain.predict(table), rtol=1e-6, atol=1e-6)


def test_what_the_output_holds_is_that_of_the_model(plain, built, tiny_data):
    batch = plain.transforms.to_batch(pq.read_table(tiny_data / "test.parquet")[:50])
    with torch.inference_mode():
        expected, found = plain.model(batch), built[0].model(batch)
    for name in ("logits", "shared", "hidden"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.embedded.tokens, expected.embedded.tokens)
    assert found.embedded.sequences.keys() == {"seen"}


def test_no_code_is_left_behind(built):
    assert list(built[1].iterdir()) == []


def test_models_that_cannot_be_compiled_are_named(plain):
    schema = plain.schema
    with pytest.raises(UserError, match="CETNet cannot be compiled: its members look up tokens of their own"):
        CompiledRanker(CETNet(schema, members={"a": DCNv2, "b": DCNv2}), schema)
    with pytest.raises(UserError, match="InterFormer cannot be compiled: Constraints violated"):
        CompiledRanker(InterFormer(schema, embedding_dim=16, heads=2), schema)


@pytest.mark.experiment
@pytest.mark.parametrize("name", RANKERS.split())
def test_rankers_of_default_size_predict_what_they_did(plain, tiny_data, tiny_configs, name):
    schema = dataclasses.replace(plain.schema, labels=(Label("click"), Label("conversion", required=False)))
    config = compose(["data=tiny", f"model={name}"], "train", str(tiny_configs))["model"]
    model = instantiate(config, schema=schema, seed=0, device="cpu").eval()
    compiled = CompiledRanker(model, schema)
    table = pq.read_table(tiny_data / "test.parquet")
    for rows in (1, 2, 200):
        batch = plain.transforms.to_batch(table[:rows], labels=False)
        with torch.inference_mode():
            found, expected = (torch.sigmoid(ranker(batch).logits) for ranker in (compiled, model))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
