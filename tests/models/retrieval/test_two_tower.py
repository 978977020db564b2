from __future__ import annotations

import dataclasses
import math

import pyarrow.parquet as pq
import pytest
import torch

from raysys.data.log import ParquetLog
from raysys.data.sides import fill_other_sides
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.models.retrieval.base import scores_in_blocks
from raysys.models.retrieval.two_tower import TwoTower
from raysys.schema import FeatureSchema

ITEM = ["item", "brand"]


@pytest.fixture
def two_sided(schema):
    """The schema of all kinds of features, `age` of users, `price` and its flag of items, `tags` of users."""
    sides = {"age": "user", "price": "item"}
    dense = tuple(dataclasses.replace(feature, side=sides[feature.name]) for feature in schema.dense)
    sparse = tuple(dataclasses.replace(f, side="user") if f.name == "tags" else f for f in schema.sparse)
    return dataclasses.replace(schema, dense=dense, sparse=sparse)


@pytest.fixture(params=[0, 1, 2])
def model(request, two_sided):
    return TwoTower(two_sided, embedding_dim=8, deep=(12,), width=6, bottom=(8,), init_scale=1.0, seed=request.param)


def test_vectors_have_length_1_and_the_score_is_their_product_over_the_temperature(model, two_sided, make_batch):
    batch = make_batch(two_sided, 20)
    output = model(batch)
    users, items = model.encode_users(output.embedded), model.encode_items(output.embedded)
    assert users.shape == items.shape == (20, 6)
    torch.testing.assert_close(torch.cat([users, items]).norm(dim=1), torch.ones(40))
    scores = model.score(users, items)
    torch.testing.assert_close(scores, users @ items.t() / 0.07)
    torch.testing.assert_close(scores.diagonal(), output.logits[:, 0])
    torch.testing.assert_close(output.shared, torch.cat([users, items], 1))


def test_scores_in_blocks_are_the_scores(model, two_sided, make_batch, monkeypatch):
    embedded = model.embed(make_batch(two_sided, 20))
    users, items = model.encode_users(embedded), model.encode_items(embedded)
    monkeypatch.setattr("raysys.models.retrieval.base.BLOCK_SCORES", 60)
    torch.testing.assert_close(scores_in_blocks(model, users, items), model.score(users, items))
    assert scores_in_blocks(model, users[:0], items).shape == (0, 20)


def test_users_do_not_read_items_nor_items_users(model, two_sided, make_batch):
    """Everything of one side from another batch: the vectors of the other side stay, to the bit."""
    first, second = make_batch(two_sided, 20, seed=1), make_batch(two_sided, 20, seed=2)
    a, b = model.embed(first), model.embed(second)
    item = torch.tensor([feature.side == "item" for feature in two_sided.sparse])
    item_dense = torch.tensor([False, True, True])  # age, price, price is missing
    mixed = dataclasses.replace(
        a,
        tokens=torch.where(item[:, None], b.tokens, a.tokens),
        dense=torch.where(item_dense, b.dense, a.dense),
    )
    assert torch.equal(model.encode_users(mixed), model.encode_users(a))
    assert torch.equal(model.encode_items(mixed), model.encode_items(b))
    assert not torch.equal(model.encode_users(a), model.encode_users(b))


def test_every_feature_reaches_its_tower(model, two_sided, make_batch):
    embedded = model.embed(make_batch(two_sided, 20))
    tokens, dense = embedded.tokens.detach().requires_grad_(), embedded.dense.detach().requires_grad_()
    events, mask = embedded.sequences["history"]
    events = events.detach().requires_grad_()
    leaves = dataclasses.replace(embedded, tokens=tokens, dense=dense, sequences={"history": (events, mask)})
    towers = {"user": model.encode_users(leaves), "item": model.encode_items(leaves)}
    read = {}
    for side, vectors in towers.items():
        grads = torch.autograd.grad(vectors[:, 0].sum(), (tokens, dense, events), allow_unused=True)
        read[side] = [() if grad is None else grad.abs().sum(0) for grad in grads]
    sides = [feature.side for feature in two_sided.sparse]
    for side in ("user", "item"):
        assert [bool(part) for part in read[side][0].sum(1) > 0] == [one == side for one in sides]
    assert (read["user"][1] > 0).tolist() == [True, False, False]
    assert (read["item"][1] > 0).tolist() == [False, True, True]
    assert (read["user"][2] > 0).any()
    assert len(read["item"][2]) == 0  # items read no history


@pytest.mark.parametrize("learned", [False, True])
def test_the_temperature_is_fixed_or_learned(two_sided, make_batch, learned):
    model = TwoTower(two_sided, embedding_dim=8, temperature=0.2, learn_temperature=learned)
    assert ("log_scale" in dict(model.named_parameters())) == learned
    assert float(model.log_scale) == pytest.approx(-math.log(0.2))
    assert "log_scale" in model.state_dict()
    model(make_batch(two_sided, 20)).logits.sum().backward()
    assert (model.log_scale.grad is not None) == learned


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"width": 0}, "width is 0"),
        ({"sequence_pooling": "men"}, "unknown sequence_pooling 'men'"),
    ],
)
def test_wrong_arguments_are_named(two_sided, keys, message):
    with pytest.raises(UserError, match=message):
        TwoTower(two_sided, **keys)


@pytest.mark.parametrize("side", ["user", "item"])
def test_a_schema_without_one_of_the_sides_is_refused(plain_schema, side):
    other = {"user": "item", "item": "user"}[side]
    sparse = tuple(dataclasses.replace(feature, side=other) for feature in plain_schema.sparse)
    with pytest.raises(UserError, match=f"needs a feature of the {side}"):
        TwoTower(dataclasses.replace(plain_schema, sparse=sparse))


def test_rows_of_one_side_alone_give_the_vectors_of_whole_rows(tiny_data):
    schema = FeatureSchema.load(tiny_data / "schema.yaml")
    transforms = Transforms.fit(schema, ParquetLog(str(tiny_data / "train.parquet"), schema))
    model = TwoTower(schema, embedding_dim=8, init_scale=1.0).eval()
    rows = pq.read_table(tiny_data / "test.parquet")
    items = fill_other_sides(rows.select(ITEM), schema, "item")
    users = fill_other_sides(rows.drop_columns([*ITEM, *schema.tasks]), schema, "user", "context")
    with torch.no_grad():
        whole = model(transforms.to_batch(rows)).shared
        item = model.encode_items(model.embed(transforms.to_batch(items, labels=False)))
        user = model.encode_users(model.embed(transforms.to_batch(users, labels=False)))
    torch.testing.assert_close(torch.cat([user, item], 1), whole)
