from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

from raysys.config import compose, instantiate
from raysys.errors import UserError
from raysys.models.heads import TaskTowers
from raysys.models.ranking.hiformer import Hiformer
from raysys.nn.token_attention import ATTENTIONS
from raysys.schema import DenseFeature, FeatureSchema, Label, SparseFeature, Table

D = 8
HEADS = Path(__file__).parents[3] / "configs/model/head"


def wide(schema, count):
    return dataclasses.replace(schema, dense=tuple(DenseFeature(f"x{number}") for number in range(count)))


@pytest.mark.parametrize(("columns", "tokens"), [(1, 1), (8, 1), (9, 2), (30, 4)])
def test_dense_columns_make_a_token_for_each_eight(plain_schema, make_batch, columns, tokens):
    schema = wide(plain_schema, columns)
    model, batch = Hiformer(schema, embedding_dim=D, bottom=[4]).eval(), make_batch(schema, 3)
    names = [f"dense.{number}" for number in range(tokens)] if tokens > 1 else ["dense"]
    assert model.tokens.names == (*names, "a", "b", "c")
    made = model.tokens(model.embed(batch))
    assert made.shape == (3, tokens + 3, D)
    torch.testing.assert_close(made[:, :tokens].flatten(1), model.tokens.dense(batch.dense))
    assert model(batch).logits.isfinite().all()


def test_the_sizes_of_the_paper():
    names = [f"c{number}" for number in range(31)]
    schema = FeatureSchema(
        tables=tuple(Table(name, 2, 128) for name in names),
        sparse=tuple(SparseFeature(name, name) for name in names),
        dense=tuple(DenseFeature(f"x{number}") for number in range(30)),
        labels=(Label("install"),),
    )
    sizes = {"embedding_dim": 128, "heads": 4, "key_dim": 16, "value_dim": 64, "dense_per_token": 5, "bottom": []}
    model = Hiformer(schema, key_rank=128, value_rank=1024, **sizes)
    attention = model.layers[0].attention
    assert len(model.tokens.names) + 1 == 38
    assert sum(p.numel() for part in (attention.key, attention.value) for p in part.parameters()) == 15_876_096
    # One task token's query, output, MLP and norms, of what the paper's models have beyond keys and values.
    rest = sum(parameter.numel() for name, parameter in model.layers.named_parameters()) - 15_876_096
    assert rest == 128 * (64 + 256) + 2 * 128 * 512 + 640 + 4 * 128


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_pruning_changes_nothing_but_the_cost(schema, make_batch, attention):
    keys = {"embedding_dim": D, "attention": attention, "layers": 2, "bottom": [8]}
    whole, pruned = (Hiformer(schema, prune=prune, **keys).eval() for prune in (False, True))
    batch, shapes = make_batch(schema, 5), {name: value.shape for name, value in pruned.state_dict().items()}
    pruned.load_state_dict({name: value[-shapes[name][0] :] for name, value in whole.state_dict().items()})
    torch.testing.assert_close(pruned(batch).logits, whole(batch).logits)
    smaller = sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in whole.parameters())
    assert smaller == (attention != "vanilla")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("norm_first", [False, True])
def test_every_weight_of_every_token_is_trained(schema, make_batch, attention, layers, norm_first):
    keys = {"attention": attention, "layers": layers, "norm_first": norm_first}
    model = Hiformer(schema, embedding_dim=D, bottom=[8], dropout=0.0, **keys)
    model(make_batch(schema, 64)).logits.square().sum().backward()
    assert (model.task_tokens.grad.abs().sum(1) > 0).all()
    for name, parameter in model.layers.named_parameters():
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).all(), name


def test_a_task_reads_its_own_token(schema, make_batch):
    model = Hiformer(schema, embedding_dim=D).eval()
    shared = model.interact(model.embed(make_batch(schema, 5)))
    assert shared.shape == (5, 2 * D)
    assert model.predict(shared).shared is shared
    other = shared.clone()
    other[:, D:] += 1
    first, second = model.predict(shared).logits, model.predict(other).logits
    assert torch.equal(first[:, 0], second[:, 0])
    assert not torch.isclose(first[:, 1], second[:, 1]).any()


def test_other_heads_see_all_task_tokens(schema, make_batch):
    model = Hiformer(schema, embedding_dim=D, head=partial(TaskTowers, tower=[4])).eval()
    shared = model.interact(model.embed(make_batch(schema, 5))).detach().requires_grad_()
    model.predict(shared).logits[:, 0].sum().backward()
    assert (shared.grad != 0).all()


@pytest.mark.parametrize(("rank", "expected"), [(0.25, (12, 48)), (7, (7, 7)), (0.001, (1, 1)), (None, None)])
def test_ranks_are_numbers_or_shares_of_the_columns(plain_schema, rank, expected):
    # L = 3 features and a task token; keys have 4 · 4 · 3 = 48 columns, values 4 · 4 · 12 = 192.
    keys = {"key_dim": 3, "value_dim": 12, "key_rank": rank, "value_rank": rank}
    attention = Hiformer(plain_schema, embedding_dim=24, **keys).layers[0].attention
    if expected is None:
        assert attention.key.down is None
        assert attention.value.down is None
    else:
        assert (attention.key.down.shape[1], attention.value.down.shape[1]) == expected


def test_initial_widths_of_a_head(plain_schema):
    attention = Hiformer(plain_schema, embedding_dim=12, heads=4, attention="vanilla").layers[0].attention
    assert attention.key.weight.shape == (1, 12, 4 * 2)  # half of 12 / 4, rounded up
    assert attention.value.weight.shape == (1, 12, 4 * 6)
    odd = Hiformer(plain_schema, embedding_dim=8, heads=3, key_dim=5, value_dim=7, attention="vanilla")
    assert odd.layers[0].attention.value.weight.shape == (1, 8, 21)


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        (
            {"heads": 3},
            "heads 3 does not divide embedding_dim 8",
            "heads can be 1, 2, 4, 8; any number with key_dim and value_dim given",
        ),
        ({"layers": 0}, "layers is 0", "at least 1 is expected"),
        ({"d_ff": 0}, "d_ff is 0", "at least 1 is expected"),
        ({"dense_per_token": 0}, "dense_per_token is 0", "at least 1 is expected"),
        ({"attention": "composit"}, "unknown attention 'composit'", "did you mean 'composite'?"),
        (
            {"attention": "vanilla", "composite_queries": True},
            "composite_queries with attention 'vanilla'",
            "use attention 'composite'",
        ),
        (
            {"key_rank": 17},
            "key_rank is 17 for a matrix [32, 16]",
            "a whole number up to 16, a share below 1, or null for a full matrix is expected",
        ),
        (
            {"value_rank": 0},
            "value_rank is 0 for a matrix [32, 64]",
            "a whole number up to 32, a share below 1, or null for a full matrix is expected",
        ),
    ],
)
def test_impossible_configs(plain_schema, keys, message, hint):
    with pytest.raises(UserError) as caught:
        Hiformer(plain_schema, embedding_dim=D, **keys)
    assert caught.value.message == message
    assert caught.value.hint == hint


@pytest.mark.parametrize("head", sorted({path.stem for path in HEADS.glob("*.yaml")} - {"esmm"}))
def test_any_head_fits(schema, make_batch, head):
    node = compose(["model=hiformer", f"model/head={head}", "model.embedding_dim=8", "model.bottom=[8]"])["model"]
    output = instantiate(node, schema=schema).eval()(make_batch(schema, 3))
    assert output.logits.shape == (3, 2)
    assert output.shared.shape == (3, 2 * D)
