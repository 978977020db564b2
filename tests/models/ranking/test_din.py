"""What must hold for DIN."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from raysys.errors import UserError
from raysys.models.ranking.din import DIN, Dice, DiceMLP
from raysys.schema import DenseFeature, FeatureSchema, Label, Sequence, SequenceFeature, SparseFeature, Table

D = 8


def model_of(schema, **keys):
    return DIN(schema, **{"embedding_dim": D, "attention": (6,), "deep": (10,), **keys})


@pytest.fixture
def wide(schema):
    """The target has two fields, the item and its genre; the history has both and a rating."""
    features = (*schema.sequences[0].features, SequenceFeature("history_genre", "genre"))
    return dataclasses.replace(schema, sequences=(Sequence("history", features, max_length=5),))


def history_of(model, embedded):
    return model.histories[0](embedded)


@pytest.mark.parametrize("softmax", [False, True])
def test_history_vector_equals_its_formula(wide, make_batch, softmax):
    model = model_of(wide, softmax=softmax)
    embedded = model.embed(make_batch(wide, 7))
    attention, out = model.histories[0], history_of(model, embedded)
    events, mask = embedded.sequences["history"]
    assert events.shape == (7, 5, 3 * D)  # item, rating, genre
    genre, item = embedded.tokens[:, 1], embedded.tokens[:, 2]
    for row in range(7):
        a = torch.cat([item[row], genre[row]])
        there = events[row, mask[row]]
        scores = [torch.zeros(0)]
        for h in there:
            paired = torch.cat([h[:D], h[2 * D :]])
            x = torch.cat([a, paired, a - paired, a * paired, h[D : 2 * D]])
            scores.append(attention.score(attention.mlp.maps[0](x).relu()))
        e = torch.cat(scores)
        e = e.softmax(0) if softmax else e
        torch.testing.assert_close(out[row], (e[:, None] * there).sum(0))


def test_events_side_by_side_sum_to_the_events_of_other_models(wide, make_batch):
    model = model_of(wide, sequence_pooling="mean")
    batch = make_batch(wide, 7)
    separate, mask = model.embed(batch).sequences["history"]
    model.embeddings.assembly.separate_events = False
    summed, same = model.embed(batch).sequences["history"]
    torch.testing.assert_close(separate.unflatten(2, (3, D)).sum(2), summed)
    assert torch.equal(mask, same)


def test_pooled_histories_are_the_same_tokens(wide, make_batch):
    model, batch = model_of(wide, sequence_pooling="both"), make_batch(wide, 7)
    first = model.tokens(model.embed(batch))
    model.embeddings.assembly.separate_events = False
    torch.testing.assert_close(model.tokens(model.embed(batch)), first)


@pytest.mark.parametrize("softmax", [False, True])
def test_order_of_the_history_does_not_matter(wide, make_batch, softmax):
    model = model_of(wide, softmax=softmax)
    embedded = model.embed(make_batch(wide, 7))
    (events, mask), order = embedded.sequences["history"], torch.randperm(5)
    other = dataclasses.replace(embedded, sequences={"history": (events[:, order], mask[:, order])})
    torch.testing.assert_close(model.interact(other), model.interact(embedded))


@pytest.mark.parametrize("keys", [{}, {"softmax": True}, {"dice": True}], ids=str)
def test_what_stands_at_padded_places_does_not_matter(wide, make_batch, keys):
    model = model_of(wide, **keys)  # in training: Dice's statistics do not see it either
    embedded = model.embed(make_batch(wide, 20))
    events, mask = embedded.sequences["history"]
    other = dataclasses.replace(embedded, sequences={"history": (events.masked_fill(~mask[:, :, None], 7.0), mask)})
    torch.testing.assert_close(model.interact(other), model.interact(embedded))
    longer = {"history": (nn.functional.pad(events, (0, 0, 0, 4)), nn.functional.pad(mask, (0, 4)))}
    torch.testing.assert_close(
        model.interact(dataclasses.replace(embedded, sequences=longer)), model.interact(embedded)
    )


@pytest.mark.parametrize("keys", [{}, {"softmax": True}, {"dice": True}], ids=str)
def test_an_empty_history_gives_zeros(wide, make_batch, keys):
    model = model_of(wide, **keys)
    embedded = model.embed(make_batch(wide, 7))
    events, mask = embedded.sequences["history"]
    embedded.sequences["history"] = (events, torch.zeros_like(mask))
    vector = history_of(model, embedded)
    assert vector.shape == (7, 3 * D)
    assert vector.abs().sum() == 0
    model.predict(model.interact(embedded)).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_without_softmax_equal_events_add_up(wide, make_batch):
    """The intensity of an interest is kept: twice the same history gives twice the vector; a softmax gives the same."""
    embedded = model_of(wide).embed(make_batch(wide, 7))
    events, mask = embedded.sequences["history"]
    twice = dataclasses.replace(
        embedded, sequences={"history": (torch.cat([events, events], 1), torch.cat([mask, mask], 1))}
    )
    for softmax, factor in ((False, 2), (True, 1)):
        model = model_of(wide, softmax=softmax)
        torch.testing.assert_close(history_of(model, twice), factor * history_of(model, embedded))


def test_item_features_of_one_table_are_summed(schema, make_batch):
    both = dataclasses.replace(schema, sparse=(*schema.sparse, SparseFeature("companion", "item", side="item")))
    model = model_of(both)
    assert model.histories[0].targets == [[2, 4]]
    assert model(make_batch(both, 5)).logits.shape == (5, 2)


def test_dice_equals_its_formula_and_batch_norm():
    x = 3 * torch.randn(50, 4) + 1
    dice, norm = Dice(4), nn.BatchNorm1d(4, eps=1e-8, affine=False)
    nn.init.normal_(dice.alpha)
    for _ in range(3):
        p = norm(x).sigmoid()
        torch.testing.assert_close(dice(x), p * x + dice.alpha * (1 - p) * x)
    dice.eval()
    p = ((x - dice.mean) / dice.variance.sqrt()).sigmoid()
    torch.testing.assert_close(dice(x), p * x + dice.alpha * (1 - p) * x)
    torch.testing.assert_close(dice.mean, norm.running_mean)
    torch.testing.assert_close(dice.variance, norm.running_var, rtol=0.03, atol=0)  # which is divided by N - 1


def test_dice_starts_as_a_gate_and_stays_finite_with_one_row():
    x = torch.randn(1, 4)
    assert torch.equal(Dice(4)(x), x * 0.5)
    dice = Dice(4)
    torch.testing.assert_close(dice(x, torch.zeros(1, dtype=torch.bool)), Dice(4).eval()(x))
    assert torch.equal(dice.mean, torch.zeros(4))


def test_dice_is_in_both_mlps(wide, make_batch):
    model = model_of(wide, dice=True)
    assert sum(isinstance(module, Dice) for module in model.modules()) == 2
    model(make_batch(wide, 64)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    with torch.autocast("cpu", torch.bfloat16):
        assert model(make_batch(wide, 64)).logits.isfinite().all()
    assert DiceMLP(4, (), "relu", dice=True).out_features == 4


def test_schemas_that_din_cannot_use(schema, plain_schema):
    with pytest.raises(UserError, match="schema: DIN needs a sequence"):
        model_of(plain_schema)
    queries = Sequence("queries", (SequenceFeature("query", "rating"),), max_length=3)
    with pytest.raises(UserError) as caught:
        model_of(dataclasses.replace(schema, sequences=(*schema.sequences, queries)))
    assert caught.value.message == "schema: DIN needs an item feature that shares a table with sequence 'queries'"
    assert caught.value.hint == "give a sparse feature of side item one of its tables: rating"


TAOBAO = (
    {"adgroup_id": 246851, "age_level": 9, "brand": 308870, "btag": 6, "campaign_id": 191771, "cate_id": 11330}
    | {"cms_group_id": 15, "cms_segid": 99, "customer": 132136, "final_gender_code": 4, "new_user_class_level": 7}
    | {"occupation": 4, "pid": 4, "pvalue_level": 6, "shopping_level": 5, "userid": 403958}
)
AMAZON = {"item_id": 63003, "cate_id": 803}
KUAI = {"user_id": 10002, "item_id": 632406, "item_emb": 3242317}
WIDE, NARROW = (1024, 512, 256), (512, 256, 128)


@pytest.mark.parametrize(
    ("tables", "targets", "histories", "keys", "published", "apart"),
    [
        # theirs has a batch norm with a scale and a shift before each Dice
        (AMAZON, ("item_id", "cate_id"), 1, {"deep": WIDE, "dice": True}, 5_403_522, 2 * sum(WIDE)),
        # their map of the price has no bias
        (TAOBAO, ("cate_id", "brand", "btag"), 1, {"embedding_dim": 32, "deep": NARROW}, 42_263_682, -32),
        # theirs maps frozen vectors of the items, here a third table, by a matrix in each of three places; Dice in `deep` only
        (KUAI, ("item_id", "item_emb"), 2, {"deep": WIDE}, 43_032_835, 3 * 64**2 + sum(WIDE) - 64 * KUAI["item_emb"]),
    ],
    ids=["amazon", "taobao", "kuai"],
)
def test_the_published_numbers_of_parameters(tables, targets, histories, keys, published, apart):
    """Those of BARS's runs on its three sets, which settle what is embedded and what each MLP sees."""
    keys = {"embedding_dim": 64, **keys}
    schema = FeatureSchema(
        tables=tuple(Table(name, rows, keys["embedding_dim"]) for name, rows in tables.items()),
        dense=(DenseFeature("price"),) if tables is TAOBAO else (),
        sparse=tuple(SparseFeature(name, name, side="item" if name in targets else "user") for name in tables),
        sequences=tuple(
            Sequence(f"h{place}", tuple(SequenceFeature(f"h{place}_{name}", name) for name in targets), max_length=100)
            for place in range(histories)
        ),
        labels=(Label("click"),),
    )
    model = DIN(schema, attention=(512, 256), bottom=(), device="meta", **keys)
    assert sum(parameter.numel() for parameter in model.parameters()) == published - apart
