from __future__ import annotations

import math

import pytest

from raysys.report import format as f
from raysys.report.format import ABSENT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f.number(0.79634), "0.7963"), (f.number(None), ABSENT), (f.number(math.nan), ABSENT), (f.number(0.00001), "1.00e-05"), (f.number(0), "0.0000"),
        (f.compact(999), "999"), (f.compact(999.7), "1.00k"), (f.compact(10_187.0), "10.2k"), (f.compact(1.5e9), "1.50G"), (f.compact(None), ABSENT),
        (f.size(512), "512 B"), (f.size(912_000_000), "869.8 MiB"), (f.size(1024**4 * 5), "5.0 TiB"),
        (f.duration(0.0042), "4.2 ms"), (f.duration(59.96), "1m 00s"), (f.duration(3599.6), "1h 00m"), (f.duration(200_000), "2d 07h"), (f.duration(0), "0s"),
        (f.share(0.1234), "12.3%"), (f.count(1234567.2), "1,234,567"), (f.metric_title("log_loss"), "Log loss"), (f.metric_title("mine"), "mine"),
        (f.moment(1_700_000_000), "2023-11-14 22:13 UTC"),
    ],
)  # fmt: skip
def test_figures_as_text(text, expected):
    assert text == expected


def test_a_timestamp_may_be_a_number_or_iso_text():
    assert f.timestamp(12.5) == 12.5
    assert f.timestamp(None) is None
    assert f.timestamp("2023-11-14T22:13:20Z") == 1_700_000_000
    assert f.timestamp("2023-11-14T22:13:20") == 1_700_000_000
    assert f.timestamp("2023-11-14T23:13:20+01:00") == 1_700_000_000


def test_names_in_order():
    assert f.in_order(["b", "test", "valid"], f.SPLITS) == ["valid", "test", "b"]
