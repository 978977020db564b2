"""The number of threads is set for each call, in whichever thread it is made."""

from __future__ import annotations

import threading

import faiss
import pytest
import torch

from raysys.models.retrieval.indexes.exact import Exact
from raysys.models.retrieval.indexes.hnsw import HNSW
from raysys.models.retrieval.indexes.ivf_pq import IVFPQ


@pytest.mark.parametrize("kind", [HNSW, IVFPQ])
def test_faiss_has_the_indexs_number_in_every_thread(kind, fill, monkeypatch):
    made = fill(kind)
    library = {HNSW: faiss.IndexHNSWFlat, IVFPQ: faiss.IndexIVFPQ}[kind]
    search, seen = library.search, []

    def spy(*arguments, **keywords):
        seen.append(faiss.omp_get_max_threads())
        return search(*arguments, **keywords)

    monkeypatch.setattr(library, "search", spy)
    for threads in (1, 2, 3):
        made.index.threads = threads
        thread = threading.Thread(target=made.index.search, args=(made.queries, 3))
        thread.start()
        thread.join()
    assert seen == [1, 2, 3]


def test_torch_has_the_indexs_number_while_it_searches(fill, monkeypatch):
    made = fill(Exact)
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(torch.Tensor, "topk", lambda *_: seen.append(torch.get_num_threads()) or 1 / 0)
    made.index.threads = before + 1
    with pytest.raises(ZeroDivisionError):
        made.index.search(made.queries, 3)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_what_others_have_set_stays(kind, fill):
    made = fill(kind)
    before = torch.get_num_threads(), faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    made.index.threads = before[0] + 3
    made.index.search(made.queries, 3)
    made.index.add(made.ids[:3], made.vectors[:3])
    made.index.remove(made.ids[:3])
    after = torch.get_num_threads(), faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    assert after == before
