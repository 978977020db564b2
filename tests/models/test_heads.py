from __future__ import annotations

import pytest
import torch

from raysys.errors import UserError
from raysys.models.heads import TaskTowers
from raysys.nn.mlp import MLP
from raysys.schema import Label


def labels(count):
    return [Label(f"task{number}") for number in range(count)]


@pytest.mark.parametrize("tasks", [1, 3])
def test_towers_equal_a_loop_over_tasks(tasks):
    towers, shared = TaskTowers(labels(tasks), 6, tower=(5, 4), activation="silu"), torch.randn(7, 6)
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
    towers, shared = TaskTowers(labels(2), 6), torch.randn(7, 6)
    output = towers(shared)
    torch.testing.assert_close(output.logits, shared @ towers.logits.weight[:, :, 0].t())
    assert torch.equal(output.hidden[:, 1], shared)


def test_a_task_does_not_train_the_tower_of_another():
    towers = TaskTowers(labels(2), 6, tower=(5,))
    towers(torch.randn(7, 6)).logits[:, 0].sum().backward()
    weight = towers.hidden.layers[0].weight
    assert weight.grad[0].abs().sum() > 0
    assert torch.equal(weight.grad[1], torch.zeros_like(weight[1]))


def test_each_tower_may_have_an_input_of_its_own():
    towers, shared = TaskTowers(labels(2), 6, tower=(5,)), torch.randn(7, 6)
    together, apart = towers(shared), towers(torch.stack([shared, shared + 1]))
    torch.testing.assert_close(apart.logits[:, 0], together.logits[:, 0])
    torch.testing.assert_close(apart.logits[:, 1], towers(shared + 1).logits[:, 1])


def test_split_towers_see_one_part_each():
    towers, shared = TaskTowers(labels(3), 12, tower=(5,), split=True), torch.randn(7, 12)
    output = towers(shared)
    assert output.shared is shared
    apart = towers.hidden(torch.stack(shared.chunk(3, 1)))
    torch.testing.assert_close(output.hidden, apart.transpose(0, 1))


def test_split_towers_need_a_part_for_each_task():
    with pytest.raises(UserError) as caught:
        TaskTowers(labels(2), 7, split=True)
    assert caught.value.message == "split towers of 2 tasks on a shared representation of 7 columns"
    assert caught.value.hint == "it needs a part for each task: use model/head=towers"


def test_number_of_parameters():
    """An MLP [128, 16] and towers [8] on the 135 inputs of Census G1, as other heads are compared with: 19.8 k."""
    modules = MLP(135, [128, 16]), TaskTowers(labels(2), 16, tower=(8,))
    assert sum(parameter.numel() for module in modules for parameter in module.parameters()) == 19_762
