"""What the routes share: the replica that they run in, and the problems that they may answer with."""

from __future__ import annotations

from typing import Any

from ray import serve

from raysys.serve.cascade import Cascade
from raysys.serve.messages import Problem

PROBLEMS: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (401, 413, 415, 422, 503)}


def cascade() -> Cascade:
    """The replica that this code runs in."""
    replica = serve.get_replica_context().servable_object
    assert isinstance(replica, Cascade)
    return replica
