"""A folder counts once its manifest is there, and every later change of it is seen."""

from __future__ import annotations

import hashlib
import json

import pytest

from raysys.errors import UserError
from raysys.hashed_folder import MANIFEST, files_of, find_damage, hash_files, read_json, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / ".hidden").write_bytes(b"metadata")
    (tmp_path / "inner" / "weights").write_bytes(bytes(3 << 20))
    write_manifest(tmp_path, 1, hash_files(tmp_path, files_of(tmp_path)))
    return tmp_path


def test_the_manifest_lists_every_file_with_its_sha256(folder):
    assert files_of(folder) == [".hidden", "inner/weights"]
    hashes = read_manifest(folder, 1)
    assert hashes == {
        ".hidden": hashlib.sha256(b"metadata").hexdigest(),
        "inner/weights": hashlib.sha256(bytes(3 << 20)).hexdigest(),
    }
    assert find_damage(folder, hashes, hashes) == {}
    assert [path.name for path in folder.glob("*.tmp")] == []


def test_a_manifest_further_down_is_a_file_like_any_other(folder):
    (folder / "inner" / MANIFEST).write_text("{}")
    assert files_of(folder) == [".hidden", f"inner/{MANIFEST}", "inner/weights"]


def test_damage_names_the_file(folder):
    hashes = read_manifest(folder, 1)
    content = bytearray((folder / "inner" / "weights").read_bytes())
    content[-1] ^= 1
    (folder / "inner" / "weights").write_bytes(content)
    (folder / ".hidden").unlink()
    assert find_damage(folder, hashes, hashes) == {
        ".hidden": "is missing",
        "inner/weights": "does not match its hash",
    }
    assert find_damage(folder, hashes, [".hidden"]) == {".hidden": "is missing"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "manifest.json: not valid JSON"),
        (b"\xff\xfe", "manifest.json: not valid JSON"),
        (b"[]", "manifest.json is no manifest"),
        (b'{"format_version": 1}', "manifest.json is no manifest"),
        (json.dumps({"format_version": 2, "sha256": {}}).encode(), "format 2, expected 1"),
        (None, r"manifest.json: no such file\n  hint: a folder without manifest.json is not finished"),
    ],
)
def test_a_wrong_manifest_is_an_error_of_the_user(folder, content, message):
    (folder / MANIFEST).unlink()
    if content is not None:
        (folder / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_manifest(folder, 1)


def test_read_json_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, null]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}
    with pytest.raises(UserError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")
