"""Users are spread over versions as the shares say, and stay where they are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raysys.errors import UserError
from raysys.serve.plan import Plan
from raysys.serve.settings import read_settings

RELEASES = {"v1": "a", "v2": "b", "v3": "c"}


@pytest.mark.parametrize("shares", [{"v1": 0.9, "v2": 0.1}, {"v1": 0.2, "v2": 0.3, "v3": 0.5}, {"v2": 1.0, "v1": 0.0}])
def test_shares_are_those_of_the_users(shares):
    plan, users = Plan(RELEASES, shares), 20_000
    found = [plan.assign(user) for user in range(users)]
    for version, share in shares.items():
        spread = 5 * math.sqrt(share * (1 - share) / users)  # five standard deviations of a share
        assert abs(found.count(version) / users - share) <= spread


def test_a_user_stays_and_a_growing_share_only_takes_users():
    before, after = (Plan(RELEASES, {"v1": share, "v2": 1 - share}) for share in (0.1, 0.3))
    users = [f"u{number}" for number in range(2000)]
    first = np.array([before.assign(user) for user in users]) == "v1"
    second = np.array([after.assign(user) for user in users]) == "v1"
    assert [before.assign(user) == "v1" for user in users] == first.tolist()
    assert (second | ~first).all()
    assert second.sum() > first.sum() > 0


def test_shares_that_round_below_one_still_assign_everyone():
    plan = Plan(RELEASES, {"v1": 1 / 3, "v2": 1 / 3, "v3": 1 / 3 - 1e-10})
    assert {plan.assign(user) for user in range(5000)} == set(RELEASES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"releases": RELEASES, "traffic": {"v9": 1.0}}, "'v9' is not among the releases"),
        ({"releases": RELEASES, "traffic": {"v1": 0.5}}, "traffic is"),
        ({"releases": RELEASES, "traffic": {"v1": 1.5, "v2": -0.5}}, "traffic is"),
        ({"releases": RELEASES, "traffic": {"v1": math.nan}}, "traffic is"),
        ({"releases": RELEASES, "traffic": {"v1": 1.0}, "shadow": "v7"}, "'v7' is not among the releases"),
        ({"releases": RELEASES}, "traffic is"),
        ({"releases": RELEASES, "traffik": {}}, "unknown key 'traffik'"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        Plan.from_config(config)


def test_what_is_one_too_many_must_reach_the_one_who_refuses_it():
    given = {"releases": {}, "traffic": {}, "cascade": {"users": "stores/users", "max_requests": 8}}
    assert read_settings(given | {"ingress": {"num_cpus": 0.1}}).ingress.max_ongoing == 512
    with pytest.raises(UserError, match=r"must exceed cascade\.max_requests"):
        read_settings(given | {"ingress": {"max_ongoing": 8}})
