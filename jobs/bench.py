"""Measure raysys against the bare loop: a table, and OUT/bench.json. What the rows mean stands in docs/bench.md.

Rates are compared within one run: the rivals take turns of a few seconds, and a figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import bench_bare
import bench_models
import bench_profile
import bench_raysys
import bench_result
from bench_models import dense_parameters, flops_per_row
from bench_raysys import Run, Timing
from bench_result import Row, ratio
from bench_rival import LOG, Rival, take_turns
from rich.console import Console

from raysys.data.synthetic import prepare_criteo_shaped

TITLES = {"dlrm": "DLRM", "dcn": "DCN v2", "dhen": "DHEN"}
PIPELINES = ("base", "sparse_dist")
SECTIONS = ("models", "end_to_end", "reader", "scaling", "sparse", "quality")
AUC = {1: 0.744, 2: 0.737}


@dataclass(frozen=True)
class Sizes:
    """How much is measured. steps: of a turn of raysys by its number of workers; batch_size: rows of a worker.

    model_rounds: of the section `models`, whose target is narrow: a turn's rate scatters by a tenth.
    """

    data: str
    log_rows: int
    batch_size: int
    steps: Mapping[int, int]
    rival_steps: int
    rounds: int
    model_rounds: int
    seeds: int
    table: Mapping[str, int]
    on_ray: bool


FULL = Sizes(
    data="data/synthetic-criteo-shaped",
    log_rows=600_000,
    batch_size=4096,
    steps={1: 20, 2: 10},  # six turns fit into an epoch
    rival_steps=10,
    rounds=5,
    model_rounds=21,
    seeds=3,
    table={"rows": 1_000_000, "width": 64, "batch_size": 4096, "length": 26, "steps": 10},
    on_ray=True,
)
QUICK = Sizes(
    data="data/synthetic-criteo-shaped-quick",
    log_rows=6000,
    batch_size=64,
    steps={1: 5},
    rival_steps=2,
    rounds=2,
    model_rounds=2,
    seeds=1,
    table={"rows": 1000, "width": 8, "batch_size": 64, "length": 3, "steps": 2},
    on_ray=False,
)


class Bench:
    """The sections. Timings that several of them use are made once. out: of the JSON; runs: of what is thrown away."""

    def __init__(self, sizes: Sizes, out: Path, runs: Path) -> None:
        self.sizes, self.out, self.runs = sizes, out, runs
        self._timings: dict[tuple[str, int], Timing] = {}

    def models(self) -> list[Row]:
        """The bare loop over the same loop with TorchRec's own classes, each with the pipeline that is faster for it."""
        rows = []
        for model in ("dlrm", "dcn"):
            dense = dense_parameters(bench_bare.Model(model))
            assert dense == dense_parameters(bench_models.Published(model)), model
            rivals = {
                f"{name} {pipeline}": self._loop(model, pipeline, target=target)
                for name, target in (("bare", "bare"), ("torchrec", "published"))
                for pipeline in PIPELINES
            }
            rates = take_turns(rivals, self.sizes.model_rounds)
            bare, published = (
                max((key for key in rates if key.startswith(name)), key=lambda key: median(rates[key]))
                for name in ("bare", "torchrec")
            )
            value, detail = ratio(rates, bare, published)
            row = Row("models", f"{TITLES[model]}: bare loop / TorchRec's class", value, 1.0, 0.05, detail)
            recorders = {
                name: _recorder(f"bench_models:{target}", self._loop_options(model, pipeline))
                for (name, pipeline), target in zip(
                    (bare.split(), published.split()), ("bare", "published"), strict=True
                )
            }
            rows.append(_explained(row, self.out, partial(bench_profile.compare, recorders)))
        return rows

    def end_to_end(self) -> list[Row]:
        """Parquet → Ray Train → metrics over the bare loop."""
        rows = []
        for model in TITLES:
            for workers in self.sizes.steps:
                timing = self._timing(model, workers)
                value, detail = ratio(timing.rates, "raysys", "bare")
                detail |= {**timing.facts, "train_loop": timing.summary}
                name = f"{TITLES[model]}, {_workers(workers)}: end to end / bare loop"
                row = Row("end_to_end", name, value, 0.90, detail=detail)
                rows.append(_explained(row, self.out, partial(self._profile, model, workers)))
        return rows

    def reader(self) -> list[Row]:
        """From Parquet to batches alone, over DLRM end to end with one worker."""
        value, detail = ratio(self._timing("dlrm", 1).rates, "reader", "raysys")
        row = Row("reader", "reader / DLRM end to end", value, 5.0, detail=detail)
        return [_explained(row, self.out, self._profile_reader)]

    def scaling(self) -> list[Row]:
        """Two workers over one, against two bare loops side by side without communication over one.

        The runs of one and of two workers are minutes apart: each counts relative to the single bare loop of its rounds.
        """
        if 2 not in self.sizes.steps:
            return []
        rates = [self._timing("dcn", workers).rates for workers in (1, 2)]
        speedup = ratio(rates[1], "raysys", "one")[0] / ratio(rates[0], "raysys", "one")[0]
        ceilings = [ratio(side, "pair", "one")[0] for side in rates]
        ceiling = mean(ceilings)
        detail = {"rates_1_worker": rates[0], "rates_2_workers": rates[1]}
        row = Row("scaling", "DCN v2: share of the ceiling", speedup / ceiling, 0.85, detail=detail)
        return [
            Row("scaling", "DCN v2: 2 workers / 1", speedup),
            Row("scaling", "ceiling: 2 separate bare loops / 1", ceiling, detail={"by_run": ceilings}),
            _explained(row, self.out, partial(self._profile, "dcn", 2)),
        ]

    def sparse(self) -> list[Row]:
        """Fused Adagrad over torch's sparse one, on one large table."""
        sizes = dict(self.sizes.table)
        names = {"fused": "EXACT_ADAGRAD", "rowwise": "EXACT_ROWWISE_ADAGRAD"}
        sides: dict[str, tuple[str, dict[str, Any]]] = {"plain": ("bench_sparse:plain", sizes)}
        sides |= {name: ("bench_sparse:fused", {"optimizer": kind, **sizes}) for name, kind in names.items()}
        rates = take_turns({name: self._rival(*side) for name, side in sides.items()}, self.sizes.rounds)
        value, detail = ratio(rates, "fused", "plain")
        row = Row("sparse", "fused Adagrad / EmbeddingBag(sparse=True)", value, 3.0, detail=detail)
        recorders = {name: _recorder(*sides[name]) for name in ("plain", "fused")}
        return [
            _explained(row, self.out, partial(bench_profile.compare, recorders)),
            Row("sparse", "fused row-wise Adagrad / the same", ratio(rates, "rowwise", "plain")[0]),
        ]

    def quality(self) -> list[Row]:
        """Test AUC of DCN v2 after one epoch, the mean over the seeds."""
        rows = []
        for workers in self.sizes.steps:
            aucs = [bench_raysys.test_auc(self._run("dcn", workers), seed) for seed in range(self.sizes.seeds)]
            name = f"DCN v2, {_workers(workers)}: test AUC, mean of {len(aucs)} seeds"
            rows.append(Row("quality", name, mean(aucs), AUC[workers], detail={"seeds": aucs}))
        return rows

    def _timing(self, model: str, workers: int) -> Timing:
        if (model, workers) not in self._timings:
            timing = self._time(model, workers)
            yardstick = bench_bare.Model(model, "cpu")
            sizes = {"dense_parameters": dense_parameters(yardstick), "flops_per_row": flops_per_row(yardstick)}
            assert sizes == {key: timing.facts[key] for key in sizes}, f"{model}: {sizes} is not {timing.facts}"
            self._timings[model, workers] = timing
        return self._timings[model, workers]

    def _time(self, model: str, workers: int) -> Timing:
        """One run in turns with the faster bare loop, and with what other sections compare it with."""
        with ExitStack() as stack:
            loops = {pipeline: stack.enter_context(self._loop(model, pipeline, workers)) for pipeline in PIPELINES}
            tried = [{pipeline: loop.turn() for pipeline, loop in loops.items()} for _ in range(3)]
            pipeline = max(loops, key=lambda name: median(turn[name] for turn in tried))
            rivals = {"bare": loops.pop(pipeline)}
            for slower in loops.values():
                slower.close()
            if (model, workers) == ("dlrm", 1):
                rivals["reader"] = self._rival("bench_raysys:read", self._reader_options())
            if model == "dcn" and 2 in self.sizes.steps:
                rivals["pair"] = self._loop(model, pipeline, 2, connected=False)
                rivals["one"] = self._loop(model, pipeline)
            timing = bench_raysys.time_run(self._run(model, workers), rivals)
        return dataclasses.replace(timing, facts={**timing.facts, "bare_pipeline": pipeline})

    def _run(self, model: str, workers: int) -> Run:
        sizes, steps = self.sizes, self.sizes.steps[workers]
        return Run(model, workers, sizes.data, self.runs, sizes.batch_size, steps, sizes.rounds, sizes.on_ray)

    def _loop(
        self, model: str, pipeline: str, processes: int = 1, connected: bool = True, target: str = "bare"
    ) -> Rival:
        return self._rival(f"bench_models:{target}", self._loop_options(model, pipeline), processes, connected)

    def _loop_options(self, model: str, pipeline: str) -> dict[str, Any]:
        sizes = self.sizes
        options = {"model": model, "pipeline": pipeline, "log": f"{sizes.data}/train"}
        return options | {"batch_size": sizes.batch_size, "steps": sizes.rival_steps}

    def _reader_options(self) -> dict[str, Any]:
        return {"data": self.sizes.data, "batch_size": self.sizes.batch_size}

    def _rival(self, target: str, options: Mapping[str, Any], processes: int = 1, connected: bool = True) -> Rival:
        return Rival(target, options, self.out / LOG, processes, connected)

    def _profile(self, model: str, workers: int, path: Path) -> Path:
        run = dataclasses.replace(self._run(model, workers), folder=self.runs / "profile", rounds=1, on_ray=True)
        pipeline = self._timing(model, workers).facts["bare_pipeline"]
        recorders = {
            "bare": _recorder("bench_models:bare", self._loop_options(model, pipeline)),
            "raysys": ("bench_profile:raysys", {"run": {**dataclasses.asdict(run), "folder": str(run.folder)}}),
        }
        return bench_profile.compare(recorders, path, workers)

    def _profile_reader(self, path: Path) -> Path:
        return bench_profile.functions(bench_raysys.read(**self._reader_options()), path)


def _recorder(target: str, options: Mapping[str, Any]) -> bench_profile.Recorder:
    return "bench_profile:rival", {"target": target, "options": dict(options)}


def _explained(row: Row, out: Path, profile: Callable[[Path], Path]) -> Row:
    """The row, and where it missed its target a profile beside the JSON."""
    if row.met is not False:
        return row
    name = "-".join("".join(letter if letter.isalnum() else " " for letter in row.name.lower()).split())
    return dataclasses.replace(row, profile=str(profile(out / f"profile-{name}.txt")))


def _workers(number: int) -> str:
    return f"{number} worker" if number == 1 else f"{number} workers"


def main() -> None:
    """Run the chosen sections; the JSON is written again after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of bench.json and profiles")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, without Ray: only to see that it works")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / LOG).unlink(missing_ok=True)
    logging.disable(logging.WARNING)  # TorchRec warns of every table that it replicates
    warnings.simplefilter("ignore")
    console = Console(width=None if sys.stdout.isatty() else 150)
    about, rows = bench_result.machine() | {"settings": dataclasses.asdict(sizes)}, []
    if not Path(sizes.data).exists():
        console.print(f"preparing {sizes.data}")
        prepare_criteo_shaped(sizes.data, rows=sizes.log_rows)
    with tempfile.TemporaryDirectory(prefix="bench") as runs:
        bench = Bench(sizes, options.out, Path(runs))
        for section in options.sections:
            console.print(f"measuring {section}")
            started = time.monotonic()
            rows += getattr(bench, section)()
            about.setdefault("seconds", {})[section] = time.monotonic() - started
            bench_result.write(options.out / "bench.json", rows, **about)
    bench_result.show(rows, about, console)
    console.print(f"{options.out / 'bench.json'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
