from __future__ import annotations

import fsspec
import pytest

from raysys.data.filesystem import exists, read_text
from raysys.data.prepare.dataset import is_prepared, prepare_folder, read_prepared
from raysys.errors import UserError


@pytest.fixture(params=["path", "relative", "file", "memory"])
def folder(request, tmp_path, monkeypatch) -> str:
    """A folder with a file `text` and a folder `sub`, as a path or as a URI."""
    monkeypatch.chdir(tmp_path)
    address = {"path": str(tmp_path), "relative": ".", "file": f"file://{tmp_path}", "memory": "memory://fs/a"}
    filesystem, root = fsspec.core.url_to_fs(address[request.param])
    filesystem.makedirs(f"{root}/sub", exist_ok=True)
    filesystem.pipe_file(f"{root}/text", "città".encode())
    return address[request.param]


def test_what_is_there_is_found_and_read(folder):
    assert exists(folder)
    assert exists(f"{folder}/sub")
    assert read_text(f"{folder}/text") == "città"
    assert not exists(f"{folder}/other")
    for name in ("other", "sub", "text/below"):
        with pytest.raises(FileNotFoundError):
            read_text(f"{folder}/{name}")


def test_an_unknown_protocol_is_named():
    with pytest.raises(UserError, match=r"^nosuch://a/b: cannot be opened: Protocol not known: nosuch"):
        read_text("nosuch://a/b")


def test_a_data_set_at_a_uri_is_read_but_never_written(capsys):
    folder = "memory://fs/prepared"

    def write(partial):
        raise AssertionError

    with pytest.raises(UserError) as error:
        prepare_folder(folder, {"rows": 5}, write)
    assert error.value.message == (
        f"{folder}: no prepared data set is there, and preparation writes local folders only"
    )
    assert error.value.hint == "prepare a local folder and copy it there"
    assert not is_prepared(folder)
    fsspec.filesystem("memory").pipe_file("/fs/prepared/prepared.json", b'{"arguments": {"rows": 5}, "bayes": {}}')
    prepare_folder(folder, {"rows": 5}, write)
    assert capsys.readouterr().out == f"{folder}: already prepared\n"
    assert read_prepared(f"{folder}/") == {"arguments": {"rows": 5}, "bayes": {}}
    with pytest.raises(UserError, match=r"memory://fs/prepared: was prepared with rows = 5, not 6"):
        prepare_folder(folder, {"rows": 6}, write)
