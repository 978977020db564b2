"""Set up `.venv` with the pinned stack: `make setup` runs this with the system's python3. Standard library only.

torchrec requires the distribution `fbgemm-gpu`, a CUDA wheel. A machine without CUDA gets `fbgemm-gpu-cpu`, the same module,
and a local `fbgemm-gpu` that holds nothing but that requirement, so that `pip check` is clean on both.

Environment: RAYSYS_ACCELERATOR=cpu|cuda overrides what is found out; RAYSYS_PYTHON names the interpreter to use.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "raysys-setup.json"
INPUTS = ("pyproject.toml", "constraints.txt", "jobs/install.py")
GPU_DEVICE = Path("/dev/nvidia0")
FBGEMM = "1.8.0"
PYTHONS = ("3.11", "3.12", "3.13", "3.14", "3.10")  # best first: 3.11 is what the pins were tested with most
PROBE = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"


class SetupError(Exception):
    """Something the user can mend; printed as one line with a hint."""


def find_python() -> str:
    """The best interpreter that can make a virtual environment: RAYSYS_PYTHON, else the first of PYTHONS on PATH."""
    wanted = os.environ.get("RAYSYS_PYTHON")
    if wanted:
        if python_version(wanted) not in PYTHONS:
            raise SetupError(f"RAYSYS_PYTHON={wanted} is no Python {' / '.join(PYTHONS)} with venv and ensurepip")
        return wanted
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    names = [f"python{version}" for version in PYTHONS] + ["python3"]
    candidates = [shutil.which(name, path=folder) for name in names for folder in folders]
    found: dict[str, str] = {}
    for candidate in filter(None, [*candidates, sys.executable]):
        version = python_version(candidate)
        if version == PYTHONS[0]:
            return candidate
        found.setdefault(version, candidate)
    for version in PYTHONS:
        if version in found:
            return found[version]
    raise SetupError(
        f"no Python {' / '.join(sorted(PYTHONS, key=lambda v: int(v[2:])))} with venv and ensurepip on PATH\n"
        "  hint: install one (on Debian and Ubuntu also python3-venv), or name one: RAYSYS_PYTHON=/path/to/python3.11"
    )


def python_version(python: str) -> str:
    """`3.11` for a usable interpreter; empty where it does not start (a pyenv shim, say) or cannot make a venv."""
    try:
        done = subprocess.run([python, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode().strip() if done.returncode == 0 else ""


def find_accelerator() -> str:
    """`cuda` where a GPU answers, else `cpu`; RAYSYS_ACCELERATOR overrides."""
    wanted = os.environ.get("RAYSYS_ACCELERATOR", "")
    if wanted:
        if wanted not in ("cpu", "cuda"):
            raise SetupError(f"RAYSYS_ACCELERATOR={wanted!r} must be cpu or cuda")
        return wanted
    if GPU_DEVICE.exists():
        return "cuda"
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if listed.returncode == 0 and b"GPU 0" in listed.stdout else "cpu"


def fingerprint(accelerator: str) -> str:
    """What the environment was made of: the pins, this script, the accelerator and the place (an editable install is absolute)."""
    digest = hashlib.sha256(f"{accelerator}\n{ROOT}\n".encode())
    for name in INPUTS:
        path = ROOT / name
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def read_stamp() -> dict[str, str]:
    """What is known of `.venv`: accelerator, and the fingerprint once it is complete. Empty where it is not ours."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(accelerator: str, complete: str) -> None:
    """Replace the stamp in one step; `complete` is empty while packages are being installed."""
    part = STAMP.with_suffix(".part")
    part.write_text(json.dumps({"accelerator": accelerator, "complete": complete}) + "\n")
    part.replace(STAMP)


def make_venv(venv: Path, python: str) -> Path:
    """Create the environment and return its interpreter."""
    run([python, "-m", "venv", str(venv)], "could not create the virtual environment")
    return venv / "bin" / "python"


def write_shim(folder: Path) -> Path:
    """A wheel named fbgemm-gpu without modules that requires fbgemm-gpu-cpu of the same version."""
    version = f"{FBGEMM}+cpu"
    info = f"fbgemm_gpu-{version}.dist-info"
    requires = f"Requires-Dist: fbgemm-gpu-cpu=={FBGEMM}"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: fbgemm-gpu\nVersion: {version}\n{requires}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: raysys\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(text.encode())}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    wheel = folder / f"fbgemm_gpu-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def install(python: Path, accelerator: str, *options: str) -> None:
    """One pip call for everything, so that pip sees every requirement at once; then `pip check`."""
    with tempfile.TemporaryDirectory() as folder:
        fbgemm = f"fbgemm-gpu=={FBGEMM}" if accelerator == "cuda" else str(write_shim(Path(folder)))
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        command = [*pip, "install", "-qq", *options, fbgemm, "--editable", f"{ROOT}[dev]"]
        run(command, "pip could not install the pinned stack (its own words stand above); the same command tries again")
        run([*pip, "check"], "pip check found packages that do not go together", quiet=True)


def run(command: list[str], failure: str, quiet: bool = False) -> None:
    """Run a command; where it fails, `failure` is the error. `quiet` shows its output only then."""
    done = subprocess.run(command, stdout=subprocess.PIPE if quiet else None, cwd=ROOT)
    if done.returncode:
        sys.stdout.write((done.stdout or b"").decode())
        raise SetupError(failure)


def setup() -> None:
    """Bring `.venv` to what pyproject.toml says; nothing is done where it is already."""
    accelerator = find_accelerator()
    wanted = fingerprint(accelerator)
    stamp = read_stamp()
    if stamp.get("complete") == wanted and python_version(str(VENV / "bin" / "python")):
        return
    if VENV.exists() and not stamp:
        raise SetupError(f"{VENV} was not made by this script\n  hint: move or delete it, then try again")
    usable = stamp.get("complete") and stamp["accelerator"] == accelerator and python_version(f"{VENV}/bin/python")
    if not usable:  # new, interrupted, or the other build of fbgemm, which pip would take for the same version
        python = find_python()
        print(f"creating .venv with {python}", flush=True)
        if VENV.exists():
            shutil.rmtree(VENV)
        VENV.mkdir()
        write_stamp(accelerator, complete="")
        make_venv(VENV, python)
    write_stamp(accelerator, complete="")
    size = "2 GB on disk, 2 to 5 minutes" if accelerator == "cpu" else "8 GB on disk, 5 to 15 minutes"
    print(f"installing the pinned stack for {accelerator} (about {size})", flush=True)
    install(VENV / "bin" / "python", accelerator, "--constraint", "constraints.txt")
    write_stamp(accelerator, complete=wanted)
    print("set up; `.venv/bin/raysys doctor` tells about this machine", flush=True)


LOCK_HEADER = """\
# The releases of everything that the direct dependencies (pinned in pyproject.toml) bring along, written by `make lock`.
# Left out: torch's own parts (fbgemm, nvidia-*, triton), which torch pins and which differ between CPU and CUDA.
"""
LISTING = """
import importlib.metadata as m, json
print(json.dumps([(d.name, d.version, d.metadata.get("Requires-Python") or "") for d in m.distributions()]))
print(json.dumps(m.requires("raysys")))
"""


def lock() -> None:
    """Resolve anew without constraints, in a temporary environment, and write constraints.txt."""
    with tempfile.TemporaryDirectory() as folder:
        python = make_venv(Path(folder) / "venv", find_python())
        install(python, "cpu")
        listing, requires = map(json.loads, subprocess.check_output([str(python), "-c", LISTING]).splitlines())
    (ROOT / "constraints.txt").write_text(LOCK_HEADER + constraints(listing, requires))


def constraints(listing: list[list[str]], requires: list[str]) -> str:
    """One pin a line, sorted; a release that needs a newer Python than ours binds only where it can be installed.

    listing: (name, version, Requires-Python) of what is installed; requires: the direct requirements, left out.
    """
    left_out = {canonical(re.split(r"[^\w.-]", line)[0]) for line in requires} | {"pip", "raysys", "triton"}
    lines = []
    for name, version, requires_python in listing:
        name = canonical(name)
        if name in left_out or name.startswith(("fbgemm", "nvidia-", "cuda-")):
            continue
        least = re.search(r">=\s*(3\.\d+)", requires_python)
        newer = least is not None and int(least.group(1)[2:]) > 10
        lines.append(f"{name}=={version}" + (f' ; python_version >= "{least.group(1)}"' if least and newer else ""))
    return "\n".join(sorted(lines)) + "\n"


def canonical(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    """Exit status 0 when `.venv` is complete, 1 after an error, 130 after Ctrl-C (the next call starts over)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lock", action="store_true", help="write constraints.txt from a fresh resolution")
    arguments = parser.parse_args()
    try:
        if arguments.lock:
            lock()
        else:
            setup()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the next call starts over", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
