"""The metrics of all replicas in one page: what the nodes of the cluster export of ours."""

from __future__ import annotations

import ray
import requests

PREFIX = "ray_raysys_"
TIMEOUT_S = 2.0


def scrape(session: requests.Session) -> str:
    """The lines of our metrics of every node that is up, with one header a metric; Ray exports new values every few seconds."""
    seen: set[str] = set()
    lines: list[str] = []
    for node in ray.nodes():
        if not node["Alive"] or not node.get("MetricsExportPort"):
            continue
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for line in session.get(url, timeout=TIMEOUT_S).text.splitlines():
            is_header = line.startswith("#")
            name = line.split(" ", 3)[2] if is_header and line.count(" ") >= 2 else line
            if not name.startswith(PREFIX) or (is_header and line in seen):
                continue
            seen.add(line)
            lines.append(line)
    return "\n".join(lines) + "\n"
