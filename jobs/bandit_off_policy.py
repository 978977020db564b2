"""Values of policies from the logs of others, on Open Bandit Data: `python jobs/bandit_off_policy.py`.

A random policy and Thompson sampling (bts) served the shop at the same time, so that what the log of one says of the other can
be compared with what the other earned. Diag-LinUCB learns from one log and is evaluated on the other.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from raysys.config import Config, run_job, validate
from raysys.data.prepare.open_bandit import POLICIES, LoggedImpressions, read_log
from raysys.machine import commit_here
from raysys.models.retrieval.indexes.exact import Exact
from raysys.models.retrieval.indexes.index import Vectors
from raysys.serve.bandit.build import build_graph
from raysys.serve.bandit.edges import EdgeSums, sum_up, to_sums
from raysys.serve.bandit.graph import Graph
from raysys.serve.bandit.off_policy import cross_fitted_rates, effective_size, evaluate
from raysys.serve.bandit.policy import Floats, Policy, Snapshot, contexts, recommend
from raysys.strict_json import to_plain


def main(config: Config) -> None:
    """Every campaign, the table, the record."""
    policy = validate(Policy, config["policy"], "policy")
    figures = [row for campaign in config["campaigns"] for row in evaluate_campaign(campaign, policy, config)]
    print(table(figures))
    if config["record"]:
        keys = ("clusters", "policy", "alphas", "prior", "resamples", "level", "seed")
        content = {
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit_here(),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **{key: config[key] for key in keys},
            "figures": figures,
        }
        Path(config["record"]).write_text(json.dumps(to_plain(content), indent=1) + "\n")


def evaluate_campaign(campaign: str, policy: Policy, config: Config) -> list[dict[str, Any]]:
    """A row for each policy on each log, with what it earned itself where it was logged."""
    logs = {name: read_log(name, campaign, config["source"], config["downloads"]) for name in POLICIES}
    items = max(int(log.item.max()) for log in logs.values()) + 1
    users = dict(zip(POLICIES, user_vectors([logs[name] for name in POLICIES]), strict=True))
    index = Exact(users["random"].shape[1])
    index.add(np.arange(items), np.zeros((items, index.dim), np.float32))  # every cluster has every item
    graph = build_graph(
        np.concatenate(list(users.values())), index, clusters=config["clusters"], width=items, seed=config["seed"]
    )
    own = {name: log.click.mean() for name, log in logs.items()}
    rows = []
    for name, log in logs.items():
        other = next(policy for policy in POLICIES if policy != name)
        targets = {
            "random": (np.full((len(log), items), 1 / items), own["random"]),
            "bts": (frequencies(logs["bts"], items)[log.position], own["bts"]),
        }
        for alpha in config["alphas"]:
            learned = learn(graph, users[other], logs[other], dataclasses.replace(policy, alpha=alpha))
            targets[f"Diag-LinUCB, alpha={alpha:g}"] = (choices(*learned, users[name], items), None)
        for target, (probabilities, earned) in targets.items():
            rows.append({"campaign": campaign, "log": name, "policy": target, "earned": earned})
            rows[-1] |= estimate(probabilities, log, config)
    return rows


def estimate(target: Floats, log: LoggedImpressions, config: Config) -> dict[str, Any]:
    """All estimates of one policy from one log."""
    model = cross_fitted_rates(log.item, log.click, target.shape[1], config["prior"], config["seed"])
    options = {key: config[key] for key in ("resamples", "level", "seed")}
    found = evaluate(target, log.item, log.click, log.propensity, model, **options)
    size = effective_size(target, log.item, log.propensity)
    return {"effective_size": size, **{name: dataclasses.asdict(value) for name, value in found.items()}}


def user_vectors(logs: list[LoggedImpressions]) -> list[Vectors]:
    """The four features of users, one-hot and of length 1, with the same columns for each log."""
    features = np.concatenate([log.user for log in logs])
    columns = [(column[:, None] == np.unique(column)) for column in features.T]
    vectors = np.concatenate(columns, axis=1).astype(np.float32) / np.sqrt(features.shape[1], dtype=np.float32)
    return np.split(vectors, np.cumsum([len(log) for log in logs])[:-1])


def frequencies(log: LoggedImpressions, items: int) -> Floats:
    """How often each item was shown at each position [3, items]: what a policy without contexts did over the week."""
    counts = np.zeros((3, items))
    np.add.at(counts, (log.position, log.item), 1)
    return counts / counts.sum(1, keepdims=True)


def learn(graph: Graph, users: Vectors, log: LoggedImpressions, policy: Policy) -> tuple[Snapshot, Policy]:
    """The snapshot after all impressions of a log."""
    context = contexts(users, graph, policy)
    item = np.repeat(log.item, policy.neighbours)
    ones = np.ones(len(item), np.int64)
    sums = to_sums(context.weight.ravel(), np.repeat(log.click, policy.neighbours), ones)
    edges = EdgeSums()
    edges.set_graph(graph, None, 0.0)
    edges.apply("log", 0, sum_up(graph.clusters[context.cluster.ravel()], item, 0 * item, sums), 0.0)
    return Snapshot("log", graph, edges.statistics(graph.version, 0.0)), policy


def choices(snapshot: Snapshot, policy: Policy, users: Vectors, items: int) -> Floats:
    """The probability [n, items] of each item: even among the `top_n` best."""
    rng = np.random.default_rng(0)  # of ties alone
    distinct, row = np.unique(users, axis=0, return_inverse=True)  # of 10,000 users some hundreds
    best = recommend(snapshot, distinct, policy, count=policy.top_n, generator=rng).item
    target = np.zeros((len(distinct), items))
    np.put_along_axis(target, best, 1 / policy.top_n, 1)
    return target[row]


def table(figures: list[dict[str, Any]]) -> str:
    """The figures as Markdown, in clicks per 1,000 impressions."""
    lines = ["| campaign | log of | policy | earned | IPS | SNIPS | DR | rows it is worth |", "| --- " * 8 + "|"]
    for row in figures:
        estimates = [
            f"{1000 * row[name]['value']:.1f} ({1000 * row[name]['low']:.1f} to {1000 * row[name]['high']:.1f})"
            for name in ("IPS", "SNIPS", "DR")
        ]
        earned = "" if row["earned"] is None else f"{1000 * row['earned']:.1f}"
        cells = (row["campaign"], row["log"], row["policy"], earned, *estimates, f"{row['effective_size']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main, "bandit_off_policy", __doc__)
