from __future__ import annotations

import dataclasses

import torch
from torchrec.models.dlrm import InteractionArch

from raysys.models.ranking.dlrm import DLRM
from raysys.schema import DenseFeature

D = 8


def test_shared_is_the_dense_token_and_all_dots(schema, make_batch):
    model = DLRM(schema, embedding_dim=D)
    embedded = model.embed(make_batch(schema, 5))
    tokens = model.tokens(embedded)
    expected = InteractionArch(tokens.shape[1] - 1)(tokens[:, 0], tokens[:, 1:])
    torch.testing.assert_close(model.interact(embedded), expected)


def test_without_dense_features_there_are_only_the_dots(plain_schema, make_batch):
    model = DLRM(plain_schema, embedding_dim=D)
    assert model.interact(model.embed(make_batch(plain_schema, 5))).shape == (5, 3)


def test_permuting_sparse_tokens_only_reorders_the_dots(plain_schema, make_batch):
    schema = dataclasses.replace(plain_schema, dense=(DenseFeature("x"),))
    model = DLRM(schema, embedding_dim=D)
    embedded = model.embed(make_batch(schema, 5))
    permuted = dataclasses.replace(embedded, tokens=embedded.tokens[:, [2, 0, 1]])
    first, second = model.interact(embedded), model.interact(permuted)
    torch.testing.assert_close(first[:, :D], second[:, :D])
    torch.testing.assert_close(first[:, D:].sort(1).values, second[:, D:].sort(1).values)
    assert not torch.allclose(first[:, D:], second[:, D:])
