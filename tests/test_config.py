"""Configs are composed, checked and turned into objects, and every wrong key is answered with the right one."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings

import pytest

from raysys.config import arguments_of, compose, fingerprint, instantiate, locate, run_job, validate
from raysys.errors import UserError
from raysys.schema import Label
from raysys.train.settings import Settings, TrainerSettings, TrainSettings

BASE = ["data=synthetic", "model=dlrm"]


def test_composed_configs_are_plain_and_resolved():
    config = compose([*BASE, "seed=3", "data.folder=elsewhere"])
    assert config["seed"] == 3
    assert config["data"]["prepare"]["folder"] == "elsewhere"
    assert json.loads(json.dumps(config)) == config
    assert fingerprint(config) == fingerprint(dict(reversed(config.items())))
    assert fingerprint(config) != fingerprint(config | {"seed": 4})


def test_defaults_are_those_of_the_settings():
    config = compose(BASE)
    assert validate(TrainSettings, config["train"], "train") == TrainSettings()
    assert json.loads(json.dumps(dataclasses.asdict(TrainSettings()))) == config["train"]  # every key is in the file
    assert validate(TrainerSettings, config["trainer"], "trainer") == TrainerSettings()
    ray = validate(TrainerSettings, compose([*BASE, "trainer=ray"])["trainer"], "trainer")
    assert ray == TrainerSettings(kind="ray", workers=2, device="cpu")


def test_every_group_option_composes():
    from raysys.config import config_folder

    for group in ("data", "model", "objective", "train", "trainer"):
        for option in (config_folder() / group).glob("*.yaml"):
            assert compose([*BASE, f"{group}={option.stem}"])[group]


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("train.batch_sise=3", "unknown config key 'train.batch_sise'", "did you mean 'train.batch_size'?"),
        ("trian.batch_size=3", "unknown config key 'trian.batch_size'", "did you mean 'train.batch_size'?"),
        ("data.prepare.rowz=3", "unknown config key 'data.prepare.rowz'", "did you mean 'data.prepare.rows'?"),
        ("model.towr=[8]", "unknown config key 'model.towr'", "did you mean 'model.tower'?"),
        ("trian.clip={a: 1}", "unknown config key 'trian.clip'", "did you mean 'train.slices'?"),
        ("model=dlmr", "no config 'dlmr' in group 'model'", "did you mean 'dlrm'?"),
        ("model=5", "config: Config group override must be a string or a list. Got int", None),
        ("seed=???", "config key 'seed' has no default", "give it: seed=..."),
        ("nothing", "'nothing' is no override", "write key=value, in quotes where needed"),
        (
            "train.early_stopping.metric=auc",
            "config key 'train.early_stopping.metric': train.early_stopping is null",
            "give it as a whole: train.early_stopping={metric: ...}",
        ),
    ],
)
def test_wrong_overrides_name_the_nearest_valid_one(override, message, hint):
    with pytest.raises(UserError) as caught:
        compose([*BASE, override])
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_group_without_default_names_its_options():
    with pytest.raises(UserError, match=r"config group 'data' has no default\n  hint: take one of: .*synthetic"):
        compose([], "prepare")


def test_configs_of_the_user_join_ours(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text("_target_: own.Model\nwidth: 3\n")
    config = compose(["data=synthetic", "model=own", "model.width=4"], config_dir=str(tmp_path))
    assert config["model"] == {"_target_": "own.Model", "width": 4}
    with pytest.raises(UserError, match="did you mean 'own'"):
        compose(["data=synthetic", "model=onw"], config_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"--config-dir .*nowhere: no such folder"):
        compose(BASE, config_dir=str(tmp_path / "nowhere"))


def test_mappings_are_set_from_the_command_line():
    overrides = ["train.optimizers.clip={model: 1.0}", "train.sharding.tables={user: {sharding_types: [row_wise]}}"]
    settings = validate(TrainSettings, compose([*BASE, *overrides])["train"], "train")
    assert settings.optimizers.clip == {"model": 1.0}
    assert settings.sharding.tables["user"].sharding_types == ("row_wise",)


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("+train.sharding.ddr_byte=1", "unknown config key 'train.sharding.ddr_byte'", "did you mean 'ddr_bytes'?"),
        ("train.checkpoint={kep: 1}", "unknown config key 'train.checkpoint.kep'", "did you mean 'keep'?"),
        (
            "train.early_stopping={metrc: ne}",
            "unknown config key 'train.early_stopping.metrc'",
            "did you mean 'metric'?",
        ),
        (
            "train.sharding.tables={user: {sharding_typs: [x]}}",
            "unknown config key 'train.sharding.tables.user.sharding_typs'",
            "did you mean 'sharding_types'?",
        ),
        ("train.batch_size=0", "config key 'train.batch_size' is 0", "Input should be greater than 0"),
        ("train.checkpoint.keep=0", "config key 'train.checkpoint.keep' is 0", "Input should be greater than 0"),
        (
            "train.pipeline=best",
            "config key 'train.pipeline' is 'best'",
            "Input should be 'auto', 'base' or 'sparse_dist'",
        ),
    ],
)
def test_wrong_settings_name_the_key(override, message, hint):
    config = compose([*BASE, override])
    with pytest.raises(UserError) as caught:
        validate(TrainSettings, config["train"], "train")
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("seed=abc", "config key 'seed' is 'abc'", "Input should be a valid integer, unable to parse"),
        ("seed=1.5", "config key 'seed' is 1.5", "Input should be a valid integer, got a number with a fractional"),
        ("name=[1]", "config key 'name' is [1]", "Input should be a valid string"),
        ("resume=5", "config key 'resume' is 5", "Input should be a valid string"),
        ("runs_folder=null", "config key 'runs_folder' is None", "Input should be a valid string"),
        ("data.folder={a: 1}", "config key 'data.folder' is {'a': 1}", "Input should be a valid string"),
        ("data.shards=many", "config key 'data.shards' is 'many'", "Input should be a valid integer"),
        ("data.shards=0", "config key 'data.shards' is 0", "Input should be greater than 0"),
        ("data.shuffle_rows=-1", "config key 'data.shuffle_rows' is -1", "Input should be greater than or equal to 0"),
        ("data.prefetch=x", "config key 'data.prefetch' is 'x'", "Input should be a valid integer"),
        ("data.keep_groups_whole=5", "config key 'data.keep_groups_whole' is 5", "Input should be a valid boolean"),
        ("data.prepare=5", "config key 'data.prepare' is 5", "Input should be a valid dictionary"),
        ("+data.shuffle=5", "unknown config key 'data.shuffle'", "did you mean 'shuffle_rows'?"),
        ("~data.shards", "config key 'data.shards' is missing", "--show-config prints the keys that there are"),
        ("train.batch_size=0", "config key 'train.batch_size' is 0", "Input should be greater than 0"),
    ],
)
def test_wrong_values_name_the_key_wherever_it_stands(override, message, hint):
    with pytest.raises(UserError) as caught:
        validate(Settings, compose([*BASE, override]))
    assert caught.value.message == message
    assert caught.value.hint.startswith(hint)


def test_every_config_of_ours_is_valid_and_words_may_be_numbers():
    from raysys.config import config_folder

    for option in (config_folder() / "data").glob("*.yaml"):
        assert validate(Settings, compose([f"data={option.stem}"])).data.shards == 12
    settings = validate(Settings, compose([*BASE, "run_id=7", "name=20261123"]))
    assert (settings.run_id, settings.name) == ("7", "20261123")


class Shape:
    def __init__(self, side, inner=None, *, color="red"):
        self.side, self.inner, self.color = side, inner, color


class Disc(Shape):
    def __init__(self, *, holes=0, **shape):
        super().__init__(**shape)
        self.holes = holes


class Bag:
    def __init__(self, **content):
        self.content = content


def make_shape(side):
    return Shape(side)


HERE = Shape.__module__


def node(name="Shape", **arguments):
    return {"_target_": f"{HERE}.{name}", **arguments}


@pytest.fixture(autouse=True)
def importable(request, monkeypatch):
    """This file as a module that `_target_` can name: test files are no modules by themselves."""
    import sys

    monkeypatch.setitem(sys.modules, HERE, request.module)


def test_targets_are_called_with_their_keys_nested_ones_first():
    shape = instantiate(node(side=1, inner=[node(side=2, color="blue")]), color="green")
    assert (shape.side, shape.color) == (1, "green")
    assert (shape.inner[0].side, shape.inner[0].color) == (2, "blue")


def test_a_constructor_with_open_arguments_takes_those_of_its_base():
    disc = instantiate(node("Disc", side=1, holes=2), color="green")
    assert (disc.side, disc.holes, disc.color) == (1, 2, "green")
    assert list(arguments_of(Disc)) == ["holes", "side", "inner", "color"]
    assert instantiate(node("Bag", anything=1)).content == {"anything": 1}
    with pytest.raises(UserError, match=r"Disc has no argument 'colour'\n  hint: did you mean 'color'"):
        instantiate(node("Disc", side=1, colour="green"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (node(sid=1), r"Shape has no argument 'sid'\n  hint: did you mean 'side'\?"),
        (node(), r"Shape: missing a required argument: 'side'"),
        (node("Shap", side=1), r"has no 'Shap'\n  hint: did you mean 'Shape'\?"),
        (
            {"_target_": "no.such.thing"},
            r"_target_ 'no.such.thing': No module named 'no'\n  hint: is the package on PYTHONPATH",
        ),
        ({"_target_": "thing"}, r"_target_ 'thing' is no dotted path"),
        ({"side": 1}, r"a config node needs a _target_ that names a class, found keys side"),
    ],
)
def test_wrong_targets_are_errors_of_the_user(config, message):
    with pytest.raises(UserError, match=message):
        instantiate(config)


def test_a_config_that_is_not_trusted_names_classes_of_allowed_modules_only():
    assert locate(f"{HERE}.Shape", allowed=("raysys.", HERE)) is Shape
    for path in ("os.system", f"{HERE}.Shape"):
        with pytest.raises(UserError, match=r"is refused\n  hint: allowed prefixes: raysys\."):
            locate(path, allowed=("raysys.",))
    for path in (
        f"{HERE}.make_shape",
        f"{HERE}.UserError",
        "raysys.bundle.save_file",
        "raysys.train.checkpoint.remove_old",
    ):
        with pytest.raises(UserError, match="it is no class of"):
            locate(path, allowed=(HERE, "raysys.bundle", "raysys.train"))
    with pytest.raises(UserError, match="is refused"):
        instantiate(node(side={"_target_": "os.system", "command": "true"}), allowed=(HERE,))


def test_a_job_ends_in_one_line_and_status_2(capsys):
    def main(config):
        raise UserError("what is wrong", "what to do")

    with pytest.raises(SystemExit) as caught:
        run_job(main, "train", "A job.", BASE)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: what is wrong\n  hint: what to do\n"
    with pytest.raises(SystemExit):
        run_job(main, "train", "A job.", [*BASE, "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_a_job_gets_its_config_and_flags(capsys):
    seen = []
    run_job(seen.append, "train", "A job.", [*BASE, "seed=5", "--dry-run"], can_dry_run=True)
    run_job(seen.append, "train", "A job.", BASE)
    assert seen[0] == compose([*BASE, "seed=5"]) | {"dry_run": True, "debug": False}
    assert "dry_run" not in seen[1]
    run_job(seen.append, "train", "A job.", [*BASE, "seed=6", "--show-config"])
    assert len(seen) == 2
    assert "seed: 6" in capsys.readouterr().out


def test_a_job_is_quiet_about_its_libraries_and_not_about_the_users_model(caplog):
    def main(config):
        for category in (FutureWarning, UserWarning):
            warnings.warn("Please use DTensor instead and so on", FutureWarning, stacklevel=1)
            warnings.warn("of a model", category, stacklevel=1)
        logging.getLogger("torchrec.distributed").warning("of TorchRec")
        logging.getLogger("mymodels").warning("of a model")
        logging.warning("of a script")

    levels = {name: logging.getLogger(name).level for name in ("torch", "torch.fx", "torchrec", "fbgemm_gpu")}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run_job(main, "train", "A job.", BASE)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    assert [(str(warning.message), warning.category) for warning in caught] == [
        ("of a model", FutureWarning),
        ("of a model", UserWarning),
    ]
    assert caplog.messages == ["of a model", "of a script"]


def test_an_interrupted_job_ends_with_status_130():
    def main(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_job(main, "train", "A job.", BASE)
    assert caught.value.code == 130


def test_a_partial_node_waits_for_the_rest_of_its_arguments():
    node = {"_target_": "raysys.models.heads.TaskTowers", "_partial_": True, "tower": [5]}
    assert instantiate(node)([Label("a"), Label("b")], 6).hidden.out_features == 5
    with pytest.raises(UserError, match="has no argument 'towr'"):
        instantiate({"_target_": "raysys.models.heads.TaskTowers", "_partial_": True, "towr": [1]})
