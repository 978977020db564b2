from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from raysys import machine
from raysys.machine import GIB, Finding, check_cluster, check_machine, check_ray, check_token, memory_limit

USAGE = type(shutil.disk_usage("/"))


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_sound_machine_has_nothing_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(100 * GIB, 50 * GIB, 50 * GIB))
    monkeypatch.setattr(machine, "memory_limit", lambda: None)
    findings = by_name(check_machine({}, shm=tmp_path))
    assert list(findings) == ["cores", "memory", "shared memory", "disk", "threads"]
    assert findings["shared memory"].value == "100.0 GiB"
    wrong = [finding for finding in findings.values() if finding.mend and finding.name != "memory"]
    assert wrong == []


def test_small_shared_memory_and_a_full_disk_are_named_with_the_way_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(GIB // 16, 0, GIB))
    findings = by_name(check_machine({}, shm=tmp_path))
    assert findings["shared memory"].value == "0.1 GiB"
    assert "--shm-size=2g" in (findings["shared memory"].mend or "")
    assert "set the folder of runs to another disk" in (findings["disk"].mend or "")


def test_a_containers_memory_limit_counts(tmp_path, monkeypatch) -> None:
    (tmp_path / "memory.max").write_text(f"{2 * GIB}\n")
    assert memory_limit(tmp_path / "memory.max") == 2 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path / "memory.max") is None
    assert memory_limit(tmp_path / "absent") is None
    monkeypatch.setattr(machine, "memory_limit", lambda: 2 * GIB)
    memory = by_name(check_machine({}))["memory"]
    assert memory.value.endswith("of which this container may use 2.0")
    assert "4 GiB is the least" in (memory.mend or "")


@pytest.mark.parametrize("threads", ["100000", "0x2", ""])
def test_more_threads_than_cores_are_wrong(threads: str) -> None:
    finding = by_name(check_machine({"OMP_NUM_THREADS": threads}))["threads"]
    assert (finding.mend is not None) == bool(threads)
    assert by_name(check_machine({"OMP_NUM_THREADS": "1"}))["threads"].mend is None


def test_stale_cluster_file_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        current = tmp_path / "ray_current_cluster"
        assert check_cluster({}, current) == Finding("ray", "cluster", "none runs here; jobs start their own")
        current.write_text(f"127.0.0.1:{port}\n")
        running = check_cluster({}, current)
        assert (running.value, running.mend) == (f"running at 127.0.0.1:{port}; jobs join it", None)
    stale = check_cluster({}, current)
    assert stale.value == f"{current} names 127.0.0.1:{port}, which does not answer"
    assert stale.mend is not None
    assert stale.mend.endswith(f"rm {current}")


def test_address_that_does_not_answer_is_wrong(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert check_cluster({"RAY_ADDRESS": f"ray://{address}"}, tmp_path / "none").mend is None
    finding = check_cluster({"RAY_ADDRESS": address}, tmp_path / "none")
    assert finding.mend == "nothing answers there: unset RAY_ADDRESS or start it"
    assert check_cluster({"RAY_ADDRESS": "nonsense"}, tmp_path / "none").mend is not None
    assert check_cluster({"RAY_ADDRESS": "local"}, tmp_path / "none").mend is None


def test_token_mode_without_a_token_is_wrong(tmp_path: Path) -> None:
    assert "ray get-auth-token --generate" in (check_token({"RAY_AUTH_MODE": "token"}, tmp_path).mend or "")
    assert check_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, tmp_path).mend is None
    assert check_token({}, tmp_path).value.startswith("no token yet")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    assert check_token({"RAY_AUTH_MODE": "token"}, tmp_path).value == "RAY_AUTH_MODE=token, token found"
    assert "workers and `ray job submit` need RAY_AUTH_MODE=token" in check_token({}, tmp_path).value
    assert "whoever reaches the ports" in check_token({"RAY_AUTH_MODE": "disabled"}, tmp_path).value


def test_long_temporary_folder_breaks_rays_sockets(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    assert "export RAY_TMPDIR=/tmp" in (
        by_name(check_ray({"RAY_TMPDIR": str(long)}, tmp_path))["temporary folder"].mend or ""
    )
    assert by_name(check_ray({"RAY_TMPDIR": "/tmp"}, tmp_path))["temporary folder"] == Finding(
        "ray", "temporary folder", f"/tmp{os.sep}ray"
    )


def test_nearly_full_disk_stops_ray(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(100, 97, 3))
    finding = by_name(check_ray({"RAY_TMPDIR": "/tmp"}, tmp_path))["disk"]
    assert (finding.value, finding.mend is None) == ("97% full", False)
