"""What tests of jobs/ share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture(scope="module")
def jobs() -> Iterator[Callable[[str], ModuleType]]:
    """Import a file of jobs/, which a script has on its path and a test has not."""
    sys.path.insert(0, str(JOBS))
    yield importlib.import_module
    sys.path.remove(str(JOBS))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Benches set the number of threads of their process; here it is that of all tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
