from __future__ import annotations

import pytest
import torch

from raysys.models.heads import TaskTowers


@pytest.mark.parametrize("tasks", [1, 3])
def test_towers_equal_a_loop_over_tasks(tasks):
    towers, shared = TaskTowers(tasks, 6, (5, 4), "silu"), torch.randn(7, 6)
    output = towers(shared)
    assert output.logits.shape == (7, tasks)
    assert output.hidden.shape == (7, tasks, 4)
    assert output.shared is shared
    for task in range(tasks):
        hidden = shared
        for layer in towers.hidden.layers:
            hidden = torch.nn.functional.silu(hidden @ layer.weight[task] + layer.bias[task])
        torch.testing.assert_close(output.hidden[:, task], hidden)
        torch.testing.assert_close(output.logits[:, task], (hidden @ towers.logits.weight[task])[:, 0])


def test_without_widths_a_task_has_one_linear_map():
    towers, shared = TaskTowers(2, 6, ()), torch.randn(7, 6)
    output = towers(shared)
    torch.testing.assert_close(output.logits, shared @ towers.logits.weight[:, :, 0].t())
    assert torch.equal(output.hidden[:, 1], shared)


def test_a_task_does_not_train_the_tower_of_another():
    towers = TaskTowers(2, 6, (5,))
    towers(torch.randn(7, 6)).logits[:, 0].sum().backward()
    weight = towers.hidden.layers[0].weight
    assert weight.grad[0].abs().sum() > 0
    assert torch.equal(weight.grad[1], torch.zeros_like(weight[1]))
