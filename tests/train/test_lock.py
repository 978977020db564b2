"""One driver to a run folder, also after one was killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from raysys.errors import UserError
from raysys.train.lock import check_free, held, is_held
from raysys.train.record import read_record
from raysys.train.trainer import fit, prepare

HOLDER = """
import sys
from pathlib import Path
from raysys.train.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """`hold(folder)`: a process that drives the run of the folder until it is killed."""
    processes = []

    def start(folder):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", HOLDER, str(folder)]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def kill(process):
    process.kill()
    process.communicate()


def test_a_lock_is_for_one_and_ends_with_its_process(hold, tmp_path):
    check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []
    process = hold(tmp_path)
    message = f"run {tmp_path} is being trained by process {process.pid} on {socket.gethostname()}"
    for attempt in (lambda: check_free(tmp_path), lambda: held(tmp_path).__enter__()):
        with pytest.raises(UserError) as caught:
            attempt()
        assert (caught.value.message, caught.value.hint) == (
            message,
            "wait for its end or stop it, or give this run another run_id",
        )
    kill(process)
    assert not is_held(tmp_path)
    with held(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(UserError, match=f"by process {os.getpid()} on"), held(tmp_path):
            pass
    assert not is_held(tmp_path)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match=f"{tmp_path}/lock cannot be locked: Function not implemented"), held(tmp_path):
        pass


def test_a_run_that_lives_is_passed_over_and_taken_up_once_it_is_killed(train_tiny, tiny_config, hold):
    options = ["objective=faulty", "objective.fault=not_finite", "objective.step=7", "train.checkpoint.every_steps=2"]
    with pytest.raises(UserError, match="not finite"):
        train_tiny(*options, "run_id=a")
    prepared = prepare(tiny_config(*options, "resume=auto"))
    folder = prepared.job.folder
    assert folder.name == "a"
    process = hold(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare(tiny_config(*options, "resume=auto")).job.folder != folder
    for start in (lambda: prepare(tiny_config(*options, "resume=auto", "run_id=a")), lambda: fit(prepared, [])):
        with pytest.raises(UserError, match=f"runs/a is being trained by process {process.pid} on"):
            start()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    kill(process)
    assert prepare(tiny_config(*options, "resume=auto")).job.folder == folder
    assert fit(prepared, []).step == 10
    assert read_record(folder)["status"] == "finished"
