"""raysys itself as one of the rivals: Parquet → reader → Ray Train workers → metrics, in turns with the others."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench_rival import THREADS, Rival

from raysys.config import compose
from raysys.data.log import ParquetLog, split_path
from raysys.data.reader import Reader
from raysys.data.transforms import Transforms
from raysys.schema import FeatureSchema
from raysys.train.launch import Worker, launch
from raysys.train.loop import TrainLoop
from raysys.train.trainer import Prepared, fit, prepare

EXPERIMENTS = {"dlrm": "criteo_dlrm", "dcn": "criteo_dcnv2", "dhen": "criteo_dhen"}
SETTLE = 3
"""Steps at the start of a turn that are not timed: their batches were read while others had their turn."""
PATIENCE_S = 600


@dataclass(frozen=True)
class Run:
    """A training run to be timed in `rounds` turns of `steps` steps, and one turn before to warm up."""

    model: str
    workers: int
    data: str
    folder: Path
    batch_size: int  # rows of a worker
    steps: int
    rounds: int
    on_ray: bool = True  # otherwise one worker in this process

    def prepare(self, run_id: str, keys: Mapping[str, Any]) -> Prepared:
        """What `jobs/train.py experiment=criteo_...` makes of it, with further config keys."""
        keys = {
            "experiment": EXPERIMENTS[self.model],
            "data.folder": self.data,
            "runs_folder": self.folder,
            "run_id": run_id,
            "trainer": "ray" if self.on_ray else "local",
            **({"trainer.workers": self.workers} if self.on_ray else {}),
            "trainer.cpus_per_worker": THREADS,
            "train.batch_size": self.batch_size * self.workers,
            **keys,
        }
        return prepare(compose([f"{key}={value}" for key, value in keys.items()]))

    def prepare_turns(self) -> Prepared:
        """The run that is timed: as many steps as the turns have, and a step event after each."""
        keys = {"train.log_every": self.steps, "train.max_steps": self.steps * (self.rounds + 1)}
        return self.prepare(f"{self.model}-{self.workers}", keys)


@dataclass(frozen=True)
class Timing:
    """The rates of raysys and its rivals by turn, without the first ones, and what the run said of itself."""

    rates: dict[str, list[float]]
    summary: dict[str, Any]
    facts: dict[str, Any]


def time_run(run: Run, rivals: Mapping[str, Rival]) -> Timing:
    """Train; every rival has its turn after each of the run's. The rivals are closed afterwards."""
    prepared = run.prepare_turns()
    turns: list[dict[str, float]] = []
    errors: list[RuntimeError] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            try:
                turns.append({name: rival.turn() for name, rival in rivals.items()})
            except RuntimeError as error:
                errors.append(error)  # raised when the run, which waits for this turn, has ended
            _go_ahead(prepared.job.folder, event["step"]).touch()

    work = partial(train_in_turns, plan=prepared.plan, steps=run.steps, rows=run.batch_size * run.workers)
    try:
        if run.on_ray:
            from ray import cloudpickle

            cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import what is in jobs/
        rates, summary = launch(prepared.job, work, listen)
    finally:
        for rival in rivals.values():
            rival.close()
    if errors:
        raise errors[0]
    sharding = sorted({table.sharding for table in prepared.plan.tables})
    flops, dense = prepared.facts["flops_per_row"], prepared.facts["parameters"]["dense"]
    facts = {"dense_parameters": dense, "flops_per_row": flops, "sharding": sharding}
    others = {name: [turn[name] for turn in turns[1:]] for name in rivals}
    return Timing({"raysys": rates[1:], **others}, summary, facts)


def train_in_turns(worker: Worker, plan: Any, steps: int, rows: int) -> tuple[list[float], dict[str, Any]]:
    """What every worker runs: the train loop, which after each step event waits for the rivals' turn.

    Gives the rows per second of each turn by the wall clock, metrics and logging included, and the loop's own summary.
    """
    rates: list[float] = []
    steps_done, started = 0, 0.0

    def stop_wanted() -> bool:
        """The loop asks after every step."""
        nonlocal steps_done, started
        steps_done += 1
        if steps_done == SETTLE:
            started = time.perf_counter()
        return worker.stop_wanted()

    def emit(event: dict[str, Any]) -> None:
        nonlocal steps_done
        if event["event"] == "step":
            rates.append((steps - SETTLE) * rows / (time.perf_counter() - started))
        worker.emit(event)
        if event["event"] == "step":
            _wait_for(_go_ahead(worker.job.folder, event["step"]))
            loop.timer.skip()
            steps_done = 0

    loop = TrainLoop(dataclasses.replace(worker, emit=emit, stop_wanted=stop_wanted), plan)
    loop.run()
    return rates, loop.summary()


def test_auc(run: Run, seed: int) -> float:
    """AUC on the test split after one epoch, as `jobs/train.py` reports it."""
    prepared = run.prepare(f"{run.model}-{run.workers}-seed-{seed}", {"seed": seed})
    return fit(prepared, []).metrics["test"]["label"]["auc"]


def _go_ahead(folder: Path, step: int) -> Path:
    return folder / f"turn_{step}"


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the rivals did not finish their turns: no {path} after {PATIENCE_S} s")
        time.sleep(0.002)


def read(data: str, batch_size: int) -> Iterator[float]:
    """Rows per second of a whole pass over the training split from Parquet to batches, anew in each turn."""
    schema = FeatureSchema.load(Path(data) / "schema.yaml")
    log = ParquetLog(split_path(data, "train"), schema)
    transforms = Transforms.fit(schema, log)
    while True:
        reader = Reader(log, transforms, batch_size)
        started = time.perf_counter()
        batches = sum(1 for _ in reader.epoch())
        assert batches == reader.steps_per_epoch
        yield log.num_rows / (time.perf_counter() - started)
