"""The log: everything in order after a reopening, torn ends cut off, damage named, states in the place of logs."""

from __future__ import annotations

import os

import numpy as np
import pytest

from raysys.errors import UserError
from raysys.serve.bandit.journal import Journal, Record


def record(number):
    return Record("entry", {"number": number, "text": "ä"}, {"a": np.arange(number), "b": np.zeros((0, 4))})


def numbers(folder):
    journal = Journal(folder)
    found = list(journal.records())
    journal.close()
    for entry in found:
        assert entry.facts["text"] == "ä"
        assert entry.arrays["a"].tolist() == list(range(entry.facts["number"]))
        assert entry.arrays["b"].shape == (0, 4)
    return [entry.facts["number"] for entry in found]


def write(folder, entries, compact_after=None):
    journal = Journal(folder)
    list(journal.records())
    for number in entries:
        journal.append(record(number))
        if number == compact_after:
            journal.compact(record(100 + number))
    journal.close()


def test_records_are_read_in_their_order(tmp_path):
    write(tmp_path, range(5))
    write(tmp_path, [5, 6])
    assert numbers(tmp_path) == [0, 1, 2, 3, 4, 5, 6]


def test_a_state_stands_for_what_was_before(tmp_path):
    write(tmp_path, range(5), compact_after=3)
    assert numbers(tmp_path) == [103, 4]
    write(tmp_path, [5], compact_after=5)
    assert numbers(tmp_path) == [105]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002.log", "00000002.state", "lock"]


def test_a_torn_end_is_cut_off_at_every_byte(tmp_path):
    write(tmp_path, [3, 4])
    log = tmp_path / "00000000.log"
    content = log.read_bytes()
    first = content.index(b'"number": 4')  # somewhere within the second record
    assert numbers(tmp_path) == [3, 4]
    for end in range(first - 200, len(content), 7):
        log.write_bytes(content[:end])
        found = numbers(tmp_path)
        assert found in ([3], [])
        write(tmp_path, [9])  # appended where the torn record began
        assert numbers(tmp_path) == [*found, 9]


def test_a_last_record_with_pages_that_were_not_written_is_torn(tmp_path):
    write(tmp_path, [3, 4])
    log = tmp_path / "00000000.log"
    content = bytearray(log.read_bytes())
    content[-20:-10] = bytes(10)
    log.write_bytes(content)
    assert numbers(tmp_path) == [3]


def test_damage_before_the_end_is_an_error(tmp_path):
    write(tmp_path, [3, 4])
    log = tmp_path / "00000000.log"
    content = bytearray(log.read_bytes())
    content[30] ^= 1
    log.write_bytes(content)
    with pytest.raises(UserError, match=r"00000000.log is damaged at byte 0"):
        numbers(tmp_path)


def test_a_damaged_state_is_an_error(tmp_path):
    write(tmp_path, [3], compact_after=3)
    state = tmp_path / "00000001.state"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00000001.state is damaged"):
        numbers(tmp_path)


def test_a_crash_while_compacting_leaves_the_log_before_or_the_state(tmp_path):
    write(tmp_path, range(4))
    (tmp_path / "00000001.tmp").write_bytes(b"half a state")
    assert numbers(tmp_path) == [0, 1, 2, 3]
    write(tmp_path, [4], compact_after=4)
    os.unlink(tmp_path / "00000001.log")  # renamed, and no new log yet
    assert numbers(tmp_path) == [104]


def test_one_process_appends(tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(UserError, match="another process appends to this log"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()
