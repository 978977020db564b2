"""What every ranking model has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import TypedDict

from raysys.data.batch import Batch
from raysys.errors import UserError, check_count
from raysys.models.embeddings import Embeddings
from raysys.models.heads import Head, TaskTowers
from raysys.models.outputs import Embedded, Output
from raysys.models.tokens import TokenStack
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema


class SequenceModelArguments(TypedDict, total=False):
    """`SharedArguments` of a model that reads sequences itself: it names `sequence_pooling`, which is none by default."""

    bottom: Sequence[int]
    target_attention: bool
    embedding_dropout: float
    init_scale: float | None
    head: Head | None
    seed: int
    device: str


class SharedArguments(SequenceModelArguments, total=False):
    """The arguments of `RankingModel` that mean the same to every model: a subclass passes them on as `**shared`."""

    sequence_pooling: str


class PlainArguments(SharedArguments, total=False):
    """`SharedArguments` of a model whose tokens and MLPs are by default those of `RankingModel`: it names `tower` only."""

    embedding_dim: int
    activation: str
    dropout: float


class RankingModel(nn.Module, ABC):
    """Tables, the token matrix of all features and a head for all tasks; a subclass says in `interact` what is between.

    embedding_dim: width D of a token. bottom: hidden widths of the MLP of the dense columns. tower: hidden widths of the MLP
    of each task, in which `dropout` acts. head: what `predict` computes with; None is `TaskTowers`. The other arguments are
    those of `Embeddings` and `TokenStack`. A model is a function of its arguments: two with the same seed are equal, on
    every device and under every sharding plan.
    """

    towers: nn.Module
    reads_sequences: ClassVar[bool] = False
    """Whether `interact` reads `Embedded.sequences`, whatever tokens are made of them; then the schema must have one."""

    separates_events: ClassVar[bool] = False
    """Whether it reads an event as the embeddings of its columns side by side instead of as their sum."""

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        embedding_dim: int = 16,
        bottom: Sequence[int] = (256, 128),
        tower: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        sequence_pooling: str = "both",
        target_attention: bool = True,
        init_scale: float | None = None,
        head: Head | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        if not schema.labels:
            raise UserError(f"{schema.source}: a ranking model needs a label")
        check_count("embedding_dim", embedding_dim)
        for key, share in {"dropout": dropout, "embedding_dropout": embedding_dropout}.items():
            if not 0 <= share < 1:
                raise UserError(f"{key} is {share}", "a number of at least 0 and below 1 is expected")
        if self.reads_sequences and not schema.sequences:
            raise UserError(
                f"{schema.source}: {type(self).__name__} needs a sequence",
                "add one to the schema's sequences, or choose a model that reads single ids and bags only",
            )
        use_sequences = self.reads_sequences or sequence_pooling != "none"
        self.embeddings = Embeddings(
            schema, embedding_dim, seed, device, init_scale, use_sequences, self.separates_events
        )
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
        self.embedding_dim, self.activation, self.dropout, self.seed = embedding_dim, activation, dropout, seed
        self._head = partial(head or TaskTowers, schema.labels, tower=tower, activation=activation, dropout=dropout)

    def add_towers(self, width: int) -> None:
        """Build what `predict` computes with, on a shared representation of H = width columns: the end of a constructor."""
        self.shared_width = width
        with seeded(self.seed, "towers"):
            self.towers = self._head(inputs=width)

    def embed(self, batch: Batch) -> Embedded:
        """The embedding lookup, the only step that a trainer shards."""
        return self.embeddings(batch)

    @abstractmethod
    def interact(self, embedded: Embedded) -> Tensor:
        """The shared representation [B, H]."""

    def predict(self, shared: Tensor) -> Output:
        """Logits [B, T] and the towers' last layers; `Output.embedded` is left to the caller."""
        output: Output = self.towers(shared)
        return output

    def forward(self, batch: Batch) -> Output:
        """The three steps in a row."""
        embedded = self.embed(batch)
        output = self.predict(self.interact(embedded))
        output.embedded = embedded
        return output
