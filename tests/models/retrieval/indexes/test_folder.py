"""Indexes on disk: the same answers after loading, and every damage is an error that names the file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from raysys.errors import UserError
from raysys.hashed_folder import MANIFEST, files_of, hash_files, write_manifest
from raysys.models.retrieval.indexes.exact import Exact
from raysys.models.retrieval.indexes.folder import load_index
from raysys.models.retrieval.indexes.hnsw import HNSW
from raysys.models.retrieval.indexes.ivf_pq import IVFPQ

K = 100


def test_a_loaded_index_answers_the_same_and_can_be_changed(kind, fill, tmp_path):
    made = fill(kind)
    made.index.remove(made.ids[:100])
    made.index.add(made.ids[100:120], made.vectors[:20])
    made.index.save(tmp_path / "index")
    made.index.save(tmp_path / "index")  # replaces
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    for loaded in (kind.load(tmp_path / "index"), load_index(tmp_path / "index")):
        assert type(loaded) is kind
        assert len(loaded) == len(made.index) == len(made.ids) - 100
        for expected, got in zip(made.index.search(made.queries, K), loaded.search(made.queries, K), strict=True):
            np.testing.assert_array_equal(got, expected)
        loaded.add(made.ids[:100], made.vectors[:100])
        loaded.remove(made.ids[200:300])
        found, _ = loaded.search(made.vectors[:300], K)
        assert np.isin(made.ids[:100], found).all()
        assert not np.isin(found, made.ids[200:300]).any()


def test_an_empty_index_can_be_saved(kind, tmp_path):
    kind(32).save(tmp_path / "index")
    assert len(load_index(tmp_path / "index")) == 0


@pytest.mark.parametrize(
    "index", [Exact(6), HNSW(6, m=8, ef_construction=40, ef_search=50), IVFPQ(6, nprobe=3, rerank=4)]
)
def test_settings_come_back_and_threads_are_those_of_the_loader(index, tmp_path):
    index.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index", threads=2)
    settings = {name: value for name, value in vars(index).items() if not name.startswith("_")}
    assert {name: getattr(loaded, name) for name in settings} == {**settings, "threads": 2}


def test_a_damaged_file_is_named(kind, fill, tmp_path):
    folder = tmp_path / "index"
    fill(kind).index.save(folder)
    for name in files_of(folder):
        content = (folder / name).read_bytes()
        for broken in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
            (folder / name).write_bytes(broken)
            with pytest.raises(UserError, match=name):
                kind.load(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=name):
            kind.load(folder)
        (folder / name).write_bytes(content)
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match=MANIFEST):
        kind.load(folder)


def test_a_damaged_file_with_a_hash_that_fits_is_named(kind, fill, tmp_path):
    folder = tmp_path / "index"
    fill(kind).index.save(folder)
    for name in files_of(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:60])
        write_manifest(folder, 1, hash_files(folder, files_of(folder)))
        with pytest.raises(UserError, match=name):
            kind.load(folder)
        (folder / name).write_bytes(content)


def test_no_pickle_is_read(fill, tmp_path):
    folder = tmp_path / "index"
    fill(Exact).index.save(folder)
    np.save(folder / "ids.npy", np.array([{}], object), allow_pickle=True)
    write_manifest(folder, 1, hash_files(folder, files_of(folder)))
    with pytest.raises(UserError, match=r"ids\.npy"):
        Exact.load(folder)


def test_only_a_class_under_an_allowed_prefix_is_loaded(tmp_path):
    folder = tmp_path / "index"
    Exact(6).save(folder)
    path = folder / "index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "_target_": "os.system"}))
    with pytest.raises(UserError, match="refused"):
        load_index(folder)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"index\.json"):
        load_index(folder)
    HNSW(6).save(folder)
    with pytest.raises(UserError, match=r"index\.json is not of a .*Exact"):
        Exact.load(folder)
