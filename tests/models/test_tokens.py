from __future__ import annotations

import dataclasses

import pytest
import torch

from raysys.errors import UserError
from raysys.models.embeddings import Embeddings
from raysys.models.tokens import TokenStack
from raysys.schema import FeatureSchema, Label

D = 8


def stack(schema, **changes):
    options = {
        "bottom": (6,),
        "activation": "relu",
        "sequence_pooling": "both",
        "target_attention": True,
        "dropout": 0.0,
    }
    return TokenStack(schema, D, **(options | changes))


@pytest.mark.parametrize(
    ("pooling", "last"),
    [
        ("none", ()),
        ("mean", ("history.mean",)),
        ("attention", ("history.attention",)),
        ("both", ("history.mean", "history.attention")),
    ],
)
def test_names_and_shapes(schema, make_batch, pooling, last):
    tokens = stack(schema, sequence_pooling=pooling)
    assert tokens.names == ("dense", "user_id", "genres", "item_id", "tags", *last)
    embedded = Embeddings(schema, D, use_sequences=pooling != "none")(make_batch(schema, 5))
    assert tokens(embedded).shape == (5, len(tokens.names), D)


def test_tokens_of_features_are_passed_on(schema, make_batch):
    embedded = Embeddings(schema, D)(make_batch(schema, 5))
    out = stack(schema)(embedded)
    assert torch.equal(out[:, 1:5], embedded.tokens)
    sequence, mask = embedded.sequences["history"]
    torch.testing.assert_close(out[:, 5], sequence.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


def test_no_dense_features_no_dense_token(schema, make_batch):
    without = dataclasses.replace(schema, dense=())
    assert stack(without).names[0] == "user_id"
    assert stack(without)(Embeddings(without, D)(make_batch(without, 5))).shape == (5, 6, D)


def test_attention_looks_at_the_item_that_shares_a_table(schema, make_batch):
    tokens = stack(schema)
    assert tokens.targets == [[2]]  # item_id; the rating table has no item feature
    embedded = Embeddings(schema, D)(make_batch(schema, 5))
    first = tokens(embedded)
    embedded.tokens = embedded.tokens.clone()
    embedded.tokens[:, 2] += 1 + torch.arange(D)
    second = tokens(embedded)
    assert torch.equal(first[:, 5], second[:, 5])
    assert not torch.allclose(first[:, 6], second[:, 6])


def test_attention_without_target(schema):
    assert stack(schema, target_attention=False).attention[0].target is None
    user_side = tuple(dataclasses.replace(feature, side="user") for feature in schema.sparse)
    assert stack(dataclasses.replace(schema, sparse=user_side)).attention[0].target is None


def test_embedding_dropout(schema, make_batch):
    embedded = Embeddings(schema, D)(make_batch(schema, 50))
    tokens = stack(schema, dropout=0.5)
    dropped = tokens(embedded)
    kept = tokens.eval()(embedded)
    share = ((dropped == 0) & (kept != 0)).sum() / (kept != 0).sum()
    assert 0.4 < share < 0.6


def test_unknown_pooling_names_the_nearest(schema):
    with pytest.raises(UserError) as caught:
        stack(schema, sequence_pooling="meen")
    assert caught.value.hint == "did you mean 'mean'?"


def test_a_schema_without_features_is_an_error():
    with pytest.raises(UserError, match="no dense, sparse or sequence feature"):
        stack(FeatureSchema(labels=(Label("y"),)))
