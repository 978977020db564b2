"""Open Bandit Data: what a fashion shop showed at random and by Thompson sampling, what was clicked, with propensities.

Saito, Aihara, Matsutani, Narita, "Open Bandit Dataset and Pipeline" (NeurIPS Datasets and Benchmarks 2021); ZOZO, CC BY 4.0.
The small sample of the obp package is read: 10,000 impressions of one week for each policy and campaign, 38 to 69 clicks each.
It is for estimators of a policy's value from another's log, and is not made into splits to train on.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from raysys.data.prepare.download import Package, read_data
from raysys.errors import UserError, nearest

POLICIES = ("random", "bts")
CAMPAIGNS = ("all", "men", "women")
PACKAGE = Package(
    "obp",
    "0.4.1",
    "obp-0.4.1-py3-none-any.whl",
    "87dec9caf4283c25ab13036532e0a24566f1c7bdcad1653a8ded43b2f5ef8208",
    folder="obp/dataset/obd",
    members=tuple(f"{policy}/{campaign}/{campaign}.csv" for policy in POLICIES for campaign in CAMPAIGNS),
)
USER_FEATURES = tuple(f"user_feature_{number}" for number in range(4))
COLUMNS = {
    "timestamp": pa.string(),
    "item_id": pa.int64(),
    "position": pa.int64(),
    "click": pa.float64(),
    "propensity_score": pa.float64(),
    **dict.fromkeys(USER_FEATURES, pa.string()),
}


@dataclass(frozen=True)
class LoggedImpressions:
    """Impressions in the order of time. item: [n] from 0 on. position: [n] 0, 1 or 2, left to right. click: [n] 0 or 1.

    propensity: [n], with which the policy chose the item for this position. user: [n, 4] hashed features, as bytes.
    """

    item: NDArray[np.int64]
    position: NDArray[np.int64]
    click: NDArray[np.float64]
    propensity: NDArray[np.float64]
    user: NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.item)


def read_log(
    policy: str, campaign: str, source: str | Path | None = None, downloads: str | Path = "data/downloads"
) -> LoggedImpressions:
    """The log of a policy (random or bts, Bernoulli Thompson sampling) in a campaign (all, men or women).

    source: a folder like obp/dataset/obd; None fetches the pinned package into `downloads`. Raises UserError for a file that
    is not what was expected.
    """
    for key, value, known in (("policy", policy, POLICIES), ("campaign", campaign, CAMPAIGNS)):
        if value not in known:
            raise UserError(f"open_bandit: {key} has {value!r}", nearest(value, known))
    name = f"{policy}/{campaign}/{campaign}.csv"
    try:
        rows = pacsv.read_csv(
            io.BytesIO(read_data(PACKAGE, name, source, downloads)),
            convert_options=pacsv.ConvertOptions(column_types=COLUMNS, include_columns=list(COLUMNS)),
        )
    except (pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"{name}: not the file that was expected: {error}") from None
    rows = rows.sort_by("timestamp")  # one format and one time zone
    propensity = rows["propensity_score"].to_numpy()
    if not ((propensity > 0) & (propensity <= 1)).all():
        raise UserError(f"{name}: a propensity is not above 0 and at most 1", "estimators divide by it")
    return LoggedImpressions(
        rows["item_id"].to_numpy(),
        pc.subtract(rows["position"], 1).to_numpy(),
        rows["click"].to_numpy(),
        propensity,
        np.stack([rows[name].to_numpy().astype(np.bytes_) for name in USER_FEATURES], axis=1),
    )
