"""A compiled ranker predicts what the model does, for any number of rows, and leaves no native code behind."""

from __future__ import annotations

import tempfile

import pyarrow.parquet as pq
import pytest
import torch

from raysys.bundle import load_bundle
from raysys.errors import UserError
from raysys.models.ensemble.cetnet import CETNet
from raysys.models.ranking.dcn import DCNv2
from raysys.models.ranking.interformer import InterFormer
from raysys.serve.compiled import CompiledRanker, compile_bundle


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
