"""Where two batches of the same rows differ, feature by feature."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.data.columns import ranges
from raysys.schema import FeatureSchema


def differing_rows(first: Batch, second: Batch, schema: FeatureSchema) -> dict[str, NDArray[np.bool_]]:
    """Which of the B rows differ in a bit, by feature: dense with its missing flag, ids with their weights, extra columns."""
    differ: dict[str, NDArray[np.bool_]] = {}
    flags = [feature.name for feature in schema.dense if feature.missing_flag]
    for column, name in enumerate([*(feature.name for feature in schema.dense), *flags]):
        found = _bits(first.dense[:, column]) != _bits(second.dense[:, column])
        differ[name] = differ[name] | found if name in differ else found
    for field_name in ("sparse", "weighted", "sequences"):
        one, other = getattr(first, field_name), getattr(second, field_name)
        if one is not None:
            differ |= {key: _jagged_differ(one[key], other[key]) for key in one.keys()}  # noqa: SIM118
    for name, value in first.extra.items():
        other = second.extra[name]
        if isinstance(value, KeyedJaggedTensor):
            assert isinstance(other, KeyedJaggedTensor)
            differ[name] = _jagged_differ(value[name], other[name])
        else:
            assert isinstance(other, Tensor)
            differ[name] = (_bits(value) != _bits(other)).reshape(len(first), -1).any(1)
    return differ


def _jagged_differ(first: JaggedTensor, second: JaggedTensor) -> NDArray[np.bool_]:
    lengths = first.lengths().numpy().astype(np.int64)
    differ = lengths != second.lengths().numpy()
    same = np.flatnonzero(~differ)
    owners = np.repeat(same, lengths[same])
    places = [ranges(jagged.offsets().numpy().astype(np.int64)[:-1][same], lengths[same]) for jagged in (first, second)]
    pairs = [(first.values(), second.values())]
    if first.weights_or_none() is not None:
        pairs.append((first.weights(), second.weights()))
    for one, other in pairs:
        differ[owners[_bits(one)[places[0]] != _bits(other)[places[1]]]] = True
    return differ


def _bits(values: Tensor) -> NDArray[np.int64]:
    """Numbers that are equal where the bits are: NaN is itself, and 0 is not -0."""
    array = values.numpy()
    return np.ascontiguousarray(array).view(f"i{array.itemsize}")
