"""All ranks hear of a bad loss or a wish to stop at the same step, one step later, wherever it came up."""

from __future__ import annotations

import torch
import torch.distributed as dist

from raysys.train.guard import StepGuard, Verdict


def losses(click=1.0, like=1.0):
    return {"loss": torch.tensor(click + like), "click": torch.tensor(click), "like": torch.tensor(like)}


def test_the_verdict_comes_one_step_later_and_keeps_the_batch():
    guard = StepGuard()
    assert guard.submit(1, losses(), False, "batch 1") is None
    assert guard.submit(2, losses(like=float("inf")), False, "batch 2") == Verdict(1, (), False)
    assert guard.submit(3, losses(), False, "batch 3") == Verdict(2, ("loss", "like"), False)
    assert guard.batch == "batch 2"


def test_the_last_verdict_is_there_to_be_fetched():
    guard = StepGuard()
    assert guard.settle() is None
    guard.submit(1, losses(click=float("nan")), True, "batch 1")
    assert guard.settle() == Verdict(1, ("loss", "click"), True)
    assert guard.settle() is None
    assert guard.batch == "batch 1"


def guard_two_ranks():
    """Rank 1 has a bad loss in step 2 and wants to stop in step 3."""
    guard, other = StepGuard(), dist.get_rank() == 1
    verdicts = []
    for step in (1, 2, 3):
        click = float("nan") if other and step == 2 else 1.0
        verdicts.append(guard.submit(step, losses(click), other and step == 3, f"rank {dist.get_rank()} step {step}"))
    return [*verdicts, guard.settle()], guard.batch


def test_both_ranks_come_to_the_same_verdict(gloo):
    answers = gloo.run(2, guard_two_ranks)
    expected = [None, Verdict(1, (), False), Verdict(2, ("loss", "click"), False), Verdict(3, (), True)]
    assert [verdicts for verdicts, _ in answers] == [expected, expected]
    assert [batch for _, batch in answers] == ["rank 0 step 2", "rank 1 step 2"]
