"""The items of what must hold of an early-stage model: shapes, what each side reads, caches, heads, masks."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from raysys.config import compose, instantiate
from raysys.errors import UserError
from raysys.models.multitask.esmm import ESMM
from raysys.models.multitask.mmoe import MMoE
from raysys.models.ranking.early_stage import EarlyStage, Encoded
from raysys.schema import DenseFeature, SparseFeature

HEADS = {"towers": None, "mmoe": partial(MMoE, experts=2, widths=[[8, 6]])}


@pytest.fixture
def sided(schema):
    """A column of every side: flags of both sides stand behind all columns, and a position that is not to be read."""
    return dataclasses.replace(
        schema,
        dense=(
            DenseFeature("price", side="item", missing_flag=True),
            DenseFeature("age", side="user", missing_flag=True),
            DenseFeature("hour", side="context"),
            DenseFeature("slot_height", side="position"),
        ),
        sparse=(*schema.sparse, SparseFeature("slot", "tag", side="position")),
    )


@pytest.fixture
def build(sided):
    return lambda **keys: EarlyStage(sided, **({"embedding_dim": 8, "deep": (12,), "width": 6, "bottom": (8,)} | keys))


@pytest.mark.parametrize("head", HEADS)
def test_encoded_rows_have_a_vector_and_a_bias_for_each_task(build, sided, make_batch, head):
    model, batch = build(head=HEADS[head]).eval(), make_batch(sided, 5)
    embedded = model.embed(batch)
    for encoded in (model.encode_users(embedded), model.encode_items(embedded)):
        assert encoded.vectors.shape == (5, 2, 6)
        assert encoded.biases.shape == (5, 2)
    one = Encoded(*(part[:1] for part in model.encode_users(embedded)))
    assert model.score(one, model.encode_items(embedded)).shape == (1, 2, 5)


@pytest.mark.parametrize("head", HEADS)
def test_scores_of_kept_vectors_are_the_logits_of_the_rows(build, sided, make_batch, head):
    """In float32 as they are, in float16 to a hundredth."""
    model, batch = build(head=HEADS[head]).eval(), make_batch(sided, 7)
    output = model(batch)
    users, items = model.encode_users(output.embedded), model.encode_items(output.embedded)
    rows = torch.arange(7)
    torch.testing.assert_close(model.score(users, items)[rows, :, rows], output.logits, rtol=1e-5, atol=1e-5)
    kept = Encoded(*(part.half().float() for part in items))
    torch.testing.assert_close(model.score(users, kept)[rows, :, rows], output.logits, rtol=1e-2, atol=1e-2)


def test_a_logit_is_the_product_over_the_root_of_k_and_two_biases(build, sided, make_batch):
    model, batch = build(), make_batch(sided, 4)
    output = model(batch)
    user, item = model.encode_users(output.embedded), model.encode_items(output.embedded)
    expected = torch.stack(
        [
            torch.stack([user.vectors[row, task] @ item.vectors[row, task] / 6**0.5 for task in range(2)])
            for row in range(4)
        ]
    )
    torch.testing.assert_close(output.logits, expected + user.biases + item.biases)
    torch.testing.assert_close(output.hidden.sum(2), expected)


def test_without_a_block_a_task_is_a_linear_map_of_each_side(build, sided, make_batch):
    """One task and no head: the plain two-tower model."""
    model, batch = build(), make_batch(sided, 3)
    embedded = model.embed(batch)
    shared = model.users(embedded)
    block = model.towers[0]
    expected = torch.stack([shared @ block.maps.weight[task] + block.maps.bias[task] for task in range(2)], 1)
    torch.testing.assert_close(model.encode_users(embedded).vectors, expected)
    single = dataclasses.replace(sided, labels=sided.labels[:1])
    assert EarlyStage(single, embedding_dim=8)(make_batch(single, 3)).logits.shape == (3, 1)


@pytest.mark.parametrize("head", HEADS)
def test_each_side_reads_its_own_features_and_none_reads_those_of_a_position(build, sided, make_batch, head):
    """Tokens: user_id, genres, item_id, tags, slot. Dense: price, age, hour, slot_height, price missing, age missing."""
    model = build(head=HEADS[head]).eval()
    embedded = model.embed(make_batch(sided, 3))
    before = model.encode_users(embedded), model.encode_items(embedded)
    reads = {"users": ([0, 3], [1, 2, 5]), "items": ([1, 2], [0, 4])}
    for place in range(5):
        tokens = embedded.tokens.clone()
        tokens[:, place] += 1
        after = dataclasses.replace(embedded, tokens=tokens)
        changed = not_equal(before[0], model.encode_users(after)), not_equal(before[1], model.encode_items(after))
        assert changed == (place in reads["users"][0], place in reads["items"][0])
    for column in range(6):
        dense = embedded.dense.clone()
        dense[:, column] += 1
        after = dataclasses.replace(embedded, dense=dense)
        changed = not_equal(before[0], model.encode_users(after)), not_equal(before[1], model.encode_items(after))
        assert changed == (column in reads["users"][1], column in reads["items"][1])
    events, mask = embedded.sequences["history"]
    after = dataclasses.replace(embedded, sequences={"history": (events + mask[:, :, None], mask)})
    assert not_equal(before[0], model.encode_users(after))
    assert not not_equal(before[1], model.encode_items(after))


def not_equal(first, second):
    return not torch.equal(first.vectors, second.vectors)


def test_the_order_within_a_request_does_not_depend_on_the_users_bias(build, sided, make_batch):
    model, batch = build().eval(), make_batch(sided, 9)
    embedded = model.embed(batch)
    users, items = model.encode_users(embedded), model.encode_items(embedded)
    shifted = Encoded(users.vectors, users.biases + 3)
    assert torch.equal(model.score(users, items).argsort(2), model.score(shifted, items).argsort(2))


def test_a_task_without_labels_gives_no_gradient_to_its_maps(build, sided, make_batch):
    model, batch = build(), make_batch(sided, 8)
    model(batch).logits[:, 0].square().sum().backward()
    for block in model.towers:
        assert block.maps.weight.grad[0].abs().sum() > 0
        assert block.maps.weight.grad[1].abs().sum() == 0
        assert block.head.logits.weight.grad[1].abs().sum() == 0


def test_tables_are_there_once_and_scoring_does_not_see_how_deep_the_towers_are(build, sided):
    shallow, deep = build(deep=(12,)), build(deep=(64, 64, 12))
    tables = [name for name, _ in shallow.named_parameters() if name.startswith("embeddings.")]
    assert tables == [name for name, _ in deep.named_parameters() if name.startswith("embeddings.")]
    assert [block.maps.weight.shape for block in shallow.towers] == [block.maps.weight.shape for block in deep.towers]


@pytest.mark.parametrize("head", ["towers", "mmoe", "ple", "adatt", "cross_stitch"])
def test_heads_of_the_configs_relate_the_tasks_on_each_side(sided, make_batch, head):
    node = compose(["model=early_stage", f"model/head={head}"])["model"] | {"embedding_dim": 8}
    model = instantiate(node, schema=sided)
    output = model(make_batch(sided, 64))
    output.logits.square().sum().backward()
    assert output.logits.shape == (64, 2)
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_empty_and_full_histories_and_single_rows_are_finite(build, sided, make_batch):
    model = build().eval()
    for rows in (1, 6):
        batch = make_batch(sided, rows)
        for length in (0, 5):
            embedded = model.embed(batch)
            events, mask = embedded.sequences["history"]
            filled = torch.full_like(mask, length > 0)
            changed = dataclasses.replace(embedded, sequences={"history": (events * filled[:, :, None], filled)})
            assert model.predict(model.interact(changed)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"target_attention": True},
            "EarlyStage: target_attention is true\n  hint: a user is encoded before the items",
        ),
        ({"width": 0}, "EarlyStage: width is 0\n  hint: a positive whole number"),
        ({"head": ESMM}, "EarlyStage: model/head=esmm gives the logit of a product\n  hint: choose towers"),
    ],
)
def test_wrong_arguments_are_named(build, keys, message):
    with pytest.raises(UserError) as error:
        build(**keys)
    assert message in str(error.value)


def test_a_schema_without_sides_is_refused(plain_schema):
    with pytest.raises(UserError, match="needs a feature of the item\n  hint: give one `side: item`"):
        EarlyStage(plain_schema)
