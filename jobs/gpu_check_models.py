"""Every model, objective and dense optimiser of configs/ trains on a device as on the CPU: what gpu_check.py runs of them.

Both runs go the whole way of jobs/train.py: sharding, pipeline, evaluation, checkpoint. Dropout is off and copies of rows
are perturbed all alike, because generators of two devices draw differently; what the host draws is the same for both.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from raysys.config import Config, compose, config_folder
from raysys.data.synthetic import SyntheticSpec, prepare
from raysys.schema import Catalogue, ExtraColumn
from raysys.train.optimizers import DenseOptimizer
from raysys.train.trainer import fit
from raysys.train.trainer import prepare as prepare_run

LIMIT = 1e-3
"""Of the relative difference of two losses: on a CPU a change of each weight in its last bit changes them by up to 5e-5."""
FIRST_LIMIT = 1e-5
"""Of the first loss, which no training has magnified: some hundred roundings of 2^-24; there such a change makes 2e-7."""
STEPS, BATCH = 10, 256
SPEC = SyntheticSpec(
    num_users=400,
    num_items=300,
    cardinalities=(10, 20, 50, 100),
    exponent=0.0,  # groups of some ten rows, which fit into a batch
    num_dense=4,
    history_length=8,
    base_rates=(0.4, 0.3, 0.2),
    entire_space=True,
    num_pairs=3,
    num_heterogeneous=3,
    num_triples=4,
)
TEACHER = "+objective.teachers={click: click_true_probability}"
ALIKE = [  # each of these features of every row is masked, and the others stay as they are
    "objective.perturbation.feature_mask=0.9999999",
    "objective.perturbation.exclude=[d0,d1,user_id,item_id,c0,history]",
    "objective.perturbation.dense_noise=1e-12",
]
RETRIEVAL = ["data.keep_groups_whole=false", "train.retrieval={}"]
OF_MODEL = {"esmm": ["model.head.conversion=click_and_conversion"]}
OF_OBJECTIVE = {
    "collaborative": ["model=cetnet"],
    "early_stage": [
        "model=early_stage",
        TEACHER,
        "objective.value.factors=[click]",
        "objective.bid=like_true_probability",
        "objective.rank_weight=0.5",
    ],
    "gradnorm": ["objective.warmup_steps=2"],
    "hsnn": ["model=hsnn", "objective.negatives=64", *RETRIEVAL],
    "lspr": ["objective.balance=ratio", "objective.balance_groups=c0", *ALIKE],
    "mgda": ["model=mmoe", "model/head=cross_stitch"],
    "multibalance": ["model=mmoe", "objective.warmup_steps=2"],
    "next_item": ["model=sasrec", *RETRIEVAL],
    "sampled_softmax": ["model=two_tower", "objective.hard_negatives=true", *RETRIEVAL],
    "scr": ALIKE,
    "ukdsl": [TEACHER, "objective.loss=listwise"],
}
COMMON = [
    "data=table",
    "data.shards=1",
    "data.keep_groups_whole=true",
    f"train.batch_size={BATCH}",
    f"train.max_steps={STEPS}",
    "train.log_every=1",
]


def cases() -> dict[str, list[str]]:
    """The overrides of every case: each file of configs/model and configs/objective is in one."""
    model, objective = (
        sorted(path.stem for path in (config_folder() / group).glob("*.yaml")) for group in ("model", "objective")
    )
    found = {
        f"objective {name}": ["model=shared_bottom", f"objective={name}", *OF_OBJECTIVE.get(name, [])]
        for name in objective
    }
    trained = {overrides for case in found.values() for overrides in case}
    found |= {
        f"model {name}": [f"model={name}", *OF_MODEL.get(name, [])] for name in model if f"model={name}" not in trained
    }
    for name in get_args(get_type_hints(DenseOptimizer)["name"]):
        keys = f"{{name: {name}, low_rank: {{min_dim: 16, update_gap: 4}}}}"
        found[f"optimiser {name}"] = ["model=dcnv2", f"train.optimizers.dense={keys}"]
    return found


def checks(folder: Path, device: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names and checks of all cases, whose data is written into the folder. device: of the second run, cpu or cuda."""
    write_data(folder / "data")
    here, there = ["trainer.device=cpu"], [f"trainer.device={device}", "train.pipeline=sparse_dist"]
    for name, overrides in cases().items():
        yield f"{name}: cpu and {device}", partial(compare, folder, [*here, *overrides], [*there, *overrides])
    yield f"Ray Train with one worker on {device}", partial(compare_with_ray, folder, there)


def compare(folder: Path, a: list[str], b: list[str]) -> dict[str, Any]:
    """Train with the overrides `a` and with `b`; the largest relative difference of their losses."""
    first, second = losses(folder, a), losses(folder, b)
    differences = np.abs(first - second) / np.abs(first)
    if differences[0] > FIRST_LIMIT:
        raise AssertionError(f"the first losses differ by {differences[0]:.1e}: {first[0]} and {second[0]}")
    return {
        "difference": float(differences.max()),
        "first_difference": float(differences[0]),
        "first_loss": float(first[0]),
        "last_loss": float(first[-1]),
    }


def compare_with_ray(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The same run in this process and in a worker of a Ray that is there for it alone."""
    try:
        return compare(folder, overrides, ["trainer=ray", "trainer.workers=1", *overrides])
    finally:
        ray.shutdown()


def losses(folder: Path, overrides: list[str]) -> NDArray[np.float64]:
    """The losses [STEPS] of a run of the data in `folder`."""
    config = compose([*COMMON, f"data.folder={folder / 'data'}", *overrides])
    events: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        fit(prepare_run(config | {"runs_folder": runs, "model": without_dropout(config["model"])}), [events.append])
    found = np.array([event["loss"] for event in events if event["event"] == "step"])
    if len(found) != STEPS or not np.isfinite(found).all():
        raise AssertionError(f"{STEPS} finite losses were expected: {found}")
    return found


def without_dropout(node: Config) -> Config:
    """A model's config node, and those within it, with every `dropout` at 0."""
    nested = {key: without_dropout(value) if isinstance(value, dict) else value for key, value in node.items()}
    return nested | ({"dropout": 0.0} if "dropout" in node else {})


def write_data(folder: Path) -> None:
    """A log whose rows stand by user, with an item catalogue; as extra columns the true probabilities of two tasks."""
    prepare(folder / "source", 12 * BATCH, SPEC, processes=1)
    for split in ("train", "valid", "test"):
        pq.write_table(pq.read_table(folder / "source" / split).sort_by("user_id"), folder / f"{split}.parquet")
    pq.write_table(pa.table({"item_id": np.arange(SPEC.num_items)}), folder / "items.parquet")
    extra = tuple(ExtraColumn(f"{task}_true_probability") for task in ("click", "like"))
    schema = dataclasses.replace(SPEC.schema(), extra=extra, catalogue=Catalogue("item_id"))
    schema.save(folder / "schema.yaml")
