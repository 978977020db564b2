"""The correction of a teacher on the impressions that it chose."""

from __future__ import annotations

import pytest
import torch

from raysys.objectives.teacher_shift import TeacherShift

REQUESTS, CANDIDATES, SHOWN = 4000, 50, 10
RANK = torch.arange(CANDIDATES) + 1


def funnel() -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher with noise on its logit that ranks candidates and shows the top: p in its order, and clicks [4000, 50]."""
    random = torch.Generator().manual_seed(4)
    true = torch.randn(REQUESTS, CANDIDATES, generator=random) - 2
    noisy = (true + 0.8 * torch.randn(true.shape, generator=random)).sort(1, descending=True)
    return noisy.values.sigmoid(), torch.bernoulli(true.gather(1, noisy.indices).sigmoid(), generator=random)


def test_the_teacher_becomes_right_on_each_bucket_of_what_was_shown():
    teacher, clicked = funnel()
    shift, shown = TeacherShift([1, 5, SHOWN], 1), (RANK <= SHOWN).float()
    for part in torch.arange(REQUESTS).split(100):
        columns = (teacher[part], RANK.expand(100, -1), clicked[part], shown.expand(100, -1))
        p, rank, label, weight = (column.flatten() for column in columns)
        shift(p[:, None], rank, label[:, None], weight[:, None])
    corrected = shift.eval()(teacher.view(-1, 1), RANK.repeat(REQUESTS), clicked.view(-1, 1), shown[:0]).view_as(
        teacher
    )
    for bucket in (slice(0, 1), slice(1, 5), slice(5, SHOWN)):
        positives = float(clicked[:, bucket].sum())
        assert float(teacher[:, bucket].sum()) / positives > 1.2
        assert float(corrected[:, bucket].sum()) / positives == pytest.approx(1, abs=2 / positives**0.5)
    torch.testing.assert_close(corrected[:, SHOWN:], teacher[:, SHOWN:])  # nothing shown there


def test_it_is_the_maximum_likelihood_of_one_parameter():
    teacher, clicked = (values[:, :1].clone() for values in funnel())
    shift = TeacherShift([1], 1)
    for _ in range(300):  # the same rows again: what the first step, of length 1, lacks (0.16) vanishes as 1 / steps
        shift(teacher, torch.ones(REQUESTS), clicked, torch.ones(REQUESTS, 1))
    d = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([d], line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(teacher.double().logit() + d, clicked.double())
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(shift.shift[0]) == pytest.approx(float(d.detach()), abs=1e-3)


def test_the_first_batches_cannot_throw_it_off():
    shift = TeacherShift([5], 1)
    for _ in range(3):
        corrected = shift(torch.full((1000, 1), 1e-9), torch.ones(1000), torch.ones(1000, 1), torch.ones(1000, 1))
    assert float(shift.shift[0]) == 3
    assert corrected.isfinite().all()
