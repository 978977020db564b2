"""Processes that tests of sharded training share."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


class GlooWorkers:
    """Processes that live as long as the test session, because importing torchrec takes longer than most tests."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count
        self._connections: list[Connection] = []
        self._process: subprocess.Popen | None = None

    def run(self, world_size: int, function: Callable, *arguments, local_world_size: int | None = None) -> list:
        """What the top-level `function` of a test file returns on each of `world_size` ranks, in a fresh process group."""
        if self._process is None:
            self._start()
        job = {
            "file": function.__code__.co_filename,
            "function": function.__name__,
            "arguments": arguments,
            "world_size": world_size,
            "rendezvous": str(self._folder / uuid.uuid4().hex),
            "environment": {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(local_world_size or world_size)},
        }
        for connection in self._connections[:world_size]:
            connection.send(job)
        answers = [self._answer(connection) for connection in self._connections[:world_size]]
        if any(kind == "silence" for kind, _ in answers):
            self.stop()
        errors = [content for kind, content in answers if kind != "result"]
        assert not errors, "\n".join(errors)
        return [content for _, content in answers]

    def stop(self) -> None:
        """End the processes; the next `run` starts new ones."""
        for connection in self._connections:
            connection.close()
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._connections, self._process = [], None

    @staticmethod
    def _answer(connection: Connection) -> tuple:
        if not connection.poll(120):
            return "silence", "a worker did not answer within 120 s"
        return pickle.loads(connection.recv_bytes())

    def _start(self) -> None:
        address = str(self._folder / uuid.uuid4().hex)
        paths = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": paths}
        command = [sys.executable, str(Path(__file__).parent / "gloo_worker.py"), address, str(self._count)]
        with Listener(address, backlog=self._count) as listener:
            self._process = subprocess.Popen(command, env=environment, start_new_session=True)
            arrived = [listener.accept() for _ in range(self._count)]
        ranked = {connection.recv(): connection for connection in arrived}
        self._connections = [ranked[rank] for rank in range(self._count)]


@pytest.fixture(scope="session")
def gloo():
    """Workers for tests that need several ranks: `gloo.run(2, function, argument)`; at most 4 of them."""
    with tempfile.TemporaryDirectory() as folder:
        workers = GlooWorkers(Path(folder), count=4)
        yield workers
        workers.stop()
