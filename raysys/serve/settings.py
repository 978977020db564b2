"""The settings of a deployment, checked before anything starts."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raysys.errors import UserError
from raysys.serve.bandit.policy import Policy


class Settings(BaseModel):
    """Keys that are not named are refused."""

    model_config = ConfigDict(extra="forbid")


class BatchSettings(Settings):
    """max_batch_size: calls that are computed together. wait_ms: how long the first waits for others. threads: of the model."""

    max_batch_size: int = Field(default=16, ge=1)
    wait_ms: float = Field(default=0.0, ge=0)
    threads: int = Field(default=1, ge=1)


class ReplicaSettings(Settings):
    """min_replicas, max_replicas: Serve scales between them so that each has about `target_ongoing` calls.

    max_ongoing: calls that a replica takes at a time. max_queued: calls that may wait for one; more are refused.
    num_cpus: that a replica reserves.
    """

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing: float = Field(default=8, gt=0)
    max_ongoing: int = Field(default=32, ge=1)
    max_queued: int = Field(default=64, ge=0)
    num_cpus: float = Field(default=0.25, ge=0)

    def options(self) -> dict[str, Any]:
        """Arguments of `Deployment.options`."""
        scale = {
            "min_replicas": self.min_replicas,
            "max_replicas": max(self.min_replicas, self.max_replicas),
            "target_ongoing_requests": self.target_ongoing,
        }
        return {
            "autoscaling_config": scale,
            "max_ongoing_requests": self.max_ongoing,
            "max_queued_requests": self.max_queued,
            "ray_actor_options": {"num_cpus": self.num_cpus},
        }


class StageSettings(ReplicaSettings):
    """Replicas that compute batches.

    max_ongoing: what waits for a batch is among them. Where a replica takes no more, Serve tries again after pauses of up to
    half a second, so the requests of all ingress replicas should find room: what they may have under way limits the queue.
    """

    max_ongoing: int = Field(default=256, ge=1)
    batch: BatchSettings = BatchSettings()


class IngressSettings(ReplicaSettings):
    """Of the cascade. Room for many more than `max_requests`: those are refused by the cascade itself, which says when to come
    again; a queue of Serve that is full does not.
    """

    target_ongoing: float = Field(default=32, gt=0)
    max_ongoing: int = Field(default=512, ge=1)
    max_queued: int = Field(default=2048, ge=0)


class BanditSettings(Settings):
    """Online Matching beside the retriever, learning from `/v1/feedback`; each release has its own.

    folder: of the synchronised logs, one folder in it a release; an actor that is restarted on another machine must find it.
    candidates: that the early ranker gets from it beside the retriever's, those of the highest means. slots: items that an
    answer explores beside its best ones. share: of the users whose answers explore. max_impressions: of one explored item, in
    each ingress replica between two snapshots. policy: see `Policy`. The others: see `raysys.serve.bandit.aggregate.Settings`.
    """

    folder: str
    candidates: int = Field(default=10, ge=0)
    slots: int = Field(default=1, ge=0)
    share: float = Field(default=1.0, ge=0, le=1)
    max_impressions: int = Field(default=1000, ge=1)
    policy: Policy = Policy()
    shards: int = Field(default=2, ge=1)
    ridge: float = Field(default=1.0, gt=0)
    window_s: float = Field(default=5.0, gt=0)
    horizon_s: float = Field(default=600.0, ge=0)
    join_s: float = Field(default=3600.0, ge=0)


class ServedLogSettings(Settings):
    """A log of what the final ranker got and said, for `jobs/skew.py`.

    share: of the requests. max_bytes: of a file; a replica keeps two.
    """

    folder: str
    share: float = Field(default=0.01, ge=0, le=1)
    max_bytes: int = Field(default=64 << 20, ge=1)


class CascadeSettings(Settings):
    """users: the user store, a folder or redis://HOST:PORT/DATABASE#NAME; its column `seen` has the items to leave out.

    retrieve: candidates that the early ranker gets. rank: those that the final ranker gets. deadline_ms: of a request that
    names none. max_requests: that a replica works on at a time; more are answered 503. retry_after_s: when those may come
    again. refresh_s: between two looks for newer rows of users, and for what Online Matching has learned.
    """

    users: str
    retrieve: int = Field(default=200, ge=1)
    rank: int = Field(default=50, ge=1)
    deadline_ms: float = Field(default=500.0, gt=0)
    max_requests: int = Field(default=64, ge=1)
    retry_after_s: int = Field(default=1, ge=1)
    refresh_s: float = Field(default=5.0, gt=0)


class HttpSettings(Settings):
    """api_keys: the file with a key a line; None lets everybody in, which is refused for a host beyond loopback.

    page: whether there is a page at /, with /v1/users and /v1/items, which show rows of both stores.
    """

    api_keys: str | None = None
    max_body: int = Field(default=1 << 20, ge=1)
    max_depth: int = Field(default=16, ge=1)
    page: bool = True


class AppSettings(Settings):
    """Everything that `raysys.serve.app:build` takes. allowed: prefixes of model classes beside `raysys.`."""

    releases: dict[str, str]
    traffic: dict[str, float]
    shadow: str | None = None
    cascade: CascadeSettings
    bandit: BanditSettings | None = None
    served_log: ServedLogSettings | None = None
    http: HttpSettings = HttpSettings()
    retriever: StageSettings = StageSettings()
    early_ranker: StageSettings = StageSettings()
    ranker: StageSettings = StageSettings()
    ingress: IngressSettings = IngressSettings()
    allowed: list[str] = []

    @model_validator(mode="after")
    def _refuses_itself(self) -> AppSettings:
        if self.ingress.max_ongoing <= self.cascade.max_requests:
            raise ValueError("ingress.max_ongoing must exceed cascade.max_requests: the rest is what gets a 503")
        return self


def read_settings(config: dict[str, Any]) -> AppSettings:
    """Settings from plain data; a UserError names the key that is wrong."""
    try:
        return AppSettings(**config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"serve.{key}: {first['msg']}", f"found {first['input']!r}") from None
