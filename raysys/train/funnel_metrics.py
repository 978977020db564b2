"""How well a cheap early ranking agrees with the final one that it feeds: pure NumPy functions over requests.

Of each request the early stage passes on the N candidates that it scores highest, and the final stage would have taken K of
all. final, early: scores of the rows [R], higher is better; request: [R] whose candidates they are, in any order. Rows with
equal scores share their places evenly: all values are expectations over a random order of ties, so that the order of the
rows changes nothing and a constant early score is as good as chance, N / C of C candidates. The operational form of "ads
recall" (Wang et al. 2023, arXiv 2307.11096, describe it in words) is ours. What is undefined is NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raysys.errors import UserError
from raysys.train.selection import places

Floats = NDArray[np.float64]


def recall_at(final: ArrayLike, early: ArrayLike, request: ArrayLike, k: int, n: int) -> float:
    """Recall@(K,N): the share of the final top K that is in the early top N, averaged over requests.

    A request with fewer than K candidates counts with as many as it has. Candidates that the final stage never scored are
    not seen: measured on what the present early stage let through, the value is optimistic.
    """
    wanted, kept, start = _top_shares(final, early, request, k, n)
    if len(start) == 0 or np.isnan(wanted).any() or np.isnan(kept).any():
        return float("nan")
    return float(np.mean(np.add.reduceat(wanted * kept, start) / np.add.reduceat(wanted, start)))


def value_recall_at(final: ArrayLike, early: ArrayLike, request: ArrayLike, k: int, n: int) -> float:
    """The share of the value of all final top Ks that is in the early top Ns, where `final` is a value ≥ 0: a ratio of sums."""
    value = np.asarray(final, np.float64)
    if (value < 0).any():
        raise UserError(f"value_recall_at: a final score is {value.min()}", "values of 0 or more are expected")
    wanted, kept, start = _top_shares(final, early, request, k, n)
    value = value[_order(request)]
    total = float(value @ wanted) if len(start) else 0.0
    return float(value @ (wanted * kept)) / total if total > 0 else float("nan")


def pair_agreement(final: ArrayLike, early: ArrayLike, request: ArrayLike) -> float:
    """The share of pairs of candidates of one request that both stages order alike, over all pairs that `final` tells apart.

    An early tie counts half. Without ties this is (1 + Kendall's τ) / 2. Time and memory: O(R) for each candidate of the
    largest request.
    """
    order = _order(request)
    f, e = np.asarray(final, np.float64)[order], np.asarray(early, np.float64)[order]
    if np.isnan(f).any() or np.isnan(e).any():
        return float("nan")
    _, size = np.unique(np.asarray(request), return_counts=True)
    left = np.repeat(np.cumsum(size), size) - np.arange(len(f))  # rows of this request from here on
    agreed, pairs = 0.0, 0
    for distance in range(1, int(size.max(initial=1))):
        row = np.flatnonzero(left > distance)
        of_final, of_early = np.sign(f[row] - f[row + distance]), np.sign(e[row] - e[row + distance])
        agreed += float(np.sum((1 + of_final * of_early)[of_final != 0])) / 2
        pairs += int(np.count_nonzero(of_final))
    return agreed / pairs if pairs else float("nan")


def _top_shares(
    final: ArrayLike, early: ArrayLike, request: ArrayLike, k: int, n: int
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """By request: how much of each row is in the final top K and in the early top N, and where each request starts."""
    for name, value in (("k", k), ("n", n)):
        if value < 1:
            raise UserError(f"recall: {name} is {value}", "a positive whole number is expected")
    order = _order(request)
    groups = np.asarray(request)[order]
    start = (
        np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]])) if len(groups) else np.empty(0, np.int64)
    )
    wanted, kept = (_in_top(np.asarray(score, np.float64)[order], groups, m) for score, m in ((final, k), (early, n)))
    return wanted, kept, start


def _order(request: ArrayLike) -> NDArray[np.int64]:
    return np.argsort(np.asarray(request), kind="stable")


def _in_top(score: Floats, request: NDArray[Any], n: int) -> Floats:
    """[R] the chance of each row to be among the `n` best of its request; NaN where its score is."""
    above, tied = places(score, request)
    return np.where(np.isnan(score), np.nan, np.clip((n - above) / tied, 0, 1))
