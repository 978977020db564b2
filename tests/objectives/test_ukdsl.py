"""UKDSL: its losses and gradients, and what it recovers from unlabelled rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raysys.config import compose, instantiate
from raysys.errors import UserError
from raysys.models.outputs import Embedded, Output
from raysys.objectives.supervised import Supervised
from raysys.objectives.ukdsl import UKDSL
from raysys.schema import (
    DenseFeature,
    ExtraColumn,
    FeatureSchema,
    Label,
)
from raysys.train.metrics import Evaluator, WindowMetrics

WIDTH = 12
SCHEMA = FeatureSchema(
    dense=tuple(DenseFeature(f"x{place}") for place in range(WIDTH)),
    labels=(
        Label("click", required=False),
        Label("spend", kind="regression", required=False),
        Label("buy", required=False),
    ),
    extra=(ExtraColumn("teacher_click"), ExtraColumn("teacher_buy"), ExtraColumn("u"), ExtraColumn("rank", "int")),
    group_id="request",
)
TEACHERS = {"click": "teacher_click", "buy": "teacher_buy"}


class Student(nn.Module):
    """A hidden layer that all tasks share (or none), and a linear head."""

    def __init__(self, hidden: int | None = 6) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.trunk = nn.Identity() if hidden is None else nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh())
            self.head = nn.Linear(hidden or WIDTH, 3)

    def embed(self, batch) -> Embedded:
        return Embedded(torch.zeros(len(batch.dense), 0, 1), (), {}, batch.dense)

    def interact(self, embedded: Embedded) -> Tensor:
        return self.trunk(embedded.dense)

    def predict(self, shared: Tensor) -> Output:
        return Output(self.head(shared), shared, shared[:, None])


def rows(labeled: int = 20, unlabeled: int = 30, padding: int = 3, rate: float = 1.0) -> SimpleNamespace:
    """Labelled rows, unlabelled ones, padding."""
    random, total = torch.Generator().manual_seed(6), labeled + unlabeled + padding
    place = torch.arange(total)
    mask, real = (place < labeled)[:, None].expand(total, 3), place < labeled + unlabeled
    labels = torch.randint(0, 2, (total, 3), generator=random).float() * mask
    drawn = torch.rand(total, 2, generator=random)
    return SimpleNamespace(
        dense=torch.randn(total, WIDTH, generator=random) * real[:, None],
        labels=labels,
        label_mask=mask,
        weight=(torch.rand(total, 3, generator=random) + 0.5) * mask,
        example_id=place.where(real, -1),
        group_id=torch.where(place < 13, place // 5, 10 + place // 7) * real,  # of labelled and unlabelled rows
        extra={
            "rank": place % 9 + 1,
            "teacher_click": drawn[:, 0] * real,
            "teacher_buy": drawn[:, 1] * real,
            "u": (torch.rand(total, generator=random) + 0.5) / rate * real,
        },
    )


def run(objective: nn.Module, batch, model: Student | None = None) -> tuple[Tensor, dict[str, Tensor], dict]:
    model = model or Student()
    loss, _, parts = objective(model, batch, model.embed(batch))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}, parts


def assert_identical(first: tuple, second: tuple) -> None:
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_without_weights_it_is_supervised_training():
    objective = UKDSL(SCHEMA, teachers=TEACHERS, unlabeled_weight=0.0)
    assert_identical(run(objective, rows()), run(Supervised(SCHEMA), rows()))


def test_a_teacher_that_repeats_the_labels_is_supervised_training():
    batch = rows(unlabeled=0)
    batch.extra |= {"teacher_click": batch.labels[:, 0], "teacher_buy": batch.labels[:, 2]}
    objective = UKDSL(SCHEMA, teachers=TEACHERS, labeled_share=1.0)
    assert_identical(run(objective, batch), run(Supervised(SCHEMA), rows(unlabeled=0)))


def test_the_share_of_the_teacher_on_labelled_rows_by_hand():
    batch = rows(unlabeled=0, padding=0)
    batch.extra["teacher_click"][:5] = float("nan")  # a null
    loss, _, _ = run(UKDSL(SCHEMA, teachers={"click": "teacher_click"}, labeled_share=0.3), batch)
    model, plain = Student(), run(Supervised(SCHEMA), rows(unlabeled=0, padding=0))[0]
    logit = model.head(model.trunk(batch.dense))[:, 0].detach()
    cross = nn.functional.binary_cross_entropy_with_logits
    teacher = batch.extra["teacher_click"].nan_to_num(0.5)
    change = cross(logit, teacher, reduction="none") - cross(logit, batch.labels[:, 0], reduction="none")
    weight = batch.weight[:, 0]
    expected = plain + 0.3 * (weight * change)[5:].sum() / weight.sum()
    torch.testing.assert_close(loss, expected)


def test_the_gradient_of_an_unlabelled_row_and_none_for_the_teacher():
    batch, model, logits = rows(), Student(), []
    for name in ("teacher_click", "teacher_buy", "u"):
        batch.extra[name].requires_grad_()
    predict = model.predict

    def keep(shared: Tensor) -> Output:
        output = predict(shared)
        output.logits.retain_grad()
        logits.append(output.logits)
        return output

    model.predict = keep
    objective = UKDSL(SCHEMA, teachers=TEACHERS, sampling_weight="u", unlabeled_weight=0.7)
    run(objective, batch, model)
    unlabeled, u = slice(20, 50), batch.extra["u"].detach()[20:50]
    for task, column in ((0, "teacher_click"), (2, "teacher_buy")):
        expected = 0.7 * u * (logits[0][unlabeled, task].sigmoid() - batch.extra[column][unlabeled]) / u.sum()
        torch.testing.assert_close(logits[0].grad[unlabeled, task], expected.detach())
    assert not logits[0].grad[unlabeled, 1].any()
    assert not logits[0].grad[50:].any()  # padding
    assert all(batch.extra[name].grad is None for name in ("teacher_click", "teacher_buy", "u"))


def test_rows_of_one_request_learn_their_order_from_the_teacher():
    batch, model = rows(padding=0), Student()
    batch.extra["teacher_click"][[3, 30]] = float("nan")  # not scored: in no list
    objective = UKDSL(
        SCHEMA, teachers={"click": "teacher_click"}, sampling_weight="u", loss="listwise", temperature=2.0
    )
    loss, _, parts = run(objective, batch, model)
    logit = model.head(model.trunk(batch.dense))[:, 0].detach()
    lists = []
    for request in batch.group_id.unique():
        listed = (batch.group_id == request) & ~batch.extra["teacher_click"].isnan()
        if listed.sum() < 2:
            continue  # a list of one says nothing
        u = batch.extra["u"][listed]
        p = (u.log() + batch.extra["teacher_click"][listed].logit() / 2).softmax(0)
        q = (u.log() + logit[listed] / 2).softmax(0) / u
        lists.append(-(p * q.log()).sum())
    assert len(lists) == 8
    expected = 4 * torch.stack(lists).mean()
    torch.testing.assert_close(parts["click_teacher"], expected)
    torch.testing.assert_close(loss, run(Supervised(SCHEMA), rows(padding=0))[0] + expected)


def test_the_correction_is_of_the_target_and_not_of_the_labels():
    batch = rows()
    given = UKDSL(SCHEMA, teachers={"click": "teacher_click"}, teacher_rank="rank", rank_buckets=[3])
    assert given.shift is not None
    given.shift.shift.fill_(0.4)
    given.eval()  # the shift stays
    moved = rows()
    moved.extra["teacher_click"] = (moved.extra["teacher_click"].logit(eps=1e-6) + 0.4).sigmoid()
    torch.testing.assert_close(run(given, batch)[0], run(UKDSL(SCHEMA, teachers={"click": "teacher_click"}), moved)[0])


def test_temperature_and_squared_logits_by_hand():
    batch = rows(labeled=0, padding=0)
    model, teacher = Student(), batch.extra["teacher_click"].double()
    logit = model.head(model.trunk(batch.dense))[:, 0].detach().double()
    target = teacher.logit()
    soft = (target / 2).sigmoid()
    bce = 4 * nn.functional.binary_cross_entropy_with_logits(logit / 2, soft)
    for keys, expected in (({"temperature": 2.0}, bce), ({"loss": "mse_logit"}, (logit - target).square().mean())):
        loss, _, parts = run(UKDSL(SCHEMA, teachers={"click": "teacher_click"}, **keys), batch)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        assert float(parts["click_teacher"]) == pytest.approx(float(expected), rel=1e-5)
        assert float(parts["click_teacher_bias"]) == pytest.approx(float((logit.sigmoid() - teacher).mean()), abs=1e-6)


def test_the_auxiliary_head_shields_the_main_one():
    objective = UKDSL(SCHEMA, teachers=TEACHERS, head_mode="aux", shared_width=6, aux_hidden=(4,))
    _, gradients, _ = run(objective, rows(labeled=0))
    assert not gradients["head.weight"].any()
    assert not gradients["head.bias"].any()
    assert gradients["trunk.0.weight"].any()
    assert all(parameter.grad.any() for parameter in objective.aux[1].parameters())
    supervised, both = run(Supervised(SCHEMA), rows())[1], run(objective, rows())[1]
    assert torch.equal(both["head.weight"], supervised["head.weight"])
    assert not torch.equal(both["trunk.0.weight"], supervised["trunk.0.weight"])
    with pytest.raises(UserError) as error:
        UKDSL(SCHEMA, teachers=TEACHERS, head_mode="aux", shared_width=7)(Student(), rows(), Student().embed(rows()))
    assert error.value.message == "objective.shared_width is 7, and the model's interact returns 6 columns"


def test_a_sample_of_the_unlabelled_rows_leaves_the_expected_loss():
    batch, objective = (
        rows(labeled=10, unlabeled=20_000, padding=0),
        UKDSL(SCHEMA, teachers=TEACHERS, sampling_weight="u"),
    )
    batch.extra["u"] = torch.ones(20_010)
    whole, sampled = float(run(objective, batch)[0]), []
    for seed in range(40):
        kept = torch.rand(20_010, generator=torch.Generator().manual_seed(seed)) < 0.1
        kept[:10] = True
        part = {name: value[kept] for name, value in vars(batch).items() if name != "extra"}
        extra = {name: value[kept] for name, value in batch.extra.items()}
        extra["u"] = extra["u"] * 10
        sampled.append(float(run(objective, SimpleNamespace(**part, extra=extra))[0]))
    error = np.std(sampled) / np.sqrt(len(sampled))
    assert abs(np.mean(sampled) - whole) < 4 * error
    assert error < 0.01


def test_unlabelled_rows_change_neither_the_labelled_parts_nor_the_metrics():
    whole, first = rows(unlabeled=30), slice(0, 20)
    part = {name: value[first] for name, value in vars(whole).items() if name != "extra"}
    alone = SimpleNamespace(**part, extra={name: value[first] for name, value in whole.extra.items()})
    parts, reports, model = [], [], Student()
    for batch in (alone, whole):
        parts.append(run(UKDSL(SCHEMA, teachers=TEACHERS), batch)[2])
        evaluator, window = Evaluator(SCHEMA), WindowMetrics(SCHEMA)
        for metrics in (evaluator, window):
            metrics.update(model.predict(model.interact(model.embed(batch))).logits, batch)
        reports.append((evaluator.compute()["tasks"], window.compute()))
    for task in SCHEMA.tasks:
        torch.testing.assert_close(parts[0][task], parts[1][task])
        for before, after in zip(*reports, strict=True):
            assert after[task] == pytest.approx(before[task], rel=1e-6, nan_ok=True)
    assert parts[0]["click_teacher"] == parts[0]["click_teacher_bias"] == 0
    assert reports[1][0]["click"]["rows"] == 20


@pytest.mark.parametrize(
    "keys",
    [
        {"labeled_share": 0.4},
        {"head_mode": "aux", "shared_width": 6},
        {"loss": "listwise"},
        {"teacher_rank": "rank", "rank_buckets": [1, 5]},
    ],
    ids=["shared", "aux", "listwise", "corrected"],
)
def test_two_ranks_average_to_the_gradient_of_the_joint_batch(keys, monkeypatch, as_two_ranks):
    def step(batch: SimpleNamespace):
        return run(UKDSL(SCHEMA, teachers=TEACHERS, sampling_weight="u", unlabeled_weight=0.7, **keys), batch)

    def patch(name: str, function) -> None:
        for module in ("objectives.supervised", "objectives.ukdsl", "objectives.teacher_shift", "nn.listwise"):
            monkeypatch.setattr(f"raysys.{module}.{name}", function, raising=name == "global_sum")

    expected_loss, expected, expected_parts = step(rows())
    results = as_two_ranks(step, rows(), 13, patch)
    torch.testing.assert_close((results[0][0] + results[1][0]) / 2, expected_loss)
    for name, value in expected.items():
        torch.testing.assert_close((results[0][1][name] + results[1][1][name]) / 2, value)
    for name, value in expected_parts.items():
        torch.testing.assert_close((results[0][2][name] + results[1][2][name]) / 2, value)


def test_a_student_recovers_a_logistic_teacher_from_unlabelled_rows(fit_convex):
    batch, truth = rows(labeled=0, unlabeled=5000, padding=0), torch.linspace(-1, 1, WIDTH)
    batch.extra["teacher_click"] = (batch.dense @ truth - 0.5).sigmoid()
    model = Student(hidden=None)
    fit_convex(model, UKDSL(SCHEMA, teachers={"click": "teacher_click"}), batch)
    assert float((model.head.weight[0] - truth).norm() / truth.norm()) < 0.02
    assert float(model.head.bias[0]) == pytest.approx(-0.5, abs=0.02)


def test_the_yaml_file_has_the_defaults_of_the_class():
    given = instantiate(compose(["objective=ukdsl"])["objective"] | {"teachers": TEACHERS}, schema=SCHEMA)
    default = UKDSL(SCHEMA, teachers=TEACHERS)
    plain = {key: value for key, value in vars(given).items() if isinstance(value, float | str | bool | list | None)}
    assert plain == {key: vars(default)[key] for key in plain}


LISTWISE_NEEDS = "objective.loss=listwise needs a group_id in schema, and labeled_share 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": {}}, "objective.teachers names no task"),
        ({"teachers": {"clicks": "teacher_click"}}, "objective.teachers: no binary task 'clicks' in schema"),
        ({"teachers": {"spend": "teacher_click"}}, "objective.teachers: no binary task 'spend' in schema"),
        ({"teachers": {"click": "rank"}}, "objective.teachers.click: no float column 'rank' in extra of schema"),
        ({"teacher_rank": "u"}, "objective.teacher_rank: no int column 'u' in extra of schema"),
        ({"teacher_rank": "rank", "rank_buckets": [5, 1]}, "objective.rank_buckets is [5, 1]"),
        ({"sampling_weight": "w"}, "objective.sampling_weight: no float column 'w' in extra of schema"),
        ({"loss": "kl"}, "objective.loss is 'kl'"),
        ({"loss": "listwise", "labeled_share": 0.5}, LISTWISE_NEEDS),
        ({"head_mode": "own"}, "objective.head_mode is 'own'"),
        ({"labeled_share": 1.5}, "objective.labeled_share is 1.5"),
        ({"temperature": 0.0}, "objective.temperature is 0.0"),
        ({"head_mode": "aux"}, "objective.head_mode=aux needs objective.shared_width, and labeled_share 0"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(UserError) as error:
        UKDSL(SCHEMA, **({"teachers": TEACHERS} | options))
    assert error.value.message == message
