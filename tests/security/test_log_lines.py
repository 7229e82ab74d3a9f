"""No text of another program can look like a separate record in a worker's log."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import datetime

import pytest

from lightbus.cli.logs import JSONLines, Lines

FORGED = "2026-05-04 10:20:30.123 ERROR    the database was deleted"
BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\x1b[2K\n", "\n\n"]
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ +")


def record(text: str, *, name: str = "lightbus") -> logging.LogRecord:
    """The log record of a failure with this message, with its traceback."""
    try:
        raise ValueError(text)
    except ValueError as error:
        return logging.LogRecord(name, logging.WARNING, "", 0, "failed: %s", (error,), sys.exc_info())


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("colour", [False, True])
def test_only_the_first_line_of_a_record_begins_like_one(broken: str, colour: bool) -> None:
    for one in (record(f"x{broken}{FORGED}"), record(FORGED, name=f"x{broken}{FORGED}")):
        first, *others = Lines("[2]", colour).format(one).splitlines()
        assert re.match(r"\d{4}-", first)
        assert others
        assert all(line.startswith("    ") for line in others)


def test_a_traceback_keeps_its_indentation() -> None:
    _, *trace = Lines("", False).format(record("no")).splitlines()
    assert trace[0] == "    Traceback (most recent call last):"
    assert trace[1].startswith('      File "')
    assert trace[-1] == "    ValueError: no"


@pytest.mark.parametrize("broken", BREAKS)
def test_in_json_a_record_is_one_line(broken: str) -> None:
    line = JSONLines("[2]").format(record(f"x{broken}{FORGED}"))
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    read = json.loads(line)
    assert read["message"] == f"failed: x{broken}{FORGED}"
    assert datetime.fromisoformat(read["time"])


def test_a_line_that_starts_with_a_time_is_a_record() -> None:
    assert RECORD.match(Lines("", False).format(record("no")))
