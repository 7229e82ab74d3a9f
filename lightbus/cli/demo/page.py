"""`lightbus demo --web`: the services work slowly, without an end, while `lightbus web` shows them."""

from __future__ import annotations

import contextlib
import itertools
import json
import time

from lightbus import errors
from lightbus.cli.demo.queues import Queues
from lightbus.cli.demo.run import Run
from lightbus.cli.demo.services import LISTENERS, PUBLISHER
from lightbus.cli.demo.stopping import Failed
from lightbus.connection.diagnosis import LOST

PAUSE = 0.1
"""Seconds between two commits."""
SHOWN = 5
"""Commits between two updates of the screen."""
LIMIT = 20.0
"""Seconds for the page to start."""


def show(run: Run, lines: list[bytes]) -> None:
    """Run until Ctrl-C.

    Args:
        lines: the commits, which are published again and again, the largest first: it becomes a dead letter.

    Raises:
        Stopped: Ctrl-C.
        Failed: a service, or the command that publishes forge's contract, has ended.
    """
    services, screen = run.services, run.screen
    queues = Queues(run.broker, run.prefix)
    try:
        run.start(queues)
        services.contract("publish", PUBLISHER)
        screen.write(f"Page:       {_start_page(run)}  (Ctrl-C ends the demo)")
        screen.write()
        pipe = services.start_slow_publisher()
        for number, line in enumerate(itertools.cycle(_largest_first(lines))):
            try:
                pipe.write(line)
                pipe.flush()
            except BrokenPipeError:
                services.check()
                raise Failed("the publisher has ended.") from None
            if number % SHOWN == 0:
                services.check()
                screen.show(run.progress(services.published(), run.entries(), queues.dead()))
            run.stopping.pause(PAUSE)
    finally:
        services.stop()
        if run.prefix:
            for name in (*LISTENERS, PUBLISHER):
                with contextlib.suppress(Failed):
                    services.contract("withdraw", name)
        with contextlib.suppress(*LOST, errors.LightbusError):
            queues.delete()


def _start_page(run: Run) -> str:
    """Its address."""
    run.services.start_page()
    deadline = time.monotonic() + LIMIT
    while not (address := run.services.page()):
        run.services.check()
        if time.monotonic() > deadline:
            raise Failed(f"the page did not start within {LIMIT:g} s.\n{run.services.last_log_lines()}")
        run.stopping.pause(0.1)
    return address


def _largest_first(lines: list[bytes]) -> list[bytes]:
    """One commit that is too long for the mail server, and then all in their order."""

    def size(line: bytes) -> int:
        commit = json.loads(line)
        return int(commit["insertions"] + commit["deletions"])

    return [max(lines, key=size), *lines]
