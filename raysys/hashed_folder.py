"""Folders whose `manifest.json` holds the sha256 of every other file: checkpoints and bundles."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raysys.errors import UserError

MANIFEST = "manifest.json"


def files_of(folder: Path) -> list[str]:
    """The relative paths of all files but the manifest, sorted. A folder inside may have a file of that name, too."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST
    )


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 by file name."""
    return {name: _sha256(folder / name) for name in names}


def write_manifest(folder: Path, format_version: int, hashes: dict[str, str]) -> None:
    """Write the manifest so that it appears at once or not at all, also after a power cut."""
    temporary = folder / (MANIFEST + ".tmp")
    with open(temporary, "w") as file:
        json.dump({"format_version": format_version, "sha256": hashes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)


def read_manifest(folder: Path, format_version: int) -> dict[str, str]:
    """The hashes by file name; raises UserError where there is no manifest or another format."""
    content = read_json(folder / MANIFEST)
    if not isinstance(content, dict) or not isinstance(content.get("sha256"), dict):
        raise UserError(f"{folder / MANIFEST} is no manifest: it holds no hashes")
    if content.get("format_version") != format_version:
        raise UserError(f"{folder}: format {content.get('format_version')!r}, expected {format_version}")
    return content["sha256"]


def find_damage(folder: Path, hashes: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    """What is wrong with each of the named files that is missing or changed."""
    damage = {}
    for name in names:
        if not (folder / name).exists():
            damage[name] = "is missing"
        elif _sha256(folder / name) != hashes[name]:
            damage[name] = "does not match its hash"
    return damage


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises UserError where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", f"a folder without {MANIFEST} is not finished") from None
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{path}: not valid JSON: {error}") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
