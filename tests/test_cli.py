from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys import doctor
from raysys.cli import main
from raysys.schema import FeatureSchema


def write_run(folder: Path, run_id: str, auc: float, width: int) -> Path:
    """A run's folder with what `raysys runs` and `raysys compare` read."""
    run = folder / run_id
    run.mkdir(parents=True)
    record = {
        "run_id": run_id,
        "status": "finished",
        "started": 1_700_000_000.0,
        "finished": 1_700_000_060.0,
        "config": {"model": {"_target_": "raysys.models.ranking.dlrm.DLRM", "width": width}},
        "parameters": {"dense": 10, "sparse": 20},
        "metrics": {"test": {"click": {"ne": 0.8, "auc": auc}}},
    }
    (run / "run.json").write_text(json.dumps(record))
    return run


def test_help_shows_examples(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"raysys {name}" in text for name in ("doctor", "schema", "data check", "runs", "compare"))


def test_version(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("raysys 0.")


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from raysys.cli import build_parser
build_parser().format_help()
print(sorted({"torch", "ray", "pyarrow", "numpy", "rich", "yaml"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("arguments", [[], ["data"], ["frobnicate"], ["compare", "a"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: raysys" in capsys.readouterr().err


def test_doctors_exit_status_is_passed_on(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(doctor, "run", lambda as_json: asked.append(as_json) or 1)
    assert main(["doctor", "--json"]) == 1
    assert main(["doctor"]) == 1
    assert asked == [True, False]


def test_runs_as_a_table_and_as_json(tmp_path, capsys) -> None:
    write_run(tmp_path, "first", 0.75, 16)
    assert main(["runs", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "first" in table
    assert "finished" in table
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert run["metrics"]["test"]["click"]["auc"] == 0.75


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_a_reader_that_is_gone_is_no_traceback(tmp_path, arguments) -> None:
    write_run(tmp_path, "a", 0.7, 8)
    command = [sys.executable, "-m", "raysys.cli", "runs", str(tmp_path), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # before Python has started
        assert (process.stderr.read(), process.wait()) == ("", 141)


def test_no_runs_yet(tmp_path, capsys) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_an_error_of_the_user_is_one_line_and_a_hint(tmp_path, capsys) -> None:
    assert main(["runs", str(tmp_path / "absent")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"error: {tmp_path / 'absent'}: no such folder",
        "  hint: runs are written to ./runs unless a config says otherwise",
    ]


def test_debug_shows_the_traceback(tmp_path, capsys) -> None:
    assert main(["runs", str(tmp_path / "absent"), "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(monkeypatch, capsys) -> None:
    def interrupted(as_json: bool) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_compare_shows_what_differs(tmp_path, capsys) -> None:
    a, b = write_run(tmp_path, "narrow", 0.75, 16), write_run(tmp_path, "wide", 0.76, 32)
    assert main(["compare", str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "model.width" in text
    assert main(["compare", str(a), str(b), "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["config"] == [{"key": "model.width", "a": 16, "b": 32}]
    (auc,) = [row for row in comparison["metrics"] if row["metric"] == "auc"]
    assert auc["difference"] == pytest.approx(0.01)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A Parquet log of 40 impressions."""
    path = tmp_path / "log.parquet"
    rows = range(40)
    columns = {"user_id": [i % 7 for i in rows], "price": [float(i) for i in rows], "click": [i % 2 for i in rows]}
    pq.write_table(pa.table(columns), path)
    return path


def test_schema_is_printed_or_written_and_reads_back(log, tmp_path, capsys) -> None:
    output = tmp_path / "schema.yaml"
    assert main(["schema", str(log), "--label", "click"]) == 0
    printed = capsys.readouterr().out
    assert main(["schema", str(log), "--label", "click", "--output", str(output)]) == 0
    assert capsys.readouterr().out == ""
    assert output.read_text() == printed
    assert FeatureSchema.load(output).tasks == ("click",)


def test_an_edited_schema_is_not_overwritten(log, tmp_path, capsys) -> None:
    output = tmp_path / "schema.yaml"
    output.write_text("edited")
    assert main(["schema", str(log), "--output", str(output)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {output} exists already\n  hint: ")
    assert output.read_text() == "edited"


def test_data_check_exits_with_1_on_an_error_in_the_data(log, tmp_path, capsys) -> None:
    schema = tmp_path / "schema.yaml"
    main(["schema", str(log), "--label", "click", "--output", str(schema)])
    assert main(["data", "check", str(log), "--schema", str(schema)]) == 0
    assert "user_id" in capsys.readouterr().out
    table = pq.read_table(log)
    broken = table.set_column(table.column_names.index("click"), "click", pa.array([i % 3 for i in range(40)]))
    pq.write_table(broken, log)
    assert main(["data", "check", str(log), "--schema", str(schema)]) == 1
    assert "click" in capsys.readouterr().out
