"""What holds for every ranking model."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import yaml

from raysys.config import arguments_of, compose, instantiate, locate
from raysys.errors import UserError
from raysys.models.flops import flops_per_row
from raysys.models.ranking.base import RankingModel

ROOT = Path(__file__).parents[3]
RETRIEVAL = "raysys.models.retrieval."
NAMES = sorted(path.stem for path in (ROOT / "configs/model").glob("*.yaml") if RETRIEVAL not in path.read_text())
SMALL = {"embedding_dim": 8, "bottom": [8]}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def build(name):
    """`build(schema, key=value)`: a model as its YAML file has it, with narrow tokens."""
    node = compose([f"model={name}"])["model"]
    return lambda schema, **keys: instantiate(with_keys(node, SMALL | keys) | given(keys), schema=schema)


def with_keys(node, keys):
    """A model's node with these keys where it has them; an ensemble's members are nodes within it."""
    nested = {key: with_keys(value, keys) if isinstance(value, dict) else value for key, value in node.items()}
    return nested | {key: value for key, value in keys.items() if key in node}


def given(keys):
    """What is no key of a config."""
    return {key: keys[key] for key in ("seed", "device") if key in keys}


def test_outputs_and_steps(build, schema, make_batch):
    model, batch = build(schema).eval(), make_batch(schema, 5)
    output = model(batch)
    assert output.logits.shape == (5, 2)
    assert output.hidden.shape[:2] == (5, 2)
    assert output.shared.shape[0] == 5
    for embedded in output.embedded.members.values() or [output.embedded]:
        assert embedded.names == ("user_id", "genres", "item_id", "tags")
    steps = model.predict(model.interact(model.embed(batch)))
    assert torch.equal(steps.logits, output.logits)
    assert steps.embedded is None


NO_SEQUENCE = {
    "din": "schema: DIN needs a sequence",
    "interformer": "schema: InterFormer needs a sequence",
    "cetnet": "members.interformer: schema: InterFormer needs a sequence",
}
NEEDS = {
    "dense": {},
    "sparse": {
        "din": "schema: DIN needs an item feature that shares a table with sequence 'history'",
        "early_stage": "schema: the model needs a feature of the item",
    },
    "sequences": NO_SEQUENCE,
    "all but ids": NO_SEQUENCE
    | {
        "early_stage": "schema: the model needs a feature of the item",
        "esmm": "ESMM needs a task for conversion, and there is no 'conversion'",
    },
}


@pytest.mark.parametrize("lack", NEEDS)
def test_a_schema_without_a_kind_of_feature(name, build, lack, schema, plain_schema, make_batch):
    """Each model predicts from what there is, or says what it needs. Plain ids: one task, no sides, no other feature."""
    if lack == "all but ids":
        schema = plain_schema
    else:
        left = {"sparse": schema.sparse, "sequences": schema.sequences, lack: ()}
        used = {f.table for f in left["sparse"]} | {f.table for s in left["sequences"] for f in s.features}
        tables = tuple(table for table in schema.tables if table.name in used)
        schema = dataclasses.replace(schema, tables=tables, **{lack: ()})
    if name in NEEDS[lack]:
        with pytest.raises(UserError) as caught:
            build(schema)
        assert caught.value.message == NEEDS[lack][name]
        return
    logits = build(schema)(make_batch(schema, 5)).logits
    assert logits.shape == (5, len(schema.labels))
    assert logits.isfinite().all()
    assert build(schema)(make_batch(schema, 1)).logits.isfinite().all()


def test_a_schema_without_any_feature_is_an_error(build, plain_schema):
    with pytest.raises(UserError, match=r"needs a|no dense, sparse or sequence feature"):
        build(dataclasses.replace(plain_schema, tables=(), sparse=()))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("embedding_dim", 0, "embedding_dim is 0"),
        ("dropout", 1.0, "dropout is 1.0"),
        ("embedding_dropout", -0.1, "embedding_dropout is -0.1"),
        ("bottom", [8, 0], "the width of a layer is 0"),
        ("sequence_pooling", "max", "unknown sequence_pooling 'max'"),
        ("activation", "reluu", "unknown activation 'reluu'"),
    ],
)
def test_impossible_values_of_common_keys(build, schema, key, value, message):
    with pytest.raises(UserError) as caught:
        build(schema, **{key: value})
    assert caught.value.message.rpartition(": ")[2] == message  # an ensemble names the member before it


def test_flops_are_counted(build, schema):
    assert flops_per_row(lambda schema: build(schema), schema) > 0


def test_every_parameter_gets_a_gradient(build, schema, make_batch):
    model = build(schema)
    model(make_batch(schema, 64)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_rows_do_not_see_each_other_nor_padding(build, schema, make_batch):
    model, batch = build(schema).eval(), make_batch(schema, 6)
    logits = model(batch).logits
    torch.testing.assert_close(model(make_batch(schema, 6, padding=3)).logits[:6], logits)
    other = dataclasses.replace(batch, dense=batch.dense.clone())
    other.dense[3:] += 100
    changed = model(other).logits
    torch.testing.assert_close(changed[:3], logits[:3])
    assert not torch.allclose(changed[3:], logits[3:])


def test_same_seed_same_model_on_every_device(build, schema):
    torch.rand(7)
    first, second, meta = build(schema, seed=1), build(schema, seed=1), build(schema, seed=1, device="meta")
    other = build(schema, seed=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        on_meta = meta.state_dict()[name]
        assert on_meta.is_meta or torch.equal(value, on_meta), name
        assert on_meta.is_meta == any(part in name for part in (".embedding_bags.", ".ids_4.", ".ids_8.")), name
    weights = [name for name, value in first.state_dict().items() if value.std() > 0]
    constant = ("norm.weight", ".target.weight")
    for name in weights:
        if not name.endswith(constant):
            assert not torch.equal(first.state_dict()[name], other.state_dict()[name]), name


def test_building_a_model_leaves_the_global_generator_alone(build, schema):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build(schema)
    assert torch.equal(torch.rand(3), expected)


def test_state_dict_round_trip(build, schema, make_batch):
    first, second, batch = build(schema, seed=1).eval(), build(schema, seed=2).eval(), make_batch(schema, 5)
    assert not torch.equal(first(batch).logits, second(batch).logits)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(batch).logits, second(batch).logits)


def test_dropout_acts_in_training_only(build, schema, make_batch):
    model, batch = build(schema, dropout=0.5), make_batch(schema, 5)
    assert not torch.equal(model(batch).logits, model(batch).logits)
    model.eval()
    assert torch.equal(model(batch).logits, model(batch).logits)


@pytest.mark.parametrize("pooling", ["none", "mean", "attention", "both"])
def test_histories_matter_unless_left_out(build, schema, make_batch, pooling):
    model, batch = build(schema, sequence_pooling=pooling).eval(), make_batch(schema, 20)
    other = dataclasses.replace(batch, sequences=make_batch(schema, 20, seed=1).sequences)
    left_out = pooling == "none" and not getattr(model, "reads_sequences", False)
    assert torch.equal(model(batch).logits, model(other).logits) == left_out


def test_autocast_runs_in_bfloat16(build, schema, make_batch):
    model, batch = build(schema).eval(), make_batch(schema, 8)
    full = model(batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch).logits
    half.float().sum().backward()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)


def test_a_schema_without_labels_is_an_error(build, plain_schema):
    with pytest.raises(UserError, match="a ranking model needs a label"):
        build(dataclasses.replace(plain_schema, labels=()))


@pytest.mark.parametrize("name", NAMES)
def test_configs_name_every_key_with_its_default(name):
    config = yaml.safe_load((ROOT / f"configs/model/{name}.yaml").read_text())
    model = locate(config.pop("_target_"))
    config.pop("defaults", None)
    keys = arguments_of(model)
    others = ("schema", "seed", "device", "head")
    defaults = {key: value.default for key, value in keys.items() if key not in others}
    assert config.keys() == defaults.keys()
    for key in [key for key, default in defaults.items() if default is inspect.Parameter.empty]:
        del config[key], defaults[key]  # only the config says it
    if model.__name__.lower() == name.replace("_", ""):  # else a preset of another model's class
        assert config == {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_passed_on_or_named_by_each_model(name):
    model = locate(compose([f"model={name}"])["model"]["_target_"])
    if issubclass(model, RankingModel):
        (passed_on,) = get_args(get_type_hints(model.__init__)["shared"])
        named = inspect.signature(model).parameters.keys() - {"shared"}
        assert arguments_of(RankingModel).keys() - named == passed_on.__annotations__.keys()


def test_an_unknown_key_names_the_nearest_one_of_the_model_and_its_base(plain_schema):
    node = {"_target_": "raysys.models.ranking.dcn.DCNv2"}
    with pytest.raises(UserError, match=r"DCNv2 has no argument 'bottum'\n  hint: did you mean 'bottom'"):
        instantiate({**node, "bottum": [8]}, schema=plain_schema)
    with pytest.raises(UserError, match=r"DCNv2 has no argument 'cross_layer'\n  hint: did you mean 'cross_layers'"):
        instantiate({**node, "cross_layer": 2}, schema=plain_schema)
    assert instantiate({**node, "init_scale": 0.5}, schema=plain_schema).embeddings.initial("a")[2] == 0.5


def test_a_model_without_interactions_cannot_be_made(plain_schema):
    class Nothing(RankingModel):
        pass

    with pytest.raises(TypeError, match="interact"):
        Nothing(plain_schema)
