"""What tests of every folder share: a tiny data set, one Ray instance, the record of `make soak`, the list of allowed skips."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

# Before torch is imported: more threads than cores make small steps several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # ray.train.report is a barrier that is drained this often (2 s by default)
}
ROOT = Path(__file__).parents[1]
TINY_SCHEMA = {
    "tables": {
        "user": {"num_embeddings": 30, "embedding_dim": 16},
        "item": {"num_embeddings": 40, "embedding_dim": 16},
        "tag": {"num_embeddings": 20, "embedding_dim": 8},
        "brand": {"num_embeddings": 6, "embedding_dim": 16},
    },
    "dense": [{"name": "price", "transform": "log_standardize"}, {"name": "age", "missing_flag": True}],
    "sparse": [
        {"name": "user", "table": "user", "side": "user"},
        {"name": "item", "table": "item", "side": "item", "encoding": "index"},
        {"name": "tags", "table": "tag", "encoding": "hash", "max_length": 3},
        {"name": "brand", "table": "brand", "side": "item", "encoding": "index"},
    ],
    "sequences": [
        {"name": "seen", "features": [{"name": "history", "table": "item", "encoding": "index"}], "max_length": 4}
    ],
    "labels": [
        {"name": "click", "negative_keep_rate": 0.5},
        {"name": "spend", "kind": "regression", "required": False},
    ],
    "example_id": "row",
    "group_id": "user",
}
TINY_CONFIGS = {
    "model/tiny": {
        "_target_": "raysys.models.ranking.dhen.DHEN",
        "embedding_dim": 16,
        "layers": 1,
        "modules": ["dot", "linear"],
        "tokens_out": 4,
        "hidden": [8],
        "bottom": [8],
        "tower": [8],
        "dropout": 0.2,
        "embedding_dropout": 0.0,
    },
    "model/user": {"_target_": "tinypkg.models.Perceptron", "hidden": 8},
    "objective/faulty": {"_target_": "tinypkg.objectives.Faulty", "fault": "none", "step": 0, "rank": 0, "marker": ""},
}
RECORDED_VERSIONS = ("torch", "torchrec", "fbgemm-gpu", "ray", "numpy")


@pytest.fixture(scope="session")
def ray_cluster(tiny_package: Path) -> Iterator[str]:
    """The address of the dashboard of a local Ray with 4 logical CPUs, shared by the whole session: a second one disturbs it."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tiny_package), os.environ.get("PYTHONPATH", "")]))
        context = ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False)
        yield f"http://{context.dashboard_url}"
        ray.shutdown()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A click log of 2,101 rows with every kind of feature: strings, hashes, bags, a history, nulls, two tasks."""
    import pyarrow.parquet as pq
    import yaml

    folder, first = tmp_path_factory.mktemp("data"), 0
    (folder / "schema.yaml").write_text(yaml.safe_dump(TINY_SCHEMA))
    for split, rows in {"train": 1500, "valid": 300, "test": 301}.items():
        pq.write_table(tiny_rows(first, rows), folder / f"{split}.parquet", row_group_size=400)
        first += rows
    return folder


def tiny_rows(first: int, rows: int) -> Any:
    """Rows of the log, whose clicks depend on user and item."""
    import numpy as np
    import pyarrow as pa

    rng = np.random.default_rng(first)
    user, item = rng.integers(0, 35, rows), rng.integers(0, 40, rows)
    tags, history = [[rng.integers(0, high, rng.integers(0, 5)) for _ in range(rows)] for high in (100, 40)]
    logit = 2 * np.sin(user) + 2 * np.cos(2 * item) - 0.5
    click = rng.random(rows) < 1 / (1 + np.exp(-logit))
    columns = {
        "row": np.arange(first, first + rows),
        "user": [f"u{number}" for number in user],
        "item": item,
        "brand": item % 6,
        "tags": tags,
        "history": history,
        "price": rng.lognormal(size=rows),
        "age": pa.array(rng.normal(size=rows), mask=rng.random(rows) < 0.1),
        "click": click.astype(np.int8),
        "spend": pa.array(logit + rng.normal(size=rows), mask=~click),
    }
    return pa.table(columns)


@pytest.fixture(scope="session")
def tiny_package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder outside of the repository, on `sys.path`, with the package `tinypkg`, as a user of raysys would have one."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(Path(__file__).parent / "tinypkg", folder / "tinypkg")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="session")
def tiny_configs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_package: Path) -> Path:
    """A folder of config groups for `--config-dir`: the data set, a DHEN with dropout, and what `tinypkg` has."""
    folder = tmp_path_factory.mktemp("configs")
    data = {
        "folder": str(tiny_data),
        "shards": 6,
        "shuffle_rows": 100,
        "keep_groups_whole": False,
        "prefetch": 2,
    }
    for name, content in {"data/tiny": data, **TINY_CONFIGS}.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def tiny_config_in(tiny_configs: Path) -> Callable[..., dict[str, Any]]:
    """`tiny_config_in(folder, "train.epochs=2")`: a config of the tiny data set and model, with its runs in `folder`."""
    from raysys.config import compose

    groups = ["data=tiny", "model=tiny", "train.batch_size=150", "train.log_every=1"]
    return lambda folder, *overrides: compose(
        [*groups, f"runs_folder={folder}", *overrides], "train", str(tiny_configs)
    )


@pytest.fixture
def tiny_config(tiny_config_in: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`tiny_config("train.epochs=2")`: the same with its runs in the test's folder `runs`."""
    return lambda *overrides: tiny_config_in(tmp_path / "runs", *overrides)


@pytest.fixture
def train_tiny(tiny_config: Callable[..., dict[str, Any]]) -> Callable[..., tuple[Path, Any, list[dict[str, Any]]]]:
    """`train_tiny("train.epochs=2")` trains in this process: the folder of the run, its outcome and all events."""
    from raysys.train.trainer import fit, prepare

    def train(*overrides: str) -> tuple[Path, Any, list[dict[str, Any]]]:
        prepared, events = prepare(tiny_config(*overrides)), []
        return prepared.job.folder, fit(prepared, [events.append]), events

    return train


@pytest.fixture(scope="session")
def tiny_run(tiny_config_in: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with a fitted calibration and a bundle; only to be read."""
    from raysys.train.export import export_run
    from raysys.train.trainer import fit, prepare

    config = tiny_config_in(tmp_path_factory.mktemp("runs"), "run_id=tiny", "train.calibration=platt", "train.epochs=2")
    prepared = prepare(config)
    fit(prepared, [])
    export_run(prepared.job.folder)
    return prepared.job.folder


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """Jobs quieten the loggers of libraries; here they run in the process of all tests."""
    loggers = [logging.getLogger(name) for name in ("", "torch.fx")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def tensors_of() -> Callable[[Path], dict[str, bytes]]:
    """`tensors_of(checkpoint)`: all tensors of a checkpoint by name, whole, as their bytes: equal means bit-equal."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    def flatten(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, bytes]]:
        for key, value in content.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value.numpy().tobytes()

    def tensors(checkpoint: Path) -> dict[str, bytes]:
        with tempfile.NamedTemporaryFile() as file:
            dcp_to_torch_save(checkpoint, file.name)
            return dict(flatten(torch.load(file.name)))

    return tensors


@pytest.fixture
def record_figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record_figure("auc", 0.79, seed=0)`: a number that `--record` writes down beside the test's outcome."""

    def record(name: str, value: float, seed: int | None = None) -> None:
        figure = {"name": name, "value": float(value)} | ({} if seed is None else {"seed": seed})
        request.node.user_properties.append(("figure", figure))

    return record


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("raysys")
    group.addoption("--record", metavar="FOLDER", help="write outcomes and figures to FOLDER/soak-<date>-<commit>.json")
    group.addoption(
        "--allowed-skips", metavar="FILE", help="fail if a test is skipped that is no list item of this page"
    )


def pytest_configure(config: pytest.Config) -> None:
    folder, page = config.getoption("--record"), config.getoption("--allowed-skips")
    if folder:
        config.pluginmanager.register(Recorder(Path(folder)))
    if page:
        config.pluginmanager.register(SkipGuard(Path(page)))


class Recorder:
    """Writes one JSON file a run: the command, the commit, versions, and each test's outcome, seconds and figures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tests: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            figures = [figure for name, figure in report.user_properties if name == "figure"]
            test = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
            self.tests.append(test | {"figures": figures})

    def pytest_sessionfinish(self) -> None:
        now = datetime.now(timezone.utc)
        commit, changes = git("rev-parse", "--short=10", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
        record = {
            "command": shlex.join(["pytest", *sys.argv[1:]]),
            "commit": commit + ("+changes" if changes else ""),
            "finished": now.isoformat(timespec="seconds"),
            "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
            "versions": {name: version for name in RECORDED_VERSIONS if (version := installed_version(name))},
            "tests": self.tests,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"soak-{now:%Y%m%d-%H%M%S}-{commit}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nrecord: {path}")


class SkipGuard:
    """Fails the run where a test was skipped that the page does not list as "- `tests/folder/test_file.py::test_name`"."""

    def __init__(self, page: Path) -> None:
        self.allowed = set(re.findall(r"^- `(tests/[^`]+)`", page.read_text(), re.M))
        self.unlisted: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.check(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.check(report)

    def check(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """A skip of a whole file at import has the file's name as its id; parameters do not count."""
        if report.skipped and report.nodeid.split("[")[0] not in self.allowed:
            self.unlisted.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted:
            print("\nskipped without being listed:", *self.unlisted, sep="\n  ")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def installed_version(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str:
    """The output of a git command, empty outside a repository."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()
