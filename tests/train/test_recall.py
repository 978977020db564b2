from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.data.catalogue import CatalogueItems
from raysys.errors import UserError
from raysys.models.retrieval.base import RetrievalModel
from raysys.models.retrieval.baselines import CountBaselines
from raysys.nn.collectives import rank, world_size
from raysys.schema import ExtraColumn, FeatureSchema, Label
from raysys.train.recall import CatalogueEvaluator, rank_intervals, rank_metrics

KEYS = np.array([30, 10, 20, 50, 40])  # not in order: keys are no row numbers
SCHEMA = FeatureSchema(labels=(Label("click"),), extra=(ExtraColumn("item", "int"), ExtraColumn("seen", "ids")))


class Given(RetrievalModel):
    """Scores users by a table: user u's vector is one-hot, an item's vector is its column of scores."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.table, self.width = scores, len(scores)

    def embed(self, batch):
        return batch

    def encode_users(self, batch):
        return torch.eye(self.width)[batch.group_id]

    def encode_items(self, batch):
        return self.table.t()[batch.group_id]


def rows(users, keys, positive, seen, example_id=None):
    n = len(users)
    lengths = torch.tensor([len(one) for one in seen], dtype=torch.int32)
    flat = torch.tensor([key for one in seen for key in one], dtype=torch.int64)
    none = KeyedJaggedTensor(keys=[], values=torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(0).int(), stride=n)
    return Batch(
        dense=torch.zeros(n, 0),
        sparse=none,
        labels=torch.tensor(positive).float()[:, None],
        label_mask=torch.ones(n, 1, dtype=torch.bool),
        weight=torch.ones(n, 1),
        example_id=torch.arange(n) if example_id is None else torch.tensor(example_id),
        group_id=torch.tensor(users),
        time=torch.zeros(n, dtype=torch.int64),
        extra={
            "item": torch.tensor(keys),
            "seen": KeyedJaggedTensor(keys=["seen"], values=flat, lengths=lengths, stride=n),
        },
    )


def catalogue(size=5, keys=KEYS):
    batch = rows(list(range(size)), [0] * size, [0] * size, [[] for _ in range(size)])
    return CatalogueItems("item", np.asarray(keys), "click", np.resize([0, 6, 21, 3, 20], size), batch)


def evaluator(scores, items=None, at=(1, 2), exclude="seen", baselines=None):
    return CatalogueEvaluator(
        Given(scores), items or catalogue(), SCHEMA, at, exclude, torch.device("cpu"), 4, baselines
    )


@pytest.fixture
def three_users():
    """By hand: rank 1; rank 3 of which one above is seen, so 2; rank 3 by a tie that counts against it."""
    scores = torch.tensor([[5.0, 4, 3, 2, 1], [1, 3, 4, 5, 2], [2, 2, 3, 0, -1]])
    found = evaluator(torch.nn.functional.pad(scores, (0, 0, 0, 2)))
    found.update(rows([0, 1, 2, 0], [30, 10, 30, 40], [1, 1, 1, 0], [[], [50], [], []]))
    return found


def test_three_users_by_hand(three_users):
    report = three_users.compute()
    assert three_users.predictions()["click_rank"].to_pylist() == [1, 2, 3]
    metrics = report["tasks"]["click"]
    assert metrics["rows"] == 3
    assert metrics["recall@1"] == pytest.approx(1 / 3)
    assert metrics["recall@2"] == pytest.approx(2 / 3)
    assert metrics["ndcg@2"] == pytest.approx((1 + 1 / np.log2(3)) / 3)
    assert metrics["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    # Best items: row 0; row 2 (3 is seen); row 2.
    assert metrics["coverage@1"] == pytest.approx(2 / 5)


def test_items_are_split_by_their_training_counts(three_users):
    slices = three_users.compute()["slices"]["item popularity"]
    rows_by_range = {name: tasks["click"]["rows"] for name, tasks in slices.items()}
    assert rows_by_range == {"0 to 5": 2, "6 to 20": 1, "above 20": 0}  # items 30, 30 and 10
    assert np.isnan(slices["above 20"]["click"]["recall@1"])


def test_constant_scores_find_nothing_and_an_oracle_everything():
    batch = rows([0, 1, 2, 3, 4], KEYS.tolist(), [1] * 5, [[]] * 5)
    for scores, value in ((torch.zeros(5, 5), 0.0), (torch.eye(5), 1.0)):
        found = evaluator(scores)
        found.update(batch)
        assert found.compute()["tasks"]["click"]["recall@2"] == value


def test_random_scores_find_k_of_n():
    size, users, k = 100, 100, 10
    generator = torch.Generator().manual_seed(0)
    items = catalogue(size, np.arange(size))
    found = evaluator(torch.rand(users, size, generator=generator), items, at=(k,))
    for _ in range(10):
        wanted = torch.randint(size, (users,), generator=generator).tolist()
        found.update(rows(list(range(users)), wanted, [1] * users, [[]] * users))
    deviation = np.sqrt(0.1 * 0.9 / (10 * users))
    assert abs(found.compute()["tasks"]["click"][f"recall@{k}"] - k / size) < 4 * deviation


def test_the_wanted_item_is_never_excluded():
    found = evaluator(torch.eye(5))
    found.update(rows([0], [30], [1], [[30, 10]]))
    assert found.predictions()["click_rank"].to_pylist() == [1]


def test_an_unknown_item_and_scores_that_are_not_finite_are_errors():
    with pytest.raises(UserError, match="item 77 of an evaluated row is not in the catalogue"):
        evaluator(torch.eye(5)).update(rows([0], [77], [1], [[]]))
    with pytest.raises(UserError, match="not finite"):
        evaluator(torch.full((5, 5), float("nan"))).update(rows([0], [30], [1], [[]]))


def test_baselines_are_ranked_beside_the_model():
    counted = CountBaselines(np.array([0, 1, 2, 1, 2]), np.array([3, 2]), 5)  # 0 → 1 → 2 and 1 → 2
    found = evaluator(torch.eye(5), baselines=counted)
    found.update(rows([0], [20], [1], [[30, 10]]))  # had items 0 and 1, wants item 2
    ranks = found.predictions()
    assert ranks["click: last item (Markov)_rank"].to_pylist() == [1]
    assert ranks["click: popularity_rank"].to_pylist() == [1]
    assert ranks["click: co-occurrence_rank"].to_pylist() == [1]


SIZE, USERS = 53, 40


def ranked_here():
    """The report of 7 batches, and the ranks of those of this rank, each W-th; many items have the same score."""
    rng, batches = np.random.default_rng(0), []
    for number in range(7):
        seen = [rng.choice(SIZE, rng.integers(0, 9), replace=False).tolist() for _ in range(11)]
        users, wanted = rng.integers(0, USERS, 11).tolist(), rng.integers(0, SIZE, 11).tolist()
        ids = list(range(11 * number, 11 * number + 11))
        batches.append(rows(users, wanted, (rng.random(11) < 0.7).astype(int).tolist(), seen, ids))
    batches += [rows([0], [0], [0], [[]], [-1])] * (-7 % world_size())  # every rank has as many
    scores = torch.from_numpy(rng.integers(0, 20, (USERS, SIZE))).float()
    counted = CountBaselines(rng.integers(0, SIZE, 300), np.full(60, 5), SIZE)
    found = evaluator(scores, catalogue(SIZE, np.arange(SIZE)), at=(1, 5), baselines=counted)
    for batch in batches[rank() :: world_size()]:
        found.update(batch)
    return found.compute(), found.predictions().to_pylist()


def test_any_number_of_ranks_finds_the_same(gloo):
    ((report, ranks),) = gloo.run(1, ranked_here)
    assert 0 < report["tasks"]["click"]["recall@5"] < 1
    assert len(report["tasks"]) == 4
    for workers in (2, 3):
        answers = gloo.run(workers, ranked_here)
        together = [row for _, found in answers for row in found]
        assert sorted(together, key=lambda row: row["example_id"]) == ranks
        for other, _ in answers:
            assert other["tasks"].keys() == report["tasks"].keys()
            for task, metrics in report["tasks"].items():
                assert other["tasks"][task] == pytest.approx(metrics, rel=1e-12)
                for label, part in report["slices"]["item popularity"].items():
                    part_of_other = other["slices"]["item popularity"][label][task]
                    assert part_of_other == pytest.approx(part[task], rel=1e-12, nan_ok=True)


def test_metrics_and_intervals_of_ranks():
    ranks = np.array([1, 2, 4, 100])
    metrics = rank_metrics(ranks, [2, 4])
    assert metrics["recall@2"] == 0.5
    assert metrics["recall@4"] == 0.75
    assert metrics["ndcg@4"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(5)) / 4)
    low, high = rank_intervals(np.repeat(ranks, 100), [2])["recall@2"]
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 400), rel=0.2)  # the binomial's interval
