"""A release: three models, an index and the item table that were made for each other, swapped and rolled back as one.

release/
  retriever/  early_ranker/  final_ranker/    bundles
  index/            the items as the retriever encodes them
  items.parquet     the item table
  graph.npz         of Online Matching, where the release has one: clusters of users, and their items
  release.json      its version, and the task by which the final order is made
  manifest.json     sha256 of the files above, and of the manifests of the folders; written last

The manifests of bundles and index hold the hashes of their own files, so that each stage verifies what it loads and no more.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raysys.bundle import ALLOWED_TARGETS, Bundle, load_bundle
from raysys.data.catalogue import catalogue_of, encode_items, read_items
from raysys.data.columns import integers, whole
from raysys.data.sides import side_columns
from raysys.errors import UserError, nearest
from raysys.hashed_folder import MANIFEST, find_damage, hash_files, read_json, read_manifest, write_manifest
from raysys.models.ranking.early_stage import EarlyStage
from raysys.models.retrieval.base import RetrievalModel
from raysys.models.retrieval.hsnn import HSNN
from raysys.models.retrieval.indexes.folder import load_index
from raysys.models.retrieval.indexes.hierarchical import Hierarchical
from raysys.models.retrieval.indexes.index import Index, Vectors
from raysys.models.retrieval.two_tower import TwoTower
from raysys.serve.bandit.edges import GRAPH_ARRAYS
from raysys.serve.bandit.graph import Graph
from raysys.serve.items import ItemTable

FORMAT_VERSION = 1
STAGES = ("retriever", "early_ranker", "final_ranker")
INDEX, ITEMS, GRAPH, FACTS = "index", "items.parquet", "graph.npz", "release.json"
FILES = (*(f"{part}/{MANIFEST}" for part in (*STAGES, INDEX)), ITEMS, FACTS)
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ENCODED_ROWS = 8192
"""Items or users that are encoded at a time."""


@dataclass(frozen=True)
class Release:
    """A release on disk whose own files were verified.

    key: the column that names an item. task: of the final order. has_graph: whether it has one for Online Matching.
    """

    folder: Path
    version: str
    key: str
    task: str
    has_graph: bool

    @classmethod
    def open(cls, folder: str | Path) -> Release:
        """Check everything that the manifest lists; a UserError names the file that is missing, damaged or of another kind."""
        folder = Path(folder)
        hashes = read_manifest(folder, FORMAT_VERSION)
        for name in FILES:
            if name not in hashes:
                raise UserError(f"{folder / MANIFEST} does not list {name}", "build the release again")
        for name, damage in find_damage(folder, hashes, hashes).items():
            raise UserError(f"{folder / name} {damage}", "build the release again")
        facts = read_json(folder / FACTS)
        if not isinstance(facts, dict) or not all(isinstance(facts.get(k), str) for k in ("version", "key", "task")):
            raise UserError(f"{folder / FACTS}: version, key and task are expected", "build the release again")
        return cls(folder, check_version(facts["version"]), facts["key"], facts["task"], GRAPH in hashes)

    def bundle(self, stage: str, allowed: Sequence[str] = ALLOWED_TARGETS) -> Bundle:
        """The verified bundle of one of `STAGES`. allowed: see `load_bundle`."""
        return load_bundle(self.folder / stage, allowed)

    def items(self) -> ItemTable:
        """The item table."""
        return ItemTable.load(self.folder / ITEMS, self.key)

    def index(self, retriever: RetrievalModel, threads: int = 1) -> Index | Hierarchical:
        """The index, searched with users' vectors of this release's retriever."""
        if isinstance(retriever, HSNN):
            return Hierarchical.load(self.folder / INDEX, threads, model=retriever)
        return load_index(self.folder / INDEX, threads)

    def graph(self) -> Graph:
        """The graph that Online Matching begins with; a UserError where the release has none."""
        if not self.has_graph:
            raise UserError(
                f"release {self.version} has no graph for Online Matching",
                "build it with users= and graph=, see configs/release.yaml",
            )
        with np.load(self.folder / GRAPH, allow_pickle=False) as arrays:
            return Graph(1, int(arrays["next_cluster"]), *(arrays[name] for name in GRAPH_ARRAYS))


def check_version(version: str) -> str:
    """A name that may stand in a path and a header; UserError otherwise."""
    if not _VERSION.fullmatch(version):
        raise UserError(f"version {version!r}", "up to 64 letters, digits, dots, dashes and underscores are expected")
    return version


def build_release(
    folder: Path,
    version: str,
    bundles: dict[str, Path],
    catalogue: str,
    make_index: Callable[[RetrievalModel], Index | Hierarchical],
    task: str | None = None,
    make_graph: Callable[[Bundle, Index], Graph] | None = None,
) -> Release:
    """Write a release beside `folder` and move it there when it is whole. What stands there already is never touched.

    bundles: by stage. catalogue: the folder of the data with the item table. make_index: an empty index for the retriever.
    task: the final ranker's task by which items are ordered; None takes its first binary one. make_graph: of the retriever's
    bundle and the index; None for a release without Online Matching.
    """
    if folder.exists():
        raise UserError(f"{folder}: is there already", "a release never changes: give the new one another folder")
    check_version(version)
    temporary = folder.with_name(folder.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for stage in STAGES:
        shutil.copytree(bundles[stage], temporary / stage)
    loaded = {stage: load_bundle(temporary / stage) for stage in STAGES}
    retriever = _check_stages(loaded, task)
    key = catalogue_of(loaded["retriever"].schema).key
    for bundle in loaded.values():
        rows = read_items(catalogue, bundle.schema)  # has every column that this stage reads of an item
    index = make_index(retriever)
    index.add(integers(whole(rows[key])), item_vectors(loaded["retriever"], rows))
    index.save(temporary / INDEX)
    if make_graph is not None:
        _save_graph(temporary / GRAPH, make_graph, loaded["retriever"], index)
    pq.write_table(rows, temporary / ITEMS)
    facts = {"version": version, "key": key, "task": task or _binary_tasks(loaded["final_ranker"])[0]}
    (temporary / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    names = FILES if make_graph is None else (*FILES, GRAPH)
    write_manifest(temporary, FORMAT_VERSION, hash_files(temporary, names))
    temporary.rename(folder)
    return Release.open(folder)


@torch.inference_mode()
def item_vectors(bundle: Bundle, rows: pa.Table) -> Vectors:
    """Catalogue rows as the retriever encodes them, [N, K]."""
    model, parts = bundle.model, []
    assert isinstance(model, RetrievalModel)
    for start in range(0, len(rows), ENCODED_ROWS):
        batch = encode_items(rows.slice(start, ENCODED_ROWS), bundle.schema, bundle.transforms, ITEMS)
        parts.append(model.encode_items(model.embed(batch)))
    vectors: Vectors = torch.cat(parts).numpy()
    return vectors


def _save_graph(
    path: Path, make: Callable[[Bundle, Index], Graph], retriever: Bundle, index: Index | Hierarchical
) -> None:
    if not isinstance(retriever.model, TwoTower):
        raise UserError(
            f"retriever: the vectors of {type(retriever.model).__name__} have no clusters for Online Matching",
            "take model=two_tower, or a release without a graph",
        )
    assert not isinstance(index, Hierarchical)
    graph = make(retriever, index)
    np.savez(path, next_cluster=graph.next_cluster, **{name: getattr(graph, name) for name in GRAPH_ARRAYS})


def _check_stages(bundles: dict[str, Bundle], task: str | None) -> RetrievalModel:
    """Whether each model can do its stage's work, and all mean the same items. Returns the retriever's model."""
    retriever = bundles["retriever"].model
    if not isinstance(retriever, RetrievalModel):
        raise UserError(f"retriever: {type(retriever).__name__} is no retrieval model", "train one: model=two_tower")
    if not isinstance(bundles["early_ranker"].model, EarlyStage):
        name = type(bundles["early_ranker"].model).__name__
        raise UserError(f"early_ranker: {name} has no vectors of items that can be kept", "train model=early_stage")
    if isinstance(bundles["final_ranker"].model, RetrievalModel):
        raise UserError("final_ranker: a retrieval model gives no probabilities", "train a ranking model")
    keys = {stage: catalogue_of(bundle.schema).key for stage, bundle in bundles.items()}
    if len(set(keys.values())) > 1:
        raise UserError(f"the stages know items by {keys}", "train them on data with one catalogue")
    known = _binary_tasks(bundles["final_ranker"])
    if task is not None and task not in known:
        raise UserError(f"task {task!r} is no binary task of the final ranker", nearest(task, known))
    if not known or not set(known[:1] if task is None else [task]) <= set(_binary_tasks(bundles["early_ranker"])):
        raise UserError("early and final ranker share no task to order items by", "name one that both have: task=…")
    for stage, bundle in bundles.items():
        crossed = {column for column in side_columns(bundle.schema, "item")} & set(
            side_columns(bundle.schema, "user", "context")
        )
        if crossed:
            raise UserError(f"{stage}: {sorted(crossed)} are of users and of items", "give each column one side")
    return retriever


def _binary_tasks(bundle: Bundle) -> list[str]:
    return [label.name for label in bundle.schema.labels if label.kind == "binary"]
