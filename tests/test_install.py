from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def install() -> ModuleType:
    """jobs/install.py as a fresh module."""
    spec = importlib.util.spec_from_file_location("raysys_install", ROOT / "jobs" / "install.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Puts an executable shell script on an otherwise empty PATH and returns its path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("RAYSYS_PYTHON", "RAYSYS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)

    def write(name: str, script: str) -> str:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
        return str(folder / name)

    return write


# Which Python, which accelerator


def test_prefers_the_python_that_was_tested_most(install, fake, monkeypatch) -> None:
    fake("python3.12", "echo 3.12")
    best = fake("python3.11", "echo 3.11")
    monkeypatch.setattr(sys, "executable", fake("python3", "echo 3.13"))
    assert install.find_python() == best


def test_passes_over_a_python_that_does_not_start_or_has_no_venv(install, fake, monkeypatch) -> None:
    fake("python3.11", "echo 'python3.11: command not found' >&2; exit 127")
    fake("python3.12", "echo \"ModuleNotFoundError: No module named 'ensurepip'\" >&2; exit 1")
    best = fake("python3.13", "echo 3.13")
    monkeypatch.setattr(sys, "executable", fake("python3", "echo 3.9"))
    assert install.find_python() == best


def test_without_a_usable_python_the_error_names_versions_and_the_way_out(install, fake, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", fake("python3", "echo 3.9"))
    with pytest.raises(install.SetupError) as error:
        install.find_python()
    assert "no Python 3.10 / 3.11 / 3.12 / 3.13 / 3.14 with venv and ensurepip on PATH" in str(error.value)
    assert "python3-venv" in str(error.value)
    assert "RAYSYS_PYTHON=" in str(error.value)


def test_the_named_python_is_taken_or_refused(install, fake, monkeypatch) -> None:
    fake("python3.11", "echo 3.11")
    wanted = fake("mine", "echo 3.12")
    monkeypatch.setenv("RAYSYS_PYTHON", wanted)
    assert install.find_python() == wanted
    monkeypatch.setenv("RAYSYS_PYTHON", fake("old", "echo 3.8"))
    with pytest.raises(install.SetupError, match=r"RAYSYS_PYTHON=.*old is no Python 3.11"):
        install.find_python()


def test_accelerator_is_found_out_and_can_be_overridden(install, fake, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(install, "GPU_DEVICE", tmp_path / "nvidia0")
    assert install.find_accelerator() == "cpu"
    fake("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert install.find_accelerator() == "cpu"
    fake("nvidia-smi", "echo 'GPU 0: NVIDIA H100 80GB HBM3'")
    assert install.find_accelerator() == "cuda"
    monkeypatch.setenv("RAYSYS_ACCELERATOR", "cpu")
    assert install.find_accelerator() == "cpu"
    monkeypatch.setenv("RAYSYS_ACCELERATOR", "gpu")
    with pytest.raises(install.SetupError, match="RAYSYS_ACCELERATOR='gpu' must be cpu or cuda"):
        install.find_accelerator()


def test_a_gpu_device_without_nvidia_smi_counts(install, fake, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(install, "GPU_DEVICE", tmp_path / "nvidia0")
    (tmp_path / "nvidia0").touch()
    assert install.find_accelerator() == "cuda"


# The stamp


@pytest.fixture
def checkout(install, fake, monkeypatch, tmp_path) -> ModuleType:
    """install.py in a checkout of its own, with a stand-in for pip; `checkout.calls` is what was done."""
    root = tmp_path / "checkout"
    (root / "jobs").mkdir(parents=True)
    for name in install.INPUTS:
        (root / name).write_text(f"content of {name}")
    monkeypatch.setattr(install, "ROOT", root)
    monkeypatch.setattr(install, "VENV", root / ".venv")
    monkeypatch.setattr(install, "STAMP", root / ".venv" / "raysys-setup.json")
    monkeypatch.setattr(install, "GPU_DEVICE", tmp_path / "nvidia0")
    monkeypatch.setattr(sys, "executable", fake("python3", "echo 3.11"))
    calls: list[str] = []

    def make_venv(venv: Path, python: str) -> Path:
        calls.append("venv")
        (venv / "bin").mkdir()
        (venv / "bin" / "python").write_text("#!/bin/sh\necho 3.11\n")
        (venv / "bin" / "python").chmod(0o755)
        return venv / "bin" / "python"

    monkeypatch.setattr(install, "make_venv", make_venv)
    monkeypatch.setattr(install, "install", lambda python, accelerator, *options: calls.append(f"pip {accelerator}"))
    install.calls = calls
    return install


def test_set_up_once_then_nothing_is_done(checkout) -> None:
    checkout.setup()
    checkout.setup()
    assert checkout.calls == ["venv", "pip cpu"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "jobs/install.py"])
def test_changed_pins_are_installed_into_the_same_environment(checkout, name) -> None:
    checkout.setup()
    (checkout.ROOT / name).write_text("other pins")
    checkout.setup()
    checkout.setup()
    assert checkout.calls == ["venv", "pip cpu", "pip cpu"]


def test_another_accelerator_gets_a_new_environment(checkout, monkeypatch) -> None:
    checkout.setup()
    (checkout.VENV / "old").touch()
    monkeypatch.setenv("RAYSYS_ACCELERATOR", "cuda")
    checkout.setup()
    assert checkout.calls == ["venv", "pip cpu", "venv", "pip cuda"]
    assert not (checkout.VENV / "old").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_installation_starts_over(checkout, monkeypatch, stop) -> None:
    def interrupted(*arguments: object) -> None:
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(checkout, "install", interrupted)
        with pytest.raises(stop):
            checkout.setup()
    checkout.setup()
    assert checkout.calls == ["venv", "venv", "pip cpu"]


def test_an_environment_whose_python_is_gone_is_made_anew(checkout) -> None:
    checkout.setup()
    (checkout.VENV / "bin" / "python").unlink()
    checkout.setup()
    assert checkout.calls == ["venv", "pip cpu", "venv", "pip cpu"]


def test_an_environment_of_the_users_own_is_left_alone(checkout) -> None:
    checkout.VENV.mkdir()
    (checkout.VENV / "mine").touch()
    with pytest.raises(checkout.SetupError, match="was not made by this script\n  hint: move or delete it"):
        checkout.setup()
    assert (checkout.VENV / "mine").exists()


def test_errors_are_one_line_and_exit_status_1(checkout, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["install.py"])
    monkeypatch.setenv("RAYSYS_ACCELERATOR", "tpu")
    assert checkout.main() == 1
    assert capsys.readouterr().err == "error: RAYSYS_ACCELERATOR='tpu' must be cpu or cuda\n"


# What is installed


def test_pip_installs_the_shim_as_fbgemm_gpu(install, tmp_path) -> None:
    wheel = install.write_shim(tmp_path)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    (found,) = metadata.distributions(path=[str(site)])
    assert (found.name, found.version, found.requires) == ("fbgemm-gpu", "1.8.0+cpu", ["fbgemm-gpu-cpu==1.8.0"])


def test_fbgemm_goes_with_the_pinned_torch_and_torchrec(install) -> None:
    from raysys.doctor import TOGETHER, minor

    pins = dict(re.findall(r'"(torch|torchrec)==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert TOGETHER[minor(pins["torch"])] == minor(pins["torchrec"]) == minor(install.FBGEMM)


def test_script_is_readable_for_an_old_python_that_looks_for_a_newer_one() -> None:
    ast.parse((ROOT / "jobs" / "install.py").read_text(), feature_version=(3, 8))


def test_constraints_leave_out_what_is_direct_or_belongs_to_torch(install) -> None:
    listing = [
        ["numpy", "2.4.6", ">=3.11"],
        ["Jinja2", "3.1.6", ">=3.7"],
        ["typing_extensions", "4.16.0", ""],
        ["scipy", "1.17.1", ">=3.11"],
        ["torch", "2.13.0+cpu", ">=3.10"],
        ["fbgemm_gpu-cpu", "1.8.0", ""],
        ["nvidia-nccl-cu13", "2.29.7", ""],
        ["triton", "3.7.1", ""],
        ["pip", "26.3", ""],
        ["raysys", "0.1.0", ""],
    ]
    text = install.constraints(listing, ["numpy==2.4.6; python_version >= '3.11'", "torch==2.13.0"])
    lines = ["jinja2==3.1.6", 'scipy==1.17.1 ; python_version >= "3.11"', "typing-extensions==4.16.0"]
    assert text.splitlines() == lines


def test_committed_constraints_are_exact_and_hold_no_direct_dependency(install) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = [re.fullmatch(r'([a-z0-9-]+)==[\w.]+( ; python_version >= "3\.1\d")?', line) for line in lines]
    assert all(pinned), [line for line, match in zip(lines, pinned, strict=True) if not match]
    names = {match.group(1) for match in pinned if match}
    assert len(names) == len(lines) > 80
    direct = re.findall(r'^    "([\w.-]+)(?:\[[^]]*\])?==', (ROOT / "pyproject.toml").read_text(), re.M)
    assert len(direct) > 15
    assert names.isdisjoint(map(install.canonical, direct))


# The wheel, and the commands


def test_wheel_contains_the_configs(tmp_path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("raysys-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"raysys/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert "raysys/configs/train.yaml" in configs
    assert configs <= names
    assert {"raysys/cli.py", "raysys/errors.py"} <= names
    assert not [name for name in names if name.startswith(("configs/", "tests/", "jobs/"))]


def test_editable_installation_reads_the_configs_of_the_checkout(tmp_path) -> None:
    code = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("raysys-*.whl")
    archive = zipfile.ZipFile(wheel)
    assert archive.read("_raysys.pth").decode().strip() == str(ROOT)
    assert not [name for name in archive.namelist() if name.endswith(".yaml")]


def run_make(*arguments: str) -> str:
    """The output of a make of its own, also where `make test` runs this."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def test_make_alone_lists_the_commands() -> None:
    text = run_make()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"train", "test", "soak", "bench", "lint"} <= set(targets)
    assert all(f"  make {target} " in text for target in targets)


def test_make_train_sets_up_and_passes_arguments_on() -> None:
    assert run_make("--dry-run", "train", "ARGS=train.epochs=2").splitlines() == [
        "python3 jobs/install.py",
        ".venv/bin/python jobs/train.py experiment=movielens trainer=ray train.epochs=2",
    ]
