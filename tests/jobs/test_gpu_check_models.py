"""What the GPU check trains, here on the CPU twice: every config has its case, and two runs that differ are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysys.config import compose, config_folder


@pytest.fixture(scope="module")
def gpu_check_models(jobs):
    return jobs("gpu_check_models")


@pytest.fixture(scope="module")
def folder(gpu_check_models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu_check")
    gpu_check_models.write_data(folder / "data")
    return folder


def test_every_model_objective_and_head_is_in_a_case(gpu_check_models):
    configs = [compose([*gpu_check_models.COMMON, *overrides]) for overrides in gpu_check_models.cases().values()]
    for group in ("model", "objective"):
        used = {config[group]["_target_"] for config in configs}
        files = [path.stem for path in (config_folder() / group).glob("*.yaml")]
        assert {compose([f"{group}={name}"])[group]["_target_"] for name in files} == used
    heads = {config["model"]["head"]["_target_"] for config in configs if "head" in config["model"]}
    files = [path.stem for path in (config_folder() / "model/head").glob("*.yaml")]
    assert {compose([f"model/head={name}"])["model"]["head"]["_target_"] for name in files} == heads


@pytest.mark.parametrize("name", ["objective early_stage", "objective sampled_softmax", "optimiser apollo"])
def test_both_pipelines_give_the_same_losses(gpu_check_models, folder, name):
    overrides = ["trainer.device=cpu", *gpu_check_models.cases()[name]]
    found = gpu_check_models.compare(folder, overrides, [*overrides, "train.pipeline=sparse_dist"])
    assert found["difference"] == 0
    assert found["last_loss"] < found["first_loss"]


def test_a_difference_is_found(gpu_check_models, folder):
    overrides = ["trainer.device=cpu", "model=dlrm"]
    slower = [*overrides, "train.optimizers.dense.lr=9e-4"]
    found = gpu_check_models.compare(folder, overrides, slower)
    assert found["first_difference"] == 0
    assert found["difference"] > gpu_check_models.LIMIT
    with pytest.raises(AssertionError, match="the first losses differ"):
        gpu_check_models.compare(folder, overrides, [*overrides, "seed=1"])


def test_every_dropout_of_a_model_is_switched_off(gpu_check_models):
    node = {"dropout": 0.1, "members": {"a": {"dropout": 0.2, "layers": 2}}}
    assert gpu_check_models.without_dropout(node) == {"dropout": 0.0, "members": {"a": {"dropout": 0.0, "layers": 2}}}
