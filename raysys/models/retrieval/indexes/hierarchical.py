"""The index of an HSNN: a beam over the levels of its hierarchy, its network scoring nodes first and items last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from raysys.errors import UserError
from raysys.models.retrieval.hsnn import HSNN
from raysys.models.retrieval.indexes.folder import read_array, read_settings, write_index
from raysys.models.retrieval.indexes.index import (
    NO_ITEM,
    Ids,
    Vectors,
    check_ids,
    check_items,
    check_known,
    check_search,
)

_PAIRS = 1 << 16  # of a user with a node or an item, that are scored at a time


@dataclass(frozen=True)
class Level:
    """The nodes of one level that have items below them, in the order of their paths.

    path: [n] the path as one number. vectors: [n, K] pseudo-items. first: [n + 1], where the children of each node, or on
    the last level its items, begin among those of the level below.
    """

    path: NDArray[np.int64]
    vectors: Tensor
    first: NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """ids, scores: [Q, k], as `Index.search` gives them. scored: [Q], the nodes and items that were scored for each query."""

    ids: Ids
    scores: Vectors
    scored: Ids


class Hierarchical:
    """An `Index` whose queries are users' vectors of an HSNN and whose scores are those of its network (Fu et al. 2026).

    S_1 = the `beams[0]` best nodes of level 1; S_l = the `beams[l-1]` best children of S_{l-1}; then all items below S_L, at most
    `budget` of them, taken leaf by leaf in the order of the leaves' scores (ours). Every item has one path, from its own
    vector: a new item is found at once. The index belongs to one model, whose weights it must be saved and loaded with.
    """

    def __init__(
        self, model: HSNN, *, beams: Sequence[int] = (16, 64), budget: int | None = None, threads: int = 1
    ) -> None:
        if len(beams) != len(model.quantizer.nodes) or min(beams) < 1:
            raise UserError(
                f"beams is {list(beams)}",
                f"a number of nodes for each of {len(model.quantizer.nodes)} levels is expected",
            )
        if budget is not None and budget < 1:
            raise UserError(f"budget is {budget}", "a positive number of items is expected, or null for all")
        self.dim, self.threads, self.beams, self.budget = model.width, threads, tuple(beams), budget
        self._model = model.eval()
        self._sizes = [len(nodes) for nodes in model.quantizer.nodes]
        self._ids = np.zeros(0, np.int64)
        self._vectors = torch.zeros(0, model.width)
        self._codes = np.zeros((0, len(self._sizes)), np.int64)  # [N, L], sorted by path, then in the order they came
        self._levels = self._build()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def levels(self) -> tuple[Level, ...]:
        """Coarse first; the last one's `first` counts items, in the order of `codes`."""
        return tuple(self._levels)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """See `Index.add`. vectors: [n, K], as the model's `encode_items` gives them."""
        ids, vectors = check_items(ids, vectors, self.dim)
        there = np.isin(self._ids, ids)
        new = torch.from_numpy(vectors)
        codes = self._model.quantizer.codes(new).numpy()
        kept = torch.from_numpy(~there)
        self._replace(
            np.concatenate([self._ids[~there], ids]),
            torch.cat([self._vectors[kept], new]),
            np.concatenate([self._codes[~there], codes]),
        )

    def remove(self, ids: Ids) -> None:
        """See `Index.remove`."""
        ids = check_ids(ids)
        check_known(ids, np.isin(ids, self._ids))
        kept = ~np.isin(self._ids, ids)
        self._replace(self._ids[kept], self._vectors[torch.from_numpy(kept)], self._codes[kept])

    def search(self, queries: Vectors, k: int) -> tuple[Ids, Vectors]:
        """See `Index.search`. queries: [Q, K], as the model's `encode_users` gives them."""
        found = self.beam(queries, k)
        return found.ids, found.scores

    @torch.inference_mode()
    def beam(self, queries: Vectors, k: int) -> Found:
        """`search`, and how much was scored for it."""
        users = torch.from_numpy(check_search(queries, self.dim, k))
        step = max(1, _PAIRS // max(self._widest(), 1))
        parts = [self._beam(users[start : start + step], k) for start in range(0, len(users), step)]
        ids, scores, scored = ([part[i] for part in parts] for i in range(3))
        empty = (np.zeros((0, k), np.int64), np.zeros((0, k), np.float32), np.zeros(0, np.int64))
        return Found(
            *(np.concatenate([none, *values]) for none, values in zip(empty, (ids, scores, scored), strict=True))
        )

    def codes(self) -> dict[str, NDArray[np.int64]]:
        """`ids` [N], and `codes` [N, L], the node of each level that each item is under."""
        return {"ids": self._ids.copy(), "codes": self._codes.copy()}

    def save(self, folder: Path) -> None:
        """See `Index.save`: ids.npy, vectors.npy and codes.npy; the model is its bundle's."""

        def write(partial: Path) -> None:
            np.save(partial / "ids.npy", self._ids)
            np.save(partial / "vectors.npy", self._vectors.numpy())
            np.save(partial / "codes.npy", self._codes)

        settings: dict[str, Any] = {"beams": list(self.beams), "budget": self.budget, "dim": self.dim}
        write_index(folder, Hierarchical, settings, write)

    @classmethod
    def load(cls, folder: Path, threads: int = 1, *, model: HSNN) -> Self:
        """See `Index.load`. model: the one that it was built with; items that it would put elsewhere are a UserError."""
        settings = read_settings(folder, Hierarchical)
        settings.pop("dim")
        index = cls(model, **settings, threads=threads)
        ids, vectors, codes = (read_array(folder / f"{name}.npy") for name in ("ids", "vectors", "codes"))
        if (
            vectors.shape[1:] != (model.width,)
            or (model.quantizer.codes(torch.from_numpy(vectors)).numpy() != codes).any()
        ):
            raise UserError(f"{folder / 'codes.npy'} is not of this model", "index and model are published together")
        index._replace(ids, torch.from_numpy(vectors), codes)
        return index

    def _replace(self, ids: Ids, vectors: Tensor, codes: NDArray[np.int64]) -> None:
        order = np.lexsort((*codes.T[::-1],)) if len(ids) else np.zeros(0, np.int64)  # stable: first come, first
        self._ids, self._codes = ids[order], codes[order]
        self._vectors = vectors[torch.from_numpy(order)]
        self._levels = self._build()

    def _build(self) -> list[Level]:
        """Levels of existing prefixes only."""
        levels, below = [], np.arange(len(self._ids))
        path = np.zeros(len(self._ids), np.int64)
        starts = []
        for code, size in zip(self._codes.T, self._sizes, strict=True):
            path = path * size + code
            starts.append(np.flatnonzero(np.append(True, path[1:] != path[:-1]))[: len(below)])
        for depth, start in enumerate(starts):
            lower = starts[depth + 1] if depth + 1 < len(starts) else below
            first = np.append(np.searchsorted(lower, start), len(lower))
            prefix = torch.from_numpy(self._codes[start, : depth + 1])
            levels.append(Level(start, self._model.quantizer.pseudo_items(prefix), first))
        return levels

    def _widest(self) -> int:
        """The most nodes or items that one query can ask for at a time."""
        widths = [len(self._levels[0].path)]
        for level, beam in zip(self._levels, self.beams, strict=True):
            children = np.sort(np.diff(level.first))[::-1][:beam]
            widths.append(int(children.sum()))
        return max(widths)

    def _beam(self, users: Tensor, k: int) -> tuple[Ids, Vectors, Ids]:
        rows = len(users)
        chosen = np.broadcast_to(np.arange(len(self._levels[0].path)), (rows, len(self._levels[0].path)))
        scored = np.zeros(rows, np.int64)
        for depth, (level, beam) in enumerate(zip(self._levels, self.beams, strict=True), 1):
            scores = self._score(users, level.vectors, chosen, depth)
            scored += (chosen >= 0).sum(1)
            best = scores.topk(min(beam, scores.shape[1]), 1)
            nodes = np.take_along_axis(chosen, best.indices.numpy(), 1)
            nodes = np.where(best.values.numpy() == -np.inf, -1, nodes)
            chosen = _children(nodes, level.first)
        if self.budget is not None:
            chosen = chosen[:, : self.budget]
        scores = self._score(users, self._vectors, chosen, 0)
        scored += (chosen >= 0).sum(1)
        best = scores.topk(min(k, scores.shape[1]), 1)
        ids = np.full((rows, k), NO_ITEM, np.int64)
        values = np.full((rows, k), -np.inf, np.float32)
        width = best.values.shape[1]
        values[:, :width] = best.values.numpy()
        items = np.take_along_axis(chosen, best.indices.numpy(), 1)
        if len(self):
            ids[:, :width] = np.where(values[:, :width] == -np.inf, NO_ITEM, self._ids[items])
        return ids, values, scored

    def _score(self, users: Tensor, vectors: Tensor, chosen: NDArray[np.int64], level: int) -> Tensor:
        """[R, n] scores of each user's own nodes or items (-1: none, which scores -inf)."""
        places = torch.from_numpy(np.maximum(chosen, 0))
        if not len(vectors):
            return torch.full(places.shape, -torch.inf)
        scores = self._model.score_own(users, vectors[places], level)
        return scores.masked_fill(torch.from_numpy(chosen < 0), -torch.inf)


def volatility(before: Hierarchical, after: Hierarchical) -> list[float]:
    """By level, the share of the items of both snapshots whose node changed; NaN where they share none."""
    old, new = before.codes(), after.codes()
    _, a, b = np.intersect1d(old["ids"], new["ids"], return_indices=True)
    changed = old["codes"][a] != new["codes"][b]
    return [float(level.mean()) if len(level) else float("nan") for level in changed.T]


def _children(nodes: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.int64]:
    """[R, n] nodes (-1: none) → [R, m] what is below them, in the order of the nodes, -1 at the end."""
    there = nodes >= 0
    start = np.where(there, first[np.maximum(nodes, 0)], 0)
    length = np.where(there, first[np.maximum(nodes, 0) + 1], 0) - start
    ends = np.cumsum(length, 1)  # [R, n]
    width = int(ends[:, -1].max(initial=0)) if nodes.shape[1] else 0
    column = np.arange(width)
    # Which node each column belongs to: rows are put one above the other on a line, on which all ends are sorted.
    shift = np.arange(len(nodes))[:, None] * (width + 1)
    line = np.searchsorted((ends + shift).ravel(), (column + shift).ravel(), side="right")
    node = line.reshape(len(nodes), width) - np.arange(len(nodes))[:, None] * nodes.shape[1]
    node = np.minimum(node, nodes.shape[1] - 1)
    offset = column - np.take_along_axis(ends - length, node, 1)
    found = np.take_along_axis(start, node, 1) + offset
    return np.where(column < ends[:, -1:], found, -1)
