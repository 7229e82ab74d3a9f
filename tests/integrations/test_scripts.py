"""docs/examples/script and cron: short programs and their exit codes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from tests.integrations.example import NO_BROKER, PYTHON, Example
from tests.patience import DELAY, wait_until, within

IMPORT = (*PYTHON, "import_users.py", "users.csv")
CLOSE = (*PYTHON, "close_day.py")


def test_a_script_has_published_all_events_when_it_ends(example: Callable[[str], Example], url: str) -> None:
    importer = example("script")
    with importer.audit(url) as audit:
        done = importer.run(*IMPORT, url=url)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "3 users: all confirmed by the broker.\n"
        for number, email in enumerate(("a@example.com", "b@example.com", "c@example.com"), start=1):
            line = f'user.imported from importer: {{"email": "{email}", "user_id": {number}}}'
            wait_until(lambda line=line: line in audit.output, line)  # type: ignore[misc]


def test_a_script_without_a_broker_fails_with_the_reason(example: Callable[[str], Example]) -> None:
    done = example("script").run(*IMPORT, url=NO_BROKER)
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_a_successful_cron_job_prints_nothing(example: Callable[[str], Example], url: str) -> None:
    accounting = example("cron")
    with accounting.audit(url) as audit:
        done = accounting.run(*CLOSE, "2026-05-04", url=url)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        audit.wait_for(r'day.closed from accounting: {"day": "2026-05-04"}')
        days = {(datetime.now(UTC) - timedelta(days=1)).date()}  # at midnight, two days are possible
        assert accounting.run(*CLOSE, url=url).returncode == 0
        days.add((datetime.now(UTC) - timedelta(days=1)).date())
        assert audit.wait_for(r'day.closed .*{"day": "(.+)"}')[1] in map(str, days)


def test_a_cron_job_reports_an_event_without_a_queue(example: Callable[[str], Example], url: str) -> None:
    done = example("cron").run(*CLOSE, "2026-05-04", url=url)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "close_day 2026-05-04: confirmed, but not routed: no queue is bound.\n"


def test_a_cron_job_without_a_broker_ends_in_time_with_its_exit_code(example: Callable[[str], Example]) -> None:
    with within(5 + DELAY):  # a process starts, too
        done = example("cron").run(*CLOSE, "2026-05-04", url=NO_BROKER)
    assert (done.returncode, done.stdout) == (os.EX_TEMPFAIL, "")
    last = done.stderr.splitlines()[-1]  # after the log of the first connection attempt
    assert re.match(r"close_day 2026-05-04: event 'day.closed' .* was not sent within 5 s.*127.0.0.1:1", last)
    assert "Traceback" not in done.stderr


def test_the_crontab_line_retries(example: Callable[[str], Example], tmp_path: os.PathLike[str]) -> None:
    """The command with another folder, interpreter and pause: the first attempt fails, the second succeeds."""
    accounting = example("cron")
    line = next(line for line in (accounting.folder / "crontab").read_text().splitlines() if "close_day" in line)
    command = line.split(maxsplit=5)[5]
    assert command.startswith("cd /srv/accounting && .venv/bin/python close_day.py || { sleep 600;")
    command = command.replace("/srv/accounting", ".").replace(".venv/bin/python close_day.py", "./attempt")
    attempt = accounting.folder / "attempt"
    attempt.write_text('#!/bin/sh\necho "$1" >> attempts\n[ "$(wc -l < attempts)" = 2 ] || exit 75\n')
    attempt.chmod(0o755)
    done = accounting.run("/bin/sh", "-c", command.replace("sleep 600", "sleep 0"), url=NO_BROKER)
    assert done.returncode == 0, done.stderr
    assert len((accounting.folder / "attempts").read_text().splitlines()) == 2
