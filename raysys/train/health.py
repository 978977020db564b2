"""The health of embedding tables: norms, rows that never moved, ids that crowd the log."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from raysys.models.embeddings import fill_initial_weights
from raysys.nn.collectives import communication_device, global_sum, rank
from raysys.train.job import Job
from raysys.train.sharding import initial_weights
from raysys.train.tables import TablePart, find_tables, local_parts, table_weights

_BLOCKS, _BLOCK_ROWS = 100, 100  # all rows of a table up to 10,000; of a larger one evenly spaced blocks
_HOT_ROWS, _HOT_BATCH, _HOT_IDS = 200_000, 8192, 5


def embedding_health(model: DistributedModelParallel, job: Job) -> dict[str, dict[str, Any]]:
    """Norms and never-trained rows by table, from at most 10,000 rows of each (collective; the same on every rank).

    norm_mean and norm_p99 are of the rows' 2-norms; never_trained_share is the share of the rows that still are, bit for
    bit, what they were initialised with.
    """
    plain = job.train_step("meta")
    initial = {table.key: initial_weights(plain, table, job.seed) for table in find_tables(plain)}
    health = {}
    for key, weight in table_weights(model).items():
        rows, columns = weight.size()
        name, seed, bound = initial[key]
        starts = _block_starts(rows)
        sums = torch.zeros(2, len(starts), _BLOCK_ROWS, dtype=torch.float64)  # squares, changed columns
        if isinstance(weight, ShardedTensor) or rank() == 0:  # a replicated table is counted once
            for part in local_parts(weight):
                for block, start in enumerate(starts):
                    _add_block(sums[:, block], part, start, (name, seed, columns, bound))
        squares, changed = global_sum(sums.to(communication_device())).cpu().flatten(1)[:, :rows]
        norms = squares.sqrt()
        health[key] = {
            "rows": rows,
            "norm_mean": float(norms.mean()),
            "norm_p99": float(norms.quantile(0.99)),
            "never_trained_share": float((changed == 0).double().mean()),
        }
    return health


def hot_ids(job: Job) -> dict[str, list[dict[str, Any]]]:
    """By table, the ids that the first 200,000 rows of the training split look up most, with their share of the look-ups."""
    features = {feature.name: feature.table for feature in job.schema.id_features}
    seen: dict[str, list[Tensor]] = {table.name: [] for table in job.schema.tables}
    batches = job.log("train", labels=False).iter_batches(batch_size=_HOT_BATCH)
    for rows in islice(batches, _HOT_ROWS // _HOT_BATCH):
        batch = job.transforms.to_batch(rows, labels=False)
        for ids in filter(None, (batch.sparse, batch.weighted, batch.sequences)):
            for name, jagged in ids.to_dict().items():
                seen[features[name]].append(jagged.values())
    return {table: _most_frequent(torch.cat(ids), job.transforms.vocabulary(table)) for table, ids in seen.items()}


def _most_frequent(ids: Tensor, vocabulary: pa.Array | None) -> list[dict[str, Any]]:
    found, counts = ids.unique(return_counts=True)
    top = counts.topk(min(_HOT_IDS, len(counts))).indices
    return [
        {"id": i, "value": _value(i, vocabulary), "share": count / len(ids)}
        for i, count in zip(found[top].tolist(), counts[top].tolist(), strict=True)
    ]


def _value(id_: int, vocabulary: pa.Array | None) -> str:
    if vocabulary is None:
        return str(id_)
    return str(vocabulary[id_ - 1].as_py()) if id_ > 0 else "(out of vocabulary)"


def _block_starts(rows: int) -> list[int]:
    """First rows of the blocks to look at; together they hold all rows of a small table."""
    blocks = min(_BLOCKS, -(-rows // _BLOCK_ROWS))
    if rows <= _BLOCKS * _BLOCK_ROWS:
        return [block * _BLOCK_ROWS for block in range(blocks)]
    return [block * (rows - _BLOCK_ROWS) // (blocks - 1) for block in range(blocks)]


def _add_block(sums: Tensor, part: TablePart, start: int, table: tuple[str, int, int, float]) -> None:
    """Add the squares and the changed columns of the block's rows that this part holds to sums [2, _BLOCK_ROWS]."""
    name, seed, columns, bound = table
    first = max(start, part.row_offset)
    last = min(start + _BLOCK_ROWS, part.row_offset + len(part.values))
    if first >= last:
        return
    values = part.values[first - part.row_offset : last - part.row_offset]
    before = torch.empty_like(values)
    fill_initial_weights(before, name, seed, first, part.column_offset, columns, bound)
    place = slice(first - start, last - start)
    sums[0, place] += values.double().square().sum(1).cpu()
    sums[1, place] += (values != before).sum(1).cpu()
