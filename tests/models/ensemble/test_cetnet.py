"""CETNet: members with tables of their own in joint collections, fused by confidence."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torchrec.distributed.train_pipeline.tracing import Tracer
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from raysys.config import instantiate
from raysys.errors import UserError
from raysys.models.embeddings import Embeddings
from raysys.models.ensemble.cetnet import CETNet
from raysys.models.ranking.dcn import DCNv2
from raysys.models.ranking.dhen import DHEN
from raysys.models.ranking.dlrm import DLRM
from raysys.objectives.collaborative import Collaborative
from raysys.objectives.supervised import Supervised

DHEN_MEMBER = partial(
    DHEN, embedding_dim=8, layers=1, modules=("dot", "linear"), tokens_out=3, hidden=(8,), bottom=(8,), tower=(8,)
)
DCN_MEMBER = partial(DCNv2, embedding_dim=4, rank=4, deep=(8,), bottom=(8,))
DLRM_MEMBER = partial(DLRM, embedding_dim=8, bottom=(8,), tower=(8,))
PAIR = {"dhen": DHEN_MEMBER, "dlrm": DLRM_MEMBER}
TRIO = PAIR | {"dcnv2": DCN_MEMBER}


def table_of(model, name):
    return next(weight for key, weight in model.named_parameters() if key.endswith(f".{name}.weight"))


def member_weights(model, name):
    """The parameters of a member by the names that they have in the bare model, tables by their own names."""
    found = {}
    for key, value in model.named_parameters():
        if key.startswith(f"members.{name}."):
            found[key.removeprefix(f"members.{name}.").replace("assembly.", "embeddings.assembly.", 1)] = value
        elif key.startswith("tables.") and f".{name}__" in key:
            found[key.split("__")[1]] = value
    return found


def bare_weights(model):
    tables = (".embedding_bags.", ".ids_")
    return {
        key.split("embeddings.")[-1].split("embedding_bags.")[-1] if any(part in key for part in tables) else key: value
        for key, value in model.named_parameters()
    }


def narrowed(schema, divisor=2):
    """What each of two members gets: tables of half the width, a multiple of 4."""
    tables = (dataclasses.replace(t, embedding_dim=-(-t.embedding_dim // divisor // 4) * 4) for t in schema.tables)
    return dataclasses.replace(schema, tables=tuple(tables))


# One member


@pytest.mark.parametrize("build", [DHEN_MEMBER, DCN_MEMBER], ids=["dhen", "dcnv2"])
@pytest.mark.parametrize("shared_tables", [False, True])
def test_one_member_is_the_bare_model_bit_for_bit(schema, make_batch, build, shared_tables):
    bare = build(schema, seed=3)
    model = CETNet(schema, members={"only": build}, seed=3, temperature=0.1, shared_tables=shared_tables)
    batch = make_batch(schema, 9, padding=2)
    output, expected = model(batch), bare(batch)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.members["only"].logits, expected.logits)
    assert torch.equal(output.shared, expected.shared)
    assert torch.equal(output.extra["fusion_weights"], torch.ones(11, 2, 1))
    if not shared_tables:
        own, others = member_weights(model, "only"), bare_weights(bare)
        assert own.keys() == others.keys()
        assert all(torch.equal(own[key], others[key]) for key in own)


@pytest.mark.parametrize("options", [(0.0, 0.1, 1.0), (0.5, 1.0, 0.1), (1.0, 0.0, 3.0)])
def test_one_member_has_the_loss_and_gradients_of_the_bare_model(schema, make_batch, options):
    fused_share, peer_weight, temperature = options
    bare = DHEN_MEMBER(schema, seed=3)
    model = CETNet(schema, members={"only": DHEN_MEMBER}, seed=3, temperature=temperature)
    batch = make_batch(schema, 16)
    objective = Collaborative(schema, fused_share=fused_share, peer_weight=peer_weight, ramp=0)
    expected = Supervised(schema)(bare, batch, bare.embed(batch))[0]
    loss, _, parts = objective(model, batch, model.embed(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert [float(parts[f"{task}.peers"]) for task in schema.tasks] == [0, 0]
    loss.backward()
    expected.backward()
    own, others = member_weights(model, "only"), bare_weights(bare)
    for key, value in own.items():
        torch.testing.assert_close(value.grad, others[key].grad, rtol=1e-5, atol=1e-8, msg=key)


# Several members


def test_no_parameter_is_shared_and_there_are_those_of_the_members_alone(schema):
    model = CETNet(schema, members=TRIO)
    storages = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len(set(storages)) == len(storages)
    own_schema = narrowed(schema, 3)
    alone = sum(parameter.numel() for build in TRIO.values() for parameter in build(own_schema).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == alone


def test_a_members_logits_do_not_depend_on_the_others_tables(schema, make_batch):
    model, batch = CETNet(schema, members=TRIO).eval(), make_batch(schema, 9)
    before = {name: output.logits for name, output in model(batch).members.items()}
    with torch.no_grad():
        for table in schema.tables:
            table_of(model, f"dlrm__{table.name}").add_(1.0)
    after = {name: output.logits for name, output in model(batch).members.items()}
    assert [name for name in TRIO if not torch.equal(before[name], after[name])] == ["dlrm"]


def test_without_peers_and_fused_loss_each_member_trains_as_alone(schema, make_batch):
    model, batch = CETNet(schema, members=TRIO, width_share=0.5, seed=5), make_batch(schema, 16)
    objective = Collaborative(schema, fused_share=0.0, peer_weight=0.0)
    objective(model, batch, model.embed(batch))[0].backward()
    for place, (name, build) in enumerate(TRIO.items()):
        alone = build(narrowed(schema), seed=5 + place)
        Supervised(schema)(alone, batch, alone.embed(batch))[0].backward()
        own, others = member_weights(model, name), bare_weights(alone)
        assert own.keys() == others.keys()
        for key, value in own.items():
            assert torch.equal(value, others[key])
            torch.testing.assert_close(value.grad, others[key].grad / 3, rtol=1e-4, atol=1e-8, msg=key)


def test_permuted_members_give_the_same_prediction(schema, make_batch):
    model, batch = CETNet(schema, members=PAIR).eval(), make_batch(schema, 9)
    other = CETNet(schema, members=dict(reversed(PAIR.items()))).eval()
    for own, theirs in zip(sorted(model.state_dict().items()), sorted(other.state_dict().items()), strict=True):
        assert own[0] == theirs[0]
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(batch).logits, model(batch).logits)
    weights, permuted = (m(batch).extra["fusion_weights"] for m in (model, other))
    torch.testing.assert_close(permuted, weights.flip(2))


def test_identical_members_differ_by_their_seeds(schema, make_batch):
    model, batch = CETNet(schema, members={"a": DHEN_MEMBER, "b": DHEN_MEMBER}, seed=1), make_batch(schema, 9)
    outputs = model(batch).members
    assert not torch.allclose(outputs["a"].logits, outputs["b"].logits)
    assert not torch.equal(table_of(model, "a__item"), table_of(model, "b__item"))


def test_members_with_the_same_weights_are_each_of_them(schema, make_batch):
    """The fused prediction, its loss and its gradient are those of one member, and nothing pulls them apart."""
    model, batch = CETNet(schema, members={"a": DHEN_MEMBER, "b": DHEN_MEMBER}), make_batch(schema, 9)
    first, second = member_weights(model, "a"), member_weights(model, "b")
    with torch.no_grad():
        for key, value in second.items():
            value.copy_(first[key])
    loss, output, parts = Collaborative(schema, peer_weight=5.0, ramp=0)(model, batch, model.embed(batch))
    alone = output.members["a"].logits
    torch.testing.assert_close(output.logits, alone)
    assert torch.equal(output.extra["fusion_weights"], torch.full((9, 2, 2), 0.5))
    expected = sum(Supervised(schema).task_losses(alone, batch).per_task)
    torch.testing.assert_close(loss, expected)
    for task in schema.tasks:
        assert parts[f"{task}.peers"] == parts[f"{task}.distance"] == 0
        assert parts[f"{task}.error_correlation"] == pytest.approx(1)
    loss.backward()
    for key, value in second.items():
        torch.testing.assert_close(value.grad, first[key].grad, msg=key)


def test_uniform_weights_give_the_mean_probability(schema, make_batch):
    output = CETNet(schema, members=TRIO, uniform=True)(make_batch(schema, 9))
    mean = torch.stack([member.logits.sigmoid() for member in output.members.values()]).mean(0)
    torch.testing.assert_close(output.logits.sigmoid(), mean)


def test_a_regression_task_is_the_plain_mean(schema, make_batch):
    labels = (schema.labels[0], dataclasses.replace(schema.labels[1], kind="regression"))
    schema = dataclasses.replace(schema, labels=labels)
    output = CETNet(schema, members=TRIO)(make_batch(schema, 9))
    mean = torch.stack([member.logits for member in output.members.values()]).mean(0)
    torch.testing.assert_close(output.logits[:, 1], mean[:, 1])
    torch.testing.assert_close(output.extra["fusion_weights"][:, 1], torch.full((9, 3), 1 / 3))


@pytest.mark.parametrize("detach_weights", [True, False])
def test_the_gradient_through_the_weights_can_be_stopped(schema, make_batch, detach_weights):
    model, batch = CETNet(schema, members=PAIR, detach_weights=detach_weights), make_batch(schema, 9)
    output = model(batch)
    logits = [member.logits for member in output.members.values()]
    found = torch.autograd.grad(output.logits.sigmoid().sum(), logits)
    weights = output.extra["fusion_weights"].unbind(2)
    held = [w * z.sigmoid() * (1 - z.sigmoid()) for w, z in zip(weights, logits, strict=True)]
    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(found, held, strict=True))
    assert same == detach_weights


# Tables


def test_all_members_are_looked_up_in_one_call_of_each_collection(schema, make_batch):
    alone, model = DHEN_MEMBER(schema), CETNet(schema, members=TRIO, width_share=1)
    calls = []

    def collections(module):
        return {
            name.rpartition(".")[2]: part
            for name, part in module.named_modules()
            if isinstance(part, EmbeddingBagCollection | EmbeddingCollection)
        }

    for name, part in collections(model).items():
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(make_batch(schema, 5))
    assert sorted(calls) == sorted(collections(alone)) == ["bags", "ids_4", "ids_8", "weighted_bags"]
    names = {config.name for config in model.tables.configs().values()}
    assert names == {f"{member}__{table.name}" for member in TRIO for table in schema.tables}


def test_members_may_differ_in_the_home_of_a_table(schema, make_batch):
    """One reads histories and one does not: a table of bags for one is one of single vectors for the other."""
    members = {"with": DHEN_MEMBER, "without": partial(DLRM_MEMBER, sequence_pooling="none")}
    model, batch = CETNet(schema, members=members, width_share=1, seed=2), make_batch(schema, 7)
    for place, (name, build) in enumerate(members.items()):
        assert torch.equal(model(batch).members[name].logits, build(schema, seed=2 + place)(batch).logits)


def test_torchrec_can_trace_the_lookup(schema):
    model = CETNet(schema, members=PAIR, device="meta")

    class Lookup(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model.embed(batch)

    leaves = [f"model.tables.{name}" for name in ("bags", "weighted_bags", "ids_4", "joined_ids")]
    leaves.append("model.members")
    calls = [node.target for node in Tracer(leaf_modules=leaves).trace(Lookup()).nodes if node.op == "call_module"]
    assert sorted(calls) == sorted(leaves)


def test_tables_have_the_memory_of_one_model_by_default(schema):
    wide = dataclasses.replace(
        schema, tables=tuple(dataclasses.replace(table, embedding_dim=16) for table in schema.tables)
    )

    def elements(**options):
        model = CETNet(wide, members=PAIR, device="meta", **options)
        return sum(c.num_embeddings * c.embedding_dim for c in model.tables.configs().values())

    one = sum(table.num_embeddings * 16 for table in wide.tables)
    assert elements() == elements(shared_tables=True) == one
    assert elements(width_share=1) == 2 * one


def test_shared_tables_are_seen_by_all_members(schema, make_batch):
    members = {"dhen": DHEN_MEMBER, "dlrm": partial(DLRM_MEMBER, sequence_pooling="none")}
    model, batch = CETNet(schema, members=members, shared_tables=True, seed=4), make_batch(schema, 9)
    assert model.tables.configs().keys() == {table.name for table in schema.tables}
    assert torch.equal(table_of(model, "item"), table_of(Embeddings(schema, 8, seed=4), "item"))
    before = {name: output.logits for name, output in model(batch).members.items()}
    with torch.no_grad():
        table_of(model, "item").add_(1.0)
    after = {name: output.logits for name, output in model(batch).members.items()}
    assert not any(torch.equal(before[name], after[name]) for name in members)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": {}}, "members is empty"),
        ({"members": PAIR, "temperature": 0}, "temperature is 0"),
        ({"members": PAIR, "width_share": 1.5}, "width_share is 1.5"),
        ({"members": {"a.b": DHEN_MEMBER}}, "a member cannot be named 'a.b'"),
        ({"members": {"a__b": DHEN_MEMBER}}, "a member cannot be named 'a__b'"),
        ({"members": {"items": DHEN_MEMBER}}, "a member cannot be named 'items'"),
        ({"members": {"a": None}}, "members.a is None"),
        ({"members": {"a": partial(DHEN_MEMBER, seed=3)}}, "members.a.seed is given"),
        ({"members": {"a": partial(CETNet, members=PAIR)}}, "members.a is a CETNet"),
        (
            {"members": PAIR | {"b": partial(DHEN_MEMBER, modules=["self_attention"], heads=3)}},
            "members.b: heads 3 does not divide embedding_dim 8",
        ),
        (
            {"members": PAIR | {"b": partial(DLRM_MEMBER, init_scale=0.1)}, "shared_tables": True},
            "shared_tables: members have init_scale",
        ),
    ],
)
def test_wrong_settings_are_named(schema, options, message):
    with pytest.raises(UserError) as caught:
        CETNet(schema, **options)
    assert caught.value.message.startswith(message)


def test_a_wrong_key_of_a_member_is_named(schema):
    node = {"_target_": "raysys.models.ranking.dcn.DCNv2", "_partial_": True, "cross_layer": 2}
    with pytest.raises(UserError, match=r"DCNv2 has no argument 'cross_layer'\n  hint: did you mean 'cross_layers'"):
        instantiate({"_target_": "raysys.models.ensemble.cetnet.CETNet", "members": {"a": node}}, schema=schema)
