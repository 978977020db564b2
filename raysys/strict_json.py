"""Values as strict JSON can hold them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def to_plain(value: Any) -> Any:
    """Arrays and tensors as lists, NaN and infinities as None (JSON has neither), keys and paths as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, and tensors
        return to_plain(value.tolist())
    raise TypeError(f"JSON cannot hold {type(value).__name__}: {value!r}")
