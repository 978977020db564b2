from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.data.catalogue import CatalogueItems
from raysys.errors import UserError
from raysys.models.outputs import Embedded
from raysys.models.retrieval.base import RetrievalModel
from raysys.objectives.sampled_softmax import SampledSoftmax
from raysys.schema import ExtraColumn, FeatureSchema, Label

ITEMS, USERS = 12, 5
SCHEMA = FeatureSchema(labels=(Label("click"),), group_id="user", extra=(ExtraColumn("item", "int"),))
COUNTS = np.array([40, 20, 10, 8, 6, 5, 4, 3, 2, 1, 1, 0])


class Free(RetrievalModel):
    """A full-rank problem: any score for any pair. `embed` hands on users and items of the rows."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores, self.width = nn.Parameter(scores.clone()), ITEMS

    def encode_users(self, embedded):
        return self.scores[embedded.dense[:, 0].long()]

    def encode_items(self, embedded):
        return torch.eye(ITEMS)[embedded.dense[:, 1].long()]


def rows(users, items, positive, weight=None):
    n = len(users)
    users, items = torch.as_tensor(users), torch.as_tensor(items)
    dense = torch.stack([users, items], 1).float()
    none = KeyedJaggedTensor(keys=[], values=torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(0).int(), stride=n)
    weight = torch.ones(n) if weight is None else torch.as_tensor(weight).float()
    batch = Batch(
        dense=dense,
        sparse=none,
        labels=torch.as_tensor(positive).float()[:, None],
        label_mask=torch.ones(n, 1, dtype=torch.bool),
        weight=weight[:, None],
        example_id=torch.arange(n),
        group_id=users,
        time=torch.zeros(n, dtype=torch.int64),
        extra={"item": items * 10},
    )
    return batch, Embedded(torch.zeros(n, 0, 1), (), {}, dense)


def embedded(batch):
    return Embedded(torch.zeros(len(batch), 0, 1), (), {}, batch.dense)


def catalogue(counts=COUNTS):
    every = torch.arange(ITEMS)
    batch, _ = rows(torch.zeros(ITEMS, dtype=torch.int64), every, torch.zeros(ITEMS), torch.zeros(ITEMS))
    return CatalogueItems("item", (every * 10).numpy(), "click", counts, batch)


def objective(counts=COUNTS, **keys):
    return SampledSoftmax(SCHEMA, items=catalogue(counts), **keys)


def run(loss, model, batch, seed=0):
    batch = loss.augment(batch, seed)
    return loss(model, batch, embedded(batch))


@pytest.fixture(params=[0, 1, 2])
def model(request):
    return Free(torch.randn(USERS, ITEMS, generator=torch.Generator().manual_seed(request.param)))


def reference(model, users, items, weight, share, refined=False):
    """The loss of a batch of positives in float64, written out."""
    scores, total = model.scores.detach().double().numpy(), 0.0
    for n, (user, item) in enumerate(zip(users, items, strict=True)):
        drawn = [m for m in range(len(items)) if m == n or items[m] != item]
        count = len(items) - 1 if refined else len(items)
        logits = {m: scores[user, items[m]] - np.log(count * share[items[m]]) for m in drawn}
        if refined:
            others = np.log(sum(np.exp(value) for m, value in logits.items() if m != n))
            own = scores[user, item]
            probability = np.exp(own) / (np.exp(own) + np.exp(others))
            total += -weight[n] * (1 - probability) * (own - others)
        else:
            total += -weight[n] * (logits[n] - np.log(sum(np.exp(value) for value in logits.values())))
    return total / sum(weight)


@pytest.mark.parametrize("refined", [False, True])
def test_the_loss_is_its_equation_with_duplicates_masked(model, refined):
    users, items, weight = [0, 1, 2, 3, 1], [0, 3, 0, 5, 3], [1.0, 2.0, 1.0, 0.5, 1.0]
    batch, found = rows(users, items, [1] * 5, weight)
    value = objective(refined=refined)(model, batch, found)[0]
    assert float(value) == pytest.approx(
        reference(model, users, items, weight, COUNTS / COUNTS.sum(), refined), rel=1e-5
    )


def test_rows_that_are_not_positive_are_neither_anchors_nor_candidates(model):
    batch, found = rows([0, 1, 2], [0, 3, 5], [1, 1, 1])
    more, found_more = rows([0, 1, 2, 3, 4], [0, 3, 5, 7, 8], [1, 1, 1, 0, 1], [1, 1, 1, 1, 0])
    assert float(objective()(model, more, found_more)[0]) == pytest.approx(float(objective()(model, batch, found)[0]))


def test_hard_negatives_are_those_of_the_own_group(model):
    batch, found = rows([0, 1, 0], [0, 3, 7], [1, 1, 0])
    loss = objective(hard_negatives=True)
    drawn = loss.candidates(model, batch, found)
    assert drawn.allowed.tolist() == [[True, True, True], [True, True, False], [True, True, True]]
    assert float(drawn.log_expected[2]) == 0
    plain = objective()(model, batch, found)[0]
    assert float(loss(model, batch, found)[0]) > float(plain)


def test_uniform_negatives_join_with_what_is_expected_of_them(model):
    loss = objective(negatives=6)
    batch = loss.augment(rows([0, 1], [0, 3], [1, 1])[0], 3)
    assert len(batch) == 8
    assert batch.weight[2:].sum() == 0
    drawn = loss.candidates(model, batch, embedded(batch))
    item = (batch.extra["item"] // 10).numpy()
    expected = np.log(2 * COUNTS[item] / COUNTS.sum() + 6 / ITEMS)
    np.testing.assert_allclose(drawn.log_expected, expected, rtol=1e-5)
    assert drawn.uniform.tolist() == [False] * 2 + [True] * 6
    assert torch.equal(loss.augment(rows([0, 1], [0, 3], [1, 1])[0], 3).extra["item"], batch.extra["item"])


FLAT = np.arange(ITEMS, 0, -1)
"""No item fills so much of a batch that masking its duplicates matters: 12 to 1 of 78."""


def fitted(log_q, seed, steps=2000):
    """Scores by item of one user, and those of the full softmax at its optimum, log p(i); both around their mean."""
    probability = FLAT / FLAT.sum()
    model = Free(torch.zeros(USERS, ITEMS))
    loss, generator = objective(FLAT, log_q=log_q), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        items = torch.multinomial(torch.from_numpy(probability), 8, replacement=True, generator=generator)
        batch, found = rows(torch.zeros(8, dtype=torch.int64), items, torch.ones(8))
        value = loss(model, batch, found)[0]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    scores = model.scores.detach()[0].double().numpy()
    return scores - scores.mean(), np.log(probability) - np.log(probability).mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_log_q_scores_approach_those_of_the_full_softmax_and_without_popular_items_are_under_scored(seed):
    corrected, truth = fitted("counts", seed)
    plain, _ = fitted("none", seed)
    assert np.abs(corrected - truth).max() < 0.15
    assert (plain[:6] < truth[:6] - 0.15).all()
    assert (plain[-4:] > truth[-4:] + 0.15).all()


def test_the_streaming_estimate_is_fed_in_training_only(model):
    loss = objective(log_q="streaming")
    batch, found = rows([0, 1], [0, 3], [1, 1])
    loss.train()
    loss(model, batch, found)
    assert int(loss.frequency.step) == 1
    loss.eval()
    loss(model, batch, found)
    assert int(loss.frequency.step) == 1


def test_the_streaming_estimate_counts_items_of_positive_rows_alone(model):
    loss = objective(log_q="streaming", negatives=24)
    batch = loss.augment(rows([0, 1, 2, 3], [0, 3, 5, 7], [1, 1, 0, 1], [1, 1, 1, 0])[0], 0)
    assert len(batch.extra["item"].unique()) > 5
    loss(model, batch, embedded(batch))
    seen = loss.frequency(torch.arange(ITEMS) * 10) > 0.5
    assert seen.nonzero()[:, 0].tolist() == [0, 3]


@pytest.mark.parametrize(
    ("keys", "message"), [({"negatives": -1}, "objective.negatives is -1"), ({"log_q": "count"}, "log_q is 'count'")]
)
def test_wrong_settings_are_named(keys, message):
    with pytest.raises(UserError, match=message):
        objective(**keys)
