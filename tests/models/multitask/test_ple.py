from __future__ import annotations

import pytest
import torch

from raysys.errors import UserError
from raysys.models.multitask.mmoe import MMoE
from raysys.models.multitask.ple import PLE


def cgc_by_loops(level, x, tasks, own, shared):
    """The outputs of the T tasks and, with a gate, of the shared unit; x has one input for each unit."""
    (linear,) = level.experts.layers
    experts = [
        torch.relu(x[min(e // own, tasks) if own else tasks] @ linear.weight[e] + linear.bias[e])
        for e in range(tasks * own + shared)
    ]
    outputs = []
    for task in range(tasks):
        chosen = experts[task * own : (task + 1) * own] + experts[tasks * own :]
        gate = torch.softmax(x[task] @ level.task_gates.weight[task] + level.task_gates.bias[task], 1)
        outputs.append(sum(gate[:, e, None] * chosen[e] for e in range(own + shared)))
    if level.shared_gate is not None:
        gate = torch.softmax(x[tasks] @ level.shared_gate.weight[0] + level.shared_gate.bias[0], 1)
        outputs.append(sum(gate[:, e, None] * experts[e] for e in range(len(experts))))
    return outputs


@pytest.mark.parametrize(("own", "shared"), [(2, 1), (1, 3), (0, 2), (2, 0)])
@pytest.mark.parametrize("widths", [[[5]], [[5], [4], [3]]])
def test_one_level_is_cgc_and_levels_follow_each_other(tasks, shake, x, own, shared, widths):
    head = shake(PLE(tasks(3), 6, task_experts=own, shared_experts=shared, widths=widths, tower=(4,)))
    values = [x] * 4
    for level in head.levels:
        values = cgc_by_loops(level, values, 3, own, shared)
    assert len(values) == 3
    torch.testing.assert_close(head(x).logits, head.towers(torch.stack(values)).logits)


def test_gates_sum_to_one_and_see_own_and_shared_experts_only(tasks, shake, x):
    first, last = shake(PLE(tasks(2), 6, task_experts=2, shared_experts=1)).levels
    weights = first.weights(x)
    assert weights.shape == (3, len(x), 5)
    assert last.weights(torch.randn(3, 9, 64)).shape == (2, 9, 5)
    torch.testing.assert_close(weights.sum(2), torch.ones(3, len(x)))
    seen = weights.ne(0).all(1)
    assert seen.tolist() == [[1, 1, 0, 0, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert torch.equal(weights.ne(0).any(1), seen)


def test_without_task_experts_cgc_is_mmoe(tasks, shake, x):
    cgc = shake(PLE(tasks(2), 6, task_experts=0, shared_experts=3, widths=[[5, 4]], tower=(3,)))
    mmoe = MMoE(tasks(2), 6, experts=3, widths=[[5, 4]], tower=(3,))
    names = {"experts.0.": "levels.0.experts.", "gates.0.": "levels.0.task_gates."}
    state = cgc.state_dict()
    for new, old in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    mmoe.load_state_dict(state)
    torch.testing.assert_close(cgc(x).logits, mmoe(x).logits)


def test_one_expert_a_task_and_none_shared_are_separate_networks(tasks, shake, separate, x):
    head = shake(PLE(tasks(3), 6, task_experts=1, shared_experts=0, widths=[[5, 4]], tower=(3,)))
    for task in range(3):
        expected = separate([head.levels[0].experts], head.towers, x, task)
        torch.testing.assert_close(head(x).logits[:, task], expected)


@pytest.mark.parametrize("levels", [1, 2])
def test_a_task_reaches_another_tasks_experts_through_the_shared_unit_only(tasks, shake, x, levels):
    head = shake(PLE(tasks(2), 6, widths=[[5]] * levels))
    head(x).logits[:, 0].sum().backward()
    *lower, last = (level.experts.layers[0].weight.grad.abs().sum((1, 2)) for level in head.levels)
    assert torch.equal(last[2:4], torch.zeros(2))
    assert (last[[0, 1, 4]] > 0).all()
    for experts in lower:
        assert (experts > 0).all()


def test_number_of_parameters(tasks, count_parameters):
    """Two experts a task and a shared one, widths 32 and 16, on the 135 inputs of Census G1: 26.4 k."""
    head = PLE(tasks(2), 135, task_experts=2, shared_experts=1, widths=[[32], [16]], tower=(8,))
    first = 5 * (135 * 32 + 32) + 2 * (135 * 3 + 3) + (135 * 5 + 5)
    last = 5 * (32 * 16 + 16) + 2 * (32 * 3 + 3)
    assert count_parameters(head) == first + last + 2 * (16 * 8 + 8 + 8 + 1) == 26_384


def test_numbers_of_experts_that_fit_nothing_are_an_error(tasks):
    with pytest.raises(UserError, match="task_experts and shared_experts are both 0"):
        PLE(tasks(2), 6, task_experts=0, shared_experts=0)
    with pytest.raises(UserError, match="shared_experts is -1"):
        PLE(tasks(2), 6, shared_experts=-1)
