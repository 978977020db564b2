"""What goes into JSON is strict JSON, whatever numbers it held."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from raysys.strict_json import to_plain


def test_numbers_arrays_and_paths_become_plain():
    content = {
        1: (float("nan"), float("-inf"), 2.5),
        "array": np.array([[1.0, np.nan]]),
        "tensor": torch.tensor([3, 4]),
        "scalar": np.float32(0.5),
        "path": Path("a/b"),
        "flag": True,
        "none": None,
    }
    plain = to_plain(content)
    assert plain == {
        "1": [None, None, 2.5],
        "array": [[1.0, None]],
        "tensor": [3, 4],
        "scalar": 0.5,
        "path": "a/b",
        "flag": True,
        "none": None,
    }
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_what_json_cannot_hold_is_named():
    with pytest.raises(TypeError, match="JSON cannot hold set"):
        to_plain({"a": [{1}]})
