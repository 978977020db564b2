from __future__ import annotations

import os
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CLUSTERS = ROOT / "clusters"


def read(name: str) -> dict[str, Any]:
    (document,) = yaml.safe_load_all((CLUSTERS / name).read_text())
    return document


@pytest.mark.parametrize(
    ("name", "version", "kind"),
    [
        ("kuberay/raycluster.yaml", "ray.io/v1", "RayCluster"),
        ("kuberay/rayjob.yaml", "ray.io/v1", "RayJob"),
        ("kuberay/storage.yaml", "v1", "PersistentVolumeClaim"),
    ],
)
def test_kubernetes_documents_have_their_kind_and_a_name(name: str, version: str, kind: str) -> None:
    document = read(name)
    assert (document["apiVersion"], document["kind"]) == (version, kind)
    assert re.fullmatch(r"[a-z][a-z0-9-]*", document["metadata"]["name"])


def test_pods_agree_with_the_rest_of_the_repository() -> None:
    spec = read("kuberay/raycluster.yaml")["spec"]
    claim = read("kuberay/storage.yaml")["metadata"]["name"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "raysys:cpu"
        assert {"name": "GLOO_SOCKET_IFNAME", "value": "eth0"} in container["env"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]] == [claim]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert spec["rayVersion"] == metadata.version("ray")
    assert spec["authOptions"] == {"mode": "token"}
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())


def test_job_runs_on_the_same_cluster_and_fits_its_pods() -> None:
    job, cluster = read("kuberay/rayjob.yaml")["spec"], read("kuberay/raycluster.yaml")["spec"]
    assert job["rayClusterSpec"] == cluster
    overrides = dict(word.split("=", 1) for word in job["entrypoint"].split()[2:])
    (group,) = cluster["workerGroupSpecs"]
    cpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    assert overrides["trainer"] == "ray"
    assert int(overrides["trainer.workers"]) == group["replicas"] == group["minReplicas"]
    assert int(overrides["trainer.cpus_per_worker"]) <= int(cpus)
    assert overrides["runs_folder"].startswith("/shared/")


def test_ray_accepts_the_launcher_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read("ray-up.yaml"))
    validate_config(config)
    assert config["docker"]["image"] == "raysys:cpu"
    with pytest.raises(Exception, match="workers"):  # Ray's schema does find a key that is none
        validate_config(config | {"workers": 3})


def test_slurm_script_starts_ray_once_a_node_and_passes_arguments_on(tmp_path: Path) -> None:
    stand_ins = {
        "scontrol": 'echo "node-a"; echo "node-b"',
        "srun": 'echo "srun $*"',
        "ray": 'echo "ray $*" >&2; echo secret-token',
    }
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name, line in stand_ins.items():
        (binaries / name).write_text(f"#!/bin/sh\n{line}\n")
        (binaries / name).chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
    }
    script = [str(CLUSTERS / "slurm.sh"), "experiment=movielens", "name=two words"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "ray get-auth-token --generate\n"
    assert done.stdout == (
        "srun --nodes=2 --ntasks=2 --cpus-per-task=8 ray symmetric-run --address node-a:6379 --min-nodes 2 --num-cpus=8"
        " --num-gpus=0 -- env RAY_ADDRESS=node-a:6379 python jobs/train.py trainer=ray experiment=movielens name=two words\n"
    )


def test_slurm_script_says_how_it_is_started(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(CLUSTERS / "slurm.sh")], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "submit this script with sbatch" in done.stderr


def test_image_copies_what_exists() -> None:
    lines = (CLUSTERS / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "constraints.txt", "raysys", "configs", "jobs"} <= set(sources)
    missing = [source for source in sources if not (ROOT / source).exists()]
    assert missing == []
