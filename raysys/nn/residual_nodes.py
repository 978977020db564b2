"""Vectors as a sum of learned nodes, coarse to fine: soft assignment to train with, hard assignment to serve with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raysys.errors import UserError

_SCALE_MOMENTUM, _USAGE_MOMENTUM = 0.99, 0.95
_K_MEANS_STEPS = 10
_CODED = 1 << 16  # vectors at a time: distances of a million to 500 nodes would take 2 GB


class Assignment(NamedTuple):
    """One level of n vectors: weights [n, C] of its nodes, what is left to explain [n, D], and the sum so far [n, D].

    `residual` is what the level was given, so that residual - weights @ nodes is the next level's.
    """

    weights: Tensor
    residual: Tensor
    partial: Tensor


class ResidualNodes(nn.Module):
    """L levels of nodes. Of a vector v: r¹ = v; a^l = softmax_k(-|r^l - c^l_k|² / (T s^l)); r^{l+1} = r^l - Σ_k a^l_k c^l_k.

    The pseudo-item of level l is what levels 1 to l explain, Σ_{l'≤l} a^{l'} c^{l'} (HSNN, Rangadurai et al. 2025, arXiv
    2408.06653, section "learning to index"; that it is the running sum is our reading). s^l is the mean |r^l|² (a moving
    average, ours): residuals shrink with depth, and one temperature T should mean the same on every level. Without a
    temperature the nearest node of each level has weight 1.

    nodes: C_l by level. The nodes start at 0 and are placed by `place`.
    """

    scale: Tensor
    placed: Tensor

    def __init__(self, nodes: Sequence[int], dim: int) -> None:
        super().__init__()
        if not nodes or min(nodes) < 2:
            raise UserError(f"nodes is {list(nodes)}", "at least one level of at least 2 nodes is expected: [64, 16]")
        self.nodes = nn.ParameterList(torch.zeros(count, dim) for count in nodes)
        self.register_buffer("scale", torch.ones(len(nodes)))
        self.register_buffer("placed", torch.zeros((), dtype=torch.bool))
        for level, count in enumerate(nodes):
            self.register_buffer(f"usage_{level}", torch.full((count,), 1 / count))

    def forward(self, vectors: Tensor, temperature: float | None) -> list[Assignment]:
        """[n, D] → the assignment of each level, soft at a temperature, hard where that is None."""
        residual, partial, found = vectors, torch.zeros_like(vectors), []
        for level, nodes in enumerate(self.nodes):
            distance = squared_distances(residual, nodes)  # [n, C]
            if temperature is None:
                weights = torch.zeros_like(distance).scatter(1, distance.argmin(1, keepdim=True), 1.0)
            else:
                weights = (-distance / (temperature * self.scale[level])).softmax(1)
            centre = weights @ nodes
            partial = partial + centre
            found.append(Assignment(weights, residual, partial))
            residual = residual - centre
        return found

    @torch.no_grad()
    def codes(self, vectors: Tensor) -> Tensor:
        """[n, D] → [n, L]: the nearest node of each level."""
        return torch.cat([self._codes(part) for part in vectors.split(_CODED)])

    def _codes(self, vectors: Tensor) -> Tensor:
        residual, codes = vectors, []
        for nodes in self.nodes:
            code = squared_distances(residual, nodes).argmin(1)
            codes.append(code)
            residual = residual - nodes[code]
        return torch.stack(codes, 1)

    @torch.no_grad()
    def pseudo_items(self, codes: Tensor) -> Tensor:
        """Paths [n, l] of l ≤ L levels → [n, D]: the sum of their nodes."""
        return torch.stack([self.nodes[level][code] for level, code in enumerate(codes.unbind(1))]).sum(0)

    @torch.no_grad()
    def track(self, levels: Sequence[Assignment]) -> None:
        """Let the moving averages follow a global batch, which every rank gives whole: |r^l|², and who is nearest to whom."""
        for level, (assignment, nodes) in enumerate(zip(levels, self.nodes, strict=True)):
            mean = assignment.residual.square().sum(1).mean().clamp(min=1e-6)
            self.scale[level].lerp_(mean, 1 - _SCALE_MOMENTUM)
            nearest = assignment.weights.argmax(1).bincount(minlength=len(nodes)) / len(assignment.weights)
            self.usage(level).lerp_(nearest.to(self.scale), 1 - _USAGE_MOMENTUM)

    def usage(self, level: int) -> Tensor:
        """[C] the moving share of vectors of which each node is the nearest."""
        return self.get_buffer(f"usage_{level}")

    def idle(self, level: int, share: float) -> Tensor:
        """The numbers of the nodes whose usage is below share / C."""
        usage = self.usage(level)
        return (usage < share / len(usage)).nonzero()[:, 0]

    @torch.no_grad()
    def place(self, vectors: Tensor, generator: torch.Generator) -> None:
        """Put each level's nodes on random vectors of those that are left to explain: the same on every rank that gives the same."""
        residual = vectors
        for level, nodes in enumerate(self.nodes):
            order = torch.randperm(len(residual), generator=generator)
            chosen = order.repeat(-(-len(nodes) // len(order)))[: len(nodes)]
            spread = residual.std(0, correction=0).mean()
            noise = torch.randn(nodes.shape, generator=generator).to(nodes) * 0.01 * spread
            nodes.copy_(residual[chosen.to(residual.device)] + noise)
            self.scale[level] = residual.square().sum(1).mean().clamp(min=1e-6)
            residual = residual - nodes[squared_distances(residual, nodes).argmin(1)]
        self.placed.fill_(True)

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """k-means of each level on what the levels before leave of vectors [n, D], from the nodes as they are."""
        residual = vectors
        for nodes in self.nodes:
            nodes.copy_(_k_means(residual, nodes))
            residual = residual - nodes[squared_distances(residual, nodes).argmin(1)]


def _k_means(vectors: Tensor, start: Tensor) -> Tensor:
    """Centroids [C, D] of vectors [n, D] after a few iterations from where they were, so that they keep their numbers."""
    import faiss

    points, centroids = vectors.cpu().float().contiguous().numpy(), start.cpu().float().contiguous().numpy()
    fit = faiss.Kmeans(points.shape[1], len(centroids), niter=_K_MEANS_STEPS, min_points_per_centroid=1, seed=1)
    fit.cp.max_points_per_centroid = len(points)
    fit.train(points, init_centroids=centroids)
    return torch.from_numpy(fit.centroids).to(start)


def squared_distances(vectors: Tensor, nodes: Tensor) -> Tensor:
    """|v - c|² of n vectors and C nodes: [n, C]."""
    squares = vectors.square().sum(1, keepdim=True) - 2 * vectors @ nodes.t() + nodes.square().sum(1)
    return squares.clamp(min=0)


def usage_penalty(weights: Tensor) -> Tensor:
    """F = Σ_k m_k² of the mean weight m_k over rows [n, C]: 1/C where nodes are used evenly, 1 where one has everything."""
    return weights.mean(0).square().sum()


def perplexity(weights: Tensor) -> Tensor:
    """exp of the entropy of the mean weight over rows [n, C]: how many nodes are in use, 1 to C."""
    mean = weights.mean(0)
    return torch.special.entr(mean).sum().exp()
