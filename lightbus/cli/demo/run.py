"""One run of the demo, from the first process to the last deleted queue."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from pathlib import Path

from lightbus import errors
from lightbus.cli.demo.counts import Entries, expected, handled
from lightbus.cli.demo.queues import Queues
from lightbus.cli.demo.screen import Row, Screen, show_table
from lightbus.cli.demo.services import LISTENERS, PUBLISHER, Services
from lightbus.cli.demo.stopping import Failed, Stopping
from lightbus.connection.diagnosis import LOST
from lightbus.connection.dial import BrokerAddresses

START_LIMIT = 20.0
"""Seconds for the workers to start."""
LIMIT = 50.0
"""Seconds for the whole run."""
STEADY, STUCK = 0.5, 5.0
"""The demo ends when nothing is waiting and nothing has changed for so many seconds. STEADY is for equal columns (an
event that is handled twice would still show), STUCK for different ones (a busy machine may delay a service)."""


class Run:
    """Starts the services, publishes the commits, watches, and compares."""

    def __init__(
        self,
        *,
        folder: Path,
        url: str,
        prefix: str,
        lines: list[bytes],
        screen: Screen,
        stopping: Stopping,
        contracts: bool = False,
    ) -> None:
        """
        Args:
            prefix: of the names of the apps.
            lines: the commits to publish; none, if they are published slowly, again and again.
            contracts: whether the services publish contracts, also on a broker that is not the demo's own.
        """
        self.broker = BrokerAddresses.parse(url)
        self.prefix = prefix
        self.lines = lines
        self.screen = screen
        self.stopping = stopping
        self.services = Services(folder, url, prefix, contracts=contracts)
        self.expected = expected(lines)
        self.failures_shown = 0

    def play(self) -> bool:
        """Run to the end. Returns whether the services handled the expected events."""
        began = time.monotonic()
        queues = Queues(self.broker, self.prefix)
        try:
            self.start(queues)
            self._publish()
            self._watch(queues, began + LIMIT)
            self.services.stop()
            return self._report(queues, time.monotonic() - began)
        finally:
            self.services.stop()
            with contextlib.suppress(*LOST, errors.LightbusError):
                queues.delete()

    def start(self, queues: Queues) -> None:
        """Start the services, and return when they consume."""
        self.screen.write(f"Broker:     {self.broker.masked}" + ("" if self.prefix else "  (embedded: no server)"))
        for name in LISTENERS:
            self.services.start_worker(name)
        listed = ", ".join(f"{name} (process {self.services.pid(name)})" for name in LISTENERS)
        self.screen.write(f"Services:   {listed}")
        deadline = time.monotonic() + START_LIMIT
        while not all(queues.consumers(name) for name in LISTENERS):
            self.services.check()
            if time.monotonic() > deadline:
                raise Failed(f"the services did not start within {START_LIMIT:g} s.\n{self.services.last_log_lines()}")
            self.stopping.pause(0.1)

    def _publish(self) -> None:
        self.services.start_publisher(self.lines)
        process = f"forge, process {self.services.pid(PUBLISHER)}"
        self.screen.write(f"Publishing: {len(self.lines):,} commits as commit.pushed ({process})")
        self.screen.write()

    def _watch(self, queues: Queues, deadline: float) -> None:
        """Show the progress, until nothing is waiting and nothing has changed for a moment."""
        seen: object = None
        changed_at = time.monotonic()
        while True:
            entries = self.entries()
            published, waiting, dead = self.services.published(), queues.waiting(), queues.dead()
            self._show_failures()
            self.screen.show(self.progress(published, entries, dead))
            now = ({name: len(rows) for name, rows in entries.items()}, published, waiting, dead)
            if now != seen or waiting or self.services.publishing:
                seen, changed_at = now, time.monotonic()
            equal = all(row.handled == row.expected for row in self._rows(entries, dead))
            if time.monotonic() > changed_at + (STEADY if equal else STUCK):
                break
            if time.monotonic() > deadline:
                self.screen.write(f"Not done after {LIMIT:g} s: {waiting:,} events are still waiting.", fg="red")
                break
            self.services.check()
            self.stopping.pause(0.1)
        self.services.check()
        self.screen.show(self.progress(published, entries, dead), last=True)

    def progress(self, published: int, entries: Entries, dead: int) -> list[str]:
        """The lines that are updated in place."""
        mails = Counter(what for what, _ in entries["inbox"])
        retries = mails["attempt 2"] + mails["attempt 3"]
        large = sum(what == "large" for what, _ in entries["reviews"])
        return [
            f"forge   published {published:>6,}" + (f" of {len(self.lines):,}" if self.lines else ""),
            f"stats   counted   {len(entries['stats']):>6,}",
            f"reviews checked   {len(entries['reviews']):>6,}, requested {large}",
            f"inbox   delivered {mails['delivered']:>6,}, retried {retries}, gave up on {dead}",
        ]

    def _show_failures(self) -> None:
        """The first failure of each attempt, as the worker logs it, to show what a retry looks like."""
        while self.failures_shown < 3:
            text = f"attempt {self.failures_shown + 1}: MailTooLong"
            found = next((line for line in self.services.log("inbox").splitlines() if text in line), None)
            if found is None:
                return
            self.failures_shown += 1
            self.screen.write(f"inbox logs: {found.strip()}", fg="yellow")

    def entries(self) -> Entries:
        """The records of each service."""
        return {name: self.services.entries(name) for name in LISTENERS}

    def _rows(self, entries: Entries, dead: int) -> list[Row]:
        counts = handled(entries, dead)
        return [Row(service, what, counts.get((service, what), 0), count) for service, what, count in self.expected]

    def _report(self, queues: Queues, seconds: float) -> bool:
        rows = self._rows(self.entries(), queues.dead())
        rows.append(Row("broker", "events still waiting in a queue", queues.waiting(), 0))
        equal = all(row.handled == row.expected for row in rows)
        self.screen.write()
        show_table(rows, self.screen)
        self.screen.write()
        if equal:
            self.screen.write(f"All events were handled as expected, in {seconds:.1f} s.", fg="green")
        else:
            self.screen.write("The columns differ. The last log lines of the services:", fg="red")
            self.screen.write(self.services.last_log_lines())
        return equal
