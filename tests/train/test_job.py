"""What a worker is told and how it sets itself up."""

from __future__ import annotations

import pickle

import pytest
import torch

from raysys.errors import UserError
from raysys.train.job import absolute, choose_device, device_type, machine, seed_draws, step_seed, versions
from raysys.train.settings import TrainerSettings
from raysys.train.size import estimate_seconds
from raysys.train.trainer import prepare


def test_a_job_travels_with_absolute_paths(tiny_config, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").symlink_to(tiny_data)
    config = tiny_config("data.folder=log", "runs_folder=runs", "run_id=a")
    job = pickle.loads(pickle.dumps(prepare(config).job))
    monkeypatch.chdir("/")
    assert job.folder == tmp_path / "runs" / "a"
    assert job.checkpoints == tmp_path / "runs" / "a" / "checkpoints"
    assert job.has_split("valid")
    assert not job.has_split("holdout")
    assert job.log("train").num_rows == 1500
    assert job.config == config  # as the user wrote it
    assert absolute("s3://bucket/log") == "s3://bucket/log"


def test_models_are_built_anew_from_the_seed(tiny_config):
    first, again, other = (prepare(tiny_config(f"seed={seed}")).job.model("cpu").state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_each_step_of_each_rank_draws_its_own_numbers():
    drawn = {}
    for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)]:
        seed_draws(step_seed(*key))
        value = float(torch.rand(()))
        assert drawn.setdefault(key, value) == value
    assert len(set(drawn.values())) == 4


def test_a_step_draws_what_a_manual_seed_draws():
    seed_draws(step_seed(3, 1, 20))
    found = torch.rand(5), torch.randperm(9), torch.nn.functional.dropout(torch.ones(50))
    torch.manual_seed((3 * 1_000_003 + 1) * 1_000_000_007 + 20)
    expected = torch.rand(5), torch.randperm(9), torch.nn.functional.dropout(torch.ones(50))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_the_device_is_what_the_driver_may_know(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"trainer\.device is 'cuda', and torch finds no GPU here"):
        choose_device("cuda")
    assert device_type(TrainerSettings(kind="ray", device="cuda")) == "cuda"  # the driver needs no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device("auto", rank) for rank in (0, 1, 2)] == [torch.device("cuda", i) for i in (0, 1, 0)]
    assert device_type(TrainerSettings(kind="local")) == "cuda"
    with pytest.raises(UserError, match=r"trainer\.device is 'auto'"):
        device_type(TrainerSettings(kind="ray"))


def test_records_name_versions_and_machine_but_no_host():
    assert versions()["torch"] == torch.__version__
    assert machine().keys() == {"cpus", "memory_bytes", "gpu"}


def test_an_estimate_grows_with_the_work_and_falls_with_the_threads():
    once, more, threads = (
        estimate_seconds(10**6, 10**6, 1),
        estimate_seconds(10**9, 10**6, 1),
        estimate_seconds(10**6, 10**6, 100),
    )
    assert threads < once < more
