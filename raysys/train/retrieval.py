"""What training a retrieval model asks of schema, data and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from torch import nn

from raysys.data.catalogue import CatalogueItems, catalogue_of, positives
from raysys.data.columns import flatten, integers, ranges, whole
from raysys.errors import UserError, nearest
from raysys.models.retrieval.base import RetrievalModel
from raysys.models.retrieval.baselines import CountBaselines
from raysys.schema import ExtraColumn, FeatureSchema
from raysys.train.recall import rank_intervals
from raysys.train.settings import RetrievalSettings, TrainSettings

if TYPE_CHECKING:
    from raysys.train.job import Job


def retrieval_task(schema: FeatureSchema, settings: RetrievalSettings) -> str:
    """The label that makes a row positive."""
    binary = [label.name for label in schema.labels if label.kind == "binary"]
    if settings.task is None and binary:
        return binary[0]
    if settings.task not in binary:
        raise UserError(
            f"train.retrieval.task is {settings.task!r}, and {schema.source} has no such binary label",
            nearest(str(settings.task), binary) if binary else "retrieval needs a binary label",
        )
    return settings.task


def retrieval_schema(schema: FeatureSchema, settings: RetrievalSettings) -> FeatureSchema:
    """The schema with what retrieval reads besides features: the key of a row's item and the items that the row has."""
    wanted = [ExtraColumn(catalogue_of(schema).key, "int")]
    wanted += [ExtraColumn(settings.exclude, "ids")] if settings.exclude is not None else []
    named = {column.name for column in schema.extra}
    return dataclasses.replace(schema, extra=(*schema.extra, *(c for c in wanted if c.name not in named)))


def check_retrieval(model: nn.Module, settings: TrainSettings) -> None:
    """Refuse a model and settings that do not go together, before anything starts."""
    if isinstance(model, RetrievalModel) != (settings.retrieval is not None):
        kind = "a retrieval model" if isinstance(model, RetrievalModel) else "a ranking model"
        raise UserError(
            f"{type(model).__name__} is {kind}, and train.retrieval is {'null' if settings.retrieval is None else 'set'}",
            "train.retrieval={} with a retrieval model, null with any other",
        )
    if settings.retrieval is None:
        return
    for key in ("slices", "calibration"):
        if getattr(settings, key) not in ((), "none"):
            raise UserError(f"train.{key} is {getattr(settings, key)!r}", "scores of retrieval are no probabilities")


def retrieval_intervals(predictions: pa.Table, at: Sequence[int]) -> dict[str, dict[str, tuple[float, float]]]:
    """95% intervals by task and metric, from the ranks that the workers wrote."""
    columns = {name.removesuffix("_rank"): name for name in predictions.column_names if name.endswith("_rank")}
    return {task: rank_intervals(predictions[name].to_numpy(), at) for task, name in columns.items()}


def count_baselines(job: Job, items: CatalogueItems) -> CountBaselines:
    """Fitted on the training split: of every group its longest row, what it had and then the row's own item."""
    assert job.train.retrieval is not None
    exclude, group = job.train.retrieval.exclude, job.schema.group_id
    assert exclude is not None
    names = list(dict.fromkeys([items.key, exclude, items.task, *([group] if group else [])]))
    rows = job.log("train").read(names)
    rows = rows.filter(positives(rows, items.task))
    had, lengths = flatten(whole(rows[exclude]))
    longest = _longest(rows, group, lengths)
    starts = (np.cumsum(lengths) - lengths)[longest]
    size = lengths[longest] + 1
    ends = np.cumsum(size) - 1
    keys = np.empty(int(size.sum()), np.int64)
    keys[ends] = integers(whole(rows[items.key]))[longest]
    inside = np.ones(len(keys), np.bool_)
    inside[ends] = False
    keys[inside] = integers(had)[ranges(starts, lengths[longest])]
    order = np.argsort(items.keys)
    place = order[np.minimum(np.searchsorted(items.keys, keys, sorter=order), len(order) - 1)]
    known = items.keys[place] == keys
    owner = np.repeat(np.arange(len(size)), size)[known]
    return CountBaselines(place[known], np.bincount(owner, minlength=len(size)), len(items))


def _longest(rows: pa.Table, group: str | None, lengths: np.ndarray) -> np.ndarray:
    """The number of the row with the longest list of each group."""
    if group is None:
        return np.arange(len(lengths))
    _, owner = np.unique(rows[group].to_numpy(), return_inverse=True)
    order = np.lexsort((lengths, owner))
    return order[np.append(owner[order][1:] != owner[order][:-1], True)]
