"""Rivals of a comparison: each runs in processes of its own and waits while another has its turn.

So one measurement alternates between them every few seconds, and what else the machine does hits all alike. This file is
the parent's side (`Rival`) and, run as a script, the process: `python bench_rival.py MODULE:FUNCTION OPTIONS`, where
the function gives an iterator of rates.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

THREADS = 1
"""Of every process: more of them than cores made steps 3 to 6 times slower."""
LOG = "rivals.log"
"""What the rivals say on stderr, beside the results."""


class Rival:
    """Processes that run `target(**options)`, "module:function" of this folder, and take one turn at a time.

    connected: the processes are the ranks of one process group (gloo); otherwise each has a group of its own.
    log: a file for what they say on stderr.
    """

    def __init__(
        self, target: str, options: Mapping[str, Any], log: Path, processes: int = 1, connected: bool = True
    ) -> None:
        self.name, self._log = f"{target} {dict(options)}", log
        ports = [_free_port()] * processes if connected else [_free_port() for _ in range(processes)]
        ranks = [(rank, processes) if connected else (0, 1) for rank in range(processes)]
        command = [sys.executable, str(Path(__file__).resolve()), target, json.dumps(options)]
        with log.open("a") as stderr:
            self._processes = [
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    env=os.environ | _environment(rank, world_size, port),
                )
                for (rank, world_size), port in zip(ranks, ports, strict=True)
            ]

    def turn(self) -> float:
        """The sum of the rates of its processes over one turn; the first call waits until they have warmed up."""
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write("turn\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise self._died() from None
        return sum(self._answer(process) for process in self._processes)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        for process in self._processes:
            process.wait()

    def __enter__(self) -> Rival:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _answer(self, process: subprocess.Popen[str]) -> float:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("rate "):
                return float(line.split()[1])
        raise self._died()

    def _died(self) -> RuntimeError:
        return RuntimeError(f"{self.name} ended; the end of {self._log}:\n{self._log.read_text()[-2000:]}")


def take_turns(rivals: Mapping[str, Rival], rounds: int) -> dict[str, list[float]]:
    """The rates of each rival in each round; all of them are closed afterwards."""
    with ExitStack() as stack:
        for rival in rivals.values():
            stack.enter_context(rival)
        turns = [{name: rival.turn() for name, rival in rivals.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in rivals}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": THREADS}
    return {name: str(value) for name, value in (places | names).items()}


def main(target: str, options: dict[str, Any]) -> None:
    """The process: warm up, then answer every line of the standard input with the rate of a turn."""
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo")
    module, _, function = target.partition(":")
    rates = getattr(importlib.import_module(module), function)(**options)
    next(rates)
    for _ in sys.stdin:
        print(f"rate {next(rates)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
