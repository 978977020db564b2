"""Which features a trained model uses, measured without labels (the feature selection of arXiv 2502.06834)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from raysys.data.batch import Batch
from raysys.models.outputs import Embedded
from raysys.schema import FeatureSchema


@torch.no_grad()
def feature_importance(
    model: nn.Module, batches: Iterable[Batch], schema: FeatureSchema, *, repeats: int = 5, seed: int = 0
) -> dict[str, Tensor]:
    """I_j = mean |s(f(x)) - s(f(x with feature j of another row))| by feature, for each task: [T].

    s is the sigmoid for binary tasks and the identity for others. Rows are permuted within a batch, `repeats` times, behind
    one lookup a batch; a missing flag goes with its feature, a sequence as a whole. Labels and weights are never read, so
    unlabelled rows count as much; padding does not. Cost: a dense forward pass per feature, batch and repeat. The model's
    training mode is restored.
    """
    calls: Any = model
    training = model.training
    model.eval()
    random = torch.Generator().manual_seed(seed)
    names = [feature.name for feature in schema.dense] + [feature.name for feature in schema.sparse]
    names += [sequence.name for sequence in schema.sequences]
    binary = torch.tensor([label.kind == "binary" for label in schema.labels])
    totals, rows = {name: torch.zeros(len(schema.labels)) for name in names}, 0

    def predict(embedded: Embedded) -> Tensor:
        logits = calls.predict(calls.interact(embedded)).logits.float()
        return torch.where(binary.to(logits.device), logits.sigmoid(), logits)  # [B, T]

    for batch in batches:
        embedded = calls.embed(batch)
        real = (batch.example_id >= 0).nonzero()[:, 0]  # [n]
        plain = predict(embedded)
        rows += repeats * len(real)
        for _ in range(repeats):
            source = torch.arange(len(batch), device=real.device)
            source[real] = real[torch.randperm(len(real), generator=random).to(real.device)]
            for name in names:
                moved = predict(_exchanged(embedded, name, source, schema))
                totals[name] += (moved - plain).abs()[real].sum(0).cpu()
    model.train(training)
    return {name: total / max(rows, 1) for name, total in totals.items()}


def _exchanged(embedded: Embedded, name: str, source: Tensor, schema: FeatureSchema) -> Embedded:
    """Feature `name` of each row taken from row `source`, in the members of an ensemble too."""
    tokens, dense, sequences = embedded.tokens, embedded.dense, dict(embedded.sequences)
    if name in embedded.names:
        tokens, place = tokens.clone(), embedded.names.index(name)
        tokens[:, place] = tokens[source, place]
    if name in sequences:
        values, mask = sequences[name]
        sequences[name] = (values[source], mask[source])
    columns = _dense_columns(schema, name)
    if columns:
        dense = dense.clone()
        dense[:, columns] = dense[source][:, columns]
    members = {key: _exchanged(member, name, source, schema) for key, member in embedded.members.items()}
    return replace(embedded, tokens=tokens, dense=dense, sequences=sequences, members=members)


def _dense_columns(schema: FeatureSchema, name: str) -> list[int]:
    """The columns of `Batch.dense` of a feature: its own, and that of its missing flag."""
    flagged = [feature.name for feature in schema.dense if feature.missing_flag]
    owners = [feature.name for feature in schema.dense] + flagged
    return [place for place, owner in enumerate(owners) if owner == name]
