"""What is perturbed, by how much, and what stays as it is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from raysys.models.outputs import Embedded
from raysys.objectives.perturbed_rows import Perturbation, map_rows


def perturbed(**keys) -> partial:
    return partial(Perturbation, **({"feature_mask": 0.0, "dense_noise": 0.0} | keys))


def embedded_rows(rows: int = 40) -> Embedded:
    random = torch.Generator().manual_seed(4)
    tokens, events = torch.randn(rows, 3, 8, generator=random), torch.randn(rows, 5, 8, generator=random)
    mask = torch.arange(5) < torch.randint(0, 6, (rows, 1), generator=random)
    dense = torch.cat([torch.randn(rows, 2, generator=random), torch.zeros(rows, 1)], 1)
    names = ("user_id", "item_id", "place")
    member = Embedded(tokens[:, :1] + 1, names[:1], {}, dense)
    return Embedded(tokens, names, {"history": (events * mask[..., None], mask)}, dense, {"m": member})


def test_what_is_drawn_follows_from_the_step_and_leaves_other_draws_alone(monkeypatch, full_schema):
    perturbation, embedded = Perturbation(full_schema), embedded_rows()
    counted = torch.ones(40)

    def copies(seed: int, rank: int = 0) -> Tensor:
        monkeypatch.setattr("raysys.objectives.perturbed_rows.rank", lambda: rank)
        torch.manual_seed(seed)
        other, tokens = Perturbation(full_schema), None
        state = torch.get_rng_state()
        tokens = other(embedded, counted)[1].tokens
        assert torch.equal(torch.get_rng_state(), state)
        return tokens

    assert torch.equal(copies(1), copies(1))
    assert not torch.equal(copies(1), copies(2))
    assert not torch.equal(copies(1), copies(1, rank=1))
    first, second = (perturbation(embedded, counted)[1].tokens for _ in range(2))  # nobody seeds: calls count
    assert not torch.equal(first, second)


def test_a_cropped_history_is_its_end_moved_to_the_left(full_schema):
    embedded = map_rows(embedded_rows(), lambda value: value.repeat(50, *[1] * (value.dim() - 1)))
    lengths, left = embedded.sequences["history"][1].sum(1), []
    for crop in (0.5, 1.0):
        copies = perturbed(history_crop=crop)(full_schema)(embedded, torch.ones(2000))[1]
        (events, before), (moved, after) = embedded.sequences["history"], copies.sequences["history"]
        for row, (length, count) in enumerate(zip(lengths, after.sum(1), strict=True)):
            assert torch.equal(moved[row, :count], events[row, length - count : length])
            assert not moved[row, count:].any()
            assert torch.equal(after[row], torch.arange(5) < count)
        assert torch.equal(after.any(1), before.any(1))  # the last event always stays
        left.append(after.sum(1)[lengths == 5].unique().tolist())
        assert torch.equal(copies.tokens, embedded.tokens)
    assert left == [[3, 4, 5], [1, 2, 3, 4, 5]]
    assert (
        perturbed(history_crop=1.0, exclude=["history"])(full_schema)(embedded, torch.ones(2000))[1]
        .sequences["history"][1]
        .equal(before)
    )


def test_a_masked_feature_has_its_default_and_what_is_excluded_stays(full_schema):
    embedded = embedded_rows()
    perturbation = Perturbation(
        full_schema, feature_mask=0.9999999, dense_noise=0.5, emb_noise=0.5, exclude=["item_id"]
    )
    rows, copies = perturbation(embedded, torch.ones(40))
    assert torch.equal(rows, torch.arange(40))
    assert not copies.tokens[:, 0].any()
    assert torch.equal(copies.tokens[:, 1:], embedded.tokens[:, 1:])  # named, and of side position
    assert torch.equal(copies.dense, torch.tensor([2.0, 0.0, 1.0]).expand(40, 3))  # defaults and the missing flag
    assert not copies.sequences["history"][0].any()
    assert not copies.sequences["history"][1].any()
    assert not copies.members["m"].tokens.any()


def test_noise_has_the_size_that_was_asked_for(full_schema):
    embedded = map_rows(embedded_rows(), lambda value: value.repeat(500, *[1] * (value.dim() - 1)))
    noise = Perturbation(full_schema, feature_mask=0.0, dense_noise=0.2, emb_noise=0.3, exclude=["price"])
    copies = noise(embedded, torch.ones(20_000))[1]
    moved = copies.dense - embedded.dense
    assert float(moved[:, 0].std() / embedded.dense[:, 0].std()) == pytest.approx(0.2, rel=0.03)
    assert not moved[:, 1:].any()
    relative = copies.tokens[:, :2] / embedded.tokens[:, :2] - 1
    assert float(relative.std()) == pytest.approx(0.3, rel=0.03)
    assert torch.equal(copies.sequences["history"][1], embedded.sequences["history"][1])


def test_rescaling_keeps_the_mean(full_schema):
    embedded = map_rows(embedded_rows(4), lambda value: value.repeat(10_000, *[1] * (value.dim() - 1)))
    copies = Perturbation(full_schema, feature_mask=0.5, rescale=True, dense_noise=0.0)(embedded, torch.ones(40_000))[1]
    torch.testing.assert_close(copies.tokens.mean(0), embedded.tokens.mean(0), rtol=0.05, atol=0.02)
    torch.testing.assert_close(copies.dense[:, :2].mean(0), embedded.dense[:, :2].mean(0), rtol=0.05, atol=0.05)


def test_a_share_of_the_rows_can_have_copies(full_schema):
    rows, copies = Perturbation(full_schema, row_fraction=0.25, feature_mask=0.0, dense_noise=0.0)(
        embedded_rows(), torch.ones(40)
    )
    assert len(rows) == len(set(rows.tolist())) == 10
    assert torch.equal(copies.tokens, embedded_rows().tokens[rows])
