"""A small world that can be served: users who like one topic, models of all three stages, releases and stores."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raysys.config import compose
from raysys.models.retrieval.indexes.exact import Exact
from raysys.serve.bandit.build import build_graph
from raysys.serve.release import build_release
from raysys.serve.stages import user_vectors
from raysys.serve.store import ArrowStore
from raysys.train.export import export_run
from raysys.train.trainer import fit, prepare

USERS, ITEMS, TOPICS = 50, 40, 4
SCHEMA = {
    "tables": {
        "user": {"num_embeddings": USERS + 1, "embedding_dim": 8},
        "item": {"num_embeddings": ITEMS + 1, "embedding_dim": 8},
        "topic": {"num_embeddings": TOPICS + 1, "embedding_dim": 8},
        "hour": {"num_embeddings": 25, "embedding_dim": 8},
    },
    "dense": [
        {"name": "age", "side": "user", "transform": "standardize", "default": 30.0},
        {"name": "price", "side": "item", "transform": "standardize"},
    ],
    "sparse": [
        {"name": "user", "table": "user", "side": "user"},
        {"name": "item", "table": "item", "side": "item"},
        {"name": "topic", "table": "topic", "side": "item"},
        {"name": "hour", "table": "hour", "side": "context"},
    ],
    "sequences": [{"name": "liked", "features": [{"name": "liked", "table": "item"}], "max_length": 6}],
    "labels": [{"name": "click"}, {"name": "stars", "kind": "regression", "required": False}],
    "example_id": "row",
    "group_id": "user",
    "catalogue": {"key": "item"},
}
COMMON = ["data=table", "data.prepare=null", "data.shards=4", "train.batch_size=100"]
STAGES = {
    "retriever": [
        "model=two_tower",
        "model.embedding_dim=8",
        "objective=sampled_softmax",
        "objective.negatives=16",
        "train.retrieval={exclude: null, at: [3, 10]}",
        "train.epochs=6",
    ],
    "early_ranker": ["model=early_stage", "model.embedding_dim=8", "model.deep=[16]", "train.epochs=2"],
    "final_ranker": ["model=dcnv2", "model.embedding_dim=8", "train.epochs=2"],
}


@pytest.fixture(scope="session")
def served_data(tmp_path_factory):
    """The folder of the log: a user clicks two thirds of what is shown of their topic, one tenth of the rest."""
    folder, rng = tmp_path_factory.mktemp("served"), np.random.default_rng(0)
    keys = rng.permutation(1000)[:ITEMS]
    liked: dict[int, list[int]] = {user: [] for user in range(USERS)}
    rows = []
    for number, user in enumerate(rng.integers(0, USERS, 4000)):
        place = rng.integers(ITEMS)
        likes = place % TOPICS == user % TOPICS
        click = int(rng.random() < (0.67 if likes else 0.1))
        rows.append(
            {
                "row": number,
                "user": int(user),
                "age": float(20 + user % 40),
                "item": int(keys[place]),
                "topic": int(place % TOPICS),
                "price": float(place),
                "hour": int(rng.integers(24)),
                "liked": liked[user][-6:],
                "click": click,
                "stars": float(rng.normal() + likes),
            }
        )
        liked[user] += [int(keys[place])] * click
    for split, part in (("train", rows[:3200]), ("valid", rows[3200:3600]), ("test", rows[3600:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"{split}.parquet", row_group_size=256)
    catalogue = {"item": keys, "topic": np.arange(ITEMS) % TOPICS, "price": np.arange(ITEMS, dtype=np.float64)}
    titles = [f"Item {number}" for number in range(ITEMS)]
    pq.write_table(pa.table({**catalogue, "title": titles}), folder / "items.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    return folder


@pytest.fixture(scope="session")
def stage_bundles(served_data, tmp_path_factory):
    """make(seed) trains the three models; the bundles by stage."""
    made: dict[int, dict] = {}

    def make(seed=0):
        if seed not in made:
            runs = tmp_path_factory.mktemp(f"stages-{seed}")
            made[seed] = {}
            for stage, overrides in STAGES.items():
                place = [f"data.folder={served_data}", f"runs_folder={runs}", f"run_id={stage}", f"seed={seed}"]
                prepared = prepare(compose([*COMMON, *place, *overrides], "train"))
                fit(prepared, [])
                made[seed][stage] = export_run(prepared.job.folder)
        return made[seed]

    return make


@pytest.fixture(scope="session")
def make_release(stage_bundles, served_data):
    """make(folder, version, seed, clusters) builds a release with an exact index; clusters: of a graph, None for none."""

    def make(folder, version, seed=0, clusters=None, **arguments):
        if clusters is not None:

            def graph(bundle, index):
                users = pq.read_table(served_data / "valid.parquet")
                return build_graph(user_vectors(bundle, users), index, clusters=clusters, width=10)

            arguments["make_graph"] = graph
        bundles = stage_bundles(seed)
        return build_release(folder, version, bundles, str(served_data), lambda model: Exact(model.width), **arguments)

    return make


@pytest.fixture(scope="session")
def release(make_release, tmp_path_factory):
    """A release, only to be read."""
    return make_release(tmp_path_factory.mktemp("releases") / "v1", "v1")


@pytest.fixture(scope="session")
def user_store(served_data, tmp_path_factory):
    """The folder of a store with each user's newest row."""
    rows = pq.read_table(served_data / "train.parquet").to_pylist()
    newest = {row["user"]: {name: row[name] for name in ("user", "age", "liked")} for row in rows}
    folder = tmp_path_factory.mktemp("stores") / "users"
    ArrowStore.create(folder, pa.Table.from_pylist(list(newest.values())), "user")
    return folder


@pytest.fixture(scope="session")
def free_port():
    """free_port(): one that nobody listens at."""

    def find():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def serving(ray_cluster, free_port):
    """`with serving(config) as url`: the application of this config at an address of this machine."""
    from ray import serve

    from raysys.serve.app import build

    @contextmanager
    def run(config):
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        serve.run(build(config), name="raysys", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()

    return run


@pytest.fixture(scope="module")
def learning(serving, make_release, user_store, tmp_path_factory):
    """The address of an application with Online Matching that counts twice a second, and the folder of its logs."""
    folder = tmp_path_factory.mktemp("learning")
    version = folder.name  # its actors are found by this name, another one in each module
    release = make_release(folder / "release", version, clusters=6)
    stage = {"num_cpus": 0.1}
    config = {
        "releases": {version: str(release.folder)},
        "traffic": {version: 1.0},
        "cascade": {
            "users": str(user_store),
            "retrieve": 20,
            "rank": 10,
            "deadline_ms": 10_000,
            "refresh_s": 0.3,
        },
        "served_log": {"folder": str(folder / "served"), "share": 0.5, "max_bytes": 1_000_000},
        "bandit": {"folder": str(folder / "bandit"), "slots": 2, "window_s": 0.5, "policy": {"neighbours": 2}},
        **{name: stage for name in ("retriever", "early_ranker", "ranker", "ingress")},
    }
    with serving(config) as url:
        yield SimpleNamespace(url=url, release=release, bandit=folder / "bandit", served=folder / "served")
