"""The HSNN's hierarchy and its rivals at equal scored items: `python jobs/compare_indexes.py set=items_1e4` trains, measures, records.

For each set and seed an HSNN, one with the EM update and two towers are trained. Beams are chosen on rows of the validation
split and measured on rows of the test split. A run that is finished is not repeated, nor a seed that is in the record.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysys.config import Config, compose, flat, instantiate, run_job
from raysys.data.catalogue import read_items
from raysys.data.synthetic.catalogue import affinities
from raysys.errors import UserError, nearest
from raysys.machine import commit_here
from raysys.models.retrieval.hierarchy import disjoint, exhaustive, soft_and_hard_auc, usage
from raysys.models.retrieval.hsnn import HSNN
from raysys.models.retrieval.indexes.exact import Exact
from raysys.models.retrieval.indexes.hierarchical import Hierarchical, volatility
from raysys.models.retrieval.indexes.index import Ids
from raysys.models.retrieval.indexes.tradeoff import InvertedLists, tradeoff
from raysys.report.index_comparison import index_table
from raysys.strict_json import to_plain
from raysys.train.job import machine, versions
from raysys.train.record import read_record
from raysys.train.snapshots import Queries, Snapshots
from raysys.train.trainer import fit, prepare

Figures = dict[str, Any]


def main(config: Config) -> None:
    """Every set and seed that the record lacks, then the table."""
    if config["set"] is not None and config["set"] not in config["sets"]:
        raise UserError(
            f"set {config['set']!r} is not in configs/compare_indexes.yaml", nearest(config["set"], config["sets"])
        )
    torch.set_num_threads(1)
    path = Path(config["record"])
    record = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "versions": versions()}
    for name in [config["set"]] if config["set"] else config["sets"]:
        node = config["sets"][name]
        if (source := node.get("source")) is not None and config["sources"][source] is None:
            print(f"{name} is left out: give sources.{source}=FOLDER")
            continue
        for seed in node["seeds"]:
            found = record.setdefault("sets", {}).setdefault(name, {})
            if str(seed) not in found:
                found[str(seed)] = compare(config, name, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(to_plain(record), indent=1) + "\n")
    print(index_table(record.get("sets", {})))
    print(f"record: {path}")


def compare(config: Config, name: str, seed: int) -> Figures:
    """All figures of one set and seed."""
    runs = {kind: train(config, name, kind, seed) for kind in models_of(config, name)}
    compared = Comparison(config, config["sets"][name], seed, Snapshots(runs["hsnn"]))
    rows = compared.hierarchies()
    if "hsnn_em" in runs:
        rows |= compared.em_update(Snapshots(runs["hsnn_em"]))
    rows |= compared.two_towers(Snapshots(runs["two_tower"]))
    return {
        "command": command(config, name),
        "commit": commit_here(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "overrides": {kind: overrides(config, name, kind, seed) for kind in runs},
        "items": len(compared.items),
        "queries": len(compared.test.own),
        "seconds": {kind: seconds(folder) for kind, folder in runs.items()},
        "rows": rows,
        "curriculum": compared.curriculum(),
    }


class Comparison:
    """One HSNN, what it ranks first when it scores everything, and the measurements beside it."""

    def __init__(self, config: Config, node: Config, seed: int, hsnn: Snapshots) -> None:
        self.config, self.node, self.seed, self.hsnn = config, node, seed, hsnn
        self.k = config["k"]
        self.items, self.valid, self.test = self.vectors(hsnn)
        self.truth = None
        if node["made_up"]:
            truth = affinities(self.test.rows, read_items(hsnn.job.data, hsnn.job.schema))
            self.truth = np.argpartition(-truth, self.k, axis=1)[:, : self.k]
        self.scored = 0.0

    def vectors(self, run: Snapshots) -> tuple[Tensor, Queries, Queries]:
        """Of the items, and of the rows that choose and those that measure."""
        valid, test = (run.queries(split, self.node["queries"]) for split in ("valid", "test"))
        return run.items(), valid, test

    def seen(self, items: Tensor) -> Tensor:
        """What k-means after training sees of the items."""
        random = torch.Generator().manual_seed(self.seed)
        return items[torch.randperm(len(items), generator=random)[: self.config["centroid_items"]]]

    def hierarchies(self) -> dict[str, Figures]:
        """The learned one at the beams of the rule, which say what may be scored, and those of k-means after training."""
        model, items, valid, test = hsnn_of(self.hsnn), self.items, self.valid, self.test
        wanted = exhaustive(model, valid.users, items, self.k)
        best, cost = timed(lambda: exhaustive(model, test.users, items, self.k))
        rows = {"hsnn, every item": self.row(best, best, len(items), cost)}
        index = build(model, items)
        curve = tradeoff(model, index, valid.users, wanted)
        beams = curve.cheapest(self.config["recall"])
        rows["hsnn"] = self.beam(index, beams, best)
        rows["hsnn"] |= {"usage": usage(index), "nodes": [len(nodes) for nodes in model.quantizer.nodes]}
        self.scored = rows["hsnn"]["scored"]
        kinds = {"hsnn": (model, index)}
        for title, trained in (("disjoint k-means", False), ("disjoint k-means, levels' networks", True)):
            made = disjoint(model, self.seen(items), self.seed, trained_levels=trained)
            kinds[title] = made, build(made, items)
        for title, (made, made_index) in kinds.items():
            curve = tradeoff(made, made_index, valid.users, wanted)
            at = {
                str(b): self.beam(made_index, curve.best_within(b * self.scored), best) for b in self.config["budgets"]
            }
            rows[title] = rows.get(title) or at["1.0"] | {"usage": usage(made_index)}
            rows[title]["budgets"] = at
        return rows

    def em_update(self, run: Snapshots) -> dict[str, Figures]:
        """The HSNN whose nodes were k-means of its items during training, against all of its own scores."""
        model, (items, valid, test) = hsnn_of(run), self.vectors(run)
        best, cost = timed(lambda: exhaustive(model, test.users, items, self.k))
        wanted, title = exhaustive(model, valid.users, items, self.k), "hsnn, EM update"
        rows = {f"{title}, every item": self.row(best, best, len(items), cost)}
        for way, made in ((title, model), (f"{title}, disjoint k-means", disjoint(model, self.seen(items), self.seed))):
            index = build(made, items)
            beams = tradeoff(made, index, valid.users, wanted).best_within(self.scored)
            rows[way] = self.beam(index, beams, best, test.users) | {"usage": usage(index)}
        return rows

    def two_towers(self, run: Snapshots) -> dict[str, Figures]:
        """Every inner product, and inverted lists with as many compared items as the HSNN scores, in the best number of lists."""
        items, valid, test = self.vectors(run)
        assert torch.equal(test.own, self.test.own)
        vectors, asking, queries = items.numpy(), valid.users.numpy(), test.users.numpy()
        exact = Exact(vectors.shape[1])
        exact.add(np.arange(len(vectors)), vectors)
        (best, _), cost = timed(lambda: exact.search(queries, self.k))
        wanted, choices = exact.search(asking, self.k)[0], list[tuple[float, InvertedLists, int, float]]()
        for per_root in self.config["ivf_lists"]:
            lists = InvertedLists(vectors, per_root)
            probes = lists.probes_within(asking, self.scored)
            choices.append((overlap(lists.search(asking, self.k, probes), wanted), lists, probes, per_root))
        _, lists, probes, per_root = max(choices, key=lambda choice: choice[0])
        found, ivf_cost = timed(lambda: lists.search(queries, self.k, probes))
        scored = float(lists.scored(queries)[:, probes - 1].mean())
        return {
            "two towers, exact": self.row(best, best, len(vectors), cost),
            "two towers, IVF": self.row(found, best, scored, ivf_cost) | {"probes": probes, "lists_per_root": per_root},
        }

    def curriculum(self) -> list[Figures]:
        """By checkpoint: temperature, AUC by level, usage, and what changed since the one before."""
        random, found, before = torch.Generator().manual_seed(self.seed), list[Figures](), None
        others = torch.randint(len(self.items), (self.config["negatives"],), generator=random)
        for checkpoint in self.hsnn.checkpoints:
            self.hsnn.load(checkpoint)
            items, valid, _ = self.vectors(self.hsnn)
            model, temperature = hsnn_of(self.hsnn), self.hsnn.temperature
            aucs = soft_and_hard_auc(model, valid.users, items[valid.own], items[others], temperature)
            index = build(model, items)
            found.append(
                {
                    "step": int(checkpoint.name.rpartition("_")[2]),
                    "temperature": temperature,
                    "auc": [{"soft": soft, "hard": hard, "gap": soft - hard} for soft, hard in aucs],
                    "usage": usage(index),
                    "volatility": None if before is None else volatility(before, index),
                }
            )
            before = index
        return found

    def beam(self, index: Hierarchical, beams: tuple[int, int], best: Ids, users: Tensor | None = None) -> Figures:
        """A row of the table for these beams."""
        queries = (self.test.users if users is None else users).numpy()
        index.beams = beams
        found, cost = timed(lambda: index.beam(queries, self.k))
        return self.row(found.ids, best, float(found.scored.mean()), cost) | {"beams": beams}

    def row(self, found: Ids, best: Ids, scored: float, cost: float) -> Figures:
        """recall: of what scoring everything finds. taken: of the items that were taken. true: of the truly best items."""
        figures = {
            "scored": scored,
            "recall": overlap(found, best),
            "taken": float((found == self.test.own.numpy()[:, None]).any(1).mean()),
            "ms": 1000 * cost / len(found),
        }
        return figures if self.truth is None else figures | {"true": overlap(found, self.truth)}


def train(config: Config, name: str, kind: str, seed: int) -> Path:
    """Train one run in this process, unless it is finished, and return its folder."""
    prepared_config = compose([*overrides(config, name, kind, seed), *place(config, name, kind, seed)])
    instantiate(prepared_config["data"]["prepare"])
    prepared = prepare(prepared_config)
    record = read_record(prepared.job.folder)
    if record is None or record["status"] not in ("finished", "early_stopped"):
        print(f"{name} {kind} seed {seed}: training", flush=True)
        if fit(prepared, []).status == "interrupted":
            raise KeyboardInterrupt
    return prepared.job.folder


def overrides(config: Config, name: str, kind: str, seed: int) -> list[str]:
    """What decides the run of one model."""
    node = config["sets"][name]
    shared = [*(config["made_up"] if node["made_up"] else []), *config["all_runs"], *node["overrides"]]
    nodes = [f"model.nodes={node['nodes']}"] if kind.startswith("hsnn") else []
    return [*flat(models_of(config, name)[kind]), *shared, *nodes, f"data.prepare.seed={seed}", f"seed={seed}"]


def place(config: Config, name: str, kind: str, seed: int) -> list[str]:
    """Where the run of one model and its data are. Experiments of one data set may prepare it each in its way."""
    node, folder = config["sets"][name], Path(config["runs_folder"]).resolve() / name
    data = folder / (f"data-{seed}" if node["made_up"] else f"data-{kind}-{seed}")
    source = [f"data.prepare.source={config['sources'][node['source']]}"] if "source" in node else []
    return [f"data.folder={data}", *source, f"runs_folder={folder}", f"run_id={kind}-{seed}", "resume=auto"]


def models_of(config: Config, name: str) -> dict[str, list[str | list[str]]]:
    """The overrides of each model of a set."""
    found: dict[str, list[str | list[str]]] = config["sets"][name].get("models", config["models"])
    return found


def command(config: Config, name: str) -> str:
    """How the job was started, without where the data was."""
    text = shlex.join(["python", *sys.argv])
    source = config["sources"].get(config["sets"][name].get("source"))
    return text if source is None else text.replace(str(source), "FOLDER")


def hsnn_of(run: Snapshots) -> HSNN:
    """The run's model."""
    assert isinstance(run.model, HSNN)
    return run.model


def build(model: HSNN, items: Tensor) -> Hierarchical:
    """The index of the items under their row numbers."""
    index = Hierarchical(model, beams=[1] * len(model.quantizer.nodes))
    index.add(np.arange(len(items)), items.numpy())
    return index


def overlap(found: Ids, wanted: Ids) -> float:
    """The mean share of each row of `wanted` that is in the row of `found`."""
    shares = [np.isin(best, ids).mean() for ids, best in zip(found, wanted, strict=True)]
    return float(np.mean(shares))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds of CPU time of the one thread, which other work does not change."""
    started = time.process_time()
    result = call()
    return result, time.process_time() - started


def seconds(folder: Path) -> float:
    """How long a run took."""
    record = read_record(folder) or {}
    return round(record["finished"] - record["started"], 1)


if __name__ == "__main__":
    run_job(main, "compare_indexes", __doc__)
