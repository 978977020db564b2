"""`raysys doctor`: what this machine and its packages are, and for each thing that is wrong one line that says how to mend it.

Runs where torch, torchrec, fbgemm or Ray are broken or missing: nothing of them is imported here, each is run once in a
process of its own, since a wrong build of fbgemm can end the process that loads it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from raysys.machine import Finding, check_machine, check_ray

# torch → fbgemm and torchrec, by minor version; fbgemm's release notes have the table.
TOGETHER = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8", "2.14": "1.9"}
STACK = ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec", "ray")

PROBES = {
    "torch": """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"cuda": torch.version.cuda, "gpus": gpus}))
""",
    "fbgemm": """
import json, torch, fbgemm_gpu
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
assert offsets.tolist() == [0, 1, 3], offsets
gpu = torch.cuda.is_available() and bool(torch.version.cuda)
place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
tables = SplitTableBatchedEmbeddingBagsCodegen([(8, 4, *place)])
device = "cuda" if gpu else "cpu"
out = tables(torch.tensor([1, 2, 3], device=device), offsets.to(device))
assert out.shape == (2, 4), out.shape
print(json.dumps({"device": device}))
""",
    "torchrec": """
import json, torch, torchrec
table = torchrec.EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=8, feature_names=["f"])
ids = torchrec.KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([1, 2, 3]), torch.tensor([1, 2]))
assert torchrec.EmbeddingBagCollection(tables=[table])(ids).values().shape == (2, 4)
print(json.dumps({}))
""",
    "ray": "import json, ray, ray.train; print(json.dumps({}))",
}


@dataclass(frozen=True)
class Probe:
    """What one package said when it was run: its answers, or in `error` one line on how it failed."""

    answers: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def run_probe(code: str, seconds: float = 120.0) -> Probe:
    """Run Python code in a process of its own; its last line of output is a JSON object."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Probe(error=f"gave no answer within {seconds:g} s")
    if done.returncode < 0:
        return Probe(error=f"ended the process with {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        causes = [line for line in lines if re.search("undefined symbol|cannot open shared object", line)]
        return Probe(error=[f"ended with exit status {done.returncode}", *lines, *causes][-1][:160])
    return Probe(answers=json.loads(done.stdout.splitlines()[-1]))


def installed_versions() -> dict[str, str]:
    """The version of each distribution of the stack that is installed."""
    found = {}
    for name in STACK:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def list_gpus() -> list[str]:
    """The GPUs that the NVIDIA driver knows, whether or not torch can use them."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.startswith("GPU ")] if done.returncode == 0 else []


def minor(version: str) -> str:
    """`2.13` of `2.13.0+cpu`."""
    return ".".join(version.split("+")[0].split(".")[:2])


def check_stack(versions: Mapping[str, str], probes: Mapping[str, Probe], gpus: Sequence[str]) -> list[Finding]:
    """torch, fbgemm, torchrec and Ray: present, going together, and able to run."""
    fbgemm_cpu = "fbgemm-gpu-cpu" in versions
    fbgemm_cuda = "fbgemm-gpu" in versions and not versions["fbgemm-gpu"].endswith("+cpu")
    fbgemm = "fbgemm-gpu-cpu" if fbgemm_cpu else "fbgemm-gpu"
    findings = [Finding("stack", "python", platform.python_version())]
    together = check_together(versions, fbgemm)
    findings += [together] if together else []
    mend_first = "the versions above" if together and together.mend else None
    for package, distribution in (("torch", "torch"), ("fbgemm", fbgemm), ("torchrec", "torchrec"), ("ray", "ray")):
        if distribution not in versions:
            findings.append(Finding("stack", distribution, "not installed", install_hint(versions, distribution)))
            continue
        value, probe, mend = versions[distribution], probes[package], None
        if probe.error:
            value += f", does not run: {probe.error}"
            first = None if package == "ray" else mend_first
            mend = f"mend {first} first" if first else broken_hint(versions, distribution, probe.error)
            mend_first = mend_first or distribution
        elif package == "torch":
            value += f", CUDA {probe.answers['cuda']} build" if probe.answers["cuda"] else ", CPU build"
        elif package == "fbgemm":
            value += f", {'CPU' if fbgemm_cpu else 'CUDA'} build, its operators run on {probe.answers['device']}"
        findings.append(Finding("stack", distribution, value, mend))
    if fbgemm_cpu and fbgemm_cuda:
        mend = "two builds of one module overwrite each other: delete .venv, then `make setup`"
        findings.append(Finding("stack", "fbgemm builds", "fbgemm-gpu and fbgemm-gpu-cpu are both installed", mend))
    return findings + check_gpu(probes.get("torch", Probe(error="not installed")), gpus, fbgemm_cpu)


def check_together(versions: Mapping[str, str], fbgemm: str) -> Finding | None:
    """torch, fbgemm and torchrec are compiled for each other, by minor version; None while one of them is missing."""
    if not {"torch", "torchrec", fbgemm} <= set(versions):
        return None
    found = ", ".join(f"{name} {versions[name]}" for name in ("torch", fbgemm, "torchrec"))
    torch = minor(versions["torch"])
    if torch not in TOGETHER:
        pairs = ", ".join(f"{key} with {value}" for key, value in TOGETHER.items())
        return Finding(
            "stack", "versions", found, f"torch {torch} is not known; torch goes with fbgemm and torchrec: {pairs}"
        )
    wanted = TOGETHER[torch]
    if minor(versions[fbgemm]) == minor(versions["torchrec"]) == wanted:
        return Finding("stack", "versions", f"torch {torch}, fbgemm {wanted} and torchrec {wanted} go together")
    mend = (
        f"torch {torch} goes with fbgemm {wanted} and torchrec {wanted}: "
        f"pip install 'torch=={torch}.*' '{fbgemm}=={wanted}.*' 'torchrec=={wanted}.*'"
    )
    return Finding("stack", "versions", f"{found} do not go together", mend)


def install_hint(versions: Mapping[str, str], distribution: str) -> str:
    """How to install one missing package of the stack, in the version that fits the torch that is there."""
    wanted = TOGETHER.get(minor(versions.get("torch", "")))
    if distribution.startswith(("fbgemm", "torchrec")) and wanted:
        return f"`make setup` in a checkout, or pip install '{distribution}=={wanted}.*'"
    return f"`make setup` in a checkout, or pip install the version of {distribution} that pyproject.toml pins"


def broken_hint(versions: Mapping[str, str], distribution: str, error: str) -> str:
    """What to do about a package whose versions are right and that still does not run."""
    if re.search(r"lib\w*(cud|nv)", error):
        return "this is a CUDA build, and CUDA or torch's CUDA build is not there: `RAYSYS_ACCELERATOR=cpu make setup`"
    if "no answer" in error:
        return "the disk or the machine is very slow, or a process hangs: run it again, then `import` it by hand"
    return f"install it again, with what it needs: delete .venv, then `make setup` (now: {distribution} {versions[distribution]})"


def check_gpu(torch: Probe, gpus: Sequence[str], fbgemm_cpu: bool) -> list[Finding]:
    """Whether the installed builds can use the GPUs that the driver knows."""
    if not gpus:
        return [Finding("stack", "GPU", "none")]
    mend = None
    if not torch.error and not torch.answers["cuda"]:
        mend = "torch is a CPU build: `RAYSYS_ACCELERATOR=cuda make setup`, where pip finds a CUDA build"
    elif not torch.error and not torch.answers["gpus"]:
        mend = f"torch finds none: update the NVIDIA driver to one for CUDA {torch.answers['cuda']}, or look at CUDA_VISIBLE_DEVICES"
    elif fbgemm_cpu:
        mend = "fbgemm is a CPU build: `RAYSYS_ACCELERATOR=cuda make setup`"
    return [Finding("stack", "GPU", "; ".join(gpus), mend)]


def check_pins() -> list[Finding]:
    """The other direct dependencies: missing ones are wrong, versions other than the pinned ones are only named."""
    try:
        requirements = metadata.requires("raysys") or []
    except metadata.PackageNotFoundError:
        return [Finding("stack", "pins", "raysys runs from a source tree: not checked")]
    pins: dict[str, set[str]] = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+)(?:\[[^]]*])?==([^;\s]+)", requirement)
        if match and "extra" not in requirement:
            pins.setdefault(match.group(1), set()).add(match.group(2))
    missing, other = [], []
    for name in sorted(set(pins) - set(STACK)):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if version not in pins[name]:
            other.append(f"{name} {version} (pinned: {' or '.join(sorted(pins[name]))})")
    if missing:
        return [Finding("stack", "pins", f"not installed: {', '.join(missing)}", "`make setup`, or pip install them")]
    return [Finding("stack", "pins", "; ".join(other) if other else f"{len(pins)} direct dependencies as pinned")]


def diagnose() -> list[Finding]:
    """Everything, in the order of the report; takes as long as the slowest import (5 to 30 s)."""
    versions = installed_versions()
    fbgemm = {"fbgemm-gpu", "fbgemm-gpu-cpu"} & set(versions)
    present = [name for name in PROBES if name in versions or (name == "fbgemm" and fbgemm)]
    with ThreadPoolExecutor() as pool:
        probes = dict(zip(present, pool.map(run_probe, map(PROBES.__getitem__, present)), strict=True))
    findings = check_stack(versions, probes, list_gpus()) + check_pins()
    return findings + check_machine(os.environ) + check_ray(os.environ, Path.home())


def render(findings: Sequence[Finding]) -> str:
    """The report as plain text: one line a finding, and under a wrong one the line that mends it."""
    lines, section = [], ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section]
        lines.append(f"  {'ok' if finding.mend is None else '!!'}  {finding.name:<18}{finding.value}")
        if finding.mend:
            lines.append(f"      {'':<18}-> {finding.mend}")
    wrong = sum(finding.mend is not None for finding in findings)
    return "\n".join([*lines, "", f"{wrong} to mend" if wrong else "everything is fine"]).lstrip("\n")


def show(findings: Sequence[Finding]) -> None:
    """Print the report, coloured on a terminal where rich is there."""
    text = render(findings)
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        print(text)
        return
    styled = Text(text)
    for pattern, style in ((r"(?m)^  ok", "green"), (r"(?m)^  !!.*$", "red"), (r"(?m)^ +-> .*$", "yellow")):
        styled.highlight_regex(pattern, style)
    styled.highlight_regex(r"(?m)^\w.*$", "bold")
    Console(soft_wrap=True).print(styled)


def run(as_json: bool = False) -> int:
    """Look, print, and return the exit status: 1 if something is wrong."""
    if sys.stderr.isatty():
        print("running torch, fbgemm, torchrec and Ray once each ...", file=sys.stderr)
    findings = diagnose()
    ok = all(finding.mend is None for finding in findings)
    if as_json:
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        show(findings)
    return 0 if ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m raysys.doctor [--json]`."""
    parser = argparse.ArgumentParser(prog="raysys doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return run(parser.parse_args(argv).json)


if __name__ == "__main__":
    sys.exit(main())
