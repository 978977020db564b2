"""The sparse graph of Online Matching: clusters of users, and the few items that each may be offered.

Yi et al., "Online Matching: A Real-time Bandit System for Large-scale Recommendations" (RecSys 2023, arXiv 2307.15893). How
ids of clusters last, how items are put in between rebuilds, and the matching of old to new clusters are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysys.data.columns import ranges
from raysys.data.hashing import mix, spread
from raysys.errors import check_count
from raysys.models.retrieval.indexes.index import Ids, Vectors, check_items

NO_CLUSTER = -1
"""Stands for no cluster, where a row has fewer than others."""


@dataclass(frozen=True)
class Graph:
    """C clusters with E edges to items, sorted by cluster, then by item; never changed.

    clusters: [C] ascending ids that a cluster keeps from one graph to the next. centroids: [C, D], of length 1. items: [E];
    those of cluster c are `items[offsets[c] : offsets[c + 1]]`. version: larger for every later graph. next_cluster: no cluster ever had this id
    or a larger one.
    """

    version: int
    next_cluster: int
    clusters: Ids
    centroids: Vectors
    offsets: NDArray[np.int64]
    items: Ids

    @property
    def edge_clusters(self) -> Ids:
        """The cluster's id of each edge [E]."""
        return np.repeat(self.clusters, np.diff(self.offsets))

    def part(self, shard: int, shards: int) -> Graph:
        """The clusters of one shard, with their edges."""
        mine = shard_of(self.clusters, shards) == shard
        sizes = np.diff(self.offsets)
        return Graph(
            self.version,
            self.next_cluster,
            self.clusters[mine],
            self.centroids[mine],
            _offsets(sizes[mine]),
            self.items[np.repeat(mine, sizes)],
        )


def shard_of(clusters: Ids, shards: int) -> NDArray[np.int64]:
    """The shard [n] of each cluster [n], in [0, shards): a hash of its id."""
    return spread(mix(clusters.astype(np.uint64)), shards)


def insert_items(graph: Graph, items: Ids, vectors: Vectors, clusters_per_item: int) -> Graph:
    """The next version, with edges of new items [n] to the clusters of largest <centroid, v>, vectors [n, D].

    They come on top of a cluster's W until the next rebuild. An item that is there already gets the edges that it lacks.
    """
    check_count("clusters_per_item", clusters_per_item)
    items, vectors = check_items(items, vectors, graph.centroids.shape[1])
    clusters_per_item = min(clusters_per_item, len(graph.clusters))
    scores = vectors @ graph.centroids.T  # [n, C]
    best = np.argpartition(-scores, clusters_per_item - 1, axis=1)[:, :clusters_per_item]
    rows = np.concatenate([np.repeat(np.arange(len(graph.clusters)), np.diff(graph.offsets)), best.ravel()])
    edges = np.unique(np.stack([rows, np.concatenate([graph.items, np.repeat(items, clusters_per_item)])]), axis=1)
    return sorted_graph(graph.version + 1, graph.next_cluster, graph.clusters, graph.centroids, edges[0], edges[1])


def join_graphs(parts: Sequence[Graph]) -> tuple[Graph, NDArray[np.int64]]:
    """The graph that was cut into parts of one version, and where each of its edges [E] stands among those of the parts."""
    versions = {part.version for part in parts}
    if len(versions) != 1:
        raise ValueError(f"parts of versions {sorted(versions)}, one is expected")
    clusters = np.concatenate([part.clusters for part in parts])
    sizes = np.concatenate([np.diff(part.offsets) for part in parts])
    order = np.argsort(clusters)
    edges = ranges(_offsets(sizes)[:-1][order], sizes[order])
    items = np.concatenate([part.items for part in parts])[edges]
    centroids = np.concatenate([part.centroids for part in parts])[order]
    next_cluster = max(part.next_cluster for part in parts)
    return Graph(versions.pop(), next_cluster, clusters[order], centroids, _offsets(sizes[order]), items), edges


def sorted_graph(
    version: int, next_cluster: int, clusters: Ids, centroids: Vectors, rows: NDArray[np.int64], items: Ids
) -> Graph:
    """A graph of edges (row, item) in any order, with clusters in the order of their ids."""
    order = np.argsort(clusters)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    rows = rank[rows]
    edges = np.lexsort((items, rows))
    offsets = _offsets(np.bincount(rows, minlength=len(clusters)))
    return Graph(version, next_cluster, clusters[order], centroids[order], offsets, items[edges])


def _offsets(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
