"""Cross-entropy within requests against a loop over them, and what a loss of ranks must not see."""

import pytest
import torch
from torch import Tensor

from raysys.nn import listwise
from raysys.nn.listwise import deviation_within, listwise_cross_entropy

REQUEST = torch.tensor([7, 3, 7, 7, -1, 3, 5, 9, 9, 7])  # 5 has one row, 9 one that counts, -1 is padding
WEIGHT = torch.tensor([1.0, 2.5, 0.5, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 4.0])


def scores() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 10, generator=random)
    return student.requires_grad_(), teacher


def by_loop(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """With a candidate of weight w as w candidates of the same score."""
    losses = []
    for request in (7, 3):
        rows = (request == REQUEST) & (weight > 0)
        p, q = ((weight[rows].log() + score[rows].double()).softmax(0) for score in (teacher, student))
        log_q = (q / weight[rows]).log()
        losses.append(-(p * log_q).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("weight", [WEIGHT, (WEIGHT > 0).float()], ids=["weighted", "plain"])
def test_it_is_the_mean_over_requests_of_two_rows_or_more(weight):
    student, teacher = scores()
    loss = listwise_cross_entropy(student, teacher, REQUEST, weight)
    expected = by_loop(student, teacher, weight)
    torch.testing.assert_close(loss.double(), expected)
    (found,), (wanted,) = (torch.autograd.grad(value, student) for value in (loss, expected))
    torch.testing.assert_close(found, wanted)
    assert not found[[4, 6, 7, 8]].any()


def test_a_candidate_of_weight_two_is_two_candidates():
    student, teacher = scores()
    rows = torch.arange(10).repeat_interleave(torch.tensor([2, 1, 1, 1, 1, 3, 1, 1, 1, 1]))
    weight = (WEIGHT > 0).float()
    repeated = listwise_cross_entropy(student[rows], teacher[rows], REQUEST[rows], weight[rows])
    weight[[0, 5]] = torch.tensor([2.0, 3.0])
    torch.testing.assert_close(listwise_cross_entropy(student, teacher, REQUEST, weight), repeated)


def test_a_constant_within_a_request_changes_nothing():
    student, teacher = scores()
    shift = torch.tensor([0.0, 10, 0, 3, 0, -4, 0, 0, 0, 70])[REQUEST.clamp(min=0)]
    loss = listwise_cross_entropy(student, teacher, REQUEST, WEIGHT)
    torch.testing.assert_close(listwise_cross_entropy(student + shift, teacher - shift, REQUEST, WEIGHT), loss)
    (gradient,) = torch.autograd.grad(loss, student)
    sums = torch.zeros(10).index_add(0, REQUEST.clamp(min=0), gradient)
    torch.testing.assert_close(sums, torch.zeros(10), rtol=0, atol=1e-6)


def test_a_student_that_ranks_as_the_teacher_has_no_gradient():
    _, teacher = scores()
    teacher.requires_grad_()
    student = (teacher.detach() + REQUEST).requires_grad_()
    listwise_cross_entropy(student, teacher, REQUEST, WEIGHT).backward()
    torch.testing.assert_close(student.grad, torch.zeros(10), rtol=0, atol=1e-6)
    assert teacher.grad is None


def test_large_scores_stay_finite():
    student = torch.tensor([1e4, -1e4, 3e4]).requires_grad_()
    loss = listwise_cross_entropy(student, torch.tensor([-1e4, 1e4, 0.0]), torch.zeros(3), torch.ones(3))
    loss.backward()
    assert float(loss) == 4e4  # all of the teacher's share on the second
    torch.testing.assert_close(student.grad, torch.tensor([0.0, -1.0, 1.0]))


def test_several_losses_at_once():
    student, teacher = scores()
    students, teachers = torch.stack([student, teacher], 1), torch.stack([teacher, student], 1)
    weights = torch.stack([WEIGHT, torch.ones(10)], 1)
    found = listwise_cross_entropy(students, teachers, REQUEST, weights)
    for i in range(2):
        torch.testing.assert_close(
            found[i], listwise_cross_entropy(students[:, i], teachers[:, i], REQUEST, weights[:, i])
        )


def test_without_a_list_the_loss_is_zero():
    student, teacher = scores()
    for request, weight in ((REQUEST, torch.zeros(10)), (torch.arange(10), torch.ones(10))):
        loss = listwise_cross_entropy(student, teacher, request, weight)
        (gradient,) = torch.autograd.grad(loss, student)
        assert float(loss) == 0
        assert not gradient.any()


def test_ranks_with_unequal_numbers_of_requests_average_to_the_joint_loss(monkeypatch):
    student, teacher = scores()
    whole = listwise_cross_entropy(student, teacher, REQUEST, WEIGHT)
    monkeypatch.setattr(listwise, "world_size", lambda: 2)
    monkeypatch.setattr(listwise, "global_sum", lambda value: torch.full_like(value, 2))  # requests of both ranks
    parts = [REQUEST != 3, REQUEST == 3]
    shares = [listwise_cross_entropy(student[rows], teacher[rows], REQUEST[rows], WEIGHT[rows]) for rows in parts]
    torch.testing.assert_close(sum(shares) / 2, whole)


def test_the_deviation_within_a_request_counts_weights_and_no_rounding():
    values, weight = scores()[1].double(), WEIGHT.double()
    found = deviation_within(values, REQUEST, weight)
    for request in (7, 3):
        rows = torch.repeat_interleave(values[request == REQUEST], (2 * weight[request == REQUEST]).long())
        expected = rows.std(correction=0).expand(int((request == REQUEST).sum()))
        torch.testing.assert_close(found[request == REQUEST], expected)
    assert not found[[4, 6, 7, 8]].any()
    same = torch.tensor([0.1 + 1e6, 0.1 + 1e6, 1e6, 3.0])
    assert not deviation_within(same, torch.tensor([0, 0, 0, 1]), torch.ones(4)).any()
