"""What holds for every head in configs/model/head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from raysys.config import arguments_of, compose, instantiate, locate
from raysys.errors import UserError
from raysys.schema import Label

ROOT = Path(__file__).parents[3]
NAMES = sorted(path.stem for path in (ROOT / "configs/model/head").glob("*.yaml"))
LABELS = [Label("click"), Label("conversion"), Label("dwell", kind="regression")]


@pytest.fixture(params=NAMES)
def build(request):
    """`build(labels)`: the head as its YAML file has it, on 6 inputs."""
    node = compose(["model=shared_bottom", f"model/head={request.param}"])["model"]["head"]

    def build(labels=tuple(LABELS), **keys):
        arguments = {"tower": (5,), "activation": "relu", "dropout": 0.0} | keys
        torch.manual_seed(0)
        return instantiate(node)(labels=labels, inputs=6, **arguments)

    return build


@pytest.mark.parametrize("rows", [1, 9])
def test_shapes(build, rows):
    x = torch.randn(rows, 6)
    output = build()(x)
    assert output.logits.shape == (rows, 3)
    assert output.hidden.shape == (rows, 3, 5)
    assert output.shared is x


def test_every_parameter_gets_a_gradient_from_all_tasks(build):
    head = build()
    head(torch.randn(64, 6)).logits.square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_rows_do_not_see_each_other(build):
    head, x = build(), torch.randn(9, 6)
    torch.testing.assert_close(head(x).logits[2:4], head(x[2:4]).logits)


def test_without_a_tower_a_task_ends_in_a_linear_map(build):
    output = build(tower=())(torch.randn(4, 6))
    assert output.logits.shape == (4, 3)
    assert output.hidden.shape[:2] == (4, 3)


def test_dropout_acts_in_training_only(build):
    head, x = build(dropout=0.5), torch.randn(9, 6)
    assert not torch.equal(head(x).logits, head(x).logits)
    head.eval()
    assert torch.equal(head(x).logits, head(x).logits)


def test_autocast_gives_finite_values_in_bfloat16(build):
    head, x = build(), torch.randn(9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        half = head(x).logits
    half.float().sum().backward()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), head(x).logits, rtol=0.1, atol=0.1)


def test_exports_and_compiles_as_one_graph_for_any_number_of_rows(build):
    head, x = build().eval(), torch.randn(9, 6)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, x):
            return self.head(x).logits

    rows = torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(Logits(), (x,), dynamic_shapes={"x": {0: rows}}).module()
    compiled = torch.compile(Logits(), backend="eager", fullgraph=True)
    for batch in (x, torch.randn(30, 6)):
        torch.testing.assert_close(exported(batch), head(batch).logits)
        torch.testing.assert_close(compiled(batch), head(batch).logits)


def test_the_state_is_plain_parameters(build):
    head = build()
    assert head.state_dict().keys() == dict(head.named_parameters()).keys()


@pytest.mark.parametrize("name", ["mmoe", "ple", "cross_stitch", "esmm", "adatt"])
def test_configs_name_every_key_with_its_default(name):
    config = yaml.safe_load((ROOT / f"configs/model/head/{name}.yaml").read_text())
    keys = arguments_of(locate(config["_target_"]))
    given = ("labels", "inputs", "tower", "activation", "dropout", "inner")
    own = {key: _lists(value.default) for key, value in keys.items() if key not in given}
    assert {key: value for key, value in config.items() if key not in ("_target_", "_partial_", "defaults")} == own


def _lists(value):
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", ["mmoe", "ple", "cross_stitch", "adatt"])
@pytest.mark.parametrize("widths", [[], [64, 32], [[]], [[8], [0]]])
def test_widths_that_are_no_levels_are_an_error(name, widths):
    node = compose(["model=shared_bottom", f"model/head={name}"])["model"]["head"] | {"widths": widths}
    with pytest.raises(UserError, match=r"widths is .*\n  hint: give the widths of an expert for each level"):
        instantiate(node)(labels=LABELS, inputs=6, tower=(), activation="relu", dropout=0.0)


def test_a_head_goes_on_any_trunk_and_an_inner_head_into_another(schema, make_batch):
    overrides = [
        "model=dlrm",
        "model/head=esmm",
        "model/head@model.head.inner=adatt",
        "model.head.inner.task_experts=3",
    ]
    model = instantiate(compose(overrides)["model"], schema=schema)
    assert model.towers.inner.levels[0].experts.num == 2 * 3 + 1
    assert model(make_batch(schema, 5)).logits.shape == (5, 2)
