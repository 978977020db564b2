"""Check logged traffic for skew: `python jobs/skew.py bundle=runs/X/bundle served=requests.jsonl log=data/X/test.parquet`.

Served predictions are computed again, and with `log` served features are compared with those that training reads. The exit
status is 1 where something differs.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from raysys.bundle import load_bundle
from raysys.config import Config, run_job
from raysys.data.log import ParquetLog
from raysys.serve.skew import SkewReport, check_skew, read_served
from raysys.strict_json import to_plain


def show(report: SkewReport, console: Console) -> None:
    """What was compared, then a row for each task and feature that differs, with examples."""
    console.print(
        f"{report.requests:,} requests with {report.rows:,} rows, {report.rows_in_log:,} of them found in the log; "
        f"{report.other_versions:,} requests of other versions left out"
    )
    if not report.skewed:
        console.print("[green]nothing differs[/]")
        return
    table = Table(box=None, header_style="bold")
    for title in ("differs", "rows", "largest", "examples"):
        table.add_column(title, justify="right" if title in ("rows", "largest") else "left")
    for kind, differences in (("prediction", report.predictions), ("feature", report.features)):
        for difference in differences:
            largest = "" if difference.largest is None else f"{difference.largest:.3g}"
            examples = "\n".join(str(example) for example in difference.examples)
            table.add_row(f"{kind} {difference.name}", f"{difference.rows:,}", largest, examples)
    console.print(table, highlight=False)


def main(config: Config) -> None:
    """Compare, report, and end with status 1 where something differs."""
    bundle = load_bundle(config["bundle"], config["allowed"])
    log = ParquetLog(config["log"], bundle.schema, labels=False) if config["log"] else None
    report = check_skew(
        islice(read_served(config["served"]), config["requests"]),
        bundle,
        log,
        model_version=config["model_version"],
        tolerance=config["tolerance"],
        examples=config["examples"],
    )
    if config["output"]:
        Path(config["output"]).write_text(json.dumps(to_plain(report.to_dict()), indent=1) + "\n")
    show(report, Console(width=None if sys.stdout.isatty() else 200))
    sys.exit(int(report.skewed))


if __name__ == "__main__":
    run_job(main, "skew", __doc__)
