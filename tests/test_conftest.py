from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import pytest

@pytest.mark.experiment
def test_trains(record_figure):
    record_figure("auc", 0.79, seed=3)
    record_figure("rows_per_second", 1000)

@pytest.mark.soak
def test_breaks(record_figure):
    record_figure("ne", 0.8, seed=0)
    assert False

@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_gpu(device):
    pytest.skip("no GPU")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of its own with this suite's conftest.py and three tests."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "tests" / "test_suite.py").write_text(SUITE)
    return tmp_path


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    markers = ["-o", "markers=experiment\nsoak", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *markers, *arguments, "tests"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_record_holds_outcomes_figures_and_seeds(project: Path) -> None:
    done = run_pytest(project, "-m", "experiment or soak", "--record", "records")
    assert done.returncode == 1, done.stdout + done.stderr
    (path,) = (project / "records").glob("soak-*.json")
    record = json.loads(path.read_text())
    assert "'experiment or soak' --record records" in record["command"]
    assert set(record["versions"]) >= {"torch", "torchrec", "ray"}
    trains, breaks = record["tests"]
    assert trains["test"] == "tests/test_suite.py::test_trains"
    assert trains["outcome"] == "passed"
    figures = [{"name": "auc", "value": 0.79, "seed": 3}, {"name": "rows_per_second", "value": 1000.0}]
    assert trains["figures"] == figures
    assert (breaks["outcome"], breaks["figures"]) == ("failed", [{"name": "ne", "value": 0.8, "seed": 0}])


def test_nothing_is_recorded_without_the_option(project: Path) -> None:
    run_pytest(project, "-m", "experiment")
    assert not list(project.rglob("*.json"))


def test_listed_skip_passes(project: Path) -> None:
    (project / "gpu.md").write_text("# Skipped\n\n- `tests/test_suite.py::test_gpu` needs a GPU\n")
    done = run_pytest(project, "-m", "not experiment and not soak", "--allowed-skips", "gpu.md")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 skipped" in done.stdout


def test_unlisted_skip_fails_and_is_named(project: Path) -> None:
    (project / "gpu.md").write_text("# Skipped\n\nThe text names `tests/test_suite.py::test_gpu`, no list item does.\n")
    done = run_pytest(project, "-m", "not experiment and not soak", "--allowed-skips", "gpu.md")
    assert done.returncode == 1
    assert "skipped without being listed:\n  tests/test_suite.py::test_gpu[cuda:0]" in done.stdout


def test_unlisted_skip_of_a_whole_file_fails(project: Path) -> None:
    (project / "gpu.md").write_text("- `tests/test_suite.py::test_gpu`\n")
    skip = 'import pytest\npytest.skip("no kernel", allow_module_level=True)\n'
    (project / "tests" / "test_kernels.py").write_text(skip)
    done = run_pytest(project, "-m", "not experiment and not soak", "--allowed-skips", "gpu.md")
    assert done.returncode == 1
    assert "  tests/test_kernels.py" in done.stdout
