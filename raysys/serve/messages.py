"""What requests and answers look like, and the limits of what a request may ask for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_ITEMS = 1000
"""Items that one request may name or ask for."""
MAX_BATCH = 64
"""Requests that one call may hold."""

User = (
    Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
    | Annotated[str, StringConstraints(min_length=1, max_length=256, strict=True)]
)
Item = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
Scalar = (
    Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
    | Annotated[float, Field(allow_inf_nan=False, strict=True)]
    | Annotated[str, StringConstraints(max_length=1024, strict=True)]
    | None
)
Context = Annotated[dict[Annotated[str, StringConstraints(max_length=256)], Scalar], Field(max_length=64)]


class Message(BaseModel):
    """Keys that are not named are refused, and so are NaN and infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class RecommendRequest(Message):
    """user: the key of a row of the user store; an unknown one gets what users get of whom nothing is known.

    context: features of side `context`. exclude: items that are not to be shown, besides those that the user has seen.
    deadline_ms: how long the answer may take; None takes the deployment's. explain: whether the stages are shown.
    """

    user: User
    count: int = Field(default=10, ge=1, le=MAX_ITEMS, strict=True)
    context: Context = {}
    exclude: list[Item] = Field(default=[], max_length=MAX_ITEMS)
    deadline_ms: float | None = Field(default=None, gt=0, le=60_000)
    explain: bool = False


class RetrieveRequest(Message):
    """The first stage alone; see `RecommendRequest`."""

    user: User
    count: int = Field(default=100, ge=1, le=MAX_ITEMS, strict=True)
    context: Context = {}
    exclude: list[Item] = Field(default=[], max_length=MAX_ITEMS)


class RankRequest(Message):
    """The final stage alone: these items for this user, best first."""

    user: User
    items: list[Item] = Field(min_length=1, max_length=MAX_ITEMS)
    context: Context = {}


class RankBatch(Message):
    """Several requests in one call, answered in their order."""

    requests: list[RankRequest] = Field(min_length=1, max_length=MAX_BATCH)


class ScoredItem(Message):
    """score: what the items are ordered by. predictions: of each task, calibrated; empty before the final stage.

    impression: by which feedback names it, where the deployment learns from feedback.
    """

    item: int
    score: float
    predictions: dict[str, float] = {}
    impression: str | None = None


class Ranking(Message):
    """Items of one user, best first."""

    request_id: str
    version: str
    items: list[ScoredItem]


class StageReport(Message):
    """What a stage got, what it passed on, and how long it took. items: all that it scored, best first: `left` went on."""

    stage: str
    entered: int
    left: int
    milliseconds: float
    items: list[ScoredItem]


class Recommendation(Ranking):
    """complete: whether every stage had the time to do all of its work. stages: where the request asked to explain.

    explored: items that Online Matching wants to learn about, for places of their own. Their scores are upper bounds.
    """

    complete: bool
    explored: list[ScoredItem] = []
    stages: list[StageReport] = []


class Reward(Message):
    """What became of an item that was shown. reward: 0 for nothing, 1 for the best; the first one of an impression counts."""

    impression: Annotated[str, StringConstraints(max_length=128, strict=True)]
    reward: float = Field(ge=0, le=1)


class FeedbackRequest(Message):
    """Rewards; sending them again changes nothing."""

    rewards: list[Reward] = Field(min_length=1, max_length=MAX_ITEMS)


class FeedbackAnswer(Message):
    """accepted: rewards that are on disk."""

    request_id: str
    accepted: int


class ItemsRequest(Message):
    """Items whose rows of the item table are wanted."""

    items: list[Item] = Field(min_length=1, max_length=MAX_ITEMS)
    version: Annotated[str, StringConstraints(max_length=64)]


class Rows(Message):
    """Rows by key as they are in a store; a key that is not there has none. item_columns: those that list items."""

    key: str
    rows: list[dict[str, Any]]
    item_columns: list[str] = []


class RankBatchAnswer(Message):
    """The rankings of a batch."""

    rankings: list[Ranking]


class VersionFacts(Message):
    """share: of the users. shadow: whether it also computes what others answer, unseen."""

    version: str
    share: float
    shadow: bool


class Models(Message):
    """What is served."""

    versions: list[VersionFacts]


class Problem(Message):
    """Why a request was not answered."""

    error: str
    request_id: str
