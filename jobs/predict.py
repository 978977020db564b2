"""Score a log with a trained run: `python jobs/predict.py run=runs/X input=LOG.csv output=scores trainer=ray`."""

from __future__ import annotations

from pathlib import Path

from raysys.config import Config, run_job
from raysys.train.predict import predict


def main(config: Config) -> None:
    """Write a folder of Parquet files, one a worker, with a probability per row and task."""
    checkpoint = Path(config["checkpoint"]) if config["checkpoint"] else None
    output = Path(config["output"])
    rows = predict(Path(config["run"]), config["input"], output, config["trainer"], checkpoint)
    print(f"{rows:,} rows scored: {output}")


if __name__ == "__main__":
    run_job(main, "predict", __doc__)
