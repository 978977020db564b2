from __future__ import annotations

import dataclasses

import pytest
import torch

from raysys.errors import UserError
from raysys.models.ranking.finalmlp import FeatureGate, FinalMLP

D = 8
STREAMS = {"first": (6, 4), "second": (5, 2), "heads": 2, "gate": (3,)}


@pytest.fixture
def x():
    return torch.randn(6, 5, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("context", [[], [1], [3, 0]])
def test_a_gate_equals_its_formula(x, context):
    gate = FeatureGate(5, D, context, hidden=(3,))
    seen = torch.cat([x[:, place] for place in context], 1) if context else gate.learned.expand(6, -1)
    hidden = torch.relu(seen @ gate.hidden[0].weight.t() + gate.hidden[0].bias)
    open_ = 2 * torch.sigmoid(hidden @ gate.output.weight.t() + gate.output.bias)
    torch.testing.assert_close(gate(x), x.flatten(1) * open_)


def test_a_gate_without_weights_lets_all_through(x):
    gate = FeatureGate(5, D, [1], hidden=(3,))
    torch.nn.init.zeros_(gate.output.weight)
    assert torch.equal(gate(x), x.flatten(1))


def test_a_gate_opens_by_its_context_only(x):
    """The ratio of what comes out to what goes in is the gate."""
    gate, other = FeatureGate(5, D, [1, 2], hidden=(3,)), x.clone()
    other[:, [0, 3, 4]] += 1
    torch.testing.assert_close(gate(x) / x.flatten(1), gate(other) / other.flatten(1))
    other[:, 2] += 1
    assert not torch.allclose(gate(x) / x.flatten(1), gate(other) / other.flatten(1), rtol=1e-2)
    learned = FeatureGate(5, D, [], hidden=(3,))
    ratio = learned(x) / x.flatten(1)
    torch.testing.assert_close(ratio, ratio[:1].expand(6, -1))


def test_contexts_are_the_features_of_a_side(schema):
    model = FinalMLP(schema, embedding_dim=D, contexts=("user", "item"), **STREAMS)
    names = [[model.tokens.names[place] for place in gate.places] for gate in model.gates]
    assert names == [["user_id"], ["genres", "item_id"]]
    learned = FinalMLP(schema, embedding_dim=D, **STREAMS)
    assert [gate.learned.shape for gate in learned.gates] == [(D,), (D,)]


def test_shared_is_both_streams_and_a_bilinear_form_for_each_task(schema, make_batch):
    model = FinalMLP(schema, embedding_dim=D, contexts=("user", "learned"), **STREAMS)
    embedded = model.embed(make_batch(schema, 5))
    x = model.tokens(embedded)
    u, v = model.first(model.gates[0](x)), model.second(model.gates[1](x))
    forms = torch.stack(
        [
            sum(
                torch.einsum("bi,ij,bj->b", u[:, 2 * h : 2 * h + 2], model.fusion.weight[h, :, task], v[:, h : h + 1])
                for h in range(2)
            )
            for task in range(2)
        ],
        1,
    )
    torch.testing.assert_close(model.interact(embedded), torch.cat([u, v, forms], 1))


def test_the_linear_tower_holds_the_papers_fusion(schema, make_batch):
    model, batch = FinalMLP(schema, embedding_dim=D, **STREAMS), make_batch(schema, 5)
    weight = model.towers.logits.weight  # [T, H, 1]
    with torch.no_grad():
        weight[:, 6:, 0] = torch.eye(2)  # each task its own form
    x = model.tokens(model.embed(batch))
    u, v = model.first(model.gates[0](x)), model.second(model.gates[1](x))
    expected = u @ weight[:, :4, 0].t() + v @ weight[:, 4:6, 0].t() + model.fusion(u, v)
    torch.testing.assert_close(model(batch).logits, expected)  # biases start at 0


def test_number_of_parameters(schema, plain_schema):
    def count(model):
        parts = model.gates, model.first, model.second, model.fusion, model.towers
        return sum(p.numel() for part in parts for p in part.parameters())

    def streams(m):
        return (m * D + 1) * 6 + 7 * 4 + (m * D + 1) * 5 + 6 * 2

    def gate(context, m):
        return (context * D + 1) * 3 + (3 + 1) * m * D

    learned = 2 * (D + gate(1, 3))
    assert count(FinalMLP(plain_schema, embedding_dim=D, **STREAMS)) == learned + streams(3) + 4 * 2 // 2 + (7 + 1)
    sides = gate(1, 7) + gate(2, 7)
    model = FinalMLP(schema, embedding_dim=D, contexts=("user", "item"), **STREAMS)
    assert count(model) == sides + streams(7) + 2 * 4 * 2 // 2 + 2 * (8 + 1)


def test_gates_are_trained(plain_schema, make_batch):
    schema = dataclasses.replace(
        plain_schema, sparse=(dataclasses.replace(plain_schema.sparse[0], side="user"), *plain_schema.sparse[1:])
    )
    model = FinalMLP(schema, embedding_dim=D, contexts=("learned", "user"), **STREAMS)
    model(make_batch(schema, 32)).logits.sum().backward()
    for name, parameter in model.gates.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        (
            {"heads": 3},
            "heads 3 does not divide the last widths of first and second, 4 and 2",
            "heads can be 1, 2",
        ),
        ({"heads": 0}, "heads 0 does not divide the last widths of first and second, 4 and 2", "heads can be 1, 2"),
        ({"contexts": ["usr", "learned"]}, "unknown context 'usr' in contexts", "did you mean 'user'?"),
        ({"contexts": ["learned"]}, "contexts is ['learned']", "give two, one for each stream: [user, item]"),
        (
            {"contexts": ["user", "item"]},
            "contexts names 'user', but schema has no sparse feature of side 'user'",
            "a context can be learned, context",
        ),
    ],
)
def test_impossible_configs(plain_schema, keys, message, hint):
    with pytest.raises(UserError) as caught:
        FinalMLP(plain_schema, embedding_dim=D, **STREAMS | keys)
    assert caught.value.message == message
    assert caught.value.hint == hint
