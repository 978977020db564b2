"""What a model costs, before it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.schema import FeatureSchema


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    count: int = sdpa_flop_count(query, key, value)
    return count


_UNKNOWN_TO_TORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def flops_per_row(build: Callable[[FeatureSchema], nn.Module], schema: FeatureSchema, rows: int = 2) -> int:
    """Floating-point operations of one row's forward pass in matrix products, a multiply-add counted as 2.

    Training takes about 3 times as many. Bags and sequences are taken at their full length. `build` makes the model; it
    gets the schema with tables of one row, so that nothing large is allocated, and the lookups themselves cost nothing.
    """
    small = dataclasses.replace(schema, tables=tuple(dataclasses.replace(t, num_embeddings=1) for t in schema.tables))
    model = build(small).eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter:
        model(full_batch(small, rows))
    return counter.get_total_flops() // rows


def full_batch(schema: FeatureSchema, rows: int) -> Batch:
    """A batch of zeros in which every bag and every sequence has its full length."""
    bags = [(feature.name, feature.max_length) for feature in schema.unweighted]
    weighted = [(feature.name, feature.max_length) for feature in schema.weighted]
    events = [(feature.name, sequence.max_length) for sequence in schema.sequences for feature in sequence.features]
    labels = torch.zeros(rows, len(schema.labels))
    ids = torch.zeros(rows, dtype=torch.int64)
    extra: dict[str, Tensor | KeyedJaggedTensor] = {}
    for column in schema.extra:
        shapes = {"float": torch.zeros(rows), "int": ids, "vector": torch.zeros(rows, column.width)}
        extra[column.name] = shapes[column.kind] if column.kind in shapes else _zeros([(column.name, 1)], rows)
    return Batch(
        dense=torch.zeros(rows, schema.dense_width),
        sparse=_zeros(bags, rows),
        labels=labels,
        label_mask=torch.ones_like(labels, dtype=torch.bool),
        weight=torch.ones_like(labels),
        example_id=ids,
        group_id=ids,
        time=ids,
        weighted=_zeros(weighted, rows, weights=True) if weighted else None,
        sequences=_zeros(events, rows) if events else None,
        extra=extra,
    )


def _zeros(lengths: Sequence[tuple[str, int]], rows: int, weights: bool = False) -> KeyedJaggedTensor:
    total = sum(length for _, length in lengths) * rows
    return KeyedJaggedTensor(
        keys=[name for name, _ in lengths],
        values=torch.zeros(total, dtype=torch.int64),
        lengths=torch.tensor([length for _, length in lengths for _ in range(rows)], dtype=torch.int32),
        weights=torch.zeros(total) if weights else None,
        stride=rows,
    )
