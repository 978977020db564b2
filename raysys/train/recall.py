"""Retrieval measured over the full catalogue: where in the order of all items the item of each positive row stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.data.catalogue import NO_ROW, CatalogueItems, KeyLookup
from raysys.data.columns import ranges
from raysys.data.join import take_rows
from raysys.errors import UserError
from raysys.models.retrieval.base import RetrievalModel, scores_in_blocks
from raysys.models.retrieval.baselines import CountBaselines
from raysys.nn.collectives import (
    communication_device,
    gather_rows,
    gather_with_grad,
    global_max,
    on_first_rank,
    rank,
    world_size,
)
from raysys.schema import FeatureSchema

_SCORES = 1 << 25  # of a block of users against all items: 128 MiB
_RESAMPLES = 1000
POPULARITY = {"0 to 5": (0, 5), "6 to 20": (6, 20), "above 20": (21, None)}
"""Items by how often they are the item of a positive training row."""


class CatalogueEvaluator:
    """Ranks the item of every positive row among all items; exact on any number of ranks.

    An item with the same score as the wanted one counts as above it, so that constant scores give a recall of 0. The items
    that the row already has (`exclude`) are left out, the wanted one never. baselines: ranked beside the model, from `exclude`.
    """

    def __init__(
        self,
        model: RetrievalModel,
        items: CatalogueItems,
        schema: FeatureSchema,
        at: Sequence[int],
        exclude: str | None,
        device: torch.device,
        batch_size: int,
        baselines: CountBaselines | None = None,
    ) -> None:
        self._model, self._items, self._at, self._exclude = model, items, sorted(at), exclude
        self._task = schema.tasks.index(items.task)
        self._lookup = KeyLookup(items.keys).to(device)
        self._vectors = encode_catalogue(model, items, device, batch_size)  # [N, K]
        self._baselines = baselines
        self._names = [items.task] + ([f"{items.task}: {name}" for name in _names(baselines)] if baselines else [])
        self._found: list[Tensor] = [torch.empty(0, 2 + len(self._names), dtype=torch.int64)]
        self._shown = torch.zeros(len(self._names), len(self._at), len(items), dtype=torch.bool)

    def update(self, batch: Batch) -> None:
        """Rank the items of one batch, which is on the device of the model (collective)."""
        users = self._model.encode_users(self._model.embed(batch))
        wanted = (batch.weight[:, self._task] > 0) & (batch.labels[:, self._task] > 0)
        keys = batch.extra[self._items.key]
        assert isinstance(keys, Tensor)
        target = self._lookup(keys)
        if (wanted & (target == NO_ROW)).any():
            key = int(keys[wanted & (target == NO_ROW)][0])
            raise UserError(f"{self._items.key} {key} of an evaluated row is not in the catalogue", "add its row")
        rows = wanted.nonzero()[:, 0]
        for block in rows.split(max(1, _SCORES // len(self._items))):
            self._rank(batch, block, users[block], target[block])

    def compute(self) -> dict[str, Any]:
        """{"tasks": {task: metrics}, "slices": {"item popularity": {range: {task: metrics}}}}, the same on every rank."""
        rows = gather_rows(torch.cat(self._found))
        shown = global_max(self._shown.byte().to(communication_device())).cpu()
        return on_first_rank(lambda: self._report(rows, shown.bool().numpy()))

    def predictions(self) -> pa.Table:
        """This rank's rows: example_id and, for the task and each baseline, the rank of the row's item from 1."""
        rows = torch.cat(self._found).numpy()
        columns = {f"{name}_rank": rows[:, 2 + place] for place, name in enumerate(self._names)}
        return pa.table({"example_id": rows[:, 0], **columns})

    def _rank(self, batch: Batch, rows: Tensor, users: Tensor, target: Tensor) -> None:
        history, length = _lists(batch, self._exclude, rows)
        known = self._lookup(history.to(rows.device))
        owner = torch.repeat_interleave(torch.arange(len(rows)), length).to(rows.device)
        inside = known != NO_ROW
        out = torch.stack([owner[inside], known[inside]])
        ranks = []
        for place, scores in enumerate(self._scores(users, known.cpu(), length)):
            scores = scores.float()
            if not scores.isfinite().all():
                raise UserError("a score is not finite", "the model diverged: lower the learning rates")
            own = scores.gather(1, target[:, None])
            scores = scores.index_put((out[0], out[1]), scores.new_tensor(-torch.inf)).scatter(1, target[:, None], own)
            ranks.append((scores >= own).sum(1))
            best = scores.topk(min(self._at[-1], scores.shape[1])).indices.cpu()
            for column, k in enumerate(self._at):
                self._shown[place, column, best[:, :k].flatten()] = True
        found = torch.stack([batch.example_id[rows], target, *ranks], 1)
        self._found.append(found.cpu())

    def _scores(self, users: Tensor, history: Tensor, length: Tensor) -> Iterator[Tensor]:
        yield scores_in_blocks(self._model, users, self._vectors)
        if self._baselines is not None:
            inside = history != NO_ROW
            owner = torch.repeat_interleave(torch.arange(len(length)), length)
            count = torch.bincount(owner[inside], minlength=len(length))
            for scores in self._baselines.scores(history[inside].numpy(), count.numpy()).values():
                yield torch.from_numpy(np.array(scores)).to(users.device)

    def _report(self, rows: Tensor | None, shown: NDArray[np.bool_]) -> dict[str, Any]:
        assert rows is not None  # rank 0
        found = rows.numpy()
        counts = self._items.counts[found[:, 1]]
        tasks, slices = {}, dict[str, dict[str, Any]]()
        for place, name in enumerate(self._names):
            ranks = found[:, 2 + place]
            tasks[name] = rank_metrics(ranks, self._at)
            tasks[name] |= {f"coverage@{k}": float(shown[place, i].mean()) for i, k in enumerate(self._at)}
            tasks[name] |= {"rows": len(ranks)}
            for label, (low, high) in POPULARITY.items():
                part = ranks[(counts >= low) & (counts <= (counts.max(initial=0) if high is None else high))]
                slices.setdefault(label, {})[name] = {**rank_metrics(part, self._at), "rows": len(part)}
        return {"tasks": tasks, "slices": {"item popularity": slices}}


def rank_metrics(ranks: NDArray[np.int64], at: Sequence[int]) -> dict[str, float]:
    """Means over rows of recall@K = [r ≤ K], NDCG@K = [r ≤ K] / log2(r + 1) and MRR = 1 / r, r the rank from 1 of the one item."""
    values: dict[str, NDArray[Any]] = {f"recall@{k}": ranks <= k for k in at}
    values |= {f"ndcg@{k}": (ranks <= k) / np.log2(ranks + 1) for k in at}
    values |= {"mrr": 1 / ranks}
    return {name: float(value.mean()) if len(ranks) else float("nan") for name, value in values.items()}


def rank_intervals(ranks: NDArray[np.int64], at: Sequence[int], seed: int = 0) -> dict[str, tuple[float, float]]:
    """95% bootstrap intervals of `rank_metrics` over rows, from 1,000 resamples."""
    rng = np.random.default_rng(seed)
    drawn = [rank_metrics(ranks[rng.integers(0, len(ranks), len(ranks))], at) for _ in range(_RESAMPLES)]
    low, high = ({name: float(np.quantile([d[name] for d in drawn], q)) for name in drawn[0]} for q in (0.025, 0.975))
    return {name: (low[name], high[name]) for name in low}


@torch.no_grad()
def encode_catalogue(model: RetrievalModel, items: CatalogueItems, device: torch.device, batch_size: int) -> Tensor:
    """The vectors of all items [N, K], every rank computing its share (collective)."""
    share = -(-len(items) // world_size())
    own = (torch.arange(share) + rank() * share).clamp(max=len(items) - 1)
    parts = [
        model.encode_items(model.embed(take_rows(items.batch, rows).to(device)))
        for rows in own.split(max(1, batch_size // world_size()))
    ]
    return gather_with_grad(torch.cat(parts))[: len(items)]


def _lists(batch: Batch, column: str | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values and lengths of these rows' lists, on the CPU."""
    if column is None:
        return torch.empty(0, dtype=torch.int64), torch.zeros(len(rows), dtype=torch.int64)
    lists = batch.extra[column]
    assert isinstance(lists, KeyedJaggedTensor)
    start, length = lists.offsets().cpu()[:-1][rows.cpu()], lists.lengths().cpu()[rows.cpu()].long()
    places = ranges(start.long().numpy(), length.numpy())
    return lists.values().cpu()[torch.from_numpy(places)], length


def _names(baselines: CountBaselines) -> list[str]:
    nothing = np.empty(0, np.int64)
    return list(baselines.scores(nothing, nothing))
