from __future__ import annotations

import dataclasses

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.errors import UserError
from raysys.models.retrieval.sasrec import SASRec
from raysys.schema import Catalogue, FeatureSchema, Label, Sequence, SequenceFeature, SparseFeature, Table

ITEMS, LENGTH = 30, 6
SCHEMA = FeatureSchema(
    tables=(Table("item", ITEMS, 8),),
    sparse=(SparseFeature("item", "item", "item", encoding="index"),),
    sequences=(Sequence("history", (SequenceFeature("history", "item", "index"),), max_length=LENGTH),),
    labels=(Label("click"),),
    catalogue=Catalogue("item"),
)


def rows(histories, items=None):
    n = len(histories)
    items = torch.zeros(n, dtype=torch.int64) if items is None else torch.as_tensor(items)
    lengths = torch.tensor([len(history) for history in histories], dtype=torch.int32)
    zeros = torch.zeros(n, dtype=torch.int64)
    return Batch(
        dense=torch.zeros(n, 0),
        sparse=KeyedJaggedTensor(keys=["item"], values=items, lengths=torch.ones(n, dtype=torch.int32)),
        labels=torch.ones(n, 1),
        label_mask=torch.ones(n, 1, dtype=torch.bool),
        weight=torch.ones(n, 1),
        example_id=torch.arange(n),
        group_id=zeros,
        time=zeros,
        sequences=KeyedJaggedTensor(
            keys=["history"],
            values=torch.tensor([item for history in histories for item in history], dtype=torch.int64),
            lengths=lengths,
            stride=n,
        ),
    )


@pytest.fixture(params=[0, 1, 2])
def model(request):
    return SASRec(SCHEMA, blocks=2, heads=2, seed=request.param, init_scale=0.5).eval()


def test_a_state_does_not_know_what_comes_after_it(model):
    first, second = model.states(model.embed(rows([[1, 2, 3, 4, 5], [1, 2, 9, 4, 5]])))
    torch.testing.assert_close(first[:2], second[:2])
    assert not torch.allclose(first[2], second[2])
    assert not torch.allclose(first[4], second[4])


def test_padding_is_inert(model):
    alone = model.encode_users(model.embed(rows([[7, 8]])))
    beside = model.encode_users(model.embed(rows([[7, 8], [1, 2, 3, 4, 5, 6]])))
    torch.testing.assert_close(alone[0], beside[0])


def test_the_order_of_events_matters_and_the_last_state_is_the_user(model):
    embedded = model.embed(rows([[1, 2, 3], [2, 1, 3]]))
    users = model.encode_users(embedded)
    torch.testing.assert_close(users, model.states(embedded)[:, 2])
    assert not torch.allclose(users[0], users[1], atol=1e-4)


def test_a_user_without_events_is_zeros(model):
    assert not model.encode_users(model.embed(rows([[], [3]])))[0].any()


def test_scores_are_products_with_the_items_embeddings(model):
    batch = rows([[1, 2], [3, 4, 5]], [6, 7])
    embedded = model.embed(batch)
    users, items = model.encode_users(embedded), model.encode_items(embedded)
    torch.testing.assert_close(model(batch).logits[:, 0], model.score(users, items).diagonal())
    everything = model.embed(rows([[]] * ITEMS, list(range(ITEMS))))
    events = embedded.sequences["history"][0]
    torch.testing.assert_close(events[1, :3], model.encode_items(everything)[3:6])


def test_gradients_reach_everything(model):
    model.train()
    model(rows([[1, 2, 3, 4, 5, 6]], [7])).logits.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": ()}, "0 sequences have one column of table 'item'"),
        ({"catalogue": None}, "the catalogue's key is no single id"),
    ],
)
def test_a_schema_without_a_sequence_of_items_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        SASRec(dataclasses.replace(SCHEMA, **change))


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="heads 3"):
        SASRec(SCHEMA, heads=3)
