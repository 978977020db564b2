from __future__ import annotations

import pytest
import torch

from raysys.errors import UserError, check_count
from raysys.nn.experts import Experts, Gate, check_levels, mix, units


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 2, 2], [3, 0, 1]])
def test_an_expert_reads_what_its_unit_reads(counts):
    experts, x = Experts(6, [5, 4], counts, "silu"), torch.randn(3, 7, 6)
    outputs, owner = experts(x), [unit for unit, count in enumerate(counts) for _ in range(count)]
    assert outputs.shape == (sum(counts), 7, 4)
    for e, unit in enumerate(owner):
        value = x[unit]
        for layer in experts.layers:
            value = torch.nn.functional.silu(value @ layer.weight[e] + layer.bias[e])
        torch.testing.assert_close(outputs[e], value)


def test_all_experts_read_an_input_that_all_units_share():
    experts, x = Experts(6, [5], [2, 1]), torch.randn(7, 6)
    torch.testing.assert_close(experts(x), experts(x.expand(2, -1, -1)))


def test_a_gate_is_a_softmax_for_each_unit():
    gate, x = Gate(3, 6, 4), torch.randn(7, 6)
    torch.testing.assert_close(gate(x)[1], torch.softmax(x @ gate.weight[1] + gate.bias[1], 1))
    torch.testing.assert_close(gate(x.expand(3, -1, -1)), gate(x))


def test_mix_is_a_weighted_sum_over_experts():
    weights, experts = torch.randn(2, 7, 3), torch.randn(3, 7, 5)
    expected = sum(weights[:, :, e, None] * experts[e] for e in range(3))
    torch.testing.assert_close(mix(weights, experts), expected)


def test_units_of_an_input_that_all_share_are_that_input():
    shared, apart = torch.randn(7, 6), torch.randn(3, 7, 6)
    assert units(shared, 1, 3) is shared
    assert torch.equal(units(apart, 1, 3), apart[1:])


def test_widths_and_numbers_of_experts_are_checked():
    assert check_levels(((64, 32), (16,))) == [[64, 32], [16]]
    assert check_count("experts", 0, least=0) == 0
    with pytest.raises(UserError, match=r"widths is \[64, 32\]\n  hint: .*\[\[64\], \[32\]\] are two levels"):
        check_levels([64, 32])
    with pytest.raises(UserError, match=r"experts is 0\n  hint: at least 1 is expected"):
        check_count("experts", 0)
