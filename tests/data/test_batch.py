from __future__ import annotations

import dataclasses

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from raysys.data.batch import Batch


def jagged(weights: bool = False) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=["a", "b"],
        values=torch.tensor([1, 2, 3]),
        lengths=torch.tensor([1, 0, 2, 0], dtype=torch.int32),
        weights=torch.tensor([0.5, 1.0, 2.0]) if weights else None,
    )


@pytest.fixture
def batch() -> Batch:
    numbers = torch.arange(2)
    columns = torch.ones(2, 1)
    return Batch(
        dense=torch.rand(2, 3),
        sparse=jagged(),
        labels=columns,
        label_mask=columns.bool(),
        weight=columns,
        example_id=numbers,
        group_id=numbers,
        time=numbers,
        weighted=jagged(weights=True),
        extra={"position": numbers, "candidates": jagged()},
    )


def everything(batch: Batch) -> list[torch.Tensor]:
    tensors = [batch.dense, batch.labels, batch.label_mask, batch.weight, batch.example_id, batch.group_id, batch.time]
    tensors.append(batch.extra["position"])
    for keyed in (batch.sparse, batch.weighted, batch.extra["candidates"]):
        tensors += [keyed.values(), keyed.lengths()]
    return [*tensors, batch.weighted.weights()]


def test_it_is_what_torchrec_pipelines_take(batch):
    assert isinstance(batch, Pipelineable)
    assert len(batch) == 2


def test_all_of_it_moves_to_another_device(batch):
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert {tensor.device.type for tensor in everything(moved)} == {"meta"}
    assert {tensor.device.type for tensor in everything(batch)} == {"cpu"}
    assert moved.sequences is None
    assert moved.sparse.keys() == ["a", "b"]
    assert batch.to(torch.device("cpu")) is batch


def test_batches_are_told_apart_by_identity(batch):
    """Pipelines keep batches as keys; comparing their tensors would have no truth value."""
    assert batch != dataclasses.replace(batch)
    assert len({batch, batch}) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory and streams need CUDA")
def test_pinned_memory_and_streams(batch):
    pinned = batch.pin_memory()
    assert all(tensor.is_pinned() for tensor in everything(pinned))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        moved = pinned.to(torch.device("cuda"), non_blocking=True)
    moved.record_stream(torch.cuda.current_stream())
    stream.synchronize()
    for before, after in zip(everything(batch), everything(moved), strict=True):
        assert torch.equal(before, after.cpu())
