from __future__ import annotations

import itertools

import torch

from raysys.models.ranking.deepfm import DeepFM

D = 8


def test_shared_is_the_first_order_terms_the_pairs_and_the_mlp(schema, make_batch):
    model = DeepFM(schema, embedding_dim=D, deep=(6,))
    embedded = model.embed(make_batch(schema, 5))
    x = model.tokens(embedded)  # [B, 7, D]
    pairs = sum(x[:, i] * x[:, j] for i, j in itertools.combinations(range(7), 2))
    first, second, deep = model.interact(embedded).split([7, D, 6], 1)
    torch.testing.assert_close(first, torch.einsum("bmd,md->bm", x, model.first_order.weight))
    torch.testing.assert_close(second, pairs)
    torch.testing.assert_close(deep, model.deep(x.flatten(1)))


def test_the_linear_tower_holds_the_sum_of_the_papers_logits(schema, make_batch):
    model = DeepFM(schema, embedding_dim=D, deep=(6,))
    linear = model.towers.logits
    torch.nn.init.ones_(linear.weight[:, : 7 + D])
    batch = make_batch(schema, 5)
    x = model.tokens(model.embed(batch))
    dots = torch.bmm(x, x.mT).triu(1).sum((1, 2))
    machine = torch.einsum("bmd,md->b", x, model.first_order.weight) + dots
    deep = model.deep(x.flatten(1)) @ linear.weight[:, 7 + D :, 0].t() + linear.bias[:, 0, 0]
    torch.testing.assert_close(model(batch).logits, machine[:, None] + deep)


def test_number_of_parameters(plain_schema):
    model = DeepFM(plain_schema, embedding_dim=D, deep=(7, 5))
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embeddings."))
    assert count == 3 * D + (3 * D + 1) * 7 + (7 + 1) * 5 + (3 + D + 5 + 1)


def test_without_an_mlp_it_learns_what_a_factorisation_machine_can(plain_schema, make_batch):
    """The logit of another machine, whose pairs no sum of functions of one id can give."""
    batch = make_batch(plain_schema, 256)
    teacher = DeepFM(plain_schema, embedding_dim=D, deep=(), seed=1, init_scale=0.8)
    x = teacher.tokens(teacher.embed(batch))
    target = torch.bmm(x, x.mT).triu(1).sum((1, 2)).detach()
    model = DeepFM(plain_schema, embedding_dim=D, deep=(), init_scale=0.3)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(batch).logits[:, 0] - target).square().mean() / target.var()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
