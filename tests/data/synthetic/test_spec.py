from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from raysys.config import instantiate
from raysys.data.synthetic import SyntheticSpec
from raysys.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs" / "data"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cardinalities": (10, 1)}, "synthetic: cardinality of c1 is 1\n  hint: expected 2 to 2,147,483,647 ids"),
        ({"missing": 1.0}, "synthetic: missing is 1.0\n  hint: expected a share in [0, 1)"),
        ({"drift": 2}, "synthetic: drift is 2\n  hint: expected a number in [0, 1]"),
        ({"order": -1}, "synthetic: order is -1\n  hint: expected a standard deviation, not negative"),
        ({"base_rates": (0.1,)}, "synthetic: 3 tasks, but 1 base_rates\n  hint: give one rate per task"),
        ({"base_rates": (0.1, 0.1, 1.0)}, "synthetic: base_rates is 1.0\n  hint: expected rates in (0, 1)"),
        (
            {"correlation": -0.6},
            "synthetic: correlation is -0.6\n  hint: expected a number in [-0.5, 1], as no 3 tasks can be less correlated "
            "with each other",
        ),
        (
            {"funnel": (("click", "conversions"),)},
            "synthetic: funnel names task 'conversions', which does not exist\n  hint: did you mean 'conversion'?",
        ),
        (
            {"funnel": (("like", "click"),)},
            "synthetic: funnel (like, click) runs backwards\n  hint: list 'like' first in tasks",
        ),
    ],
)
def test_an_impossible_spec_names_the_key(changes, message):
    with pytest.raises(UserError) as caught:
        SyntheticSpec(**changes)
    assert str(caught.value) == message


def test_the_configs_prepare_what_they_say(tmp_path):
    for name in ("synthetic", "criteo_shaped"):
        config = OmegaConf.create({"data": OmegaConf.load(CONFIGS / f"{name}.yaml")})
        config.data.folder = str(tmp_path / name)
        config.data.prepare.rows = 100
        config.data.prepare.processes = 1
        instantiate(OmegaConf.to_container(config.data.prepare, resolve=True))
        assert (tmp_path / name / "schema.yaml").exists()


def test_the_config_shows_every_default():
    content = OmegaConf.to_container(OmegaConf.load(CONFIGS / "synthetic.yaml").prepare.spec)
    del content["_target_"]
    assert SyntheticSpec(**content) == SyntheticSpec()
    assert list(content) == [f.name for f in dataclasses.fields(SyntheticSpec)]
