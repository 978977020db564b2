"""Items 2, 6 and 7 of what must hold for InterFormer, where they are about a part of it (7 also in tests/nn/test_attention.py)."""

from __future__ import annotations

import pytest
import torch

from raysys.models.ranking.interformer import (
    GATINGS,
    PFFNS,
    EventSummary,
    Gate,
    MaskNet,
    PersonalizedFFN,
    SequenceArch,
    align,
)

D, SUMMARY, PMA, RECENT = 8, 3, 2, 2
T = 5  # events


def test_recent_events_are_the_last_ones_that_are_there():  # item 2
    values = torch.randn(4, T, D)
    mask = torch.arange(T) < torch.tensor([[5], [3], [1], [0]])
    events, there = align([(values, mask)], RECENT)
    cls = torch.randn(4, SUMMARY, D)
    summary = EventSummary(SUMMARY, PMA, RECENT, D, 2, "none", "silu")
    out = summary(torch.cat([cls, events], 1), torch.cat([torch.ones(4, SUMMARY, dtype=torch.bool), there], 1))
    assert torch.equal(out[:, :SUMMARY], cls)
    zero = torch.zeros(D)
    for row, expected in enumerate([values[0, [4, 3]], values[1, [2, 1]], [values[2, 0], zero], [zero, zero]]):
        assert torch.equal(out[row, -RECENT:], torch.stack(list(expected)))


def test_pffn_of_the_appendix_has_the_rank_of_the_summary():  # item 6
    x_sum, s = torch.randn(4, SUMMARY, D), torch.randn(4, 20, D)
    ranks = {mode: torch.linalg.matrix_rank(PersonalizedFFN(SUMMARY, D, mode, "silu")(x_sum, s)) for mode in PFFNS}
    assert ranks["appendix"].tolist() == [SUMMARY] * 4
    assert ranks["full"].tolist() == [D] * 4


def test_pffn_equals_its_formula():  # item 6
    x_sum, s = torch.randn(4, SUMMARY, D), torch.randn(4, T, D)
    for mode in PFFNS:
        pffn = PersonalizedFFN(SUMMARY, D, mode, "gelu")
        weight = pffn.weight.weight
        for row in range(4):
            if mode == "appendix":
                matrix = x_sum[row].t() @ weight
                expected = s[row] @ matrix.t()
            elif mode == "full":
                expected = s[row] @ (weight @ x_sum[row].flatten()).view(D, D)
            else:
                keys, values = x_sum[row] @ weight[:D].t(), x_sum[row] @ weight[D:].t()
                expected = torch.nn.functional.gelu(s[row] @ keys.t() / D**0.5) @ values
            torch.testing.assert_close(pffn(x_sum, s)[row], expected)


def test_number_of_parameters_of_a_pffn():  # item 6
    counts = {mode: sum(p.numel() for p in PersonalizedFFN(SUMMARY, D, mode, "silu").parameters()) for mode in PFFNS}
    assert counts == {"appendix": SUMMARY * D, "full": SUMMARY * D * D * D, "gdpa": 2 * D * D}


@pytest.mark.parametrize("mode", PFFNS)
def test_pffn_is_linear_in_events_but_for_its_activation(mode):  # item 6
    pffn = PersonalizedFFN(SUMMARY, D, mode, "gelu")
    x_sum, s, other = torch.randn(4, SUMMARY, D), torch.randn(4, T, D), torch.randn(4, T, D)

    def linear():
        both = pffn(x_sum, 2 * s - 3 * other)
        return torch.allclose(both, 2 * pffn(x_sum, s) - 3 * pffn(x_sum, other), rtol=1e-4, atol=1e-4)

    assert linear() == (mode != "gdpa")
    pffn.activation = torch.nn.Identity()
    assert linear()


def test_pma_does_not_see_the_order_of_events():  # item 7
    summary = EventSummary(0, PMA, 0, D, 2, "none", "silu")
    s, mask, order = torch.randn(4, T, D), torch.arange(T) < torch.tensor([[5], [3], [1], [2]]), torch.randperm(T)
    torch.testing.assert_close(summary(s[:, order], mask[:, order]), summary(s, mask))


def test_order_of_events_matters_to_the_sequence_arch():  # item 7
    arch = SequenceArch(D, 2, None, residual=True, norm=True, dropout=0.0)
    s, mask, positions, order = (
        torch.randn(2, T, D),
        torch.ones(2, T, dtype=torch.bool),
        torch.arange(T),
        [4, 2, 0, 1, 3],
    )
    expected = arch(None, s, mask, positions)[:, order]
    assert not torch.allclose(arch(None, s[:, order], mask, positions), expected, atol=1e-4)
    torch.testing.assert_close(arch(None, s[:, order], mask, positions[order]), expected)


def test_sequences_are_aligned_at_the_last_event():
    first = (torch.arange(1.0, 4).view(1, 3, 1), torch.tensor([[True, True, False]]))
    second = (torch.arange(10.0, 15).view(1, 5, 1), torch.tensor([[True, True, True, True, False]]))
    events, mask = align([first, second], 1)
    assert events[0].tolist() == [[2, 13], [1, 12], [0, 11], [0, 10], [0, 0]]
    assert mask.tolist() == [[True, True, True, True, False]]
    assert align([first], 4)[0].shape == (1, 4, 1)


def test_mask_net_and_gate_equal_their_formulas():
    x = torch.randn(4, T, 2 * D)
    net = MaskNet(2 * D, D, "silu")
    torch.testing.assert_close(net(x), net.compress(x * net.mask[:2](x).sigmoid()))
    gates = {mode: Gate(2 * D, mode, "silu") for mode in GATINGS}
    torch.testing.assert_close(gates["product"](x), x * gates["product"].mlp(x).sigmoid())
    torch.testing.assert_close(gates["literal"](x), (x * gates["literal"].mlp(x)).sigmoid())
    assert gates["none"](x) is x
