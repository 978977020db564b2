"""Raysys's train loop and a bare loop over the same ranking model, in turns within one process and one thread."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module

from raysys.config import Config
from raysys.data.batch import Batch
from raysys.models.outputs import Output
from raysys.train.launch import Worker, launch
from raysys.train.loop import TrainLoop
from raysys.train.trainer import Prepared

SETTLE = 3
"""Steps at the start of a turn that are not timed: what they read from memory the other loop has driven from the caches."""


@dataclass(frozen=True)
class Seconds:
    """Of one turn by the wall clock, and CPU time of the whole process: the reader's thread counts."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Seconds:
        """Readings of both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Seconds) -> Seconds:
        """What has passed."""
        return Seconds(self.wall - start.wall, self.cpu - start.cpu)


@dataclass(frozen=True)
class Turn:
    """What both loops took for the same number of steps."""

    raysys: Seconds
    bare: Seconds


class BareLoop:
    """embed → interact → predict → cross-entropy → backward → fused AdamW, on batches that stay in memory.

    The tables are TorchRec's with fused Adagrad, whole, without all that several workers need: DDP, the objective's masks
    and sums over ranks, metrics, checks, timers. An ensemble's loss has its three terms, without what is only watched.
    """

    def __init__(self, prepared: Prepared, batches: Sequence[Batch]) -> None:
        job = prepared.job
        optimizers = job.config["train"]["optimizers"]
        holder = nn.Module()
        holder.model = job.model("meta")  # under this name the plan knows the tables
        keys = {key: optimizers["sparse"][key] for key in ("eps",)} | {"learning_rate": optimizers["sparse"]["lr"]}
        fused = {"optimizer": EmbOptimType.EXACT_ADAGRAD, **keys}
        self.sharded = DistributedModelParallel(
            holder,
            device=torch.device("cpu"),
            plan=prepared.plan,
            sharders=[EmbeddingBagCollectionSharder({**fused}), EmbeddingCollectionSharder({**fused})],
            init_data_parallel=False,
        )
        self.model: Any = get_unwrapped_module(self.sharded).model
        tables = self.sharded.fused_optimizer.params
        dense = [weight for name, weight in self.sharded.named_parameters() if name not in tables]
        rates = {key: optimizers["dense"][key] for key in ("lr", "eps", "betas", "weight_decay")}
        self.optimizer = torch.optim.AdamW(dense, fused=True, **rates)
        self._objective = job.config["objective"]
        self._batches = itertools.cycle(batches)

    def start_from(self, sharded: DistributedModelParallel) -> None:
        """Take the weights of raysys's model."""
        weights = dict(sharded.named_parameters())
        with torch.no_grad():
            for name, weight in self.sharded.named_parameters():
                weight.copy_(weights[name])

    def step(self) -> float:
        """Train on the next batch, and give the loss."""
        loss = self.backward()
        self.optimizer.step()
        return loss.item()

    def backward(self) -> Tensor:
        """Forward and backward on the next batch: gradients of the dense part, an update of the tables, and the loss."""
        self.optimizer.zero_grad()
        loss = self.loss(next(self._batches))
        loss.backward()
        return loss

    def loss(self, batch: Batch) -> Tensor:
        """The sum over the tasks of the mean cross-entropy."""
        output: Output = self.model.predict(self.model.interact(self.model.embed(batch)))
        fused = _cross_entropy(output.logits, batch)
        if not output.members:
            return fused
        logits = torch.stack([member.logits for member in output.members.values()])  # [M, B, T]
        first, second = logits.sigmoid(), logits
        centred = (first - first.mean(0)) * (second - second.mean(0))
        peers = centred.sum(0).mean(0).sum() / max(len(logits) - 1, 1)
        members = sum(_cross_entropy(member, batch) for member in logits.unbind()) / len(logits)
        share, weight = self._objective["fused_share"], self._objective["peer_weight"]
        return share * fused + (1 - share) * members + weight * peers


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, batch.labels) * batch.labels.shape[1]


def train_in_turns(prepared: Prepared, steps: int, rounds: int) -> list[Turn]:
    """`rounds` turns of `steps` steps each, of which the first `SETTLE` are not timed; one turn before them warms up.

    Raysys runs `TrainLoop` as `jobs/train.py` does, from Parquet through its reader to the windowed metrics of the step
    event that ends a turn. The bare loop has its turn within that event. Its batches are the first ones of the same reader.
    """
    return launch(prepared.job, lambda worker: _take_turns(worker, prepared, steps, rounds), lambda _: None, False)


def keys_of_turns(steps: int, rounds: int) -> Config:
    """Config keys of a run that `train_in_turns` can take: it ends after the last turn and evaluates nothing before."""
    total = steps * (rounds + 1)
    return {
        "train.log_every": steps,
        "train.max_steps": total,
        "train.epochs": total,
        "train.evaluate_every": 2 * total,
    }


def _take_turns(worker: Worker, prepared: Prepared, steps: int, rounds: int) -> list[Turn]:
    turns: list[Turn] = []
    steps_done, started = 0, Seconds.now()

    def stop_wanted() -> bool:
        """The loop asks after every step."""
        nonlocal steps_done, started
        steps_done += 1
        if steps_done == SETTLE:
            started = Seconds.now()
        return False

    def emit(event: dict[str, Any]) -> None:
        nonlocal steps_done
        if event["event"] != "step":
            return
        own = Seconds.now().since(started)
        turns.append(Turn(own, _bare_turn(bare, steps)))
        loop.timer.skip()
        steps_done = 0

    loop = TrainLoop(dataclasses.replace(worker, emit=emit, stop_wanted=stop_wanted), prepared.plan)
    bare = BareLoop(prepared, full_batches(loop, steps))
    bare.start_from(loop.model)
    loop.run()
    assert len(turns) == rounds + 1
    return turns[1:]


def _bare_turn(bare: BareLoop, steps: int) -> Seconds:
    for _ in range(SETTLE):
        bare.step()
    started = Seconds.now()
    for _ in range(steps - SETTLE):
        bare.step()
    return Seconds.now().since(started)


def full_batches(loop: TrainLoop, most: int) -> list[Batch]:
    """The first batches of the loop's reader, without padded ones."""
    read = (batch for batch, _ in itertools.islice(loop.reader.epoch(), most))
    return [batch for batch in read if bool((batch.example_id >= 0).all())]
