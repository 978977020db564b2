"""What counting alone retrieves: the rows that every table of retrieval results begins with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


class CountBaselines:
    """Popularity, the item that most often followed the last one (Markov), and co-occurrence with the history.

    item: the training sequences one after another, as catalogue rows, oldest first. length: of each sequence. items: N.
    """

    def __init__(self, item: Integers, length: Integers, items: int) -> None:
        self.popularity = np.bincount(item, minlength=items)
        owner = np.repeat(np.arange(len(length)), length)
        same = owner[1:] == owner[:-1]
        ones = np.ones(int(same.sum()), np.float32)
        self._following = sparse.csr_array((ones, (item[:-1][same], item[1:][same])), (items, items))
        holds = sparse.csr_array((np.ones(len(item), np.float32), (owner, item)), (len(length), items))
        holds.data[:] = 1
        self._together = (holds.T @ holds).tocsr()
        self._together.setdiag(0)
        self._sequences_with = np.asarray(holds.sum(0)).ravel()

    def scores(self, history: Integers, length: Integers) -> dict[str, Floats]:
        """[R, N] by the name of a baseline, for R histories one after another, oldest item first.

        Markov and co-occurrence are 0 for most items. Popularity fills up: on a scale below one transition it is added, and
        where nothing co-occurs it stands below 0. A row's scores are the same whichever rows they are computed with.
        """
        popularity = (self.popularity / (self.popularity.max(initial=0) + 1)).astype(np.float32)
        owner = np.repeat(np.arange(len(length)), length)
        last = np.cumsum(length) - 1
        some = length > 0
        markov = np.zeros((len(length), len(popularity)), np.float32)
        markov[some] = self._following[history[last[some]]].toarray()
        root = np.sqrt(np.maximum(self._sequences_with, 1)).astype(np.float32)
        past = sparse.csr_array((1 / root[history], (owner, history)), (len(length), len(popularity)))
        together = (past @ self._together).toarray() / root
        return {
            "popularity": np.broadcast_to(popularity, markov.shape),
            "last item (Markov)": markov + popularity,
            "co-occurrence": np.where(together > 0, together, popularity - 1),
        }
