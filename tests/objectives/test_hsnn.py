from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.data.catalogue import CatalogueItems
from raysys.errors import UserError
from raysys.models.retrieval.hsnn import HSNN
from raysys.models.retrieval.two_tower import TwoTower
from raysys.objectives.hsnn import HSNNLoss
from raysys.schema import Catalogue, ExtraColumn, FeatureSchema, Label, SparseFeature, Table

ITEMS, USERS, TOPICS = 120, 40, 6
SCHEMA = FeatureSchema(
    tables=(Table("user", USERS, 8), Table("item", ITEMS, 8)),
    sparse=(
        SparseFeature("user", "user", "user", encoding="index"),
        SparseFeature("item", "item", "item", encoding="index"),
    ),
    labels=(Label("click"),),
    extra=(ExtraColumn("item", "int"),),
    catalogue=Catalogue("item"),
)


def rows(user, item, positive):
    """Rows of a log; -1 is no user."""
    present = (user >= 0).int()
    ones = torch.ones(len(item))
    return Batch(
        dense=torch.zeros(len(item), 0),
        sparse=KeyedJaggedTensor(
            keys=["user", "item"],
            values=torch.cat([user[user >= 0], item]),
            lengths=torch.cat([present, torch.ones(len(item), dtype=torch.int32)]),
        ),
        labels=positive[:, None].float(),
        label_mask=torch.ones(len(item), 1, dtype=torch.bool) & (user >= 0)[:, None],
        weight=(ones * (user >= 0))[:, None],
        example_id=torch.where(user >= 0, torch.arange(len(item)), -1),
        group_id=user,
        time=torch.zeros(len(item), dtype=torch.int64),
        extra={"item": item},
    )


def catalogue():
    every = torch.arange(ITEMS)
    batch = rows(torch.full((ITEMS,), -1), every, torch.zeros(ITEMS))
    return CatalogueItems("item", every.numpy(), "click", np.ones(ITEMS, np.int64), batch)


def positives(count, seed):
    """Users like the items of their topic."""
    generator = torch.Generator().manual_seed(seed)
    user = torch.randint(USERS, (count,), generator=generator)
    item = torch.randint(ITEMS // TOPICS, (count,), generator=generator) * TOPICS + user % TOPICS
    return rows(user, item, torch.ones(count))


def model(seed=0, nodes=(6, 4)):
    return HSNN(SCHEMA, nodes=nodes, embedding_dim=8, deep=[16], width=8, hidden=[8], bottom=[4], seed=seed)


def objective(**keys):
    return HSNNLoss(SCHEMA, items=catalogue(), **{"negatives": 32} | keys)


def step(loss, network, batch, seed=0):
    batch = loss.augment(batch, seed)
    return loss(network, batch, network.embed(batch))


def train(network, loss, steps, lr=0.02, seed=0):
    optimizer = torch.optim.Adam(network.parameters(), lr)
    parts = {}
    for n in range(steps):
        loss.after_step(n, steps)
        value, _, parts = step(loss, network, positives(64, seed * 1000 + n), n)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    loss.after_step(steps, steps)
    return parts


def test_gradients_of_the_levels_reach_nodes_items_and_scorers():
    network, loss = model(), objective()
    loss.after_step(50, 100)
    step(loss, network, positives(64, 0))[0].backward()
    names = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert not {name for name in names if name.startswith(("quantizer", "items", "users", "embeddings"))}
    assert not {name for name in names if name.startswith("scorers")}


def test_the_loss_is_the_sum_of_its_parts():
    network, loss = model(), objective(balance=0.5)
    loss.after_step(5, 100)  # λ = 0.5 of a warm-up of 10 steps
    assert loss.index_weight == pytest.approx(0.5)
    value, _, parts = step(loss, network, positives(64, 1))
    penalties = 0.0
    batch = loss.augment(positives(64, 1), 0)
    with torch.no_grad():
        drawn = loss.candidates(network, batch, network.embed(batch))
        for assignment in network.quantizer(drawn.items, loss.temperature):
            penalties += assignment.weights.shape[1] * float(assignment.weights[-32:].mean(0).square().sum())
    expected = parts["items"] + 0.5 * (parts["level_1"] + parts["level_2"]) + 0.5 * penalties
    assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_the_temperature_falls_exponentially_and_stays():
    loss = objective(temperature=(1.0, 0.01), cooling=0.5)
    found = []
    for done in (0, 25, 50, 100):
        loss.after_step(done, 100)
        found.append(loss.temperature)
    assert found == pytest.approx([1.0, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("update", ["joint", "em"])
@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_it_learns_the_topics_at_every_level(kind, update):
    network, loss = model(), objective(loss=kind, update=update, em_every=20)
    parts = train(network, loss, 150)
    with torch.no_grad():
        every = network.embed(catalogue().batch)
        items = network.encode_items(every)
        users = network.encode_users(network.embed(positives(200, 9)))
        topic = positives(200, 9).group_id % TOPICS
        hard = network.quantizer(items, None)
        for level, vectors in enumerate([items, hard[0].partial, hard[1].partial]):
            best = network.score_level(users, vectors, level).topk(10, 1).indices
            share = (best % TOPICS == topic[:, None]).float().mean()
            assert share > 0.6, (level, float(share))  # chance is 1/6
    assert float(parts["in_use_1"]) >= 0.5 * 6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_soft_and_hard_assignment_come_together(seed):
    network, loss = model(seed), objective()
    network.quantizer.place(torch.randn(200, 8, generator=torch.Generator().manual_seed(seed)), torch.Generator())

    def gap():
        with torch.no_grad():
            items = network.encode_items(network.embed(catalogue().batch))
            soft, hard = network.quantizer(items, loss.temperature), network.quantizer(items, None)
            return float((soft[-1].partial - hard[-1].partial).norm(dim=1).mean())

    loss.after_step(0, 100)
    before = gap()
    train(network, loss, 100, seed=seed)
    assert gap() < 0.3 * before


def collapsed(seed):
    """A model whose nodes of the first level all lie far away, but for one."""
    network = model(seed)
    network.quantizer.placed.fill_(True)
    with torch.no_grad():
        network.quantizer.nodes[0].fill_(10.0)
        network.quantizer.nodes[0][0] = 0.0
    return network


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_bad_start_collapses_without_balance_and_reseeding_and_recovers_with_them(seed):
    alone, helped = collapsed(seed), collapsed(seed)
    train(alone, objective(balance=0.0, reseed=0.0), 120, seed=seed)
    train(helped, objective(), 120, seed=seed)
    used = []
    for network in (alone, helped):
        with torch.no_grad():
            codes = network.quantizer.codes(network.encode_items(network.embed(catalogue().batch)))[:, 0]
        used.append(len(codes.unique()))
    assert used[0] == 1
    assert used[1] >= 4


def test_idle_nodes_are_moved_after_the_step_not_within():
    network, loss = collapsed(0), objective()
    network.quantizer.usage(0).zero_()
    loss.after_step(3, 100)
    before = network.quantizer.nodes[0].detach().clone()
    step(loss, network, positives(64, 0))[0].backward()
    assert torch.equal(network.quantizer.nodes[0], before)
    loss.after_step(4, 100)
    assert (network.quantizer.nodes[0] != before).any(1).sum() >= 5
    assert network.quantizer.nodes[0].norm(dim=1).max() < 2  # on residuals of unit vectors


def test_em_leaves_nodes_to_k_means():
    network, loss = model(), objective(update="em", em_every=5)
    loss.after_step(1, 100)
    step(loss, network, positives(64, 0))[0].backward()
    assert all(nodes.grad is None or not nodes.grad.any() for nodes in network.quantizer.nodes)
    before = network.quantizer.nodes[0].detach().clone()
    loss.after_step(5, 100)
    step(loss, network, positives(64, 1))
    assert not torch.equal(network.quantizer.nodes[0], before)


def test_another_model_is_refused():
    network, loss = TwoTower(SCHEMA, embedding_dim=8, deep=[8], width=8), objective()
    with pytest.raises(UserError, match="TwoTower has none"):
        step(loss, network, positives(8, 0))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": "softmx"}, "objective.loss is 'softmx'"),
        ({"update": "x"}, "objective.update is 'x'"),
        ({"temperature": (0.1, 1.0)}, "objective.temperature"),
        ({"warmup": 2}, "objective.warmup"),
        ({"cooling": 0}, "objective.cooling"),
        ({"reseed": 1}, "objective.reseed"),
        ({"balance": -1}, "objective.balance"),
    ],
)
def test_wrong_settings_are_named(keys, message):
    with pytest.raises(UserError, match=message):
        objective(**keys)
