"""Copies of rows before the lookup: which ids they lack, and that nobody else sees them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.models.ranking.dlrm import DLRM
from raysys.objectives.perturbation import LSPR, SCR
from raysys.objectives.perturbed_rows import Perturbation
from raysys.objectives.supervised import Supervised
from raysys.schema import (
    DenseFeature,
    ExtraColumn,
    FeatureSchema,
    Label,
    Sequence,
    SequenceFeature,
    SparseFeature,
    Table,
)
from raysys.train.metrics import Evaluator

ROWS = 200
SCHEMA = FeatureSchema(
    tables=(Table("item", 30, 8), Table("tag", 20, 8)),
    dense=(DenseFeature("age"),),
    sparse=(
        SparseFeature("item_id", "item"),
        SparseFeature("tags", "tag", max_length=8),
        SparseFeature("weighted", "tag", max_length=8, weights="w"),
        SparseFeature("kept", "tag", max_length=8),
        SparseFeature("slots", "tag", max_length=8, side="position"),
    ),
    sequences=(Sequence("history", (SequenceFeature("clicked", "item"),), max_length=5),),
    labels=(Label("click"),),
    extra=(ExtraColumn("score"),),
)
ONLY_DROP = partial(Perturbation, feature_mask=0.0, dense_noise=0.0, exclude=["kept"])


def batch(seed: int = 3) -> Batch:
    random = torch.Generator().manual_seed(seed)

    def jagged(names: list[str], longest: int, weights: bool = False) -> KeyedJaggedTensor:
        lengths = torch.randint(0, longest + 1, (len(names) * ROWS,), generator=random, dtype=torch.int32)
        ids = torch.randint(0, 20, (int(lengths.sum()),), generator=random)
        return KeyedJaggedTensor(names, ids, ids + 0.5 if weights else None, lengths=lengths)

    mask, place = torch.ones(ROWS, 1, dtype=torch.bool), torch.arange(ROWS)
    mask[-3:] = False
    return Batch(
        torch.randn(ROWS, 1, generator=random),
        jagged(["item_id", "tags", "kept", "slots"], 8),
        torch.randint(0, 2, (ROWS, 1), generator=random) * mask.float(),
        mask,
        mask.float(),
        place.where(mask[:, 0], -1),
        place,
        place,
        weighted=jagged(["weighted"], 8, weights=True),
        sequences=jagged(["clicked"], 5),
        extra={"score": place.float()},
    )


def bags(values: KeyedJaggedTensor, name: str, part: slice) -> list[list[float]]:
    """The ids of each row of a part, or their weights where there are some."""
    lengths, weights = values[name].lengths().tolist(), values[name].weights_or_none()
    content = values[name].values() if weights is None else weights
    return [ids.tolist() for ids in content.split(lengths)][part]


def test_copies_lack_some_ids_of_bags_and_all_else_is_as_it_was():
    plain, found = batch(), Perturbation.augment(ONLY_DROP(SCHEMA, id_drop=0.3), batch(), 7)
    own, copies = slice(0, ROWS), slice(ROWS, None)
    for name in ("item_id", "kept", "slots", "clicked"):
        values, expected = ((b.sequences if name == "clicked" else b.sparse) for b in (found, plain))
        assert bags(values, name, own) == bags(values, name, copies) == bags(expected, name, own)
    for values, expected, name in ((found.sparse, plain.sparse, "tags"), (found.weighted, plain.weighted, "weighted")):
        before, after = bags(expected, name, own), bags(values, name, copies)
        assert bags(values, name, own) == before
        total, left = sum(map(len, before)), sum(map(len, after))
        assert left / total == pytest.approx(0.7, abs=4 * (0.21 / total) ** 0.5)
        assert all(is_part(part, of) for part, of in zip(after, before, strict=True))
    assert found.extra["copied_rows"].tolist() == list(range(ROWS))
    for name in ("dense", "labels", "group_id", "time"):
        assert torch.equal(
            getattr(found, name), getattr(plain, name).repeat(2, *[1] * (getattr(plain, name).dim() - 1))
        )
    assert torch.equal(found.weight[own], plain.weight)
    assert not found.weight[copies].any()
    assert not found.label_mask[copies].any()
    assert (found.example_id[copies] == -1).all()


def is_part(part: list, of: list) -> bool:
    """In the same order."""
    rest = iter(of)
    return all(value in rest for value in part)


def test_what_is_left_out_follows_from_the_seed():
    perturbation = ONLY_DROP(SCHEMA, id_drop=0.3, row_fraction=0.25)
    first, again, other = (perturbation.augment(batch(), seed) for seed in (1, 1, 2))
    assert len(first) == ROWS + ROWS // 4
    assert torch.equal(first.sparse.values(), again.sparse.values())
    assert torch.equal(first.extra["copied_rows"], again.extra["copied_rows"])
    assert not torch.equal(first.extra["copied_rows"], other.extra["copied_rows"])


@pytest.mark.parametrize("build", [SCR, LSPR])
def test_without_it_a_batch_stays_itself(build):
    given = batch()
    assert build(SCHEMA).augment(given, 1) is given
    off = {"lambda_": 0.0} if build is SCR else {"alpha": 0.0}
    assert build(SCHEMA, perturbation=partial(ONLY_DROP, id_drop=0.3), **off).augment(given, 1) is given


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_loss_is_that_of_the_rows_and_of_what_is_left_of_them(fraction):
    model = DLRM(SCHEMA, embedding_dim=8, bottom=[8])
    objective = LSPR(SCHEMA, alpha=0.3, perturbation=partial(ONLY_DROP, id_drop=0.5, row_fraction=fraction))
    given = objective.augment(batch(), 5)
    rows = given.extra["copied_rows"]
    loss, output, _ = objective(model, given, model.embed(given))
    plain, *_ = Supervised(SCHEMA)(model, batch(), model.embed(batch()))
    logits, weight = model(given).logits[ROWS:, 0], batch().weight[rows, 0]
    cross = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch().labels[rows, 0], reduction="none")
    copies = (weight * cross).sum() / weight.sum()
    torch.testing.assert_close(loss, 0.7 * plain + 0.3 * copies)
    assert abs(float(copies - plain)) > 1e-5
    assert len(output.logits) == len(given)
    metrics = [Evaluator(SCHEMA), Evaluator(SCHEMA)]
    metrics[0].update(output.logits, given)
    metrics[1].update(model(batch()).logits, batch())
    assert metrics[0].compute()["tasks"]["click"] == pytest.approx(metrics[1].compute()["tasks"]["click"], nan_ok=True)


def test_a_batch_that_was_not_augmented_is_refused():
    model, objective = (
        DLRM(SCHEMA, embedding_dim=8, bottom=[8]),
        SCR(SCHEMA, perturbation=partial(ONLY_DROP, id_drop=0.5)),
    )
    with pytest.raises(AssertionError, match="must go through augment"):
        objective(model, batch(), model.embed(batch()))
