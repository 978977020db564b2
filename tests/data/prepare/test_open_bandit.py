"""Open Bandit Data: a tiny log column by column, and the facts of the real one."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.data.prepare.open_bandit import CAMPAIGNS, POLICIES, read_log
from raysys.errors import UserError

HEADER = ",timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,user_feature_2,user_feature_3,user-item_affinity_0\n"


def write(folder, rows):
    path = folder / "bts" / "men" / "men.csv"
    path.parent.mkdir(parents=True)
    path.write_text(HEADER + "".join(f"{number},{row}\n" for number, row in enumerate(rows)))
    return folder


def test_columns_are_those_of_the_file_in_the_order_of_time(tmp_path):
    rows = [
        "2019-11-24 00:00:09.5+00:00,7,3,1,0.25,aa,bb,cc,dd,0.0",
        "2019-11-24 00:00:01.5+00:00,2,1,0,0.5,ee,bb,cc,dd,1.0",
    ]
    log = read_log("bts", "men", write(tmp_path, rows))
    assert log.item.tolist() == [2, 7]
    assert log.position.tolist() == [0, 2]
    assert log.click.tolist() == [0, 1]
    assert log.propensity.tolist() == [0.5, 0.25]
    assert log.user.tolist() == [[b"ee", b"bb", b"cc", b"dd"], [b"aa", b"bb", b"cc", b"dd"]]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("campaign", CAMPAIGNS)
def test_the_real_logs_have_what_is_known_of_them(policy, campaign, downloads):
    log = read_log(policy, campaign, downloads=downloads)
    items = {"all": 80, "men": 34, "women": 46}[campaign]
    clicks = {"random": {"all": 38, "men": 46, "women": 46}, "bts": {"all": 42, "men": 69, "women": 46}}
    assert len(log) == 10_000
    assert log.click.sum() == clicks[policy][campaign]
    assert set(log.item.tolist()) == set(range(items))
    assert set(log.position.tolist()) == {0, 1, 2}
    if policy == "random":
        np.testing.assert_allclose(log.propensity, 1 / items, atol=1e-6)


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(UserError, match="policy has 'btss'\n  hint: did you mean 'bts'"):
        read_log("btss", "men", tmp_path)
    with pytest.raises(UserError, match="campaign has 'kids'"):
        read_log("bts", "kids", tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_log("bts", "men", tmp_path)
    folder = write(tmp_path, ["2019-11-24 00:00:01.5+00:00,2,1,0,0,ee,bb,cc,dd,1.0"])
    with pytest.raises(UserError, match="a propensity is not above 0"):
        read_log("bts", "men", folder)
    (folder / "bts" / "men" / "men.csv").write_text("item_id,click\n1,0\n")
    with pytest.raises(UserError, match=r"men.csv: not the file that was expected"):
        read_log("bts", "men", folder)
