from __future__ import annotations

import pytest
import torch

from raysys.models.multitask.cross_stitch import CrossStitch


def test_equals_a_loop_over_tasks(tasks, shake, x):
    head = shake(CrossStitch(tasks(3), 6, widths=[[5], [4]], tower=(3,)))
    values = [x] * 3
    for level in head.levels:
        (linear,) = level.networks.layers
        outputs = [torch.relu(values[t] @ linear.weight[t] + linear.bias[t]) for t in range(3)]
        values = [sum(level.stitch[t, k] * outputs[k] for k in range(3)) for t in range(3)]
    torch.testing.assert_close(head(x).logits, head.towers(torch.stack(values)).logits)


def test_the_identity_gives_separate_networks(tasks, shake, separate, x):
    head = shake(CrossStitch(tasks(3), 6, widths=[[5, 4], [4]], tower=(3,)))
    with torch.no_grad():
        for level in head.levels:
            level.stitch.copy_(torch.eye(3))
    for task in range(3):
        expected = separate([level.networks for level in head.levels], head.towers, x, task)
        torch.testing.assert_close(head(x).logits[:, task], expected)


@pytest.mark.parametrize(("count", "row"), [(1, [1.0]), (2, [0.9, 0.1]), (3, [0.9, 0.05, 0.05])])
def test_starts_with_its_own_network_mostly(tasks, count, row):
    torch.testing.assert_close(CrossStitch(tasks(count), 6).levels[0].stitch[0], torch.tensor(row))


def test_number_of_parameters(tasks, count_parameters):
    head = CrossStitch(tasks(3), 6, widths=[[5, 4], [3]], tower=(2,))
    networks = 3 * ((6 * 5 + 5) + (5 * 4 + 4) + (4 * 3 + 3))
    assert count_parameters(head) == networks + 2 * 3 * 3 + 3 * (3 * 2 + 2 + 2 + 1)
