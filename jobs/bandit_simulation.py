"""Regret of Diag-LinUCB and of simpler policies in a simulated world: `python jobs/bandit_simulation.py`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from raysys.config import Config, run_job, validate
from raysys.machine import commit_here
from raysys.serve.bandit.policy import Policy
from raysys.serve.bandit.rivals import BestCandidate, EpsilonGreedyEdges, EpsilonGreedyItems, LinUCB, Random
from raysys.serve.bandit.simulation import Chooser, DiagLinUCB, World, simulate
from raysys.strict_json import to_plain


def choosers(world: World, policy: Policy, epsilon: float, seed: int) -> dict[str, Callable[[], Chooser]]:
    """The policies by name."""

    def diag(**changes: Any) -> Callable[[], Chooser]:
        return lambda: DiagLinUCB(world.graph, dataclasses.replace(policy, **changes), seed)

    return {
        "best candidate in truth": lambda: BestCandidate(world),
        "random candidate": lambda: Random(seed),
        "ε-greedy, edge means": lambda: EpsilonGreedyEdges(world, seed, epsilon),
        "ε-greedy, item means": lambda: EpsilonGreedyItems(world.theta.shape[1], seed, epsilon),
        "full LinUCB": lambda: LinUCB(world, seed, policy.alpha),
        "Diag-LinUCB": diag(),
        "Diag-LinUCB, normalize=edges": diag(normalize="edges"),
        "Diag-LinUCB, unseen_first": diag(unseen_first=True),
        "Diag-LinUCB, top_n=5": diag(top_n=5),
    }


def main(config: Config) -> None:
    """Every policy on every seed, the table, the record."""
    policy = validate(Policy, config["policy"], "policy")
    figures: dict[str, list[dict[str, Any]]] = {}
    for seed in config["seeds"]:
        world = World.draw(seed, **config["world"])
        for name, make in choosers(world, policy, config["epsilon"], seed).items():
            started = time.perf_counter()
            outcome = simulate(world, make(), policy, seed, config["rounds"], config["window"])
            seconds = time.perf_counter() - started
            found = {"regret": outcome.regret.sum(), "quarters": outcome.quarters, "reward": outcome.rewards.mean()}
            figures.setdefault(name, []).append({"seed": seed, **found, "seconds": seconds})
    print(table(figures))
    if config["record"]:
        keys = ("seeds", "rounds", "window", "world", "policy", "epsilon")
        content = {
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit_here(),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **{key: config[key] for key in keys},
            "figures": figures,
        }
        Path(config["record"]).write_text(json.dumps(to_plain(content), indent=1) + "\n")


def table(figures: dict[str, list[dict[str, Any]]]) -> str:
    """The figures as Markdown: means and deviations over the seeds."""
    diag = mean(run["regret"] for run in figures["Diag-LinUCB"])
    lines = ["| policy | regret | Diag-LinUCB's over this | by quarter | mean reward | seconds |", "| --- " * 6 + "|"]
    for name, runs in figures.items():
        regret = [run["regret"] for run in runs]
        spread = f" ± {stdev(regret):.0f}" if len(runs) > 1 else ""
        quarters = ", ".join(f"{mean(parts):.0f}" for parts in zip(*(run["quarters"] for run in runs), strict=True))
        reward, seconds = (mean(run[key] for run in runs) for key in ("reward", "seconds"))
        cells = (name, f"{mean(regret):.0f}{spread}", f"{diag / mean(regret):.2f}", quarters)
        lines.append(f"| {' | '.join(cells)} | {reward:.3f} | {seconds:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main, "bandit_simulation", __doc__)
