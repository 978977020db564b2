"""What tests of every folder share: one Ray instance, figures for the record of `make soak`, and the list of allowed skips."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
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
RECORDED_VERSIONS = ("torch", "torchrec", "fbgemm-gpu", "ray", "numpy")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with 4 logical CPUs, shared by the whole session: a second one on a machine disturbs the first."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


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
