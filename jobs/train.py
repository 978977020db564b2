"""Train a model: `python jobs/train.py model=dlrm train.epochs=2`, or through `ray job submit` with trainer=ray."""

from __future__ import annotations

from rich.console import Console

from raysys.config import Config, instantiate, run_job, validate
from raysys.data.filesystem import exists
from raysys.data.prepare.dataset import is_prepared
from raysys.errors import UserError
from raysys.report.events import EventWriter
from raysys.report.html import write_report
from raysys.report.progress import Progress
from raysys.report.summary import print_dry_run, print_start, print_summary
from raysys.report.tensorboard import TensorBoard
from raysys.train.export import export_run
from raysys.train.launch import relative_in_ray_job
from raysys.train.plan import format_plan
from raysys.train.record import read_record
from raysys.train.settings import Settings
from raysys.train.size import estimate_seconds
from raysys.train.trainer import Prepared, fit, prepare


def main(config: Config) -> None:
    """Prepare the data where it is missing, train, export the bundle and write the report."""
    console = Console()
    folders = {"runs_folder": str(config["runs_folder"]), "data.folder": str(config["data"]["folder"])}
    if (warning := relative_in_ray_job(folders)) is not None:
        console.print(f"[bold yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)
    data = validate(Settings, config).data
    if data.prepare and (is_prepared(data.folder) or not exists(data.folder)):
        if config["dry_run"] and not is_prepared(data.folder):
            raise UserError(f"{data.folder}: no data yet, and a dry run writes none", "run jobs/prepare.py first")
        instantiate(data.prepare)  # what is there must be what the config asks for
    prepared = prepare(config)
    print_start(prepared.facts, format_plan(prepared.plan), console)
    if config["dry_run"]:
        facts, settings = prepared.facts, prepared.job.trainer
        rows = facts["total_steps"] * facts["rows_per_epoch"] // facts["steps_per_epoch"]
        threads = int(facts["world_size"] * settings.cpus_per_worker)
        print_dry_run(facts, estimate_seconds(facts["flops_per_row"], rows, threads), console)
        return
    train(prepared, console)


def train(prepared: Prepared, console: Console) -> None:
    """Run the prepared job; its report is written also where it fails."""
    folder = prepared.job.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with Progress() as progress, TensorBoard(folder / "tensorboard") as tensorboard:
            listeners = [EventWriter(folder / "events.jsonl").write, progress.update, tensorboard.update]
            outcome = fit(prepared, listeners)
        if outcome.status != "interrupted":
            export_run(folder)
    finally:
        if (
            folder / "events.jsonl"
        ).exists():  # else an error kept the run from starting, and is on its way to the user
            report = write_report(folder)
    print_summary(folder, read_record(folder) or {}, report, console)


if __name__ == "__main__":
    run_job(main, "train", __doc__, can_dry_run=True)
