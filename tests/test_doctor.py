from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from raysys import doctor
from raysys.doctor import Finding, Probe, check_gpu, check_pins, check_stack, render, run_probe

ROOT = Path(__file__).parent.parent
CPU = {
    "torch": "2.13.0+cpu",
    "fbgemm-gpu": "1.8.0+cpu",
    "fbgemm-gpu-cpu": "1.8.0",
    "torchrec": "1.8.0",
    "ray": "2.60.0",
}
CUDA = {"torch": "2.13.0", "fbgemm-gpu": "1.8.0", "torchrec": "1.8.0", "ray": "2.60.0"}
RUNS = {
    "torch": Probe({"cuda": None, "gpus": []}),
    "fbgemm": Probe({"device": "cpu"}),
    "torchrec": Probe(),
    "ray": Probe(),
}
ON_GPU = RUNS | {"torch": Probe({"cuda": "13.0", "gpus": ["H100"]}), "fbgemm": Probe({"device": "cuda"})}


def stack(versions: dict[str, str], probes: dict[str, Probe] = RUNS, gpus: tuple[str, ...] = ()) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_stack(versions, probes, gpus)}


def wrong(findings: dict[str, Finding]) -> dict[str, str]:
    return {finding.name: finding.mend for finding in findings.values() if finding.mend}


def test_a_sound_cpu_stack() -> None:
    findings = stack(CPU)
    assert wrong(findings) == {}
    assert findings["torch"].value == "2.13.0+cpu, CPU build"
    assert findings["fbgemm-gpu-cpu"].value == "1.8.0, CPU build, its operators run on cpu"
    assert findings["versions"].value == "torch 2.13, fbgemm 1.8 and torchrec 1.8 go together"


def test_a_sound_cuda_stack() -> None:
    findings = stack(CUDA, ON_GPU, ("GPU 0: H100",))
    assert wrong(findings) == {}
    assert findings["torch"].value == "2.13.0, CUDA 13.0 build"
    assert findings["fbgemm-gpu"].value == "1.8.0, CUDA build, its operators run on cuda"


@pytest.mark.parametrize(
    ("torch", "fbgemm", "torchrec", "pair"),
    [
        ("2.13.0+cpu", "1.6.0", "1.8.0", "torch 2.13 goes with fbgemm 1.8 and torchrec 1.8"),
        ("2.13.0+cpu", "1.8.0", "1.6.1", "torch 2.13 goes with fbgemm 1.8 and torchrec 1.8"),
        ("2.14.1+cpu", "1.8.0", "1.8.0", "torch 2.14 goes with fbgemm 1.9 and torchrec 1.9"),
        ("2.11.0+cpu", "1.8.0", "1.8.0", "torch 2.11 goes with fbgemm 1.6 and torchrec 1.6"),
    ],
)
def test_a_mismatch_is_named_with_the_pair_that_goes_together(torch, fbgemm, torchrec, pair) -> None:
    broken = RUNS | {"fbgemm": Probe(error="OSError: libx.so: undefined symbol: _ZN5torch")}
    findings = stack(CPU | {"torch": torch, "fbgemm-gpu-cpu": fbgemm, "torchrec": torchrec}, broken)
    assert (
        findings["versions"].value == f"torch {torch}, fbgemm-gpu-cpu {fbgemm}, torchrec {torchrec} do not go together"
    )
    assert (findings["versions"].mend or "").startswith(pair)
    assert "pip install 'torch==" in (findings["versions"].mend or "")
    assert findings["fbgemm-gpu-cpu"].mend == "mend the versions above first"
    assert "undefined symbol" in findings["fbgemm-gpu-cpu"].value


def test_the_gpu_machines_older_stack_goes_together_too() -> None:
    older = {"torch": "2.11.0+cu130", "fbgemm-gpu": "1.6.0", "torchrec": "1.6.1", "ray": "2.60.0"}
    assert wrong(stack(older, ON_GPU, ("GPU 0: H100",))) == {}


def test_an_unknown_torch_is_wrong() -> None:
    assert "torch 2.4 is not known" in wrong(stack(CPU | {"torch": "2.4.0"}))["versions"]


def test_missing_packages_name_the_version_that_fits() -> None:
    findings = stack({"torch": "2.13.0+cpu"}, {"torch": RUNS["torch"]})
    assert findings["fbgemm-gpu"].value == findings["torchrec"].value == "not installed"
    assert "pip install 'fbgemm-gpu==1.8.*'" in wrong(findings)["fbgemm-gpu"]
    assert "pip install 'torchrec==1.8.*'" in wrong(findings)["torchrec"]
    assert set(wrong(findings)) == {"fbgemm-gpu", "torchrec", "ray"}
    assert set(wrong(stack({}, {}))) == {"torch", "fbgemm-gpu", "torchrec", "ray"}


def test_a_broken_package_is_mended_before_those_that_need_it() -> None:
    crash = Probe(error="ended the process with SIGSEGV")
    findings = wrong(stack(CPU, RUNS | {"fbgemm": crash, "torchrec": crash}))
    assert findings["fbgemm-gpu-cpu"].startswith("install it again")
    assert findings["torchrec"] == "mend fbgemm-gpu-cpu first"


def test_a_cuda_build_without_cuda_is_named() -> None:
    missing = Probe(error="OSError: libtorch_cuda.so: cannot open shared object file: No such file or directory")
    findings = wrong(stack(CUDA, RUNS | {"fbgemm": missing}))
    assert findings["fbgemm-gpu"].endswith("`RAYSYS_ACCELERATOR=cpu make setup`")


def test_two_builds_of_fbgemm_are_wrong() -> None:
    assert "overwrite each other" in wrong(stack(CPU | {"fbgemm-gpu": "1.8.0"}))["fbgemm builds"]


def test_a_gpu_that_the_builds_cannot_use_is_named() -> None:
    gpus = ("GPU 0: H100",)
    (cpu_torch,) = check_gpu(RUNS["torch"], gpus, fbgemm_cpu=True)
    assert "torch is a CPU build: `RAYSYS_ACCELERATOR=cuda make setup`" in (cpu_torch.mend or "")
    (driver,) = check_gpu(Probe({"cuda": "13.0", "gpus": []}), gpus, fbgemm_cpu=False)
    assert "update the NVIDIA driver to one for CUDA 13.0" in (driver.mend or "")
    (cpu_fbgemm,) = check_gpu(ON_GPU["torch"], gpus, fbgemm_cpu=True)
    assert "fbgemm is a CPU build" in (cpu_fbgemm.mend or "")
    (sound,) = check_gpu(ON_GPU["torch"], gpus, fbgemm_cpu=False)
    assert (sound.value, sound.mend) == ("GPU 0: H100", None)


# Probes


def test_probe_survives_a_crash_and_names_the_signal() -> None:
    assert (
        run_probe("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").error == "ended the process with SIGSEGV"
    )


def test_probe_has_a_time_limit() -> None:
    assert run_probe("import time; time.sleep(60)", seconds=0.5).error == "gave no answer within 0.5 s"


def test_probe_names_the_cause_not_the_last_line() -> None:
    code = """
try:
    raise OSError("libx.so: undefined symbol: _ZN")
except OSError as error:
    raise RuntimeError("could not load") from error
"""
    assert run_probe(code).error == "OSError: libx.so: undefined symbol: _ZN"
    assert run_probe("raise RuntimeError('no cause')").error == "RuntimeError: no cause"


def test_probe_reads_the_last_line_of_output() -> None:
    assert run_probe("print('a warning'); print('{\"cuda\": null}')") == Probe({"cuda": None})


# Pins


def test_missing_pins_are_wrong_and_other_versions_are_named(monkeypatch) -> None:
    requires = [
        "torch==2.13.0",
        "ray[train,tune]==2.60.0",
        "numpy==2.4.6; python_version >= '3.11'",
        "numpy==2.2.6; python_version < '3.11'",
        "pyyaml==6.0.3",
        "pytest==9.2.0; extra == 'dev'",
    ]
    installed = {"numpy": "2.2.6", "pyyaml": "6.0.3"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    monkeypatch.setattr(metadata, "version", version)
    assert check_pins() == [Finding("stack", "pins", "4 direct dependencies as pinned")]
    installed["numpy"] = "2.3.0"
    assert check_pins() == [Finding("stack", "pins", "numpy 2.3.0 (pinned: 2.2.6 or 2.4.6)")]
    del installed["pyyaml"]
    (finding,) = check_pins()
    assert (finding.value, finding.mend is None) == ("not installed: pyyaml", False)


# The report

FINDINGS = [Finding("stack", "torch", "2.13.0"), Finding("machine", "disk", "1 GiB free here", "free some")]


def test_report_says_how_to_mend_right_below_what_is_wrong() -> None:
    assert render(FINDINGS) == (
        "stack\n  ok  torch             2.13.0\n\nmachine\n  !!  disk              1 GiB free here\n"
        "                        -> free some\n\n1 to mend"
    )


@pytest.mark.parametrize("with_rich", [True, False])
def test_report_is_the_same_text_without_rich(with_rich, monkeypatch, capsys) -> None:
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    doctor.show(FINDINGS)
    assert capsys.readouterr().out == render(FINDINGS) + "\n"


def test_exit_status_and_json(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: FINDINGS)
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    disk = {"section": "machine", "name": "disk", "value": "1 GiB free here", "mend": "free some"}
    assert (report["ok"], report["findings"][1]) == (False, disk)
    monkeypatch.setattr(doctor, "diagnose", lambda: FINDINGS[:1])
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.endswith("everything is fine\n")


def test_doctor_runs_where_nothing_is_installed() -> None:
    # -S: an interpreter without site-packages
    command = [sys.executable, "-S", "-m", "raysys.doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": "", "HOME": "/nonexistent"}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["torch"]["value"] == findings["ray"]["value"] == "not installed"


def test_this_environment_runs() -> None:
    findings = {finding.name: finding for finding in doctor.diagnose() if finding.section == "stack"}
    assert wrong(findings) == {}
    assert any("its operators run on" in finding.value for finding in findings.values())
