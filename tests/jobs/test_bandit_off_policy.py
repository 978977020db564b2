"""Off-policy values on Open Bandit Data: they cover what the other policy earned in the same week."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raysys.config import compose
from raysys.data.prepare.open_bandit import LoggedImpressions

DOWNLOADS = Path(__file__).parents[2] / "data" / "downloads"


@pytest.fixture(scope="module")
def job(jobs):
    return jobs("bandit_off_policy")


@pytest.fixture(scope="module")
def figures(job, tmp_path_factory):
    """The rows of the record by (campaign, log, policy)."""
    record = tmp_path_factory.mktemp("record") / "record.json"
    job.main(compose([f"downloads={DOWNLOADS}", f"record={record}", "resamples=1000"], "bandit_off_policy"))
    rows = json.loads(record.read_text())["figures"]
    return {(row["campaign"], row["log"], row["policy"]): row for row in rows}


@pytest.mark.parametrize("campaign", ["all", "men", "women"])
@pytest.mark.parametrize(("log", "policy"), [("random", "bts"), ("bts", "random")])
@pytest.mark.parametrize("estimator", ["IPS", "SNIPS", "DR"])
def test_the_log_of_one_policy_tells_what_the_other_earned(figures, campaign, log, policy, estimator):
    row = figures[campaign, log, policy]
    assert row[estimator]["low"] <= row["earned"] <= row[estimator]["high"]


def test_the_random_policy_on_its_own_log_is_worth_its_mean(figures):
    for campaign in ("all", "men", "women"):
        row = figures[campaign, "random", "random"]
        assert row["effective_size"] == pytest.approx(10_000, rel=1e-6)
        for name, tolerance in (("IPS", 1e-5), ("SNIPS", 1e-5), ("DR", 0.01)):  # the two halves of a model differ
            assert row[name]["value"] == pytest.approx(row["earned"], rel=tolerance)


def test_every_policy_has_a_value_on_every_log(figures):
    assert len(figures) == 3 * 2 * 4
    for row in figures.values():
        for name in ("IPS", "SNIPS", "DR"):
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]


def log_of(job, rng, rows=500):
    user = rng.choice([b"a", b"b", b"c"], (rows, 4))
    item = rng.integers(0, 6, rows)
    click = (user[:, 0] == b"a") & (item == 2)
    return LoggedImpressions(item, rng.integers(0, 3, rows), click.astype(float), np.full(rows, 1 / 6), user)


def test_what_is_learned_from_a_log_is_chosen(job):
    """Users with "a" click item 2 always: the policy that exploits chooses it for them."""
    from raysys.models.retrieval.indexes.exact import Exact
    from raysys.serve.bandit.build import build_graph
    from raysys.serve.bandit.policy import Policy

    log = log_of(job, np.random.default_rng(0))
    (users,) = job.user_vectors([log])
    np.testing.assert_allclose(np.linalg.norm(users, axis=1), 1, atol=1e-6)
    index = Exact(users.shape[1])
    index.add(np.arange(6), np.zeros((6, index.dim), np.float32))
    graph = build_graph(users, index, clusters=10, width=6)
    learned = job.learn(graph, users, log, Policy(neighbours=2, alpha=0.0, top_n=1))
    target = job.choices(*learned, users, 6)
    assert (target.sum(1) == 1).all()
    assert target[log.user[:, 0] == b"a", 2].mean() > 0.9


def test_frequencies_are_those_of_each_position(job):
    log = log_of(job, np.random.default_rng(1))
    found = job.frequencies(log, 6)
    for position in range(3):
        shown = log.item[log.position == position]
        np.testing.assert_allclose(found[position], np.bincount(shown, minlength=6) / len(shown))
