"""Graphs built from the vectors of a two-tower model, and which clusters of one build go on in the next.

Apart from `graph`, so that actors and replicas do without scikit-learn: 140 MB and a second each.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import MiniBatchKMeans

from raysys.errors import UserError, check_count
from raysys.models.retrieval.indexes.index import NO_ITEM, Index, Vectors, check_vectors
from raysys.serve.bandit.graph import NO_CLUSTER, Graph, sorted_graph


def build_graph(
    users: Vectors, index: Index, *, clusters: int, width: int, sample: int = 1_000_000, seed: int = 0
) -> Graph:
    """Version 1: k-means of user vectors [U, D], and for each centroid the `width` items of largest <centroid, v>.

    users: of a two-tower model, of length 1; `sample` of them are drawn where there are more. Centroids are brought to
    length 1 (ours), so that the largest <u, centroid> is the nearest. index: the eligible items. clusters: C; width: W.
    """
    check_count("clusters", clusters)
    check_count("width", width)
    users = check_vectors("users", users, index.dim)
    if len(users) < clusters:
        raise UserError(f"{len(users)} users for {clusters} clusters", "give more users, or ask for fewer clusters")
    if len(users) > sample:
        users = users[np.random.default_rng(seed).choice(len(users), sample, replace=False)]
    means = MiniBatchKMeans(clusters, batch_size=max(4096, 2 * clusters), n_init=3, random_state=seed)
    centroids = means.fit(users).cluster_centers_.astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True).clip(1e-12)
    found, _ = index.search(centroids, width)  # [C, W]
    rows = np.repeat(np.arange(clusters), width)[found.ravel() != NO_ITEM]
    return sorted_graph(1, clusters, np.arange(clusters), centroids, rows, found[found != NO_ITEM])


def carry_over(old: Graph, new: Graph, threshold: float) -> Graph:
    """The next version after `old`: `new`, whose clusters have the ids of the old ones that they continue.

    Old and new centroids whose cosine is at least `threshold` are matched one to one so that the sum of 1 + cosine is largest
    (Kuhn 1955; cubic in the number of clusters). A cluster without a match gets an id that was never used, and starts
    without statistics.
    """
    if not -1 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}", "a cosine from -1 to 1 is expected, such as 0.9")
    if old.centroids.shape[1] != new.centroids.shape[1]:
        raise UserError(
            f"centroids have {old.centroids.shape[1]} columns in the old graph and {new.centroids.shape[1]} in the new one",
            "build both from vectors of models of one width",
        )
    cosines = old.centroids @ new.centroids.T  # [C old, C new]
    alike = cosines >= threshold
    before, now = linear_sum_assignment(np.where(alike, 1 + cosines, 0), maximize=True)
    kept = alike[before, now]
    clusters = np.full(len(new.clusters), NO_CLUSTER, np.int64)
    clusters[now[kept]] = old.clusters[before[kept]]
    fresh = clusters == NO_CLUSTER
    clusters[fresh] = old.next_cluster + np.arange(fresh.sum())
    rows = np.repeat(np.arange(len(new.clusters)), np.diff(new.offsets))
    next_cluster = old.next_cluster + int(fresh.sum())
    return sorted_graph(old.version + 1, next_cluster, clusters, new.centroids, rows, new.items)
