from __future__ import annotations

from pathlib import Path

import pytest

from raysys.data.synthetic import prepare


@pytest.fixture(scope="session")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "one"
    prepare(folder, rows=90_000, processes=1)
    return folder
