"""The Ray Serve application: `serve run raysys.serve.app:build releases='{v1: releases/v1}' …`, or a config file of `serve deploy`.

Everything that changes while it runs is `user_config`: of the stages the releases that they hold, of the cascade the plan.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from raysys.serve.bandit.replica import BanditReplica
from raysys.serve.cascade import Cascade
from raysys.serve.http import make_api, read_keys
from raysys.serve.plan import Plan
from raysys.serve.replica import StageReplica
from raysys.serve.settings import AppSettings, BanditSettings, StageSettings, read_settings
from raysys.serve.stages import EarlyRankerStage, RankerStage, RetrieverStage, Stage

INGRESS = "Cascade"
STAGES = ("Retriever", "EarlyRanker", "Ranker")
BANDIT = "Bandit"


def build(config: dict[str, Any]) -> Application:
    """The application of these settings; see `AppSettings`. Raises UserError before anything starts."""
    settings = read_settings(config)
    plan = Plan(settings.releases, settings.traffic, settings.shadow)
    keys = read_keys(settings.http.api_keys) if settings.http.api_keys else []
    releases = {"releases": plan.releases}

    def stage(name: str, kind: type[Stage], how: StageSettings, *more: Any) -> Application:
        deployment = serve.deployment(
            name=name, user_config=releases, health_check_period_s=5, health_check_timeout_s=30, **how.options()
        )(StageReplica)
        return deployment.bind(kind, how.batch.model_dump(), tuple(settings.allowed), *more)

    ingress = serve.deployment(
        name=INGRESS, user_config=_plan_of(settings), health_check_period_s=5, **settings.ingress.options()
    )(serve.ingress(make_api(settings.http, keys))(Cascade))
    return ingress.bind(
        settings.cascade.model_dump(),
        stage("Retriever", RetrieverStage, settings.retriever),
        stage("EarlyRanker", EarlyRankerStage, settings.early_ranker),
        stage("Ranker", RankerStage, settings.ranker, settings.served_log and settings.served_log.model_dump()),
        *(() if settings.bandit is None else _bandit(settings.bandit, releases)),
    )


def _bandit(settings: BanditSettings, releases: dict[str, Any]) -> tuple[Application, dict[str, Any]]:
    """One replica: what it does for many requests is to write, and the disk sets the pace."""
    deployment = serve.deployment(
        name=BANDIT,
        user_config=releases,
        health_check_period_s=5,
        num_replicas=1,
        max_ongoing_requests=1024,
        max_queued_requests=1024,
        ray_actor_options={"num_cpus": 0.1},
    )(BanditReplica)
    return deployment.bind(settings.model_dump()), settings.model_dump()


def _plan_of(settings: AppSettings) -> dict[str, Any]:
    return {"releases": settings.releases, "traffic": settings.traffic, "shadow": settings.shadow}
