"""The processes of the `gloo` fixture: each takes a function and its arguments and runs it within a process group.

Run as a script: `python gloo_worker.py ADDRESS COUNT`. It imports what takes long once and then forks. Functions are named
by file and name, so that test files need not be a package.
"""

import datetime
import importlib.util
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Client
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec.distributed import collective_utils, comm


def load(path: str):
    """The module of a test file, executed once."""
    name = f"worker_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def run(job: dict, rank: int):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), **job["environment"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job['rendezvous']}",
        rank=rank,
        world_size=job["world_size"],
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        return getattr(load(job["file"]), job["function"])(*job["arguments"])
    finally:
        dist.destroy_process_group()
        # What TorchRec remembers of the first process group: ranks with different pasts would wait for each other.
        collective_utils._INITIALIZED = False
        comm._INTRA_PG = comm._CROSS_PG = None


def serve(address: str, rank: int) -> None:
    torch.set_num_threads(1)
    with Client(address) as connection:
        connection.send(rank)
        while True:
            try:
                job = connection.recv()
            except EOFError:
                return
            try:
                answer = ("result", run(job, rank))
            except Exception:
                answer = ("error", traceback.format_exc())
            connection.send_bytes(pickle.dumps(answer))  # `send` would pass tensors through shared memory


def main(address: str, count: int) -> None:
    for rank in range(1, count):
        if os.fork() == 0:
            serve(address, rank)
            return
    serve(address, 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
