"""Serve releases: `python jobs/deploy.py serve.releases='{v1: releases/v1}' serve.traffic='{v1: 1.0}'`, roll forward, roll back."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import ray

from raysys.config import Config, run_job
from raysys.errors import UserError
from raysys.serve.deploy import FAST_PATH, Deployment
from raysys.serve.settings import read_settings


def main(config: Config) -> None:
    """Start, roll forward or roll back, and say what is served."""
    changes = config["roll_back"] or config["release"] is not None
    if changes and config["address"] is None:
        raise UserError(
            "address is null", "name the dashboard of the cluster that serves: address=http://127.0.0.1:8265"
        )
    if config["roll_back"] and config["release"] is not None:
        raise UserError("both release and roll_back are given", "one change at a time")
    if changes:
        deployment = Deployment(config["address"])
        if config["roll_back"]:
            deployment.roll_back()
        else:
            deployment.roll_forward(str(Path(config["release"]).resolve()), config["share"])
        print(f"served: {deployment.plan()['traffic']}")
        return
    settings = read_settings(_resolved(config["serve"]))
    address = config["address"]
    if address is None:
        if config["fast_path"]:
            os.environ.update(FAST_PATH)
        address = (
            f"http://{ray.init(num_cpus=config['cpus'], include_dashboard=True, log_to_driver=False).dashboard_url}"
        )
    Deployment(address).start(settings, config["host"], config["port"])
    print(f"serving at http://{config['host']}:{config['port']}; change it with address={address}", flush=True)
    while config["address"] is None:
        time.sleep(1)


def _resolved(serve: Config) -> dict[str, Any]:
    """Replicas run elsewhere: paths as they are from here."""
    paths = {version: str(Path(folder).resolve()) for version, folder in serve["releases"].items()}
    keys, users, bandit = serve["http"]["api_keys"], serve["cascade"]["users"], serve["bandit"]
    served = serve["served_log"]
    return serve | {
        "releases": paths,
        "cascade": serve["cascade"] | {"users": users if "://" in users else str(Path(users).resolve())},
        "bandit": bandit and bandit | {"folder": str(Path(bandit["folder"]).resolve())},
        "served_log": served and served | {"folder": str(Path(served["folder"]).resolve())},
        "http": serve["http"] | {"api_keys": str(Path(keys).resolve()) if keys else None},
    }


if __name__ == "__main__":
    run_job(main, "deploy", __doc__)
