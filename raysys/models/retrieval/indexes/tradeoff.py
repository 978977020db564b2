"""How much is found for how much that is scored: of a hierarchy of two levels for all beams, and of inverted lists."""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.models.retrieval.hsnn import HSNN
from raysys.models.retrieval.indexes.hierarchical import Hierarchical, Level
from raysys.models.retrieval.indexes.index import IdMap, Ids, Vectors
from raysys.models.retrieval.indexes.threads import faiss_threads

_PAIRS = 1 << 19  # of a user with a node, that are scored at a time
_STEPS = 4  # widths of the first beam between one power of 2 and the next


@dataclass(frozen=True)
class Tradeoff:
    """Means over queries for beams (first[i], j + 1). first: [F]. scored, recall: [F, leaves]."""

    first: NDArray[np.int64]
    scored: NDArray[np.float64]
    recall: NDArray[np.float64]

    def cheapest(self, recall: float) -> tuple[int, int]:
        """The beams that score least among those with at least this recall; all nodes have a recall of 1."""
        return self._beams(np.where(self.recall >= recall - 1e-9, self.scored, np.inf).argmin())

    def best_within(self, scored: float) -> tuple[int, int]:
        """The beams of the highest recall among those that score no more than this; the narrowest where none does."""
        if not (self.scored <= scored).any():
            return 1, 1
        return self._beams(np.where(self.scored <= scored, self.recall, -np.inf).argmax())

    def _beams(self, place: np.intp) -> tuple[int, int]:
        row, column = np.unravel_index(place, self.scored.shape)
        return int(self.first[row]), int(column) + 1


@torch.inference_mode()
def tradeoff(model: HSNN, index: Hierarchical, users: Tensor, wanted: Ids) -> Tradeoff:
    """What `index.beam(users, k)` scores and finds of `wanted` [Q, k], the ids that scoring every item finds, by beams.

    An item is found where its leaf is reached, since the same network ranks it then: nodes alone are scored here. model:
    that of the index, which has two levels.
    """
    upper, lower = index.levels
    of_leaf = np.diff(lower.first)  # [leaves] items
    parent = np.repeat(np.arange(len(upper.path)), np.diff(upper.first))  # [leaves]
    hits = _hits(index, lower, wanted)  # [Q, leaves]
    above = _scores(model, users, upper, 1).argsort(axis=1)[:, ::-1]  # [Q, nodes] best first
    below = _scores(model, users, lower, 2)
    first = np.unique(np.floor(2 ** np.arange(0, np.log2(len(upper.path)), 1 / _STEPS)).astype(np.int64))
    first = np.unique(np.append(first, len(upper.path)))
    scored, recall = [], []
    for beam in first:
        reached = np.zeros((len(users), len(upper.path)), bool)
        np.put_along_axis(reached, above[:, :beam], True, 1)
        child = reached[:, parent]  # [Q, leaves]
        order = np.where(child, below, -np.inf).argsort(axis=1)[:, ::-1]
        taken = np.take_along_axis(child, order, 1)
        items = (of_leaf[order] * taken).cumsum(1)
        found = (np.take_along_axis(hits, order, 1) * taken).cumsum(1)
        scored.append((len(upper.path) + child.sum(1)[:, None] + items).mean(0))
        recall.append(found.mean(0) / wanted.shape[1])
    return Tradeoff(first, np.stack(scored), np.stack(recall))


class InvertedLists:
    """The items [N, K] in lists around centroids, by inner product: what `IVFPQ` has, without the codes.

    per_root: lists over √N. `IVFPQ` has 4; where few vectors may be compared, fewer centroids leave more of them to items.
    """

    def __init__(self, vectors: Vectors, per_root: float) -> None:
        dim = vectors.shape[1]
        self._quantizer = faiss.IndexFlatIP(dim)
        lists = max(1, min(round(per_root * len(vectors) ** 0.5), len(vectors) // 39))  # faiss asks for 39
        self._index = faiss.IndexIVFFlat(self._quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.max_points_per_centroid = 64
        with faiss_threads(1):
            self._index.train(vectors)
            self._index.add(vectors)
        self._sizes = np.array([self._index.invlists.list_size(number) for number in range(lists)])

    def scored(self, queries: Vectors) -> NDArray[np.int64]:
        """[Q, lists]: the centroids and items that each query is compared with, by the number of lists that it probes."""
        with faiss_threads(1):
            _, order = self._quantizer.search(queries, len(self._sizes))
        return len(self._sizes) + self._sizes[order].cumsum(1)

    def probes_within(self, queries: Vectors, scored: float) -> int:
        """The most lists whose mean cost is no more than this, at least 1."""
        return max(1, int((self.scored(queries).mean(0) <= scored).sum()))

    def search(self, queries: Vectors, k: int, probes: int) -> Ids:
        """[Q, k] rows of the items that are found, -1 where there are fewer."""
        self._index.nprobe = probes
        with faiss_threads(1):
            found: Ids = self._index.search(queries, k)[1]
        return found


def _scores(model: HSNN, users: Tensor, level: Level, depth: int) -> NDArray[np.float32]:
    """[Q, nodes]."""
    step = max(1, _PAIRS // max(len(users), 1))
    parts = [model.score_level(users, part, depth) for part in level.vectors.split(step)]
    scores: NDArray[np.float32] = torch.cat(parts, 1).numpy()
    return scores


def _hits(index: Hierarchical, leaves: Level, wanted: Ids) -> NDArray[np.int64]:
    """[Q, leaves]: how many of a query's wanted items are below each leaf."""
    ids = index.codes()["ids"]
    place = IdMap(ids, np.arange(len(ids))).find(wanted)
    leaf = np.searchsorted(leaves.first, place, side="right") - 1  # [Q, k]
    row = np.arange(len(wanted))[:, None] * len(leaves.path)
    counts = np.bincount((row + leaf).ravel(), minlength=len(wanted) * len(leaves.path))
    return counts.reshape(len(wanted), len(leaves.path))
