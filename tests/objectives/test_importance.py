"""Feature importance without labels: it finds what is planted, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from raysys.models.outputs import Embedded, Output
from raysys.objectives.importance import feature_importance
from raysys.schema import DenseFeature, FeatureSchema, Label, Sequence, SequenceFeature, SparseFeature, Table


class Rows(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.example_id)


class Linear(nn.Module):
    """A click that depends on four of twelve columns, one of them with weight 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.tensor([2.0, -1.0, 0.5, 0.0] + [0.01] * 8)

    def embed(self, batch) -> Embedded:
        return Embedded(torch.zeros(len(batch.dense), 0, 1), (), {}, batch.dense)

    def interact(self, embedded: Embedded) -> Tensor:
        return (embedded.dense @ self.weight)[:, None]

    def predict(self, shared: Tensor) -> Output:
        return Output(shared, shared, shared[:, None])


def test_importance_finds_planted_features_and_reads_no_label():
    schema = FeatureSchema(dense=tuple(DenseFeature(f"x{place}") for place in range(12)), labels=(Label("click"),))
    dense = torch.randn(420, 12, generator=torch.Generator().manual_seed(6))
    place, model = torch.arange(420), Linear()
    blind = Rows(dense=dense, example_id=place.where(place < 400, -1))  # it has nothing else
    found = {name: float(value[0]) for name, value in feature_importance(model, [blind], schema).items()}
    assert found["x3"] == 0.0
    assert found["x0"] > found["x1"] > found["x2"] > 10 * max(found[f"x{place}"] for place in range(4, 12))
    assert model.training


def test_importance_of_embeddings_sequences_and_flags():
    schema = FeatureSchema(
        tables=(Table("item", 30, 4),),
        dense=(DenseFeature("age", missing_flag=True),),
        sparse=(SparseFeature("a", "item"), SparseFeature("b", "item")),
        sequences=(Sequence("history", (SequenceFeature("clicked", "item"),), max_length=5),),
        labels=(Label("click"),),
    )

    class Uses(nn.Module):
        def __init__(self, *parts: str) -> None:
            super().__init__()
            self.parts = parts

        def embed(self, batch) -> Embedded:
            random = torch.Generator().manual_seed(1)
            draw = torch.randn(50, 8, 4, generator=random)
            return Embedded(draw[:, :2], ("a", "b"), {"history": (draw[:, 2:7], draw[:, 2:7, 0] > 0)}, draw[:, 7, :2])

        def interact(self, embedded: Embedded) -> Tensor:
            values, mask = embedded.sequences["history"]
            parts = {
                "age": embedded.dense[:, 1],  # the flag alone
                "a": embedded.tokens[:, 0].sum(1),
                "b": embedded.tokens[:, 1].sum(1),
                "history": (values * mask[..., None]).sum((1, 2)),
            }
            return torch.stack([parts[name] for name in self.parts]).sum(0)[:, None]

        def predict(self, shared: Tensor) -> Output:
            return Output(shared, shared, shared[:, None])

    blind = Rows(example_id=torch.arange(50))
    for used in ("age", "a", "b", "history"):
        found = feature_importance(Uses(used), [blind], schema, repeats=2)
        assert [name for name, value in found.items() if value > 0] == [used]
