"""What every ranking model has."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from raysys.data.batch import Batch
from raysys.errors import UserError
from raysys.models.embeddings import Embeddings
from raysys.models.heads import TaskTowers
from raysys.models.outputs import Embedded, Output
from raysys.models.tokens import TokenStack
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema


class RankingModel(nn.Module):
    """Tables, the token matrix of all features and one tower per task; a subclass says in `interact` what is between.

    embedding_dim: width D of a token. bottom: hidden widths of the MLP of the dense columns. tower: hidden widths of the MLP
    of each task. The other arguments are those of `Embeddings` and `TokenStack`. A model is a function of its arguments:
    two with the same seed are equal, on every device and under every sharding plan.
    """

    towers: TaskTowers

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        embedding_dim: int,
        bottom: Sequence[int],
        activation: str,
        sequence_pooling: str,
        target_attention: bool,
        embedding_dropout: float,
        init_scale: float | None,
        seed: int,
        device: str,
    ) -> None:
        super().__init__()
        if not schema.labels:
            raise UserError(f"{schema.source}: a ranking model needs a label")
        use_sequences = sequence_pooling != "none"
        self.embeddings = Embeddings(schema, embedding_dim, seed, device, init_scale, use_sequences)
        with seeded(seed, "tokens"):
            self.tokens = TokenStack(
                schema,
                embedding_dim,
                bottom=bottom,
                activation=activation,
                sequence_pooling=sequence_pooling,
                target_attention=target_attention,
                dropout=embedding_dropout,
            )

    def embed(self, batch: Batch) -> Embedded:
        """The embedding lookup, the only step that a trainer shards."""
        return self.embeddings(batch)

    def interact(self, embedded: Embedded) -> Tensor:
        """The shared representation [B, H]."""
        raise NotImplementedError

    def predict(self, shared: Tensor) -> Output:
        """Logits [B, T] and the towers' last layers; `Output.embedded` is left to the caller."""
        return self.towers(shared)

    def forward(self, batch: Batch) -> Output:
        """The three steps in a row."""
        embedded = self.embed(batch)
        output = self.predict(self.interact(embedded))
        output.embedded = embedded
        return output
