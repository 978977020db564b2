"""Where the workers run: in the calling process, or as a group of Ray Train that restarts after a failure."""

from __future__ import annotations

import datetime
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from raysys.errors import UserError
from raysys.nn.collectives import is_distributed, rank
from raysys.train.job import Job, choose_device, set_up_process

Emit = Callable[[dict[str, Any]], None]
T = TypeVar("T")

STOP_FILE = "stop"
FAILURE_FILE = "failure.json"
_POLL_SECONDS = 0.5
_RAY_JOB = (
    "RAY_JOB_CONFIG_JSON_ENV_VAR"  # the whole name of the variable that Ray sets for the driver of a submitted job
)


@dataclass(frozen=True)
class Worker:
    """What a worker function gets: the job, its device, where events go, and whether somebody asked to stop.

    `emit` does something on rank 0 only. `stop_wanted` may be asked every step; the ranks have to agree on the answer.
    """

    job: Job
    device: torch.device
    emit: Emit
    stop_wanted: Callable[[], bool]


def launch(job: Job, work: Callable[[Worker], T], emit: Emit, can_stop: bool = True) -> T:
    """Run `work` on every rank, where the trainer settings say, and return what it returned on rank 0.

    can_stop: SIGTERM makes `stop_wanted` true instead of ending the process, as does a file `stop` in the job's folder.
    Raises UserError for what a user can mend, on whichever rank it happened, and for workers that kept failing.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in (STOP_FILE, FAILURE_FILE):
        (job.folder / name).unlink(missing_ok=True)
    run = _in_process
    if job.trainer.kind == "ray":
        _connect(job)  # before SIGTERM is handled: ray.init sets a handler of its own
        run = _on_ray
    if not can_stop:
        return run(job, work, emit)
    with _sigterm_asks_to_stop(job.folder / STOP_FILE):
        return run(job, work, emit)


def relative_in_ray_job(folders: dict[str, str]) -> str | None:
    """A warning where this is the driver of `ray job submit` and a folder (by its key) is relative, else None.

    It would stand in the copy of the working directory that Ray makes for the job, and deletes.
    """
    relative = [f"{key}={path}" for key, path in folders.items() if "://" not in path and not Path(path).is_absolute()]
    if _RAY_JOB not in os.environ or not relative:
        return None
    return (
        f"{' and '.join(relative)} will be in Ray's temporary copy of the working directory, and vanish with it: "
        "give an absolute path on a file system that all nodes share"
    )


def _in_process(job: Job, work: Callable[[Worker], T], emit: Emit) -> T:
    """One rank in the calling process, without Ray."""
    device = choose_device(job.trainer.device)
    with _own_process_group(device):
        return _work(job, work, device, emit)


def _work(job: Job, work: Callable[[Worker], T], device: torch.device, emit: Emit) -> T:
    set_up_process(job.trainer.cpus_per_worker)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return work(Worker(job, device, emit, _stop_file_watch(job.folder / STOP_FILE)))


def _connect(job: Job) -> None:
    """Join the cluster that the settings or RAY_ADDRESS name, or start one; nothing is done where Ray runs already."""
    import ray

    if not ray.is_initialized():
        debug = bool(job.config.get("debug"))
        level = logging.INFO if debug else logging.ERROR
        ray.init(address=job.trainer.address, log_to_driver=debug, logging_level=level, include_dashboard=False)
    total = ray.cluster_resources()
    for name, amount in _resources(job).items():
        needed, found = amount * job.trainer.workers, total.get(name, 0)
        if found < needed:  # Ray would wait for what is missing without a word
            raise UserError(
                f"{job.trainer.workers} workers need {needed:g} {name}, Ray has {found:g}",
                "lower trainer.workers or trainer.cpus_per_worker, or add nodes",
            )


def _resources(job: Job) -> dict[str, float]:
    return {"CPU": job.trainer.cpus_per_worker} | ({"GPU": 1} if job.trainer.device == "cuda" else {})


def _on_ray(job: Job, work: Callable[[Worker], T], emit: Emit) -> T:
    """A group of Ray Train workers; a dead or hung one restarts the group, and `work` finds its newest checkpoint."""
    import ray

    mailbox = _mailbox()
    # Ray Train blocks: in the main thread signals would wait, and it would take Ctrl-C for itself.
    fitting = _in_background(_trainer(job, work, mailbox).fit)
    try:
        while not wait([fitting], timeout=_POLL_SECONDS).done:
            for event in ray.get(mailbox.take.remote()):
                emit(event)
    except BaseException:
        (job.folder / STOP_FILE).touch()  # nobody waits for the workers any longer
        raise
    for event in ray.get(mailbox.take.remote()):
        emit(event)
    try:
        outcome = fitting.result().return_value
    except Exception as error:
        raise _failure(job.folder) or _workers_failed(error, job.trainer.max_failures) from error
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def _trainer(job: Job, work: Callable[[Worker], Any], mailbox: Any) -> Any:
    """The TorchTrainer of a job; its time-outs are settings of Ray Train that only the environment can give."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    settings = job.trainer
    os.environ.update(
        RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S=str(settings.hang_timeout_s),
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=str(settings.start_timeout_s),
        RAY_TRAIN_COLLECTIVE_TIMEOUT_S=str(settings.hang_timeout_s),
    )
    use_gpu = settings.device == "cuda"
    # What a worker raises is retried; what keeps workers from starting would be for ever, without a limit.
    failures: dict[str, Any] = {"max_failures": settings.max_failures, "controller_failure_limit": 3}
    return TorchTrainer(
        _ray_worker,
        train_loop_config={"job": job, "work": work, "mailbox": mailbox},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(settings.hang_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=use_gpu, resources_per_worker=_resources(job)
        ),
        run_config=RunConfig(
            name=f"{job.folder.name}-{time.time_ns()}",
            storage_path=str(job.folder / "ray"),
            failure_config=FailureConfig(**failures),
        ),
    )


def _ray_worker(config: dict[str, Any]) -> Any:
    """The train function of Ray Train. An error of the user is returned, not raised: a restart would only repeat it.

    The rank that has it leaves a file, and the others, which may wait for that rank in a collective for ever, return too.
    """
    import ray
    import ray.train

    job: Job = config["job"]
    local_rank = ray.train.get_context().get_local_rank()
    last: list[Any] = []

    def emit(event: dict[str, Any]) -> None:
        if rank() == 0:
            last[:] = [config["mailbox"].put.remote({"time": time.time(), **event})]

    working = _in_background(lambda: _work(job, config["work"], choose_device(job.trainer.device, local_rank), emit))
    try:
        while not wait([working], timeout=_POLL_SECONDS).done:
            if (failure := _failure(job.folder)) is not None:
                return failure
        return working.result()
    except UserError as error:
        _leave_failure(job.folder, error)
        return error
    except Exception:
        if (failure := _failure(job.folder)) is not None:  # this one only follows from it: the connection was closed
            return failure
        raise
    finally:
        ray.get(last)  # the events of a worker that exits too early would be lost


def _leave_failure(folder: Path, error: UserError) -> None:
    temporary = folder / f"{FAILURE_FILE}.{rank()}"
    temporary.write_text(json.dumps({"message": error.message, "hint": error.hint}))
    temporary.replace(folder / FAILURE_FILE)


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


def _in_background(function: Callable[[], T]) -> Future[T]:
    """The future of a function that a daemon thread runs: a thread that never returns keeps no process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class _Mailbox:
    """An actor that takes the events of rank 0: a list that is emptied when read."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events


def _mailbox() -> Any:
    """A mailbox on this node, so that it does not go down with a worker's."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()


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
