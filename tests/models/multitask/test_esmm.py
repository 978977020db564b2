from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from raysys.errors import UserError
from raysys.models.heads import TaskTowers
from raysys.models.multitask.adatt import AdaTT
from raysys.models.multitask.esmm import ESMM, logit_of_product
from raysys.schema import Label

LABELS = [Label("dwell", kind="regression"), Label("buy"), Label("click")]


def esmm(inner=TaskTowers, **keys):
    torch.manual_seed(0)
    return ESMM(LABELS, 6, conversion="buy", inner=inner, tower=(5,), **keys)


@pytest.mark.parametrize("inner", [None, TaskTowers, partial(AdaTT, task_experts=1, widths=[[4]])])
def test_conversion_is_the_product_of_two_rates_and_other_tasks_pass_through(x, inner):
    head = esmm(inner)
    output, before = head(x), head.inner(x).logits
    product = torch.sigmoid(before[:, 2]) * torch.sigmoid(before[:, 1])
    torch.testing.assert_close(torch.sigmoid(output.logits[:, 1]), product)
    assert torch.equal(output.logits[:, [0, 2]], before[:, [0, 2]])
    assert torch.equal(output.extra["conversion_given_click"], before[:, 1])


def test_a_conversion_is_never_likelier_than_a_click(x):
    logits = esmm()(100 * x).logits
    assert (logits[:, 1] <= logits[:, 2]).all()


def test_the_logit_of_a_product_is_exact_where_rates_are_near_0_and_1():
    values = torch.tensor([-60.0, -20.0, -1.0, 0.0, 3.0, 18.0, 60.0])
    a, b = (grid.flatten() for grid in torch.meshgrid(values, values, indexing="ij"))
    logs = F.logsigmoid(a.double()) + F.logsigmoid(b.double())
    expected = logs - torch.log(-torch.expm1(logs))
    torch.testing.assert_close(logit_of_product(a, b).double(), expected, rtol=1e-6, atol=1e-6)
    first, second = a.clone().requires_grad_(), b.clone().requires_grad_()
    logit_of_product(first, second).sum().backward()
    assert first.grad.isfinite().all()
    assert second.grad.isfinite().all()


def test_rows_without_a_click_train_the_conversion_rate_through_the_product_only(x):
    head, no_click = esmm(), torch.zeros(len(x))
    output = head(x)
    after_click = output.extra["conversion_given_click"]
    after_click.retain_grad()
    F.binary_cross_entropy_with_logits(output.logits[:, 2], no_click).backward(retain_graph=True)
    assert after_click.grad is None or torch.equal(after_click.grad, torch.zeros_like(after_click))
    F.binary_cross_entropy_with_logits(output.logits[:, 1], no_click, reduction="sum").backward()
    p_click, p_after = torch.sigmoid(output.logits[:, 2]), torch.sigmoid(after_click)
    expected = p_click * p_after * (1 - p_after) / (1 - p_click * p_after)  # of -log(1 - p_click p_after)
    torch.testing.assert_close(after_click.grad, expected.detach())


def test_tasks_that_do_not_fit_are_errors():
    with pytest.raises(UserError, match=r"needs a task for conversion, and there is no 'sale'\n  hint: .* dwell, buy"):
        ESMM(LABELS, 6, conversion="sale")
    with pytest.raises(UserError, match="needs a binary task for conversion, and 'dwell' is a regression"):
        ESMM(LABELS, 6, conversion="dwell")
    with pytest.raises(UserError, match="click and conversion are both 'buy'"):
        ESMM(LABELS, 6, click="buy", conversion="buy")


def test_the_rate_after_a_click_is_learned_without_a_loss_of_its_own():
    """The labels are clicks and "clicked and converted"; what is learned is right for rows without a click, too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 6, generator=generator)
    rates = torch.sigmoid(x @ torch.randn(6, 2, generator=generator) - 0.5)  # of a click, of a conversion after it
    events = (torch.rand(rates.shape, generator=generator) < rates).float()
    torch.manual_seed(0)
    head = ESMM([Label("click"), Label("conversion")], 6)
    labels, optimizer = events.cumprod(1), torch.optim.LBFGS(head.parameters(), max_iter=50)

    def loss():
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(head(x).logits, labels)
        value.backward()
        return value

    optimizer.step(loss)
    found = torch.sigmoid(head(x).extra["conversion_given_click"].detach())
    no_click = events[:, 0] == 0
    assert (found - rates[:, 1])[no_click].abs().mean() < 0.02
    torch.testing.assert_close(found[no_click].mean(), rates[no_click, 1].mean(), rtol=0.03, atol=0)
