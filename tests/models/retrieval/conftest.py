"""What tests of the HSNN's hierarchy share: a model with nodes on items, and users."""

from __future__ import annotations

import pytest
import torch

from raysys.models.retrieval.hsnn import HSNN
from raysys.schema import DenseFeature, FeatureSchema, Label, SparseFeature, Table

WIDTH = 8
SCHEMA = FeatureSchema(
    tables=(Table("a", 4), Table("b", 4)),
    dense=(DenseFeature("x", "item"), DenseFeature("y", "user")),
    sparse=(SparseFeature("a", "a", "item"), SparseFeature("b", "b", "user")),
    labels=(Label("click"),),
)


@pytest.fixture
def make_hsnn():
    """make(nodes, items, users, seed): a model whose nodes lie on items [items, 8], the items, and users [users, 8]."""

    def make(nodes, items, users, seed):
        model = HSNN(SCHEMA, nodes=nodes, embedding_dim=8, deep=[8], width=WIDTH, hidden=[8], bottom=[4], seed=seed)
        generator = torch.Generator().manual_seed(seed)
        vectors = [torch.nn.functional.normalize(torch.randn(n, WIDTH, generator=generator)) for n in (items, users)]
        model.eval().quantizer.place(vectors[0], generator)
        return model, *vectors

    return make
