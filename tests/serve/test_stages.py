"""The stages give what their models give row by row, and a release is whole or refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysys.bundle import load_bundle
from raysys.errors import UserError
from raysys.models.retrieval.indexes.exact import Exact
from raysys.serve.release import FILES, Release, build_release
from raysys.serve.stages import EarlyRankerStage, RankerStage, RetrieverStage
from raysys.serve.store import ArrowStore

NONE = np.zeros(0, np.int64)


@pytest.fixture(scope="module")
def users(user_store):
    rows, found = ArrowStore(user_store).get([3, 4, 7])
    assert found.all()
    return pa.Table.from_batches([rows]).append_column("hour", pa.array([1, 2, 3]))


def pairs(users, items, row):
    """Plain rows of one user with every item, as a log has them."""
    user = users.slice(row, 1).to_pylist()[0]
    return [user | item for item in items.rows.drop_columns(["title"]).to_pylist()]


def test_the_retriever_finds_what_scoring_every_pair_finds(release, users):
    found = RetrieverStage(release).retrieve(users, [5, 40, 3], [NONE] * 3)
    bundle, items = release.bundle("retriever"), release.items()
    for row, candidates in enumerate(found):
        with torch.inference_mode():
            logits = bundle.model(bundle.transforms.rows_to_batch(pairs(users, items, row))).logits[:, 0]
        best = logits.topk(len(candidates.ids))
        assert len(candidates.ids) == [5, 40, 3][row]
        # the index compares cosines: within a rounding of float32 of the model's score, divided by its temperature
        torch.testing.assert_close(torch.from_numpy(candidates.scores), best.values * 0.07, rtol=0, atol=1e-6)


def test_items_that_are_excluded_are_not_retrieved(release, users):
    stage = RetrieverStage(release)
    (everything,) = stage.retrieve(users.slice(0, 1), [40], [NONE])
    (rest,) = stage.retrieve(users.slice(0, 1), [40], [everything.ids[:7]])
    np.testing.assert_array_equal(rest.ids, everything.ids[7:])
    (none,) = stage.retrieve(users.slice(0, 1), [40], [everything.ids])
    assert len(none.ids) == 0


def test_the_early_ranker_gives_the_models_logits(release, users):
    items, bundle = release.items(), release.bundle("early_ranker")
    asked = [items.keys, items.keys[:9], items.keys[5:6]]
    found = EarlyRankerStage(release).rank(users, asked, [10, 10, 10])
    assert [len(candidates.ids) for candidates in found] == [10, 9, 1]
    for row, candidates in enumerate(found):
        with torch.inference_mode():
            logits = bundle.model(bundle.transforms.rows_to_batch(pairs(users, items, row))).logits[:, 0]
        expected = logits[torch.from_numpy(items.find(candidates.ids))]
        torch.testing.assert_close(torch.from_numpy(candidates.scores), expected, rtol=1e-5, atol=1e-6)
        assert (np.diff(candidates.scores) <= 0).all()


def test_the_ranker_gives_the_bundles_predictions(release, users):
    items, bundle = release.items(), release.bundle("final_ranker")
    found = RankerStage(release).predict(users, [items.keys, items.keys[:3], items.keys[-1:]])
    assert [tuple(part.shape) for part in found] == [(40, 2), (3, 2), (1, 2)]
    for row, part in enumerate(found):
        expected = bundle.predict(pairs(users, items, row))
        place = {0: slice(None), 1: slice(3), 2: slice(-1, None)}[row]
        torch.testing.assert_close(part, expected[place], rtol=1e-6, atol=1e-7)


def test_unknown_users_and_items_have_defined_answers(release, user_store):
    rows, found = ArrowStore(user_store).get([10**6])
    assert not found.any()
    unknown = pa.Table.from_batches([rows])
    item = np.array([999_999])
    (prediction,) = RankerStage(release).predict(unknown, [item])
    bundle = release.bundle("final_ranker")
    blank = {"user": 10**6, "age": 30.0, "hour": None, "liked": [], "item": 999_999, "topic": None, "price": 0.0}
    torch.testing.assert_close(prediction, bundle.predict([blank]), rtol=1e-6, atol=1e-7)
    assert len(RetrieverStage(release).retrieve(unknown, [5], [NONE])[0].ids) == 5


def test_a_users_topic_comes_first(release, user_store, served_data):
    rows, _ = ArrowStore(user_store).get(list(range(40)))
    users = pa.Table.from_batches([rows])
    found = RetrieverStage(release).retrieve(users, [5] * 40, [NONE] * 40)
    topics = {row["item"]: row["topic"] for row in pq.read_table(served_data / "items.parquet").to_pylist()}
    hits = np.mean([topics[int(i)] == user % 4 for user, c in enumerate(found) for i in c.ids])
    assert hits > 0.5  # a quarter by chance


def load_everything(folder):
    opened = Release.open(folder)
    for kind in (RetrieverStage, EarlyRankerStage, RankerStage):
        kind(opened)


@pytest.mark.parametrize("name", [*FILES, "final_ranker/model.safetensors", "index/vectors.npy"])
@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing"])
def test_a_damaged_release_is_refused_by_the_name_of_the_file(release, tmp_path, name, damage):
    folder = shutil.copytree(release.folder, tmp_path / "v1")
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content[:-1] + b"\x00")
    with pytest.raises(UserError) as error:
        load_everything(folder)
    assert name.rpartition("/")[2] in str(error.value)


def test_a_part_of_another_release_is_refused(release, make_release, tmp_path):
    other = make_release(tmp_path / "v2", "v2", seed=1)
    shutil.rmtree(other.folder / "index")
    shutil.copytree(release.folder / "index", other.folder / "index")
    with pytest.raises(UserError, match=r"index/manifest\.json does not match its hash"):
        Release.open(other.folder)


def test_what_cannot_be_served_is_refused_when_it_is_built(release, stage_bundles, served_data, tmp_path):
    bundles = stage_bundles()

    def build(folder=tmp_path / "new", version="v9", catalogue=served_data, task=None, **stages):
        return build_release(folder, version, bundles | stages, str(catalogue), lambda m: Exact(m.width), task)

    with pytest.raises(UserError, match="is there already"):
        build(folder=release.folder)
    with pytest.raises(UserError, match=r"version '\.\./v1'"):
        build(version="../v1")
    with pytest.raises(UserError, match="DCNv2 is no retrieval model"):
        build(retriever=bundles["final_ranker"])
    with pytest.raises(UserError, match="no vectors of items that can be kept"):
        build(early_ranker=bundles["final_ranker"])
    with pytest.raises(UserError, match="gives no probabilities"):
        build(final_ranker=bundles["retriever"])
    with pytest.raises(UserError, match="'stars' is no binary task"):
        build(task="stars")
    assert not (tmp_path / "new").exists()


def test_release_json_says_what_is_served(release):
    facts = json.loads((release.folder / "release.json").read_text())
    assert facts == {"version": "v1", "key": "item", "task": "click"}
    assert load_bundle(release.folder / "final_ranker").schema.tasks == ("click", "stars")
