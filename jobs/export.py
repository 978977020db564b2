"""Export a bundle for serving from a trained run: `python jobs/export.py run=runs/X`."""

from __future__ import annotations

from pathlib import Path

from raysys.config import Config, run_job
from raysys.train.export import export_run


def main(config: Config) -> None:
    """Write the bundle and say where it is."""
    paths = {key: Path(config[key]) if config[key] else None for key in ("checkpoint", "output", "artifacts")}
    print(f"bundle: {export_run(Path(config['run']), quantize=config['quantize'], **paths)}")


if __name__ == "__main__":
    run_job(main, "export", __doc__)
