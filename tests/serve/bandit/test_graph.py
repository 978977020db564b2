"""Graphs: which items clusters get, what an insertion adds, and which clusters go on after a rebuild."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from raysys.errors import UserError
from raysys.models.retrieval.indexes.exact import Exact
from raysys.serve.bandit.build import build_graph, carry_over
from raysys.serve.bandit.graph import insert_items, join_graphs, shard_of


def edges_of(graph):
    return set(zip(graph.edge_clusters.tolist(), graph.items.tolist(), strict=True))


def test_each_cluster_has_the_items_of_largest_inner_product(small):
    graph = small.graph
    scores = graph.centroids.astype(np.float64) @ small.vectors.T.astype(np.float64)
    for cluster, row in enumerate(scores):
        expected = small.items[np.argsort(-row)[:6]]
        found = graph.items[graph.offsets[cluster] : graph.offsets[cluster + 1]]
        assert found.tolist() == sorted(expected.tolist())
    np.testing.assert_allclose(np.linalg.norm(graph.centroids, axis=1), 1, atol=1e-6)


def test_centroids_are_means_of_the_users_that_are_nearest(unit_vectors):
    """Users in three tight bundles: k-means finds them, whatever the seed."""
    rng = np.random.default_rng(0)
    bundles = np.eye(3, 8, dtype=np.float32)
    users = np.repeat(bundles, 40, 0) + rng.normal(0, 0.01, (120, 8)).astype(np.float32)
    index = Exact(8)
    index.add(np.arange(9), unit_vectors(rng, 9))
    graph = build_graph(users, index, clusters=3, width=2, seed=1)
    cosines = graph.centroids @ bundles.T
    assert sorted(cosines.argmax(1)) == [0, 1, 2]
    assert (cosines.max(1) > 0.999).all()


def test_a_catalogue_smaller_than_the_width_gives_fewer_edges(small, unit_vectors):
    index = Exact(8)
    index.add(np.arange(4), unit_vectors(np.random.default_rng(0), 4))
    graph = build_graph(small.users, index, clusters=5, width=6)
    assert np.diff(graph.offsets).tolist() == [4] * 5


def test_inserted_items_come_on_top_of_what_was_there(small, rng, unit_vectors):
    items, vectors = np.array([1000, 7, 3]), unit_vectors(rng, 3)  # item 3 is there already
    graph = insert_items(small.graph, items, vectors, 2)
    best = np.argsort(-(vectors @ small.graph.centroids.T), axis=1)[:, :2]
    added = {(int(c), int(j)) for j, row in zip(items, best, strict=True) for c in row}
    assert edges_of(graph) == edges_of(small.graph) | added
    assert graph.version == small.graph.version + 1
    assert (graph.clusters == small.graph.clusters).all()
    for first, last in itertools.pairwise(graph.offsets):
        assert (np.diff(graph.items[first:last]) > 0).all()


def test_matched_clusters_keep_their_ids_and_others_get_unused_ones(small, rng, unit_vectors):
    old = small.graph
    order = rng.permutation(12)
    centroids = old.centroids[order].copy()
    centroids[:3] = unit_vectors(rng, 3)  # three clusters are others now
    new = build_graph(small.users, small.index, clusters=12, width=6)
    new = type(new)(1, 12, np.arange(12), centroids, new.offsets, new.items)
    graph = carry_over(old, new, threshold=0.98)
    of = {
        centroid.tobytes(): cluster for centroid, cluster in zip(graph.centroids, graph.clusters.tolist(), strict=True)
    }
    for place, centroid in enumerate(centroids):
        cluster = of[centroid.tobytes()]
        assert cluster == order[place] if place >= 3 else cluster >= 12
        row = int(np.flatnonzero(graph.clusters == cluster)[0])
        assert (graph.items[graph.offsets[row] : graph.offsets[row + 1]] == new.items[6 * place : 6 * place + 6]).all()
    assert graph.next_cluster == 15
    again = carry_over(graph, type(new)(1, 3, np.arange(3), unit_vectors(rng, 3), new.offsets[:4], new.items[:18]), 1.0)
    assert again.clusters.tolist() == [15, 16, 17]  # never those that are gone


def test_the_matching_is_the_best_of_all(rng, unit_vectors, small):
    old, new = (
        type(small.graph)(1, 6, np.arange(6), unit_vectors(rng, 6), np.arange(7), np.arange(6)) for _ in range(2)
    )
    cosines = old.centroids @ new.centroids.T
    best = max(itertools.permutations(range(6)), key=lambda order: sum(cosines[i, j] for i, j in enumerate(order)))
    graph = carry_over(old, new, -1.0)
    assert graph.clusters.tolist() == list(range(6))
    np.testing.assert_array_equal(graph.centroids, new.centroids[list(best)])


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_parts_joined_are_the_graph(small, shards):
    graph, edges = join_graphs([small.graph.part(shard, shards) for shard in reversed(range(shards))])
    for name in ("version", "clusters", "centroids", "offsets", "items"):
        np.testing.assert_array_equal(getattr(graph, name), getattr(small.graph, name))
    assert sorted(edges) == list(range(72))


def test_shards_are_about_equal():
    sizes = np.bincount(shard_of(np.arange(30_000), 8), minlength=8)
    assert (abs(sizes - 3750) < 6 * np.sqrt(3750)).all()


def test_what_is_wrong_is_named(small, unit_vectors):
    with pytest.raises(UserError, match="300 users for 301 clusters"):
        build_graph(small.users, small.index, clusters=301, width=6)
    with pytest.raises(UserError, match="threshold is 2"):
        carry_over(small.graph, small.graph, 2)
    with pytest.raises(UserError, match=r"vectors have shape \[1, 4\]"):
        insert_items(small.graph, np.array([1]), unit_vectors(np.random.default_rng(0), 1, 4), 2)
    other = type(small.graph)(
        1, 1, np.arange(1), unit_vectors(np.random.default_rng(0), 1, 4), np.arange(2), np.arange(1)
    )
    with pytest.raises(UserError, match="8 columns in the old graph and 4 in the new one"):
        carry_over(small.graph, other, 0.9)
