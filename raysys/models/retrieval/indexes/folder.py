"""Indexes on disk: a folder with index.json (class and settings), files of the library or .npy, and a manifest of hashes.

The hashes are checked before anything is read: a library may crash on a damaged file, and none reads a pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from raysys.config import locate
from raysys.errors import UserError, first_line
from raysys.hashed_folder import files_of, find_damage, hash_files, read_json, read_manifest, write_manifest
from raysys.models.retrieval.indexes.index import Index

FORMAT_VERSION = 1
SETTINGS = "index.json"
T = TypeVar("T")


def load_index(folder: str | Path, threads: int = 1, allowed: Sequence[str] = ("raysys.",)) -> Index:
    """The index of a folder, of whatever class it names.

    allowed: the prefixes under which that class may stand. Raises UserError naming the file that is damaged.
    """
    path = Path(folder) / SETTINGS
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("_target_"), str):
        raise UserError(f"{path} names no class of an index", "save the index again")
    loaded: Index = locate(content["_target_"], allowed).load(Path(folder), threads)  # type: ignore[attr-defined]
    return loaded


def write_index(folder: Path, kind: type, settings: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Write an index beside `folder` and move it there when it is whole. write: puts the files into the folder given."""
    temporary = folder.with_name(folder.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    content = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **settings}
    (temporary / SETTINGS).write_text(json.dumps(content, indent=1) + "\n")
    write_manifest(temporary, FORMAT_VERSION, hash_files(temporary, files_of(temporary)))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def read_settings(folder: Path, kind: type) -> dict[str, Any]:
    """The settings of an index of this class, after all files were checked against their hashes."""
    hashes = read_manifest(folder, FORMAT_VERSION)
    for name, damage in find_damage(folder, hashes, hashes).items():
        raise UserError(f"{folder / name} {damage}", "build the index again")
    content = read_json(folder / SETTINGS)
    target = f"{kind.__module__}.{kind.__qualname__}"
    if not isinstance(content, dict) or content.pop("_target_", None) != target:
        raise UserError(f"{folder / SETTINGS} is not of a {target}", "load_index finds the class")
    return content


def read_array(path: Path) -> NDArray[Any]:
    """A .npy file without objects."""
    return read_file(path, lambda name: np.load(name, allow_pickle=False))


def read_file(path: Path, read: Callable[[str], T]) -> T:
    """What `read` makes of a file; a UserError that names it where it cannot."""
    try:
        return read(str(path))
    except (OSError, ValueError, EOFError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}", "build the index again") from None
