from __future__ import annotations

import pytest
import torch

from raysys.errors import UserError
from raysys.nn.attention import MultiHeadAttention, check_heads, rotary_factors, rotate

B, L, D, HEADS = 3, 6, 8, 2


def attention_of(**keys):
    torch.manual_seed(0)
    return MultiHeadAttention(D, HEADS, **keys)


@pytest.fixture
def x():
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    return torch.arange(L) < torch.tensor([[L], [2], [1]])


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_equals_its_formula(x, mask, rotary):
    attention = attention_of(rotary=rotary)
    positions = torch.arange(L) if rotary else None
    expected = torch.zeros(B, L, D)
    key, value = attention.key_value.weight.chunk(2)
    for row in range(B):
        heads = []
        for part in torch.arange(D).chunk(HEADS):
            q, k, v = (x[row] @ weight[part].t() for weight in (attention.query.weight, key, value))
            if rotary:
                q, k = (rotate(each, rotary_factors(positions, D // HEADS)) for each in (q, k))
            scores = (q @ k.t() / (D / HEADS) ** 0.5)[:, mask[row]]
            heads.append(scores.softmax(1) @ v[mask[row]])
        expected[row] = torch.cat(heads, 1) @ attention.output.weight.t()
    torch.testing.assert_close(attention(x, x, mask, positions), expected)


def test_without_positions_attention_is_equivariant_to_the_order_of_events(x, mask):
    attention, order = attention_of(), torch.randperm(L)
    permuted = attention(x[:, order], x[:, order], mask[:, order])
    torch.testing.assert_close(permuted, attention(x, x, mask)[:, order])


def test_with_rotary_positions_the_order_of_events_matters(x, mask):
    attention, positions, order = attention_of(rotary=True), torch.arange(L), torch.arange(L).flip(0)
    permuted = attention(x[:, order], x[:, order], mask[:, order], positions)
    assert not torch.allclose(permuted, attention(x, x, mask, positions)[:, order], atol=1e-3)


def test_rotated_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, D)

    def score(first, second):
        turned = [rotate(x, rotary_factors(torch.tensor([p]), D)) for x, p in ((q, first), (k, second))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 5)) > 1e-3
    assert torch.equal(rotate(q, rotary_factors(torch.tensor([0]), D)), q)


def test_rotation_turns_pairs_of_columns_by_position_times_frequency():
    angle = torch.tensor(3.0 * 10_000 ** (-2 / D))  # the second pair, at position 3
    turned = rotate(torch.eye(D)[2:3], rotary_factors(torch.tensor([3]), D))[0]
    torch.testing.assert_close(turned[2:4], torch.stack([angle.cos(), angle.sin()]))
    assert turned.count_nonzero() == 2


def test_queries_see_only_keys_that_are_there(x, mask):
    attention, queries = attention_of(), torch.randn(B, 2, D)
    changed = x.masked_fill(~mask[:, :, None], 1e3)
    output = attention(queries, x, mask)
    torch.testing.assert_close(output, attention(queries, changed, mask))
    torch.testing.assert_close(output[1], attention(queries[1:2], x[1:2, :2])[0])
    assert output.shape == (B, 2, D)
    torch.testing.assert_close(attention(queries[:1], x, mask), attention(queries[:1].expand(B, -1, -1), x, mask))


def test_a_row_without_keys_gives_zeros_and_a_gradient_of_zero(x, mask):
    mask[1] = False
    x.requires_grad_()
    output = attention_of()(x, x, mask)
    output.sum().backward()
    assert output[1].abs().sum() == 0
    assert x.grad.isfinite().all()
    assert x.grad[1].abs().sum() == 0


def test_bfloat16(x, mask):
    attention = attention_of(rotary=True)
    full = attention(x, x, mask, torch.arange(L))
    with torch.autocast("cpu", torch.bfloat16):
        half = attention(x, x, mask, torch.arange(L))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)


def test_dropout_acts_in_training_only(x):
    attention = attention_of(dropout=0.5)
    assert not torch.equal(attention(x, x), attention(x, x))
    attention.eval()
    assert torch.equal(attention(x, x), attention(x, x))


@pytest.mark.parametrize(
    ("heads", "dim", "rotary", "message", "hint"),
    [
        (3, 8, False, "heads 3 does not divide embedding_dim 8", "heads can be 1, 2, 4, 8"),
        (0, 8, False, "heads 0 does not divide embedding_dim 8", "heads can be 1, 2, 4, 8"),
        (
            8,
            8,
            True,
            "heads 8 does not divide embedding_dim 8 into even widths, which rotary positions need",
            "heads can be 1, 2, 4",
        ),
        (1, 7, True, "embedding_dim is 7", "rotary positions need an even number"),
    ],
)
def test_impossible_heads(heads, dim, rotary, message, hint):
    with pytest.raises(UserError) as caught:
        check_heads(heads, dim, rotary=rotary)
    assert (caught.value.message, caught.value.hint) == (message, hint)
