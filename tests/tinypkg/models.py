"""A model of the user's own."""

from __future__ import annotations

import torch
from torch import nn

from raysys.models.embeddings import Embeddings
from raysys.models.outputs import Output


class Perceptron(nn.Module):
    """One hidden layer on all tokens and dense columns."""

    def __init__(self, schema, *, hidden=4, seed=0, device="cpu"):
        super().__init__()
        torch.manual_seed(seed)
        self.embeddings = Embeddings(schema, 16, seed, device)
        self.layer = nn.Linear(16 * len(schema.sparse) + schema.dense_width, hidden)
        self.head = nn.Linear(hidden, len(schema.labels))

    def embed(self, batch):
        return self.embeddings(batch)

    def interact(self, embedded):
        return self.layer(torch.cat([embedded.tokens.flatten(1), embedded.dense], 1)).relu()

    def predict(self, shared):
        return Output(logits=self.head(shared), shared=shared, hidden=shared[:, None])

    def forward(self, batch):
        return self.predict(self.interact(self.embed(batch)))
