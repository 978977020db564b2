"""The settings of a deployment, checked before anything starts."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raysys.errors import UserError


class Settings(BaseModel):
    """Keys that are not named are refused."""

    model_config = ConfigDict(extra="forbid")


class BatchSettings(Settings):
    """max_batch_size: calls that are computed together. wait_ms: how long the first waits for others. threads: of the model."""

    max_batch_size: int = Field(default=16, ge=1)
    wait_ms: float = Field(default=2.0, ge=0)
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
    """Replicas that compute batches."""

    batch: BatchSettings = BatchSettings()


class CascadeSettings(Settings):
    """users: the folder of the user store; its column `seen` has the items to leave out.

    retrieve: candidates that the early ranker gets. rank: those that the final ranker gets. deadline_ms: of a request that
    names none. max_requests: that a replica works on at a time; more are answered 503. retry_after_s: when those may come
    again.
    """

    users: str
    retrieve: int = Field(default=200, ge=1)
    rank: int = Field(default=50, ge=1)
    deadline_ms: float = Field(default=500.0, gt=0)
    max_requests: int = Field(default=64, ge=1)
    retry_after_s: int = Field(default=1, ge=1)


class HttpSettings(Settings):
    """api_keys: the file with a key a line; None lets everybody in, which is refused for a host beyond loopback."""

    api_keys: str | None = None
    max_body: int = Field(default=1 << 20, ge=1)
    max_depth: int = Field(default=16, ge=1)


class AppSettings(Settings):
    """Everything that `raysys.serve.app:build` takes. allowed: prefixes of model classes beside `raysys.`."""

    releases: dict[str, str]
    traffic: dict[str, float]
    shadow: str | None = None
    cascade: CascadeSettings
    http: HttpSettings = HttpSettings()
    retriever: StageSettings = StageSettings()
    early_ranker: StageSettings = StageSettings()
    ranker: StageSettings = StageSettings()
    ingress: ReplicaSettings = ReplicaSettings(max_ongoing=256, max_queued=256)
    allowed: list[str] = []


def read_settings(config: dict[str, Any]) -> AppSettings:
    """Settings from plain data; a UserError names the key that is wrong."""
    try:
        return AppSettings(**config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"serve.{key}: {first['msg']}", f"found {first['input']!r}") from None
