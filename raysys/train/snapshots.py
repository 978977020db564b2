"""What the checkpoints of a retrieval run make of its catalogue and of rows of its splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raysys.data.catalogue import CatalogueItems, KeyLookup, positives
from raysys.data.columns import integers, whole
from raysys.models.retrieval.base import RetrievalModel
from raysys.objectives.hsnn import HSNNLoss
from raysys.train.checkpoint import list_checkpoints, verify_checkpoint
from raysys.train.export import open_run
from raysys.train.recall import encode_catalogue
from raysys.train.state import load_weights

_ROWS = 8192  # items that are encoded at a time


@dataclass(frozen=True)
class Queries:
    """Rows of a split. users: [Q, K]. own: [Q], the row of each one's item in the catalogue."""

    rows: pa.Table
    users: Tensor
    own: Tensor


class Snapshots:
    """A run that has ended, with its model at any of its checkpoints: first at the one that it keeps."""

    def __init__(self, folder: Path) -> None:
        self.job, self.record = open_run(folder)
        self._step = self.job.train_step("cpu").eval()
        assert self.job.resume is not None
        self.load(self.job.resume)

    @property
    def checkpoints(self) -> list[Path]:
        """All that the run still has, oldest first."""
        return list_checkpoints(self.job.checkpoints)

    @property
    def model(self) -> RetrievalModel:
        """As of the checkpoint that was loaded last: one module, whose weights are overwritten."""
        model = self._step.model
        assert isinstance(model, RetrievalModel)
        return model

    @property
    def catalogue(self) -> CatalogueItems:
        """All items."""
        items = self._step.objective.items
        assert isinstance(items, CatalogueItems)
        return items

    @property
    def temperature(self) -> float:
        """Of the assignment to nodes in the step of the checkpoint; of runs of `HSNNLoss`."""
        objective = self._step.objective
        assert isinstance(objective, HSNNLoss)
        return objective.temperature

    def load(self, checkpoint: Path) -> None:
        """Take the weights of a checkpoint, and the objective's schedule where it has one."""
        load_weights(checkpoint, self._step)
        step, total = (verify_checkpoint(path)["step"] for path in (checkpoint, self.checkpoints[-1]))
        after_step = getattr(self._step.objective, "after_step", None)
        if after_step is not None:
            after_step(step, total)

    def items(self) -> Tensor:
        """[N, K]."""
        return encode_catalogue(self.model, self.catalogue, torch.device("cpu"), _ROWS)

    @torch.no_grad()
    def queries(self, split: str, count: int, seed: int = 0) -> Queries:
        """At most `count` positive rows of a split, drawn at random."""
        task = self.catalogue.task
        rows = self.job.log(split).read(list(dict.fromkeys(self.job.schema.columns())))
        positive = np.flatnonzero(positives(rows, task))
        chosen = np.sort(np.random.default_rng(seed).permutation(positive)[:count])
        rows = rows.take(pa.array(chosen))
        batch = self.job.transforms.to_batch(rows)
        users = self.model.encode_users(self.model.embed(batch))
        own = KeyLookup(self.catalogue.keys)(torch.from_numpy(integers(whole(rows[self.catalogue.key]))))
        return Queries(rows, users, own)
