"""Rows of one side alone."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysys.data.log import ParquetLog
from raysys.data.sides import fill_other_sides
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.models.ranking.early_stage import EarlyStage, Encoded
from raysys.schema import FeatureSchema

ITEM = ["item", "brand"]


@pytest.fixture(scope="module")
def log(tiny_data):
    """Rows as a log has them, the transforms, and an early-stage model with embeddings that are not tiny."""
    schema = FeatureSchema.load(tiny_data / "schema.yaml")
    transforms = Transforms.fit(schema, ParquetLog(str(tiny_data / "train.parquet"), schema))
    model = EarlyStage(schema, embedding_dim=8, deep=(12,), width=6, bottom=(8,), init_scale=1.0)
    return pq.read_table(tiny_data / "test.parquet"), transforms, model.eval()


def test_items_encoded_alone_and_users_encoded_alone_give_the_logits_of_the_rows(log):
    rows, transforms, model = log
    schema = transforms.schema
    items = fill_other_sides(rows.select(ITEM), schema, "item")
    users = fill_other_sides(rows.drop_columns([*ITEM, *schema.tasks]), schema, "user", "context")
    with torch.no_grad():
        logits = model(transforms.to_batch(rows)).logits
        item = model.encode_items(model.embed(transforms.to_batch(items, labels=False)))
        user = model.encode_users(model.embed(transforms.to_batch(users, labels=False)))
    each = torch.arange(len(logits))
    torch.testing.assert_close(model.score(user, item)[each, :, each], logits, rtol=1e-5, atol=1e-5)
    kept = Encoded(*(part.half().float() for part in item))  # a cache of half the size
    found = model.score(user, kept)[each, :, each]
    assert (found - logits).abs().max() < 1e-2 * logits.abs().max()
    assert not torch.equal(found, logits)


def test_what_is_there_is_kept_and_what_is_missing_of_the_own_side_is_named(log):
    rows, transforms, _ = log
    filled = fill_other_sides(rows.select([*ITEM, "price"]), transforms.schema, "item")
    assert filled["price"].equals(rows["price"])
    assert filled.schema.field("history").type == pa.null()
    with pytest.raises(UserError, match="column 'brand' is missing"):
        transforms.to_batch(fill_other_sides(rows.select(["item"]), transforms.schema, "item"), labels=False)
