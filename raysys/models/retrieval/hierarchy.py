"""What is asked of a learned hierarchy: would k-means after training do as well, does serving see what training saw?"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from raysys.models.retrieval.base import RetrievalModel, scores_in_blocks
from raysys.models.retrieval.hsnn import HSNN
from raysys.models.retrieval.indexes.hierarchical import Hierarchical
from raysys.models.retrieval.indexes.index import Ids
from raysys.models.retrieval.indexes.threads import faiss_threads
from raysys.nn.residual_nodes import perplexity

_USERS = 16  # whose scores of all items are held at a time
_FITS = 3  # of 10 iterations each: more than k-means needs to settle


@torch.inference_mode()
def exhaustive(model: RetrievalModel, users: Tensor, items: Tensor, k: int) -> Ids:
    """[Q, k] rows of the items [N, K] with the highest scores for users [Q, K], best first: every item is scored."""
    found = [scores_in_blocks(model, part, items).topk(min(k, len(items)), 1).indices for part in users.split(_USERS)]
    rows: Ids = torch.cat(found).numpy()
    return rows


def disjoint(model: HSNN, vectors: Tensor, seed: int, trained_levels: bool = False) -> HSNN:
    """A copy of a trained model whose nodes are k-means centroids of item vectors [n, K], residuals level by level.

    Its nodes are scored by the network of items, as training without a hierarchy leaves no other; with `trained_levels`
    by the networks that were trained with the learned nodes.
    """
    made = copy.deepcopy(model)
    made.quantizer.place(vectors, torch.Generator().manual_seed(seed))
    with faiss_threads(1):
        for _ in range(_FITS):
            made.quantizer.fit(vectors)
    if not trained_levels:
        for level in range(1, len(made.scorers)):
            made.scorers[level] = made.scorers[0]
    return made


def usage(index: Hierarchical) -> list[float]:
    """By level, the perplexity of the nodes' shares of items: 1 to the number of nodes, where all are used evenly."""
    counts = (np.unique(level, return_counts=True)[1] for level in index.codes()["codes"].T)
    return [float(perplexity(torch.from_numpy(count / count.sum())[None])) for count in counts]


@torch.inference_mode()
def soft_and_hard_auc(
    model: HSNN, users: Tensor, own: Tensor, others: Tensor, temperature: float
) -> list[tuple[float, float]]:
    """By level, the AUC of users' own items against others with soft pseudo-items, as trained, and with hard ones, as served.

    users, own: [Q, K], each user and the item that it took. others: [M, K], items that all users are compared on.
    """
    found = []
    pairs = zip(*(model.quantizer(torch.cat([own, others]), value) for value in (temperature, None)), strict=True)
    for level, assignments in enumerate(pairs, 1):
        aucs = []
        for assignment in assignments:
            positive = model.score_own(users, assignment.partial[: len(own), None], level)  # [Q, 1]
            negative = model.score_level(users, assignment.partial[len(own) :], level)  # [Q, M]
            aucs.append(float(((positive > negative).float() + (positive == negative).float() / 2).mean()))
        found.append((aucs[0], aucs[1]))
    return found
