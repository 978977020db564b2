"""What `raysys doctor` says about this machine and about Ray's state on it. Standard library only."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
# Characters that Ray's session folder and socket add to its temporary folder, of the 107 that a socket's path may have.
SOCKET_PATH = 62


@dataclass(frozen=True)
class Finding:
    """One line of the report. `mend` says what to do; None where nothing is wrong."""

    section: str
    name: str
    value: str
    mend: str | None = None


def check_machine(environment: Mapping[str, str], shm: Path = Path("/dev/shm"), folder: Path = Path()) -> list[Finding]:
    """Cores, memory, shared memory, disk, and threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit()
    findings = [Finding("machine", "cores", f"{cores} usable of {os.cpu_count()}")]
    value = f"{memory / GIB:.1f} GiB" + (f", of which this container may use {limit / GIB:.1f}" if limit else "")
    mend = "too little for two workers: 4 GiB is the least" if (limit or memory) < 4 * GIB else None
    findings.append(Finding("machine", "memory", value, mend))
    if shm.exists():
        size = shutil.disk_usage(shm).total
        mend = "Ray's object store falls back to the disk: docker run --shm-size=2g, or an emptyDir with medium: Memory at /dev/shm"
        findings.append(Finding("machine", "shared memory", f"{size / GIB:.1f} GiB", mend if size < GIB else None))
    free = shutil.disk_usage(folder).free
    mend = "checkpoints and Ray's logs need room: free some, or set the folder of runs to another disk"
    findings.append(Finding("machine", "disk", f"{free / GIB:.0f} GiB free here", mend if free < 5 * GIB else None))
    threads = environment.get("OMP_NUM_THREADS")
    value, mend = "OMP_NUM_THREADS unset: each worker takes as many as it has CPUs", None
    if threads:
        value = f"OMP_NUM_THREADS={threads}"
        if not threads.isdigit() or int(threads) > cores:
            mend = f"more threads than cores make steps several times slower: unset it, or at most {cores}"
    return [*findings, Finding("machine", "threads", value, mend)]


def memory_limit(path: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """The memory limit of this container in bytes; None where there is none."""
    text = path.read_text().strip() if path.exists() else "max"
    return int(text) if text.isdigit() else None


def commit_here() -> str:
    """The commit of the working directory, for records of experiments; empty outside of a repository."""
    done = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def check_ray(environment: Mapping[str, str], home: Path) -> list[Finding]:
    """Ray's temporary folder, the cluster it would connect to, and its authentication."""
    base = environment.get("RAY_TMPDIR") or (environment.get("TMPDIR") if sys.platform == "linux" else None) or "/tmp"
    folder = Path(base) / "ray"
    findings = []
    mend = f"sockets there get too long a path for Ray: export RAY_TMPDIR=/tmp (now {base})"
    findings.append(
        Finding("ray", "temporary folder", str(folder), mend if len(str(folder)) + SOCKET_PATH > 107 else None)
    )
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    usage = shutil.disk_usage(existing)
    if usage.used / usage.total > 0.95:
        mend = "Ray stops creating objects above 95%: free some, or point RAY_TMPDIR to another disk"
        findings.append(Finding("ray", "disk", f"{usage.used / usage.total:.0%} full", mend))
    return [*findings, check_cluster(environment, folder / "ray_current_cluster"), check_token(environment, home)]


def check_cluster(environment: Mapping[str, str], current: Path) -> Finding:
    """Which cluster `ray.init()` joins: RAY_ADDRESS, else the one of `ray_current_cluster`, else it starts its own."""
    address = environment.get("RAY_ADDRESS", "")
    if address:
        mend = (
            None
            if address in ("local", "auto") or reachable(address)
            else "nothing answers there: unset RAY_ADDRESS or start it"
        )
        return Finding("ray", "cluster", f"RAY_ADDRESS={address}", mend)
    written = current.read_text().strip() if current.exists() else ""
    if not written:
        return Finding("ray", "cluster", "none runs here; jobs start their own")
    if reachable(written):
        return Finding("ray", "cluster", f"running at {written}; jobs join it")
    mend = f"a cluster that was killed left it behind and the next start fails: rm {current}"
    return Finding("ray", "cluster", f"{current} names {written}, which does not answer", mend)


def reachable(address: str) -> bool:
    """Whether something listens at `host:port` (with or without a scheme) within two seconds."""
    host, _, port = address.split("://")[-1].split("/")[0].rpartition(":")
    if not host or not port.isdigit():
        return False
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def check_token(environment: Mapping[str, str], home: Path) -> Finding:
    """Ray's authentication. `ray.init()` makes a token for a cluster of its own; heads of `ray start` ask for one that they find."""
    file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    present = bool(environment.get("RAY_AUTH_TOKEN")) or file.exists()
    mode = environment.get("RAY_AUTH_MODE", "")
    value, mend = f"RAY_AUTH_MODE={mode}: whoever reaches the ports of a cluster can run code there", None
    if mode == "token":
        value = "RAY_AUTH_MODE=token" + (", token found" if present else "")
        mend = None if present else "no token is there: ray get-auth-token --generate"
    elif not mode and present:
        value = (
            "a token is there: `ray start --head` asks for it, so workers and `ray job submit` need RAY_AUTH_MODE=token"
        )
    elif not mode:
        value = "no token yet: `ray get-auth-token --generate` before a cluster of several machines"
    return Finding("ray", "authentication", value, mend)
