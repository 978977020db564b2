"""The `raysys` command: look at the machine, at data, and at runs. Training and serving are started by the scripts in jobs/."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raysys import __version__
from raysys.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

PIPE_WIDTH = 240

EXAMPLES = """\
examples:
  raysys doctor                                            is this machine ready, and if not, what to do
  raysys schema logs/ --label click --output schema.yaml   a first schema from Parquet or CSV, to edit
  raysys data check data/mine                              ranges, nulls, drift, columns that look like the label
  raysys runs                                              the runs in ./runs, newest first
  raysys compare runs/A runs/B                             their configs' and metrics' differences, with intervals

Training, prediction and export are jobs: python jobs/train.py --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command. Exit status: its own, or that of a shell's command that was ended in the same way.

    2 after an error of the user (one line and a hint), 130 after Ctrl-C, 141 where nobody reads the output any longer.
    """
    arguments = build_parser().parse_args(argv)
    try:
        status = int(arguments.command(arguments))
        sys.stdout.flush()  # here, where a reader that is gone is caught
        return status
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written when Python ends
        return 141


def build_parser() -> argparse.ArgumentParser:
    """The commands and their arguments; each command's function is in `arguments.command`."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="raysys", description=sys.modules[__name__].__doc__, epilog=EXAMPLES, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"raysys {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    doctor = commands.add_parser("doctor", parents=[shared], help="what is installed, whether it runs, how to mend it")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(command=run_doctor)

    schema = commands.add_parser("schema", parents=[shared], help="infer a first schema from Parquet or CSV")
    schema.add_argument("path", metavar="PATH", help="a file or a folder")
    schema.add_argument("--label", nargs="+", default=[], metavar="NAME", help="columns to predict")
    schema.add_argument("--output", type=Path, metavar="FILE", help="write YAML there instead of printing it")
    schema.set_defaults(command=run_schema)

    data = commands.add_parser("data", help="look at a data set").add_subparsers(metavar="COMMAND", required=True)
    check = data.add_parser(
        "check", parents=[shared], help="ranges, nulls, drift between splits, columns like the label"
    )
    check.add_argument("path", metavar="PATH", help="a folder with splits, or a single table")
    check.add_argument("--schema", metavar="FILE", help="default: schema.yaml in the folder")
    check.set_defaults(command=run_data_check)

    runs = commands.add_parser("runs", parents=[shared], help="list runs, newest first")
    runs.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER", help="default: runs")
    runs.add_argument("--json", action="store_true", help="print JSON")
    runs.set_defaults(command=run_runs)

    compare = commands.add_parser("compare", parents=[shared], help="two runs: differences of config and metrics")
    compare.add_argument("a", type=Path, metavar="A", help="a run's folder")
    compare.add_argument("b", type=Path, metavar="B", help="another one")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(command=run_compare)
    return parser


def run_doctor(arguments: argparse.Namespace) -> int:
    """`raysys doctor`: exit status 1 if something is wrong."""
    from raysys import doctor

    return doctor.run(as_json=arguments.json)


def run_schema(arguments: argparse.Namespace) -> int:
    """`raysys schema`: an existing file is never overwritten, since schemas are edited by hand."""
    from raysys.data.infer import schema_text

    output: Path | None = arguments.output
    if output and output.exists():
        raise UserError(f"{output} exists already", "name another file, or delete it first")
    text = schema_text(arguments.path, arguments.label)
    if output is None:
        print(text, end="")
        return 0
    output.write_text(text)
    print(f"wrote {output}: look through it and edit it before you train", file=sys.stderr)
    return 0


def run_data_check(arguments: argparse.Namespace) -> int:
    """`raysys data check`: exit status 1 if training would fail or be wrong."""
    from raysys.data.check import check, format_findings
    from raysys.schema import FeatureSchema

    found = check(arguments.path, FeatureSchema.load(arguments.schema) if arguments.schema else None)
    print(format_findings(found))
    return 1 if found.has_errors else 0


def run_runs(arguments: argparse.Namespace) -> int:
    """`raysys runs`."""
    from raysys.report.runs import list_runs, runs_json, runs_table

    found = list_runs(arguments.folder)
    if arguments.json:
        print(runs_json(found))
    else:
        print_rich(runs_table(found) if found else f"no runs in {arguments.folder} yet")
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    """`raysys compare`."""
    from raysys.report.compare import compare, render_comparison
    from raysys.train.intervals import paired_interval

    comparison = compare(arguments.a, arguments.b, paired_interval)
    if arguments.json:
        print(json.dumps(comparison.to_dict(), indent=2))
    else:
        print_rich(render_comparison(comparison))
    return 0


def print_rich(content: RenderableType) -> None:
    """Print a table: as wide as the terminal, or wide enough for whole lines into a pipe."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    with console.capture() as text:
        console.print(content)
    print(text.get(), end="")  # not by rich, which takes a reader that is gone for an error of its own


if __name__ == "__main__":
    sys.exit(main())
