from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from raysys.errors import UserError
from raysys.models.ranking.autoint import AutoInt

D = 8
SMALL = {"embedding_dim": D, "heads": 2, "head_dim": 3, "bottom": [8]}


def test_permuting_tokens_permutes_what_the_last_map_sees(plain_schema, make_batch):
    model = AutoInt(plain_schema, **SMALL)
    embedded = model.embed(make_batch(plain_schema, 5))
    permuted = dataclasses.replace(embedded, tokens=embedded.tokens[:, [2, 0, 1]])
    first, second = (model.interact(each).unflatten(1, (3, 6)) for each in (embedded, permuted))
    torch.testing.assert_close(second, first[:, [2, 0, 1]])
    assert not torch.allclose(second, first)


def test_without_values_layers_are_residual_maps(plain_schema, make_batch):
    model = AutoInt(plain_schema, layers=2, **SMALL)
    for layer in model.layers:
        nn.init.zeros_(layer.value.weight)
    embedded = model.embed(make_batch(plain_schema, 5))
    expected = embedded.tokens
    for layer in model.layers:
        expected = (expected @ layer.residual.weight.t()).relu()
    torch.testing.assert_close(model.interact(embedded), expected.flatten(1))


def test_the_logit_of_the_plus_is_the_sum_of_both_parts(schema, make_batch):
    model, batch = AutoInt(schema, deep=[7, 5], **SMALL).eval(), make_batch(schema, 4)
    x = model.tokens(model.embed(batch))
    attended, deep = model.layers(x).flatten(1), model.deep(x.flatten(1))
    assert deep.shape == (4, 5)
    weight, bias = model.towers.logits.weight[:, :, 0], model.towers.logits.bias[:, 0, 0]
    split = attended.shape[1]
    expected = attended @ weight[:, :split].t() + deep @ weight[:, split:].t() + bias
    torch.testing.assert_close(model(batch).logits, expected)


def test_every_weight_of_the_plus_is_trained(schema, make_batch):
    model = AutoInt(schema, deep=[7, 5], **SMALL)
    model(make_batch(schema, 64)).logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("key", ["layers", "heads", "head_dim"])
def test_impossible_configs(plain_schema, key):
    with pytest.raises(UserError, match=f"{key} is 0"):
        AutoInt(plain_schema, **{key: 0})
