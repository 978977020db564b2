from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.data.catalogue import CatalogueItems
from raysys.errors import UserError
from raysys.models.retrieval.sasrec import SASRec
from raysys.models.retrieval.two_tower import TwoTower
from raysys.objectives.next_item import NextItem
from raysys.schema import Catalogue, DenseFeature, FeatureSchema, Label, Sequence, SequenceFeature, SparseFeature, Table

ITEMS, LENGTH = 25, 5
SCHEMA = FeatureSchema(
    tables=(Table("item", ITEMS + 3, 8),),
    sparse=(SparseFeature("item", "item", "item"),),
    sequences=(Sequence("history", (SequenceFeature("history", "item"),), max_length=LENGTH),),
    labels=(Label("click"),),
    catalogue=Catalogue("item"),
)
ENCODED = torch.cat([torch.randperm(ITEMS - 2, generator=torch.Generator().manual_seed(3)) + 1, torch.zeros(2).long()])
"""The encoded id of each catalogue row; the last two items were never seen in training."""


def rows(histories, items, label=None):
    n = len(histories)
    zeros = torch.zeros(n, dtype=torch.int64)
    return Batch(
        dense=torch.zeros(n, 0),
        sparse=KeyedJaggedTensor(keys=["item"], values=torch.as_tensor(items), lengths=torch.ones(n).int()),
        labels=(torch.ones(n) if label is None else torch.as_tensor(label).float())[:, None],
        label_mask=torch.ones(n, 1, dtype=torch.bool),
        weight=torch.ones(n, 1),
        example_id=torch.arange(n),
        group_id=zeros,
        time=zeros,
        sequences=KeyedJaggedTensor(
            keys=["history"],
            values=torch.tensor([item for history in histories for item in history], dtype=torch.int64),
            lengths=torch.tensor([len(history) for history in histories], dtype=torch.int32),
            stride=n,
        ),
    )


def catalogue():
    batch = rows([[]] * ITEMS, ENCODED)
    batch = dataclasses.replace(batch, weight=torch.zeros(ITEMS, 1), labels=torch.zeros(ITEMS, 1))
    return CatalogueItems("item", np.arange(ITEMS), "click", np.ones(ITEMS, np.int64), batch)


@pytest.fixture(params=[0, 1, 2])
def model(request):
    return SASRec(SCHEMA, blocks=1, seed=request.param, init_scale=0.5).eval()


def run(loss, model, batch, seed=0):
    batch = loss.augment(batch, seed)
    return loss(model, batch, model.embed(batch)), batch


HISTORIES, WANTED = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9]], [10, 11, 12, 13]


def positions(model, wanted=WANTED, label=(1, 1, 1, 1)):
    """(state, wanted encoded id) of every position that is learned, by a loop."""
    embedded = model.embed(rows(HISTORIES, wanted))
    states, found = model.states(embedded).detach().double(), []
    for row, history in enumerate(HISTORIES):
        following = [*history[1:], wanted[row]] if history else []
        for place, item in enumerate(following):
            last = place == len(history) - 1
            if item and (not last or label[row]):
                found.append((states[row, place], item))
    return found


def embeddings(model, ids):
    return model.encode_items(model.embed(rows([[]] * len(ids), ids))).detach().double()


def test_the_full_loss_is_the_cross_entropy_over_the_catalogue(model):
    items = embeddings(model, ENCODED)
    expected = []
    for state, item in positions(model):
        logits = items @ state
        expected.append(logits.logsumexp(0) - logits[(item == ENCODED).nonzero()[0, 0]])
    (loss, _, parts), _ = run(NextItem(SCHEMA, items=catalogue()), model, rows(HISTORIES, WANTED))
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    assert 0 <= float(parts["first"]) <= 1


def test_a_row_whose_label_says_no_teaches_its_history_only(model):
    label = [1, 0, 1, 0]
    items = embeddings(model, ENCODED)
    expected = [
        (items @ state).logsumexp(0) - (items @ state)[(item == ENCODED).nonzero()[0, 0]]
        for state, item in positions(model, label=label)
    ]
    (loss, _, _), _ = run(NextItem(SCHEMA, items=catalogue()), model, rows(HISTORIES, WANTED, label))
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_items_that_were_never_seen_are_not_learned(model):
    unseen = [0, 11, 12, 13]
    items = embeddings(model, ENCODED)
    expected = [
        (items @ state).logsumexp(0) - (items @ state)[(item == ENCODED).nonzero()[0, 0]]
        for state, item in positions(model, unseen)
    ]
    (loss, _, _), _ = run(NextItem(SCHEMA, items=catalogue()), model, rows(HISTORIES, unseen))
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_sampled_loss_is_its_equation_over_items_that_were_seen(model, seed):
    objective = NextItem(SCHEMA, items=catalogue(), loss="sampled", negatives=64)
    (loss, _, _), batch = run(objective, model, rows(HISTORIES, WANTED), seed)
    drawn = batch.sparse["item"].values()[-64:]
    assert (drawn == 0).any()
    others, expected = embeddings(model, drawn), []
    for state, item in positions(model):
        own = embeddings(model, [item])[0] @ state
        logits = (others @ state - np.log(64 / ITEMS))[(drawn != item) & (drawn != 0)]
        expected.append(torch.cat([own[None], logits]).logsumexp(0) - own)
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_the_binary_loss_leaves_out_negatives_of_the_row_and_those_never_seen(model, seed):
    objective = NextItem(SCHEMA, items=catalogue(), loss="bce", negatives=9)
    (loss, _, _), batch = run(objective, model, rows(HISTORIES, WANTED), seed)
    drawn = batch.sparse["item"].values()[-9:]
    others, expected, row_of = embeddings(model, drawn), [], [0, 0, 0, 1, 3, 3, 3, 3, 3]
    for number, (state, item) in enumerate(positions(model)):
        own = embeddings(model, [item])[0] @ state
        value = torch.nn.functional.softplus(-own)
        row = row_of[number]
        if int(drawn[number]) not in [*HISTORIES[row], WANTED[row], 0]:
            value = value + torch.nn.functional.softplus(others[number] @ state)
        expected.append(value)
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_where_ids_are_indices_number_0_is_an_item_and_not_padding(model):
    every = ITEMS + 3
    indexed = dataclasses.replace(
        SCHEMA,
        sparse=(SparseFeature("item", "item", "item", "index"),),
        sequences=(Sequence("history", (SequenceFeature("history", "item", "index"),), max_length=LENGTH),),
    )
    batch = rows([[]], torch.zeros(1, dtype=torch.int64))  # a catalogue of item 0 alone
    items = CatalogueItems("item", np.arange(1), "click", np.ones(1, np.int64), batch)
    whole = CatalogueItems(
        "item", np.arange(every), "click", np.ones(every, np.int64), rows([[]] * every, torch.arange(every))
    )
    objective = NextItem(indexed, items=whole, loss="bce", negatives=1)
    objective.items = items  # so that item 0 is what is drawn
    (loss, _, _), _ = run(objective, model, rows([[3, 4]], [5]))
    softplus, zero = torch.nn.functional.softplus, embeddings(model, [0])[0]
    states = model.states(model.embed(rows([[3, 4]], [5]))).detach().double()[0]
    expected = sum(
        softplus(-embeddings(model, [item])[0] @ state) + softplus(zero @ state)
        for state, item in zip(states[:2], [4, 5], strict=True)
    )
    assert float(loss) == pytest.approx(float(expected) / 2, rel=1e-5)


@pytest.mark.parametrize("kind", ["full", "sampled", "bce"])
def test_rows_without_events_teach_nothing_and_padding_is_inert(model, kind):
    objective = NextItem(SCHEMA, items=catalogue(), loss=kind, negatives=9)
    (alone, _, _), _ = run(objective, model, rows(HISTORIES, WANTED))
    batch = rows([*HISTORIES, [], []], [*WANTED, 14, 1])
    batch.weight[-1] = 0
    (beside, _, _), _ = run(objective, model, batch)
    assert float(beside) == pytest.approx(float(alone), rel=1e-5)
    (nothing, _, _), _ = run(objective, model, rows([[], []], [3, 4]))
    nothing.backward()
    assert float(nothing) == 0


def test_a_model_without_states_is_refused():
    schema = dataclasses.replace(SCHEMA, dense=(DenseFeature("age", "user"),))
    batch = rows(HISTORIES, WANTED)
    with pytest.raises(UserError, match="TwoTower has no such states"):
        NextItem(SCHEMA, items=catalogue())(TwoTower(schema, embedding_dim=8), batch, None)


def test_hashed_items_and_wrong_settings_are_refused():
    hashed = dataclasses.replace(
        SCHEMA,
        sparse=(SparseFeature("item", "item", "item", encoding="hash"),),
        sequences=(Sequence("history", (SequenceFeature("history", "item", "hash"),), max_length=LENGTH),),
    )
    with pytest.raises(UserError, match="where two items may be one"):
        NextItem(hashed, items=catalogue())
    with pytest.raises(UserError, match=r"objective\.loss is 'ful'"):
        NextItem(SCHEMA, items=catalogue(), loss="ful")
    with pytest.raises(UserError, match=r"objective\.negatives is 0"):
        NextItem(SCHEMA, items=catalogue(), loss="bce", negatives=0)
