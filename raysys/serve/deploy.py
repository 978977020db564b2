"""Starting the application and changing what it serves while it runs, over Serve's REST API.

What changes is `user_config` alone: Serve hands it to the replicas that run, restarts none, and gives it to every later one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import AuthenticationError

from raysys.bundle import ALLOWED_TARGETS
from raysys.errors import UserError, first_line, nearest
from raysys.serve.app import BANDIT, INGRESS, STAGES
from raysys.serve.plan import Plan
from raysys.serve.release import Release
from raysys.serve.settings import AppSettings, BanditSettings
from raysys.serve.stages import EarlyRankerStage, RankerStage, RetrieverStage

NAME = "raysys"
IMPORT_PATH = "raysys.serve.app:build"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
FAST_PATH = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""Variables of a Ray that is to be started: HAProxy before the ingress, and replicas that speak gRPC to each other."""
_POLL_S = 0.2


class Deployment:
    """The application on a cluster. address: of its dashboard, http://HOST:8265.

    Raises UserError where no cluster answers there.
    """

    def __init__(self, address: str, wait_s: float = 300.0) -> None:
        self.wait_s = wait_s
        try:
            self._client = ServeSubmissionClient(address)
        except AuthenticationError:
            raise UserError(
                f"{address}: the cluster asks for its token",
                "set RAY_AUTH_MODE=token; the token is that of ~/.ray/auth_token or RAY_AUTH_TOKEN",
            ) from None
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"{address}: {first_line(error)}", "the address of a cluster's dashboard") from None

    def start(self, settings: AppSettings, host: str = "127.0.0.1", port: int = 8000) -> None:
        """Deploy the application, or give one that runs other settings: then its replicas are started anew.

        Raises UserError before anything is changed where a release is damaged, or an address beyond this machine has no keys.
        """
        if host not in LOOPBACK and settings.http.api_keys is None:
            raise UserError(
                f"host is {host} and serve.http.api_keys is null",
                "name a file with a key a line, or bind to 127.0.0.1",
            )
        check_releases(settings.releases, settings.allowed, settings.bandit)
        plan = {"releases": settings.releases, "traffic": settings.traffic, "shadow": settings.shadow}
        Plan.from_config(plan)
        application = {
            "name": NAME,
            "route_prefix": "/",
            "import_path": IMPORT_PATH,
            "args": settings.model_dump(),
            "deployments": _user_configs(settings.releases, plan, settings.bandit is not None),
        }
        self._put({"proxy_location": "EveryNode", "http_options": {"host": host, "port": port}}, application)

    def swap(self, releases: Mapping[str, str], traffic: Mapping[str, float], shadow: str | None = None) -> None:
        """Serve this plan instead: atomically in each replica of the ingress, without a failed or a mixed request.

        New releases are verified first; the stages get them beside those of the plan of now, then the ingress changes over.
        What the stages held before stays in memory until the next change: for requests on their way, and for `roll_back`.
        Raises UserError before anything is changed.
        """
        old = self.plan()
        plan = {"releases": dict(releases), "traffic": dict(traffic), "shadow": shadow}
        Plan.from_config(plan)
        known = old.get("previous", {}).get("releases", {}) | old["releases"]
        for version, folder in releases.items():
            if known.get(version, folder) != folder:
                raise UserError(
                    f"version {version!r} is served from {known[version]}, not {folder}",
                    "a version never changes: give the new release another",
                )
        settings = AppSettings(**self._application()["deployed_app_config"]["args"])
        check_releases({v: f for v, f in releases.items() if v not in known}, settings.allowed, settings.bandit)
        both = old["releases"] | dict(releases)
        self._configure(both, old)
        self._configure(both, plan | {"previous": {name: old[name] for name in ("releases", "traffic", "shadow")}})

    def roll_forward(self, folder: str, share: float = 1.0) -> None:
        """Give a new release this share of the users; those that it takes come from all others alike."""
        release, old = Release.open(folder), self.plan()
        if not 0 < share <= 1:
            raise UserError(f"share is {share}", "a number above 0 and at most 1 is expected")
        others = {version: part for version, part in old["traffic"].items() if version != release.version}
        total = sum(others.values())
        traffic = {version: part / total * (1 - share) for version, part in others.items()} if share < 1 else {}
        releases = {version: old["releases"][version] for version in traffic} | {release.version: folder}
        self.swap(releases, traffic | {release.version: share})

    def roll_back(self) -> None:
        """The plan before the last change, at once."""
        previous = self.plan().get("previous")
        if previous is None:
            raise UserError("nothing to roll back to: the plan was not changed since the application started")
        self.swap(previous["releases"], previous["traffic"], previous["shadow"])

    def plan(self) -> dict[str, Any]:
        """What the ingress was last given: `releases`, `traffic`, `shadow`, and `previous` where there was another."""
        deployments = {entry["name"]: entry for entry in self._application()["deployed_app_config"]["deployments"]}
        plan: dict[str, Any] = deployments[INGRESS]["user_config"]
        return plan

    def _application(self) -> dict[str, Any]:
        applications = self._client.get_serve_details()["applications"]
        if NAME not in applications:
            raise UserError(f"no application {NAME!r} is deployed", nearest(NAME, applications) or "start it first")
        application: dict[str, Any] = applications[NAME]
        return application

    def _configure(self, releases: Mapping[str, str], plan: Mapping[str, Any]) -> None:
        details = self._client.get_serve_details()
        application = self._application()["deployed_app_config"]
        application["deployments"] = _user_configs(releases, plan, application["args"].get("bandit") is not None)
        options = details["http_options"]
        http = {"proxy_location": details["proxy_location"], "http_options": {k: options[k] for k in ("host", "port")}}
        self._put(http, application)

    def _put(self, http: Mapping[str, Any], application: Mapping[str, Any]) -> None:
        wanted = {entry["name"]: entry["user_config"] for entry in application["deployments"]}
        self._client.deploy_applications({**http, "applications": [application]})
        self._wait(wanted)

    def _wait(self, wanted: Mapping[str, Any]) -> None:
        """Until every deployment is healthy with the `user_config` that is wanted, by its name."""
        end, state = time.monotonic() + self.wait_s, "not there"
        while time.monotonic() < end:
            application = self._client.get_serve_details()["applications"].get(NAME)
            if application is not None:
                state = f"{application['status']}: {application['message']}"
                found = application["deployments"]
                ready = found.keys() == wanted.keys() and all(
                    entry["status"] == "HEALTHY" and entry["deployment_config"].get("user_config") == wanted[name]
                    for name, entry in found.items()
                )
                if ready and application["status"] == "RUNNING":
                    return
                if application["status"] == "DEPLOY_FAILED":
                    break
            time.sleep(_POLL_S)
        raise UserError(f"the application does not come up: {state}", "ray logs and `serve status` say more")


def check_releases(
    releases: Mapping[str, str], allowed: Sequence[str] = (), bandit: BanditSettings | None = None
) -> None:
    """Load every stage of every release; raises UserError naming the file that is damaged or the version that is another.

    bandit: where it is given, each release needs a graph with enough clusters for its policy.
    """
    for version, folder in releases.items():
        release = Release.open(folder)
        if release.version != version:
            raise UserError(f"{folder} is release {release.version!r}, not {version!r}")
        for kind in (RetrieverStage, EarlyRankerStage, RankerStage):
            kind(release, 1, (*ALLOWED_TARGETS, *allowed))
        if bandit is not None and (clusters := len(release.graph().clusters)) < bandit.policy.neighbours:
            raise UserError(
                f"serve.bandit.policy.neighbours is {bandit.policy.neighbours}, and the graph of release {version} has "
                f"{clusters} clusters",
                "ask for fewer neighbours",
            )


def _user_configs(releases: Mapping[str, str], plan: Mapping[str, Any], has_bandit: bool) -> list[dict[str, Any]]:
    names = (*STAGES, BANDIT) if has_bandit else STAGES
    stages: list[dict[str, Any]] = [{"name": name, "user_config": {"releases": dict(releases)}} for name in names]
    return [*stages, {"name": INGRESS, "user_config": dict(plan)}]
