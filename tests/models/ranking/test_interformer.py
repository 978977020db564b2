"""Items 1 to 5 and 8 of what must hold for InterFormer; 6, 7 and the rest of 2 in test_interformer_parts.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from raysys.errors import UserError
from raysys.models.flops import flops_per_row
from raysys.models.ranking.interformer import GATINGS, PFFNS, InterFormer
from raysys.schema import Sequence, SequenceFeature

D, SUMMARY, PMA, RECENT = 8, 3, 2, 2
N, T = 5, 5  # tokens and events of the schema
SMALL = {
    "embedding_dim": D,
    "num_summary": SUMMARY,
    "num_pma": PMA,
    "num_recent": RECENT,
    "hidden": (6,),
    "tower": (8,),
}


def model_of(schema, **keys):
    return InterFormer(schema, **{**SMALL, **keys})


@pytest.fixture
def two_sequences(schema):
    """A second history, longer than the first."""
    watched = Sequence("watched", (SequenceFeature("watched_item", "item"),), max_length=7)
    return dataclasses.replace(schema, sequences=(*schema.sequences, watched))


def seen(model, embedded):
    """Inputs and outputs of the modules of a forward pass, by name."""
    found = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, inputs, output, name=name: found.update({name: (inputs, output)}))
    model.interact(embedded)
    return found


def changed(embedded, noise=1.0):
    """Other events in the same places."""
    sequences = {
        name: (values + noise * torch.randn_like(values) * mask[:, :, None], mask)
        for name, (values, mask) in embedded.sequences.items()
    }
    return dataclasses.replace(embedded, sequences=sequences)


@pytest.mark.parametrize("layers", [1, 3])
def test_both_streams_keep_their_size(schema, make_batch, layers):  # item 1
    model = model_of(schema, layers=layers)
    calls = seen(model, model.embed(make_batch(schema, 6)))
    for layer in range(layers):
        inputs, output = calls[f"interactions.{layer}"]
        assert inputs[0].shape == (6, N + SUMMARY + PMA + RECENT, D)
        assert output.shape == (6, N, D)
        assert calls[f"sequences.{layer}"][0][0].shape == (6, SUMMARY, D)
        assert calls[f"sequences.{layer}"][1].shape == (6, SUMMARY + T, D)
        assert calls[f"event_summaries.{layer}"][1].shape == (6, SUMMARY + PMA + RECENT, D)
    assert calls["last_event_summary"][1].shape == (6, SUMMARY + PMA + RECENT, D)
    assert model.interact(model.embed(make_batch(schema, 6))).shape == (6, (2 * SUMMARY + PMA + RECENT) * D)


def test_what_stands_at_padded_places_does_not_matter(two_sequences, make_batch):  # item 2
    model = model_of(two_sequences).eval()
    embedded = model.embed(make_batch(two_sequences, 20))
    filled = {
        name: (values.masked_fill(~mask[:, :, None], 7.0), mask) for name, (values, mask) in embedded.sequences.items()
    }
    other = dataclasses.replace(embedded, sequences=filled)
    assert torch.equal(model.interact(other), model.interact(embedded))


def test_padding_a_batch_further_changes_nothing(two_sequences, make_batch):  # item 2
    model = model_of(two_sequences).eval()
    embedded = model.embed(make_batch(two_sequences, 20))
    longer = {
        name: (torch.nn.functional.pad(values, (0, 0, 0, 4)), torch.nn.functional.pad(mask, (0, 4)))
        for name, (values, mask) in embedded.sequences.items()
    }
    other = dataclasses.replace(embedded, sequences=longer)
    torch.testing.assert_close(model.interact(other), model.interact(embedded))


def test_rows_without_events_give_finite_outputs_and_gradients(schema, make_batch):  # item 2
    model = model_of(schema, num_recent=9)
    embedded = model.embed(make_batch(schema, 4))
    values, mask = embedded.sequences["history"]
    embedded.sequences["history"] = (values, torch.zeros_like(mask))
    model.predict(model.interact(embedded)).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    "keys",
    [
        *({"pffn": pffn} for pffn in PFFNS),
        *({"gating": gating} for gating in GATINGS),
        {"s2n": False},
        {"n2s": False},
        {"s2n": False, "n2s": False},
        {"early_summary": True},
        {"early_summary": True, "n2s": False},
        {"early_summary": True, "s2n": False},
        {"num_pma": 0, "num_recent": 0},
        {"residual": False, "norm": False},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(two_sequences, make_batch, layers, keys):  # item 3
    model = model_of(two_sequences, layers=layers, **keys)
    model(make_batch(two_sequences, 64)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("s2n", [False, True])
def test_without_s2n_the_tokens_do_not_see_the_events(schema, make_batch, s2n):  # item 4
    model = model_of(schema, s2n=s2n).eval()
    embedded = model.embed(make_batch(schema, 6))
    first, second = seen(model, embedded)["interactions.1"][1], seen(model, changed(embedded))["interactions.1"][1]
    assert torch.equal(first, second) != s2n


@pytest.mark.parametrize("n2s", [False, True])
def test_without_n2s_the_events_do_not_see_the_tokens(schema, make_batch, n2s):  # item 4
    model = model_of(schema, n2s=n2s, s2n=False).eval()
    embedded = model.embed(make_batch(schema, 6))
    other = dataclasses.replace(embedded, tokens=torch.randn_like(embedded.tokens))
    first, second = seen(model, embedded)["sequences.1"][1], seen(model, other)["sequences.1"][1]
    assert torch.equal(first, second) != n2s


@pytest.mark.parametrize("both", [False, True])
def test_without_both_the_events_reach_the_logits_only_through_the_last_summary(schema, make_batch, both):  # item 4
    model = model_of(schema, s2n=both, n2s=both).eval()
    model.last_event_summary.register_forward_hook(lambda _, inputs, output: output.detach())
    embedded = model.embed(make_batch(schema, 6))
    events = embedded.sequences["history"][0].detach().requires_grad_()
    embedded.sequences["history"] = (events, embedded.sequences["history"][1])
    model.predict(model.interact(embedded)).logits.sum().backward()
    assert (events.grad is not None and bool(events.grad.abs().sum() > 0)) == both


def test_an_early_summary_stays_as_it_is(schema, make_batch):
    model = model_of(schema, layers=3, early_summary=True).eval()
    calls = seen(model, model.embed(make_batch(schema, 6)))
    summary = calls["last_event_summary"][1]
    for layer in range(3):
        assert torch.equal(calls[f"interactions.{layer}"][0][0][:, N:], summary)
    assert not model.sequences
    assert not model.event_summaries


def test_the_order_of_the_arches_within_a_layer_changes_nothing(schema, make_batch):  # item 5
    model = model_of(schema).eval()
    embedded = model.embed(make_batch(schema, 6))
    x = model.tokens(embedded)
    s, mask, positions = model.events(embedded, x)
    for layer in range(2):
        x_sum, s_sum = model.token_summaries[layer](x), model.event_summaries[layer](s, mask)
        s = model.sequences[layer](x_sum, s, mask, positions)  # the model has the Interaction Arch first
        x = model.interactions[layer](torch.cat([x, s_sum], 1))
    expected = torch.cat([model.last_token_summary(x), model.last_event_summary(s, mask)], 1).flatten(1)
    assert torch.equal(model.interact(embedded), expected)


def test_cls_tokens_are_not_rotated_and_positions_count_from_the_last_event(schema, make_batch):
    model = model_of(schema)
    embedded = model.embed(make_batch(schema, 6))
    _, mask, positions = model.events(embedded, model.tokens(embedded))
    assert positions.tolist() == [0] * SUMMARY + [0, 1, 2, 3, 4]
    assert mask[:, SUMMARY:].sum(1).tolist() == embedded.sequences["history"][1].sum(1).tolist()
    assert mask[:, :SUMMARY].all()


def test_flops_grow_with_the_square_of_the_events_and_linearly_with_layers(schema):  # item 8
    def flops(length, layers=1):
        history = dataclasses.replace(schema.sequences[0], max_length=length)
        longer = dataclasses.replace(schema, sequences=(history,))
        return flops_per_row(lambda small: model_of(small, layers=layers), longer)

    counts = [flops(length) for length in (10, 20, 30, 40)]
    second = [c - 2 * b + a for a, b, c in zip(counts, counts[1:], counts[2:], strict=False)]
    assert second == [2 * 100 * 2 * 2 * D] * 2  # scores and mixing of (CLS + T)² pairs, multiply-adds counted as 2
    assert flops(10, 3) - flops(10, 2) == flops(10, 2) - counts[0] > 0


def test_pooled_histories_may_be_tokens_as_well(schema, make_batch):
    model = model_of(schema, sequence_pooling="mean")
    assert model.tokens.names[-1] == "history.mean"
    assert model(make_batch(schema, 1)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({"heads": 3}, "heads 3 does not divide embedding_dim 8", "heads can be 1, 2, 4"),
        (
            {"heads": 8},
            "heads 8 does not divide embedding_dim 8 into even widths, which rotary positions need",
            "heads can be 1, 2, 4",
        ),
        ({"pffn": "apendix"}, "unknown pffn 'apendix'", "did you mean 'appendix'?"),
        ({"gating": "non"}, "unknown gating 'non'", "did you mean 'none'?"),
        ({"modules": ["dott"]}, "unknown module 'dott'", "did you mean 'dot'?"),
        ({"layers": 0}, "layers is 0", "at least 1 is expected"),
        ({"num_summary": 0}, "num_summary is 0", "at least 1 is expected"),
        ({"num_pma": -1}, "num_pma is -1", "at least 0 is expected"),
    ],
)
def test_impossible_configs(schema, keys, message, hint):
    with pytest.raises(UserError) as caught:
        model_of(schema, **keys)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_schema_without_sequences_is_an_error(plain_schema):
    with pytest.raises(UserError, match="schema: InterFormer needs a sequence"):
        model_of(plain_schema)


def test_histories_alone_are_enough_where_they_are_tokens_as_well(schema, make_batch):
    tables = tuple(table for table in schema.tables if table.name in ("item", "rating"))
    alone = dataclasses.replace(schema, tables=tables, sparse=(), dense=())
    with pytest.raises(UserError) as caught:
        model_of(alone)
    assert caught.value.hint == "set sequence_pooling=mean: with 'none' a history makes no token"
    assert model_of(alone, sequence_pooling="mean")(make_batch(alone, 5)).logits.isfinite().all()
