"""The ablations of CETNet: `python jobs/ablate_cetnet.py data=movielens train.epochs=4` trains each and prints a table.

(a) no peers, (b) uniform weights, (c) shared tables, (d) copies of the first member, (e) each member alone with tables of
full width, (f) members of the ensemble's widths, trained independently and averaged. A run that is finished is not repeated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from raysys.config import Config, instantiate, run_job, validate
from raysys.data.filesystem import exists
from raysys.data.prepare.dataset import is_prepared
from raysys.errors import UserError
from raysys.train.intervals import metric_interval, paired_interval
from raysys.train.settings import Settings
from raysys.train.trainer import fit, prepare

WHOLE = "cetnet"
Columns = dict[str, NDArray[np.float64]]


def main(config: Config) -> None:
    """Train what is missing and print the table of every binary task."""
    data = validate(Settings, config).data
    if data.prepare and (is_prepared(data.folder) or not exists(data.folder)):
        instantiate(data.prepare)
    predictions: dict[str, Columns] = {}
    parameters: dict[str, int] = {}
    for name, ablation in ablations(config).items():
        prepared = prepare(ablation)
        fit(prepared, [])
        predictions[name] = read_predictions(prepared.job.folder)
        parameters[name] = sum(prepared.facts["parameters"].values())
        print(f"{name}: {prepared.job.folder}", flush=True)
    tasks = [label.name for label in prepared.job.schema.labels if label.kind == "binary"]
    independent = [name for name in predictions if name.startswith("f_")]
    predictions["f_average"] = average([predictions.pop(name) for name in independent], tasks)
    parameters["f_average"] = sum(parameters[name] for name in independent)
    for task in tasks:
        Console().print(table_of(task, predictions, parameters))


def ablations(config: Config) -> dict[str, Config]:
    """The config of each run by its name."""
    model, objective = config["model"], config["objective"]
    members = model.get("members", {})
    if len(members) < 2:
        raise UserError("the ablations of an ensemble need a model with at least two members", "take model=cetnet")
    first = next(iter(members))
    supervised = {"_target_": "raysys.objectives.supervised.Supervised"} | {
        key: objective[key] for key in ("task_weights", "embedding_l2")
    }
    share = model["width_share"] or 1 / len(members)
    copies = {f"{first}{number}": members[first] for number in range(len(members))}
    nodes = {
        WHOLE: (model, objective, 0),
        "a_no_peers": (model, objective | {"peer_weight": 0.0}, 0),
        "b_uniform": (model | {"uniform": True}, objective, 0),
        "c_shared_tables": (model | {"shared_tables": True}, objective, 0),
        f"d_copies_of_{first}": (model | {"members": copies}, objective, 0),
    }
    for place, (name, member) in enumerate(members.items()):
        bare = {key: value for key, value in member.items() if key != "_partial_"}
        nodes[f"e_{name}_alone"] = (bare, supervised, 0)
        nodes[f"f_{name}"] = (model | {"members": {name: member}, "width_share": share}, supervised, place)
    return {
        name: config
        | {"model": node, "objective": loss, "seed": config["seed"] + place, "resume": "auto"}
        | {"run_id": f"{config['name']}-{name}-{config['seed']}"}
        for name, (node, loss, place) in nodes.items()
    }


def read_predictions(folder: Path) -> Columns:
    """The predictions of the test split, or of the validation split where there is none, in the order of example ids."""
    found = [path for split in ("test", "valid") if (path := folder / "predictions" / f"{split}.parquet").exists()]
    if not found:
        raise UserError(f"{folder}: no predictions", "the data set needs a test or a validation split")
    rows = pq.read_table(found[0]).sort_by("example_id")
    return {name: rows[name].to_numpy() for name in rows.column_names}


def average(predictions: list[Columns], tasks: list[str]) -> Columns:
    """The mean probability of models that scored the same rows."""
    first = predictions[0]
    for other in predictions[1:]:
        if not np.array_equal(first["example_id"], other["example_id"]):
            raise UserError("the runs have scored different rows", "remove the runs and train them anew")
    names = [f"{task}_probability" for task in tasks]
    return first | {name: np.mean([columns[name] for columns in predictions], 0) for name in names}


def table_of(task: str, predictions: dict[str, Columns], parameters: dict[str, int]) -> Table:
    """A row for each run; the last column is NE minus that of the whole ensemble, with its 95% interval."""
    table = Table("run", "parameters", "AUC", "NE", "predicted / observed", "NE - cetnet", title=task)
    label, weight = (predictions[WHOLE][f"{task}_{name}"] for name in ("label", "weight"))
    whole = predictions[WHOLE][f"{task}_probability"]
    for name, columns in predictions.items():
        p = columns[f"{task}_probability"]
        auc, ne = (metric_interval(metric, label, p, weight).value for metric in ("auc", "ne"))
        gap = paired_interval(label, weight, whole, p, "ne")
        ratio = float(weight @ p) / float(weight @ label)
        interval = f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]" if name != WHOLE else ""
        table.add_row(name, f"{parameters[name]:,}", f"{auc:.4f}", f"{ne:.4f}", f"{ratio:.3f}", interval)
    return table


if __name__ == "__main__":
    run_job(main, "ablate_cetnet", __doc__)
