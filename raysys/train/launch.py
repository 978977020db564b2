"""Where the workers run: in the calling process, or as a group of Ray Train that restarts after a failure."""

from __future__ import annotations

import datetime
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from raysys.errors import UserError
from raysys.nn.collectives import is_distributed, rank
from raysys.train.job import Job, choose_device, limit_threads

Emit = Callable[[dict[str, Any]], None]
T = TypeVar("T")

STOP_FILE = "stop"
FAILURE_FILE = "failure.json"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Worker:
    """What a worker function gets: the job, its device, where events go, and whether somebody asked to stop.

    `emit` does something on rank 0 only. `stop_wanted` may be asked every step; the ranks have to agree on the answer.
    """

    job: Job
    device: torch.device
    emit: Emit
    stop_wanted: Callable[[], bool]


def launch(job: Job, work: Callable[[Worker], T], emit: Emit) -> T:
    """Run `work` on every rank, where the trainer settings say, and return what it returned on rank 0.

    SIGTERM, or a file named `stop` in the run folder, makes `stop_wanted` true. Raises UserError for what a user can mend,
    on whichever rank it happened, and for workers that kept failing.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in (STOP_FILE, FAILURE_FILE):
        (job.folder / name).unlink(missing_ok=True)
    with _sigterm_asks_to_stop(job.folder / STOP_FILE):
        return _in_process(job, work, emit) if job.trainer.kind == "local" else _on_ray(job, work, emit)


def _in_process(job: Job, work: Callable[[Worker], T], emit: Emit) -> T:
    """One rank in the calling process, without Ray."""
    device = choose_device(job.trainer.device)
    limit_threads(job.trainer.cpus_per_worker)
    with _own_process_group(device):
        return work(Worker(job, device, emit, _stop_file_watch(job.folder / STOP_FILE)))


def _on_ray(job: Job, work: Callable[[Worker], T], emit: Emit) -> T:
    """A group of Ray Train workers; a dead or hung one restarts the group, and `work` finds its newest checkpoint."""
    settings = job.trainer
    os.environ.update(
        RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S=str(settings.hang_timeout_s),
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=str(settings.start_timeout_s),
        RAY_TRAIN_COLLECTIVE_TIMEOUT_S=str(settings.hang_timeout_s),
    )
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    if not ray.is_initialized():
        ray.init(address=settings.address, log_to_driver=job.config.get("debug", False), include_dashboard=False)
    _check_resources(job)
    use_gpu = settings.device == "cuda"
    with _EventRelay(emit) as relay:
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={"job": job, "work": work, "relay": relay.actor},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(settings.hang_timeout_s)),
            scaling_config=ScalingConfig(
                num_workers=settings.workers, use_gpu=use_gpu, resources_per_worker=_resources(job)
            ),
            run_config=RunConfig(
                name=f"{job.folder.name}-{time.time_ns()}",
                storage_path=str((job.folder / "ray").resolve()),
                failure_config=FailureConfig(max_failures=settings.max_failures, controller_failure_limit=3),
            ),
        )
        try:
            outcome = trainer.fit().return_value
        except Exception as error:
            raise _failure(job.folder) or _workers_failed(error, settings.max_failures) from error
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def _ray_worker(config: dict[str, Any]) -> Any:
    """The train function of Ray Train. An error of the user is returned, not raised: a restart would only repeat it."""
    import ray
    import ray.train

    job: Job = config["job"]
    context = ray.train.get_context()
    if (failure := _failure(job.folder)) is not None:
        return failure
    device = choose_device(job.trainer.device, context.get_local_rank())
    limit_threads(job.trainer.cpus_per_worker)
    last: list[Any] = []

    def emit(event: dict[str, Any]) -> None:
        if rank() == 0:
            last[:] = [config["relay"].put.remote({"time": time.time(), **event})]

    try:
        outcome = config["work"](Worker(job, device, emit, _stop_file_watch(job.folder / STOP_FILE)))
    except UserError as error:
        (job.folder / FAILURE_FILE).write_text(json.dumps({"message": error.message, "hint": error.hint}))
        raise
    ray.get(last)  # the events of a worker that exits too early would be lost
    return outcome


def _failure(folder: Path) -> UserError | None:
    """The user's error that a worker has left, if any."""
    path = folder / FAILURE_FILE
    return UserError(**json.loads(path.read_text())) if path.exists() else None


def _workers_failed(error: Exception, max_failures: int) -> UserError:
    """The last line of what Ray says, which names the error; its wall of tracebacks is for --debug."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UserError(
        f"the workers failed, also after {max_failures} restarts: {lines[-1] if lines else type(error).__name__}",
        "--debug shows the whole traceback; resume=auto continues from the last checkpoint",
    )


def _resources(job: Job) -> dict[str, float]:
    return {"CPU": job.trainer.cpus_per_worker} | ({"GPU": 1} if job.trainer.device == "cuda" else {})


def _check_resources(job: Job) -> None:
    """Refuse a job that the cluster can never start: Ray would wait for the missing CPUs without a word."""
    import ray

    total = ray.cluster_resources()
    for name, amount in _resources(job).items():
        if total.get(name, 0) < amount * job.trainer.workers:
            raise UserError(
                f"{job.trainer.workers} workers need {amount * job.trainer.workers:g} {name}, Ray has {total.get(name, 0):g}",
                "lower trainer.workers or trainer.cpus_per_worker, or add nodes",
            )


class _EventRelay:
    """An actor that takes the events of rank 0, and a thread of the driver that hands them on."""

    def __init__(self, emit: Emit) -> None:
        import ray

        self.actor = ray.remote(num_cpus=0)(_Mailbox).remote()
        self._emit, self._done = emit, threading.Event()
        self._thread = threading.Thread(target=self._forward, daemon=True)

    def __enter__(self) -> _EventRelay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _forward(self) -> None:
        import ray

        done = False
        while not done:
            done = self._done.wait(_POLL_SECONDS)
            for event in ray.get(self.actor.take.remote()):
                self._emit(event)


class _Mailbox:
    """The actor's side: a list that is emptied when read."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events


def _stop_file_watch(path: Path) -> Callable[[], bool]:
    """A cheap question for every step: the file system is asked at most twice a second, by rank 0 alone."""
    asked_at, wanted = 0.0, False

    def wanted_now() -> bool:
        nonlocal asked_at, wanted
        if rank() == 0 and not wanted and time.monotonic() - asked_at > _POLL_SECONDS:
            asked_at, wanted = time.monotonic(), path.exists()
        return wanted

    return wanted_now


@contextmanager
def _sigterm_asks_to_stop(path: Path) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: path.touch())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _own_process_group(device: torch.device) -> Iterator[None]:
    """A process group of one rank, which the sharded tables need; one that the caller has made is used as it is."""
    if is_distributed():
        yield
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        timeout=datetime.timedelta(minutes=10),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
