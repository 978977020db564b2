"""What one worker runs: steps, evaluation, checkpoints. The same code in-process, under Ray Train and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan

from raysys.data.batch import Batch
from raysys.data.reader import Position
from raysys.errors import UserError
from raysys.nn.collectives import rank, world_size
from raysys.train.best import BestSoFar
from raysys.train.checkpoint import checkpoint_path, remove_old, take_latest, verify_checkpoint
from raysys.train.evaluate import Evaluation, evaluate
from raysys.train.guard import StepGuard, Verdict
from raysys.train.job import seed_draws, step_seed
from raysys.train.launch import Worker
from raysys.train.optimizers import build_optimizers
from raysys.train.sharding import shard, unwrap
from raysys.train.state import load_state, save_state
from raysys.train.stream import BatchStream
from raysys.train.timing import StepTimer, TimedOptimizer
from raysys.train.window import Window


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; raised on all ranks at the same step, before anything is saved."""


class TrainLoop:
    """One worker's run. Every rank decides alike, because decisions follow from all-reduced metrics and flags."""

    def __init__(self, worker: Worker, plan: ShardingPlan) -> None:
        self.job, self.settings, self.device = worker.job, worker.job.train, worker.device
        self.emit, self._stop_wanted = worker.emit, worker.stop_wanted
        job, settings = self.job, self.settings
        self.reader = job.reader(job.log("train"), training=True, rank=rank(), world_size=world_size())
        self.total_steps = total_steps(self.reader.steps_per_epoch, settings.epochs, settings.max_steps)
        self.model = shard(
            job.train_step("meta"),
            plan,
            self.device,
            settings.optimizers,
            seed=job.seed,
            dense_parallel=settings.sharding.dense_parallel,
        )
        self.optimizers = build_optimizers(self.model, settings.optimizers, self.total_steps)
        self.step, self.position = 0, Position()
        self.best = BestSoFar(settings.early_stopping, job.schema, settings.retrieval)
        self.timer = StepTimer()
        self._guard, self._stopping = StepGuard(), False
        self._pipeline: TrainPipelineBase | TrainPipelineSparseDist | None = None
        self._has_valid = job.has_split("valid")
        self._saved: int | None = None  # the step of the newest checkpoint
        self.window = Window(job.schema if settings.retrieval is None else None, self.timer)

    def run(self) -> str:
        """Train, save the last checkpoint and return how it ended: finished, early_stopped or interrupted."""
        self.restore()
        status = self._run_steps()
        self.save(status)
        return status

    def _run_steps(self) -> str:
        if self.best.patience_is_over or (self._evaluation_due() and self._evaluate()):
            return "early_stopped"  # a run that was stopped between its last step and the evaluation after it
        stream = BatchStream(self.reader, self.position, self.settings.epochs, self.timer, self._augment())
        self._pipeline = self._make_pipeline(stream)
        self.model.train()
        while self.step < self.total_steps:
            seed_draws(step_seed(self.job.seed, rank(), self.step))
            outputs = self._pipeline.progress(stream)
            batch, self.position = stream.trained()
            self.step += 1
            self._tell_objective()
            self.window.update(outputs)
            self._check(self._guard.submit(self.step, outputs["losses"], self._stop_wanted(), batch))
            if self.step % self.settings.log_every == 0 or self.step == self.total_steps:
                self._log()
            if self._stopping:
                return "interrupted"  # the steps since the last event go on in the checkpoint
            if self._evaluation_due() and self._evaluate():
                return "early_stopped"
            if self._due(self.settings.checkpoint.every_steps):
                self.save("interval")
        return "finished"

    def restore(self) -> None:
        """Continue from the newest intact checkpoint of this run, or else from the one that the job names."""
        own = take_latest(self.job.checkpoints, self._warn)
        if own is not None:
            self.load(*own)
            self._saved = self.step
        elif self.job.resume is not None:
            self.load(self.job.resume, verify_checkpoint(self.job.resume))
        if self.step:
            self.emit({"event": "resumed", "step": self.step, "path": str(own[0] if own else self.job.resume)})
        self.window.start(self._rows())
        self._tell_objective()

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Become what a verified checkpoint holds, whose `state.json` is `state`."""
        load_state(path, state, self)
        self.step, self.position = state["step"], Position.from_dict(state["position"])
        self.best.restore(state["best"])

    def save(self, reason: str) -> None:
        """Write a checkpoint of this step unless there is one, and delete those that are no longer kept."""
        self._check(self._guard.settle())
        if self._saved == self.step:
            return
        path = checkpoint_path(self.job.checkpoints, self.step)
        started = time.perf_counter()
        size = save_state(path, self)
        self._saved = self.step
        if rank() == 0:
            remove_old(self.job.checkpoints, self.settings.checkpoint.keep, self.best.path(self.job.checkpoints))
        seconds = time.perf_counter() - started
        self.emit(
            {
                "event": "checkpoint",
                "step": self.step,
                "path": str(path),
                "bytes": size,
                "seconds": seconds,
                "reason": reason,
            }
        )
        self.timer.skip()

    def evaluate(self, split: str, **options: Any) -> Evaluation:
        """Metrics of one split with the current weights, the same on every rank."""
        ahead = self._pipeline if isinstance(self._pipeline, TrainPipelineSparseDist) else None
        if ahead is not None:
            ahead.detach()  # it has replaced the forward of the sharded tables
        self.model.eval()
        step = unwrap(self.model)
        teachers = getattr(step.objective, "teachers", None)
        evaluation = evaluate(step.model, self.job, split, self.device, teachers=teachers, **options)
        self.model.train()
        if ahead is not None:
            ahead.attach()
        self.emit({"event": "evaluation", "step": self.step, "epoch": self.position.epoch, **evaluation.event()})
        self.timer.skip()
        return evaluation

    def _augment(self) -> Callable[[Batch, int], Batch] | None:
        """What the objective does to the n-th batch from here on before it is looked up; pipelines ask for batches ahead."""
        augment, first = getattr(unwrap(self.model).objective, "augment", None), self.step
        if augment is None:
            return None
        return lambda batch, n: augment(batch, step_seed(self.job.seed, rank(), first + n))

    def _tell_objective(self) -> None:
        """Schedules of an objective follow from the step: it hears of each one, and of that which a resumed run begins with."""
        after_step = getattr(unwrap(self.model).objective, "after_step", None)
        if after_step is not None:
            after_step(self.step, self.total_steps)

    def _evaluate(self) -> bool:
        """Evaluate the validation split, keep the best checkpoint; True where patience has run out."""
        if self.best.update(self.evaluate("valid").tasks, self.step):
            self.save("best")
        return self.best.patience_is_over

    def _make_pipeline(self, stream: BatchStream) -> TrainPipelineBase | TrainPipelineSparseDist:
        optimizer = TimedOptimizer(self.optimizers, self.timer, first_step=self.step)
        self.model.register_forward_pre_hook(lambda *_: self.timer.mark("copy"))
        self.model.register_forward_hook(lambda *_: self._before_backward(stream))
        kind = self.settings.pipeline
        if kind == "sparse_dist" or (kind == "auto" and self.device.type == "cuda"):
            return TrainPipelineSparseDist(self.model, optimizer, self.device, pipeline_postproc=True)
        return TrainPipelineBase(self.model, optimizer, self.device)

    def _before_backward(self, stream: BatchStream) -> None:
        self.timer.mark("forward")
        stream.fetch_ahead()
        self.timer.mark("read")

    def _check(self, verdict: Verdict | None) -> None:
        """Take note of a wish to stop; raises where a loss was not finite, with the batch saved."""
        if verdict is None:
            return
        self._stopping |= verdict.stop
        if not verdict.not_finite:
            return
        path = self.job.folder / f"not_finite_step_{verdict.step}_rank_{rank()}.pt"
        torch.save(self._guard.batch, path)
        raise NonFiniteLossError(
            f"step {verdict.step}: {', '.join(verdict.not_finite)} is not finite; the batch is in {path}",
            "lower train.optimizers.*.lr, or clip gradients with train.optimizers.clip; no checkpoint was written",
        )

    def _log(self) -> None:
        self.emit(
            {
                "event": "step",
                "step": self.step,
                "epoch": self.position.epoch,
                "learning_rates": self.optimizers.learning_rates(),
                **self.window.take(self._rows(), self.total_steps - self.step),
            }
        )

    def summary(self) -> dict[str, Any]:
        """Medians over the step events: rows per second, and the seconds of a step by phase."""
        return self.window.summary()

    def _rows(self) -> int:
        """The rows of the log that are trained, over all epochs."""
        return self.position.epoch * self.reader.log.num_rows + sum(self.position.cursors)

    def _evaluation_due(self) -> bool:
        if not self._has_valid or self.step == 0 or self.best.evaluated == self.step:
            return False
        if self.step == self.total_steps:
            return self.best.settings is not None  # else only the end of the run needs it, which evaluates anyway
        if self.settings.evaluate_every is not None:
            return self._due(self.settings.evaluate_every)
        return self.position.step == self.reader.steps_per_epoch

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _warn(self, message: str) -> None:
        self.emit({"event": "warning", "step": self.step, "message": message})


def total_steps(steps_per_epoch: int, epochs: int, max_steps: int | None) -> int:
    """The steps of a whole run."""
    steps = steps_per_epoch * epochs
    return steps if max_steps is None else min(steps, max_steps)
