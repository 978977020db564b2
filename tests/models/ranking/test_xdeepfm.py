from __future__ import annotations

import pytest
import torch

from raysys.errors import UserError
from raysys.models.ranking.xdeepfm import XDeepFM

D = 8


def test_shared_is_the_first_order_terms_the_cin_and_the_mlp(schema, make_batch):
    model = XDeepFM(schema, embedding_dim=D, maps=(3, 4), deep=(6,))
    embedded = model.embed(make_batch(schema, 5))
    x = model.tokens(embedded)  # [B, 7, D]
    first, sums, deep = model.interact(embedded).split([7, 3 + 4, 6], 1)
    torch.testing.assert_close(first, torch.einsum("bmd,md->bm", x, model.first_order.weight))
    torch.testing.assert_close(sums, model.cin(x))
    torch.testing.assert_close(deep, model.deep(x.flatten(1)))


def test_the_linear_tower_holds_the_sum_of_the_papers_logits(schema, make_batch):
    model, batch = XDeepFM(schema, embedding_dim=D, maps=(3,), deep=(6,)), make_batch(schema, 5)
    weight = model.towers.logits.weight[:, :, 0]  # [T, H]
    torch.nn.init.ones_(weight[:, :7])
    x = model.tokens(model.embed(batch))
    linear = torch.einsum("bmd,md->b", x, model.first_order.weight)[:, None]
    cin = model.cin(x) @ weight[:, 7:10].t()
    deep = model.deep(x.flatten(1)) @ weight[:, 10:].t()
    torch.testing.assert_close(model(batch).logits, linear + cin + deep)  # biases start at 0


def test_number_of_parameters(plain_schema):
    model = XDeepFM(plain_schema, embedding_dim=D, maps=(4, 6), deep=(7, 5))
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embeddings."))
    cin = 4 * 3 * 3 + 6 * 4 * 3
    assert count == 3 * D + cin + (3 * D + 1) * 7 + (7 + 1) * 5 + (3 + 4 + 6 + 5 + 1)


@pytest.mark.parametrize("maps", [(), (4, 0)])
def test_a_layer_needs_maps(plain_schema, maps):
    with pytest.raises(UserError) as caught:
        XDeepFM(plain_schema, maps=maps)
    assert caught.value.message == f"maps is {list(maps)}"
    assert caught.value.hint == "give a positive number for each layer, at least one: [64, 64]"
