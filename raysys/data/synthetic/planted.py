"""The truth behind a synthetic log: the logit of each row as a function of its columns."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raysys.data.synthetic.spec import STRENGTHS, SyntheticSpec
from raysys.data.synthetic.zipf import FACTORS, Floats, IdFactors
from raysys.errors import UserError

START = 1_704_067_200
"""`time` of the first row, in Unix seconds: 2024-01-01."""
SPAN = 30 * 86_400
"""Seconds from the first row to the last one."""

_SIZE_KEYS = {
    "dense": "num_dense",
    "effects": "cardinalities",
    "pairwise": "num_pairs",
    "heterogeneous": "num_heterogeneous",
    "third_order": "num_triples",
    "history": "history_length",
    "order": "history_length",
}


def true_probabilities(spec: SyntheticSpec, table: pa.Table) -> NDArray[np.float64]:
    """[T, N]: the probability of each task's label given the columns of a row that a model may see.

    That of the second task of a funnel is the probability after the first one happened, for every row.
    """
    return 1 / (1 + np.exp(-_truth(spec).logits(table)))


def planted_interactions(spec: SyntheticSpec) -> dict[str, list[tuple[str, ...]]]:
    """The columns of every planted pair and triple, by kind (`pairwise`, `heterogeneous`, `third_order`)."""
    return {kind: [product.fields for product in products] for kind, products in _truth(spec).products.items()}


@dataclass(frozen=True)
class _Product:
    """`scale` * sum over the 4 factors of the product of the fields' factors, the first ones turned by `matrix`."""

    fields: tuple[str, ...]
    matrix: Floats | None
    scale: float

    def __call__(self, factors: dict[str, Floats]) -> Floats:
        first, *others = (factors[name] for name in self.fields)
        product = first if self.matrix is None else np.einsum("rs,sn->rn", self.matrix, first)
        for other in others:
            product = product * other
        return product.sum(0) * np.float32(self.scale)  # [N]


class _Truth:
    """The planted parameters, a function of the spec alone: a few kilobytes for any number of ids."""

    def __init__(self, spec: SyntheticSpec) -> None:
        self.spec = spec
        self.factors = {name: IdFactors(spec.seed, name, c, spec.exponent) for name, c in spec.fields.items()}
        self.products = _products(spec, self.factors)
        covariances = _covariances(spec, self.factors)
        tasks = len(spec.tasks)
        gram = (1 - spec.correlation) * np.eye(tasks) + spec.correlation
        self.weights: dict[str, Floats] = {}  # [T, K]; those of the effects [2T, K]: at the first and at the last row
        for kind in STRENGTHS:
            if strength := getattr(spec, kind):
                both = np.kron(np.eye(2), gram) if kind == "effects" and spec.drift else gram
                self.weights[kind] = strength * _weights(_rng(spec, kind), covariances[kind], both, kind)
        deviation = np.sqrt(sum(getattr(spec, kind) ** 2 for kind in STRENGTHS))
        self.constants = np.array([_constant(rate, deviation) for rate in spec.base_rates])

    def logits(self, table: pa.Table) -> NDArray[np.float64]:
        """[T, N] for the columns of a log."""
        spec = self.spec
        total = np.repeat(self.constants[:, None], table.num_rows, 1)  # [T, N]
        for kind, components in self._components(table):
            part = np.einsum("tk,kn->tn", self.weights[kind].astype(np.float32), components)
            if len(part) > len(total):
                angle = np.arccos(1 - spec.drift) * (table["time"].to_numpy() - START) / SPAN  # [N]
                part = np.cos(angle) * part[: len(total)] + np.sin(angle) * part[len(total) :]
            total += part
        return total

    def _components(self, table: pa.Table) -> Iterator[tuple[str, Floats]]:
        """The kinds that have weights, each [K, N]: uncorrelated over the rows or with the covariance of `_covariances`."""
        if "dense" in self.weights:
            yield "dense", np.stack([_numbers(table, f"d{number}", 0) for number in range(self.spec.num_dense)])
        factors = {name: of_ids(_numbers(table, name, -1)) for name, of_ids in self.factors.items()}
        if "effects" in self.weights:
            yield "effects", np.concatenate(list(factors.values()))
        for kind, products in self.products.items():
            if kind in self.weights:
                yield kind, np.stack([product(factors) for product in products])
        if "history" in self.weights or "order" in self.weights:
            yield from self._history(table, factors["item_id"])

    def _history(self, table: pa.Table, item: Floats) -> Iterator[tuple[str, Floats]]:
        """Products of the item's factors with sums over the history, [16, N]; 0 for an empty history."""
        column = table["history"].combine_chunks()
        offsets = column.offsets.to_numpy()
        lengths = np.diff(offsets)  # [N]
        events = self.factors["item_id"](column.flatten().to_numpy())  # [4, E]
        # Position minus the middle of its history: adds up to 0 within a row, with the sum of squares l (l^2 - 1) / 12.
        position = np.arange(events.shape[1]) - np.repeat(offsets[:-1] - offsets[0] + (lengths - 1) / 2, lengths)
        squares = {"history": lengths, "order": lengths * (lengths.astype(np.float64) ** 2 - 1) / 12}
        for kind in [kind for kind in squares if kind in self.weights]:
            weighted = events if kind == "history" else events * position.astype(np.float32)
            sums = np.zeros((FACTORS, len(lengths)), np.float32)
            sums[:, lengths > 0] = np.add.reduceat(weighted, (offsets[:-1] - offsets[0])[lengths > 0], axis=1)
            sums /= np.sqrt(np.maximum(squares[kind], 1)).astype(np.float32)
            yield kind, (sums[:, None] * item[None]).reshape(FACTORS**2, -1)


@functools.lru_cache(maxsize=4)
def _truth(spec: SyntheticSpec) -> _Truth:
    return _Truth(spec)


def _rng(spec: SyntheticSpec, part: str) -> np.random.Generator:
    """Independent numbers for each part, so that a change of one kind leaves the others as they are."""
    number = ("products", *STRENGTHS).index(part)
    return np.random.default_rng(np.random.SeedSequence(spec.seed, spawn_key=(0, number)))


def _numbers(table: pa.Table, column: str, null: int) -> NDArray[Any]:
    return table[column].fill_null(null).to_numpy()


def _products(spec: SyntheticSpec, factors: dict[str, IdFactors]) -> dict[str, list[_Product]]:
    """The planted pairs and triples of c columns, drawn without repetition, each with variance 1 where nothing is null."""
    rng = _rng(spec, "products")
    names = list(spec.fields)[2:]
    pairs = _draw(rng, names, 2, spec.num_pairs + spec.num_heterogeneous)
    triples = _draw(rng, names, 3, spec.num_triples)
    return {
        "pairwise": [_product(factors, fields) for fields in pairs[: spec.num_pairs]],
        "heterogeneous": [_product(factors, fields, _rotation(rng)) for fields in pairs[spec.num_pairs :]],
        "third_order": [_product(factors, fields) for fields in triples],
    }


def _draw(rng: np.random.Generator, names: list[str], size: int, count: int) -> list[tuple[str, ...]]:
    found = list(itertools.combinations(names, size))
    if count > len(found):
        raise UserError(
            f"synthetic: {count} different interactions of {size} c columns are wanted, but {len(names)} columns have only "
            f"{len(found)}",
            f"lower {'num_pairs or num_heterogeneous' if size == 2 else 'num_triples'}, or give more cardinalities",
        )
    return [found[number] for number in rng.permutation(len(found))[:count]]


def _product(factors: dict[str, IdFactors], fields: tuple[str, ...], matrix: Floats | None = None) -> _Product:
    """Scaled to variance 1: that of a sum of products of independent fields is the sum of the covariances' products."""
    first, *others = (factors[name].covariance for name in fields)
    covariance = first if matrix is None else matrix @ first @ matrix.T
    for other in others:
        covariance = covariance * other
    return _Product(fields, None if matrix is None else matrix.astype(np.float32), float(covariance.sum() ** -0.5))


def _rotation(rng: np.random.Generator) -> Floats:
    return np.linalg.qr(rng.standard_normal((FACTORS, FACTORS)))[0]


def _covariances(spec: SyntheticSpec, factors: dict[str, IdFactors]) -> dict[str, Floats]:
    """The covariance [K, K] over the rows of the components of each kind, nulls and short histories counted as zeros."""
    present = 1 - spec.missing
    effects = np.zeros((FACTORS * len(factors),) * 2)
    for number, (name, of_ids) in enumerate(factors.items()):
        block = slice(FACTORS * number, FACTORS * (number + 1))
        effects[block, block] = (1 - spec.missing_share(name)) * of_ids.covariance
    items = factors["item_id"].covariance
    affinity = np.kron(items, items) / (spec.history_length + 1)
    return {
        "dense": present * np.eye(spec.num_dense),
        "effects": effects,
        "pairwise": present**2 * np.eye(spec.num_pairs),
        "heterogeneous": present**2 * np.eye(spec.num_heterogeneous),
        "third_order": present**3 * np.eye(spec.num_triples),
        "history": spec.history_length * affinity,
        "order": max(spec.history_length - 1, 0) * affinity,
    }


def _weights(rng: np.random.Generator, covariance: Floats, gram: Floats, kind: str) -> Floats:
    """Random weights [T, K] for which weights @ covariance @ weights.T is exactly `gram` [T, T]."""
    rank = np.linalg.matrix_rank(covariance, tol=1e-6) if len(covariance) else 0
    if rank < len(gram):
        raise UserError(
            f"synthetic: {kind} has {rank} independent parts, too few for {len(gram)} tasks of a set correlation",
            f"raise {_SIZE_KEYS[kind]} or set {kind} to 0",
        )
    random = rng.standard_normal((len(gram), len(covariance)))
    return _power(gram, 0.5) @ _power(random @ covariance @ random.T, -0.5) @ random


def _power(matrix: Floats, exponent: float) -> Floats:
    """A power of a symmetric positive matrix; rounding may have made a zero eigenvalue slightly negative."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 0) ** exponent) @ vectors.T


def _constant(rate: float, deviation: float) -> float:
    """The constant c for which a logit c + N(0, deviation^2) has the mean probability `rate`, by bisection."""
    nodes, shares = np.polynomial.hermite_e.hermegauss(64)
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = (shares / (1 + np.exp(-middle - deviation * nodes))).sum() / shares.sum()
        low, high = (middle, high) if mean < rate else (low, middle)
    return (low + high) / 2
