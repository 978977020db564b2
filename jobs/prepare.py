"""Prepare a data set, which training does by itself where it is missing: `python jobs/prepare.py data=movielens`."""

from __future__ import annotations

from raysys.config import Config, instantiate, run_job, validate
from raysys.errors import UserError
from raysys.train.settings import DataSettings


def main(config: Config) -> None:
    """Write train, valid and test splits and their schema; a data set that is there already is left alone."""
    data = validate(DataSettings, config["data"], "data")
    if not data.prepare:
        raise UserError(f"{data.folder}: this data set has nothing to prepare", "it is used as it is")
    instantiate(data.prepare)


if __name__ == "__main__":
    run_job(main, "prepare", __doc__)
