"""Releases are swapped and rolled back while requests come; what cannot be served is refused and harms nothing."""

from __future__ import annotations

import json
import runpy
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import requests

from raysys.errors import UserError
from raysys.serve.deploy import Deployment
from raysys.serve.settings import read_settings

ROOT = Path(__file__).parents[2]
REPLICA = {"num_cpus": 0.1}


@pytest.fixture(scope="module")
def folders(release, make_release, tmp_path_factory):
    second = make_release(tmp_path_factory.mktemp("second") / "v2", "v2", seed=1)
    return {"v1": str(release.folder), "v2": str(second.folder)}


def settings(folders, user_store, **changes):
    config = {
        "releases": {"v1": folders["v1"]},
        "traffic": {"v1": 1.0},
        "cascade": {"users": str(user_store), "retrieve": 20, "rank": 10, "deadline_ms": 10_000},
        **{name: REPLICA for name in ("retriever", "early_ranker", "ranker", "ingress")},
    }
    return read_settings(config | changes)


@pytest.fixture(scope="module")
def served(ray_cluster, free_port, folders, user_store):
    """The deployment, and the address that it serves at."""
    from ray import serve

    deployment = Deployment(ray_cluster)
    port = free_port()
    deployment.start(settings(folders, user_store), port=port)
    yield deployment, f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def load(served):
    """Requests in the background; `load()` stops them and gives all answers."""
    stop, answers = threading.Event(), []

    def send():
        with requests.Session() as session:
            while not stop.is_set():
                answer = session.post(f"{served[1]}/v1/recommend", json={"user": 3, "explain": True}, timeout=60)
                answers.append((answer.status_code, answer.json()))

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()

    def end():
        stop.set()
        for thread in threads:
            thread.join()
        return answers

    yield end
    end()


def run_job(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["deploy.py", *arguments])
    runpy.run_path(str(ROOT / "jobs" / "deploy.py"), run_name="__main__")


def replicas():
    """The process id of every replica."""
    from ray import serve

    found = serve.status().applications["raysys"].deployments
    assert {deployment.status for deployment in found.values()} == {"HEALTHY"}
    client = serve.context._get_global_client()
    details = client.get_serve_details()["applications"]["raysys"]["deployments"]
    return {replica["pid"] for deployment in details.values() for replica in deployment["replicas"]}


def test_swaps_under_load_fail_no_request_and_mix_nothing(served, folders, load, monkeypatch, ray_cluster, capsys):
    deployment, _ = served
    before = replicas()
    deployment.roll_forward(folders["v2"])
    assert deployment.plan()["traffic"] == {"v2": 1.0}
    run_job(monkeypatch, f"address={ray_cluster}", "roll_back=true")
    assert "{'v1': 1.0}" in capsys.readouterr().out
    run_job(monkeypatch, f"address={ray_cluster}", f"release={folders['v2']}", "share=0.25")
    assert deployment.plan()["traffic"] == {"v1": 0.75, "v2": 0.25}
    deployment.roll_back()
    answers = load()
    assert Counter(status for status, _ in answers) == {200: len(answers)}
    by_version: dict[str, set[str]] = {}
    for _, answer in answers:  # a mixed answer would be a third one
        content = [[item["item"], round(item["score"], 6)] for item in answer["items"]]
        by_version.setdefault(answer["version"], set()).add(json.dumps(content))
    assert {version: len(found) for version, found in by_version.items()} == {"v1": 1, "v2": 1}
    assert replicas() == before  # none was started anew


def test_what_is_damaged_is_refused_and_the_old_version_stays(served, folders, make_release, tmp_path):
    deployment, url = served
    before = deployment.plan()
    folder = make_release(tmp_path / "v3", "v3", seed=1).folder
    weights = folder / "final_ranker" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    for change, message in (
        (lambda: deployment.roll_forward(str(tmp_path / "none")), "no such file"),
        (lambda: deployment.roll_forward(folders["v2"], 1.5), "share is 1.5"),
        (lambda: deployment.swap({"v9": str(folder)}, {"v9": 1.0}), "is release 'v3', not 'v9'"),
        (lambda: deployment.swap({"v1": str(folder)}, {"v1": 1.0}), "a version never changes"),
        (lambda: deployment.swap({"v1": folders["v1"]}, {"v1": 0.5}), "traffic is"),
        (lambda: deployment.roll_forward(str(folder)), r"final_ranker/model\.safetensors does not match its hash"),
    ):
        with pytest.raises(UserError, match=message):
            change()
    assert deployment.plan() == before
    assert requests.post(f"{url}/v1/recommend", json={"user": 3}, timeout=60).json()["version"] == "v1"


def test_beyond_this_machine_nobody_is_served_without_keys(ray_cluster, folders, user_store, tmp_path):
    with pytest.raises(UserError, match="api_keys is null"):
        Deployment(ray_cluster).start(settings(folders, user_store), host="0.0.0.0")
    (tmp_path / "keys").write_text("short\n")
    from raysys.serve.app import build

    with pytest.raises(UserError, match="a key is missing or short"):
        build(settings(folders, user_store, http={"api_keys": str(tmp_path / "keys")}).model_dump())


def test_an_address_without_a_cluster_is_a_clear_error():
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9"):
        Deployment("http://127.0.0.1:9")
