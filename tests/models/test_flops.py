from __future__ import annotations

import dataclasses

import torch
from torch import nn

from raysys.models.flops import flops_per_row, full_batch
from raysys.models.ranking.dlrm import DLRM
from raysys.schema import ExtraColumn


def test_flops_of_dlrm_equal_the_count_by_hand(plain_schema):
    def build(schema):
        return DLRM(schema, embedding_dim=8, tower=(16, 4))

    dots = 3 * 3 * 8  # X X^T
    towers = 3 * 16 + 16 * 4 + 4
    assert flops_per_row(build, plain_schema) == 2 * (dots + towers)


def test_flops_of_attention_are_counted_on_a_cpu(plain_schema):
    class Model(nn.Module):
        def forward(self, batch):
            q, k = torch.zeros(len(batch), 2, 3, 4), torch.zeros(len(batch), 2, 5, 4)
            return nn.functional.scaled_dot_product_attention(q, k, k)

    assert flops_per_row(lambda _: Model(), plain_schema) == 2 * (2 * 3 * 5 * 4) * 2


def test_the_models_tables_are_never_made(plain_schema):
    huge = dataclasses.replace(
        plain_schema, tables=tuple(dataclasses.replace(t, num_embeddings=2**32) for t in plain_schema.tables)
    )
    assert flops_per_row(lambda schema: DLRM(schema, embedding_dim=8), huge) > 0


def test_full_batch_has_every_bag_at_full_length(schema):
    schema = dataclasses.replace(schema, extra=(ExtraColumn("v", "vector", width=3), ExtraColumn("n", "ids")))
    batch = full_batch(schema, 4)
    assert len(batch) == 4
    assert batch.sparse.lengths().view(3, 4)[:, 0].tolist() == [1, 4, 1]
    assert batch.weighted.weights().shape == (12,)
    assert batch.sequences.lengths().tolist() == [5] * 8
    assert batch.extra["v"].shape == (4, 3)
    assert batch.extra["n"].keys() == ["n"]


def test_a_models_training_mode_does_not_matter(plain_schema):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 5))

        def forward(self, batch):
            return torch.zeros(len(batch), 3) @ self.weight

    assert flops_per_row(lambda _: Model(), plain_schema) == 2 * 3 * 5
