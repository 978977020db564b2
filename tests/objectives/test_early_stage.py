"""The loss of an early stage: shares of labels and of the final stage, gradients, the order within requests, two ranks."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.config import compose, instantiate
from raysys.errors import UserError
from raysys.models.outputs import Embedded, Output
from raysys.models.value import Value
from raysys.objectives.early_stage import EarlyStageLoss
from raysys.objectives.supervised import Supervised
from raysys.schema import DenseFeature, ExtraColumn, FeatureSchema, Label

WIDTH, TASKS = 6, ("click", "spend", "hide")
SCHEMA = FeatureSchema(
    dense=tuple(DenseFeature(f"x{place}") for place in range(WIDTH)),
    labels=(Label("click", required=False), Label("spend", "regression", False), Label("hide", required=False)),
    extra=(ExtraColumn("final_click"), ExtraColumn("final_hide"), ExtraColumn("bid"), ExtraColumn("age", "int")),
    group_id="request",
)
TEACHERS = {"hide": "final_hide", "click": "final_click"}  # not in the order of the tasks
VALUE = Value(["click"], {"hide": -0.7})
RANKING = {"value": VALUE, "bid": "bid", "rank_weight": 0.8}
IMPRESSIONS, SIZES, PADDING = 12, (5, 1, 9, 4), 3
SCORED = sum(SIZES)


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.head = nn.Linear(WIDTH, 3)

    def embed(self, batch) -> Embedded:
        return Embedded(torch.zeros(len(batch.dense), 0, 1), (), {}, batch.dense)

    def interact(self, embedded: Embedded) -> Tensor:
        return embedded.dense

    def predict(self, shared: Tensor) -> Output:
        logits = self.head(shared)
        if logits.requires_grad:
            logits.retain_grad()
        self.logits = logits
        return Output(logits, shared, shared[:, None])


def rows() -> SimpleNamespace:
    """Impressions with labels and no prediction, each a request of its own; scored requests; padding."""
    random = torch.Generator().manual_seed(6)
    total = IMPRESSIONS + SCORED + PADDING
    place = torch.arange(total)
    shown, scored = place < IMPRESSIONS, (place >= IMPRESSIONS) & (place < IMPRESSIONS + SCORED)
    mask = shown[:, None].expand(total, 3)
    drawn = torch.rand(total, 3, generator=random)
    request = torch.cat([place[:IMPRESSIONS] + 100, torch.repeat_interleave(torch.tensor(SIZES)), torch.zeros(PADDING)])
    return SimpleNamespace(
        dense=torch.randn(total, WIDTH, generator=random) * (shown | scored)[:, None],
        labels=torch.randint(0, 2, (total, 3), generator=random).float() * mask,
        label_mask=mask,
        weight=(torch.rand(total, 3, generator=random) + 0.5) * mask,
        example_id=place.where(shown | scored, -1),
        group_id=request.long(),
        extra={
            "final_click": drawn[:, 0].where(scored, torch.nan) * (place < IMPRESSIONS + SCORED),
            "final_hide": drawn[:, 1].where(scored, torch.nan) * (place < IMPRESSIONS + SCORED),
            "bid": 2 * drawn[:, 2],
        },
    )


def run(objective: nn.Module, batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Loss, gradients of weights, parts, gradient of the logits."""
    model = Student()
    loss, _, parts = objective(model, batch, model.embed(batch))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, parts, model.logits.grad


def test_without_a_share_of_the_final_stage_it_is_supervised_training():
    plain = run(Supervised(SCHEMA, task_weights={"hide": 2}), rows())
    found = run(
        EarlyStageLoss(SCHEMA, teachers=TEACHERS, soft_share=dict.fromkeys(TEACHERS, 0), task_weights={"hide": 2}),
        rows(),
    )
    torch.testing.assert_close(found[0], plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-6, atol=1e-8)


def test_the_loss_by_hand():
    """The default shares: 1 for an event of the value, a half for the click, none for a task without a teacher."""
    batch, weights = rows(), {"click": 3.0, "hide": 0.5}
    loss, _, parts, _ = run(EarlyStageLoss(SCHEMA, teachers=TEACHERS, value=VALUE, task_weights=weights), batch)
    z = Student().head(batch.dense).detach()
    scored = slice(IMPRESSIONS, IMPRESSIONS + SCORED)
    w = batch.weight
    cross = F.binary_cross_entropy_with_logits
    hard = (w[:, 0] * cross(z[:, 0], batch.labels[:, 0], reduction="none")).sum() / w[:, 0].sum()
    spend = (w[:, 1] * (z[:, 1] - batch.labels[:, 1]).square()).sum() / w[:, 1].sum()
    soft_click = cross(z[scored, 0], batch.extra["final_click"][scored])
    soft_hide = cross(z[scored, 2], batch.extra["final_hide"][scored])
    torch.testing.assert_close(loss, 3 * (hard + soft_click) / 2 + spend + 0.5 * soft_hide)
    torch.testing.assert_close(parts["hide_soft"], soft_hide)
    bias = (z[scored, 0].sigmoid() - batch.extra["final_click"][scored]).mean()
    torch.testing.assert_close(parts["click_soft_bias"], bias)


def test_the_gradient_of_a_scored_row_and_none_for_the_final_stage():
    batch = rows()
    for name in ("final_click", "final_hide", "bid"):
        batch.extra[name].requires_grad_()
    shares, weights = {"click": 0.3, "hide": 0.9}, {"click": 3.0, "hide": 0.5}
    options = {"soft_share": shares, "task_weights": weights, "value": VALUE, "bid": "bid"}
    _, _, _, gradient = run(EarlyStageLoss(SCHEMA, teachers=TEACHERS, **options), batch)
    early = Student().head(batch.dense).sigmoid()
    scored = slice(IMPRESSIONS, IMPRESSIONS + SCORED)
    for place, task in ((0, "click"), (2, "hide")):
        final = batch.extra[f"final_{task}"][scored].detach()
        expected = shares[task] * weights[task] * (early[scored, place] - final) / SCORED
        torch.testing.assert_close(gradient[scored, place], expected.detach())
    assert not gradient[scored, 1].any()  # no label and no teacher there
    assert not gradient[IMPRESSIONS + SCORED :].any()  # padding
    run(EarlyStageLoss(SCHEMA, teachers=TEACHERS, **RANKING), batch)
    assert all(batch.extra[name].grad is None for name in ("final_click", "final_hide", "bid"))


def test_rows_without_label_and_prediction_of_a_task_give_its_head_nothing():
    batch = rows()
    batch.extra["final_hide"][:] = torch.nan
    batch.label_mask = batch.label_mask & torch.tensor([True, True, False])
    batch.weight = batch.weight * batch.label_mask
    _, gradients, parts, _ = run(EarlyStageLoss(SCHEMA, teachers=TEACHERS, value=VALUE), batch)
    assert not gradients["head.weight"][2].any()
    assert gradients["head.weight"][0].any()
    assert parts["hide_soft"] == 0


def by_definition(final: Tensor, early: Tensor, request: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean over requests, one after another."""
    losses = []
    for number in request.unique():
        f, e = final[request == number], early[request == number]
        if len(f) > 1:
            scale = temperature * f.std(correction=0)
            losses.append(-(f.div(scale).softmax(0) * e.div(scale).log_softmax(0)).sum())
    return torch.stack(losses).mean()


def ranking_alone(final_click: Tensor, logit: Tensor, bid: Tensor, request: Tensor) -> tuple[Tensor, Tensor]:
    """L_rank and its gradient for the value bid · P(click), of rows without labels."""
    schema = dataclasses.replace(SCHEMA, labels=SCHEMA.labels[:1])
    objective = EarlyStageLoss(
        schema,
        teachers={"click": "final_click"},
        value=Value(["click"]),
        bid="bid",
        rank_weight=1.0,
        task_weights={"click": 0},
    )
    none = torch.zeros(len(logit), 1)
    batch = SimpleNamespace(labels=none, label_mask=none.bool(), weight=none, group_id=request, example_id=request)
    batch.extra = {"final_click": final_click, "bid": bid}
    logit = logit.clone().requires_grad_()
    model = SimpleNamespace(
        interact=lambda embedded: embedded, predict=lambda shared: Output(logit[:, None], none, none)
    )
    loss, _, parts = objective(model, batch, None)
    loss.backward()
    return parts["rank"], logit.grad


def test_the_ranking_loss_sees_no_constant_and_rests_where_the_values_agree():
    """Requests of 7, 3, 1 and 8 candidates, and one on which the final stage tells nothing."""
    random = torch.Generator().manual_seed(3)
    request = torch.repeat_interleave(torch.tensor([7, 3, 1, 8, 4]))
    final = torch.rand(23, generator=random) * 0.5 + 0.2
    bid, logit = torch.ones(23), torch.randn(23, generator=random)
    final[request == 4] = 0.3
    rank, gradient = ranking_alone(final, logit, bid, request)
    told = request < 4
    torch.testing.assert_close(rank, by_definition(final[told], logit.sigmoid()[told], request[told]))
    assert gradient[request == 0].abs().max() > 1e-3
    assert not gradient[(request == 2) | (request == 4)].any()
    moved = (logit.sigmoid() / 2 + torch.tensor([0.4, 0.1, 0.2, 0.3, 0.0])[request]).logit()
    halved = (logit.sigmoid() / 2).logit()
    torch.testing.assert_close(
        ranking_alone(final, moved, bid, request)[0], ranking_alone(final, halved, bid, request)[0]
    )
    same = (final + torch.tensor([0.2, -0.1, 0.1, 0.25, 0.0])[request]).logit()
    assert ranking_alone(final, same, bid, request)[1].abs().max() < 1e-6


def test_the_ranking_part_reads_scored_rows_of_whole_requests():
    batch = rows()
    _, _, parts, gradient = run(EarlyStageLoss(SCHEMA, teachers=TEACHERS, **RANKING), batch)
    _, _, _, without = run(EarlyStageLoss(SCHEMA, teachers=TEACHERS, value=VALUE, bid="bid"), batch)
    scored = slice(IMPRESSIONS, IMPRESSIONS + SCORED)
    logits = Student().head(batch.dense[scored]).detach().requires_grad_()
    early, bid = logits.sigmoid(), batch.extra["bid"][scored]
    final = bid * batch.extra["final_click"][scored] - 0.7 * batch.extra["final_hide"][scored]
    expected = by_definition(final, bid * early[:, 0] - 0.7 * early[:, 2], batch.group_id[scored])
    torch.testing.assert_close(parts["rank"], expected.detach())
    (own,) = torch.autograd.grad(0.8 * expected, logits)
    torch.testing.assert_close(gradient[scored] - without[scored], own, atol=1e-6, rtol=1e-4)
    assert torch.equal(gradient[:IMPRESSIONS], without[:IMPRESSIONS])


def test_two_ranks_average_to_the_gradient_of_the_joint_batch(monkeypatch, as_two_ranks):
    def step(batch: SimpleNamespace):
        return run(EarlyStageLoss(SCHEMA, teachers=TEACHERS, task_weights={"click": 3.0}, **RANKING), batch)

    def patch(name: str, function) -> None:
        for module in ("objectives.supervised", "objectives.early_stage", "nn.listwise"):
            monkeypatch.setattr(f"raysys.{module}.{name}", function)

    expected = step(rows())
    results = as_two_ranks(step, rows(), IMPRESSIONS + 5, patch)
    torch.testing.assert_close((results[0][0] + results[1][0]) / 2, expected[0])
    for place in (1, 2):  # gradients and parts
        for name, value in expected[place].items():
            torch.testing.assert_close((results[0][place][name] + results[1][place][name]) / 2, value)


def test_the_yaml_file_has_the_defaults_of_the_class():
    given = instantiate(compose(["objective=early_stage"])["objective"] | {"teachers": TEACHERS}, schema=SCHEMA)
    default = EarlyStageLoss(SCHEMA, teachers=TEACHERS)
    keys = ("soft_share", "bid", "rank_weight", "temperature", "task_weights", "embedding_l2")
    assert {key: getattr(given, key) for key in keys} == {key: getattr(default, key) for key in keys}
    assert given.value.tasks == default.value.tasks == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": {}}, "objective.teachers names no task"),
        ({"soft_share": {"spend": 0.5}}, "objective.soft_share: 'spend' has no teacher"),
        ({"soft_share": {"click": 2}}, "objective.soft_share.click is 2"),
        ({"value": Value(["spend"])}, "objective.value.factors: no binary task 'spend' in schema"),
        ({"rank_weight": -1.0}, "objective.rank_weight is -1.0"),
        ({"temperature": 0.0}, "objective.temperature is 0.0"),
        (RANKING | {"bid": "age"}, "objective.bid: no float column 'age' in extra of schema"),
        (RANKING | {"value": None}, "objective.rank_weight is above 0, and value reads no task"),
        (
            RANKING | {"teachers": {"click": "final_click"}},
            "objective.rank_weight is above 0, and 'hide' has no teacher",
        ),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(UserError) as error:
        EarlyStageLoss(SCHEMA, **({"teachers": TEACHERS} | options))
    assert error.value.message == message
