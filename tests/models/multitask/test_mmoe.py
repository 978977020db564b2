from __future__ import annotations

import pytest
import torch

from raysys.errors import UserError
from raysys.models.heads import TaskTowers
from raysys.models.multitask.mmoe import MMoE


def test_equals_a_loop_over_tasks_and_experts(tasks, shake, x):
    head = shake(MMoE(tasks(2), 6, experts=3, widths=[[5, 4]], tower=(3,)))
    first, second = head.experts[0].layers
    expected = []
    for task in range(2):
        gate = torch.softmax(x @ head.gates[0].weight[task] + head.gates[0].bias[task], 1)
        mixture = torch.zeros(len(x), 4)
        for e in range(3):
            hidden = torch.relu(x @ first.weight[e] + first.bias[e])
            mixture = mixture + gate[:, e, None] * torch.relu(hidden @ second.weight[e] + second.bias[e])
        layer, logits = head.towers.hidden.layers[0], head.towers.logits
        hidden = torch.relu(mixture @ layer.weight[task] + layer.bias[task])
        expected.append((hidden @ logits.weight[task] + logits.bias[task])[:, 0])
    torch.testing.assert_close(head(x).logits, torch.stack(expected, 1))


def test_gates_sum_to_one(tasks, shake, x):
    gates = shake(MMoE(tasks(3), 6)).gates[0](x)
    assert gates.shape == (3, len(x), 4)
    torch.testing.assert_close(gates.sum(2), torch.ones(3, len(x)))


def test_one_expert_is_shared_bottom(tasks, shake, x):
    head = shake(MMoE(tasks(2), 6, experts=1, widths=[[5, 4]], tower=(3,)))
    towers = TaskTowers(tasks(2), 4, tower=(3,))
    towers.load_state_dict(head.towers.state_dict())
    torch.testing.assert_close(head(x).logits, towers(head.experts[0](x)[0]).logits)


def test_equal_gates_are_one_gate(tasks, shake, x):
    several, one = (shake(MMoE(tasks(3), 6, tower=(3,), one_gate=flag)) for flag in (False, True))
    with torch.no_grad():
        for parameter in several.gates[0].parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    state = several.state_dict()
    one.load_state_dict({name: value[:1] if name.startswith("gates") else value for name, value in state.items()})
    assert one.gates[0].weight.shape[0] == 1
    torch.testing.assert_close(one(x).logits, several(x).logits)


def test_levels_mix_for_each_expert_of_the_next_and_all_gates_read_the_input(tasks, shake, x):
    head = shake(MMoE(tasks(2), 6, experts=3, widths=[[5], [4], [3]]))
    assert [gate.weight.shape for gate in head.gates] == [(3, 6, 3), (3, 6, 3), (2, 6, 3)]
    experts = [x] * 3
    for layer, gate in zip(head.experts, head.gates, strict=True):
        (linear,) = layer.layers
        outputs = [torch.relu(experts[e] @ linear.weight[e] + linear.bias[e]) for e in range(3)]
        weights = [torch.softmax(x @ gate.weight[slot] + gate.bias[slot], 1) for slot in range(len(gate.weight))]
        experts = [sum(w[:, e, None] * outputs[e] for e in range(3)) for w in weights]
    torch.testing.assert_close(head(x).logits, head.towers(torch.stack(experts)).logits)


def test_number_of_parameters(tasks, count_parameters):
    """Four experts [32, 16] and towers [8] on the 135 inputs of Census G1: 20.9 k."""
    head = MMoE(tasks(2), 135, experts=4, widths=[[32, 16]], tower=(8,))
    experts, gates = 4 * (135 * 32 + 32 + 32 * 16 + 16), 2 * (135 * 4 + 4)
    assert count_parameters(head) == experts + gates + 2 * (16 * 8 + 8 + 8 + 1) == 20_898


def test_no_experts_are_an_error(tasks):
    with pytest.raises(UserError, match=r"experts is 0\n  hint: at least 1"):
        MMoE(tasks(2), 6, experts=0)
