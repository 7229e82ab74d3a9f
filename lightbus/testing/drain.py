"""`Drain`: waits until a test's broker is idle, and moves its clock."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Sequence

from lightbus import errors
from lightbus.testing.messages import SHOWN, counted, hide_lightbus_errors, listed
from lightbus.testing.session import Session
from lightbus.transport.sqlite.control import Holding

__tracebackhide__ = hide_lightbus_errors


class Drain:
    """One `drain` or `advance` of a TestBus, with its timeout.

    Its methods are generators, so that sync and async tests share them. They yield the seconds to sleep before the next
    look at the broker.
    """

    def __init__(self, session: Session, seconds: float) -> None:
        self._session = session
        self._seconds = seconds
        self._ends = time.monotonic() + seconds
        self._attempts_before = len(session.recorder.attempts)

    def until_idle(self) -> Generator[float]:
        """End when no event is waiting or being handled. Retries expire at once, delayed events stay.

        Raises:
            errors.DrainTimeout: not idle in time.
            errors.TestBusError: a handler was declared after the start, so it does not run.
        """
        session = self._session
        self._check_handlers()
        consumed, retrying = session.apps.queues()
        pause = 0.001
        while True:
            if session.host is not None:
                session.host.check()
            holdings = session.control.holdings()
            retries = [one.due_in for one in holdings if one.queue in retrying and one.due_in is not None]
            if not self._is_busy(holdings, consumed):
                if not retries:
                    session.recorder.mark_drained()
                    return
                # Only the retries that are due first expire: so retries keep their order.
                session.control.expire_early(retrying, min(retries))
            if time.monotonic() > self._ends:
                raise errors.DrainTimeout(self._report(holdings, consumed, retrying))
            yield pause
            pause = min(0.02, pause * 1.5)

    def advance(self, seconds: float) -> Generator[float]:
        """Move the broker's clock by `seconds`, in steps: stop and drain wherever something falls due.

        Raises:
            errors.DrainTimeout, errors.TestBusError: as `until_idle`.
        """
        control = self._session.control
        left = seconds
        while True:
            yield from self.until_idle()
            dues = [one.due_in for one in control.holdings() if one.due_in is not None and one.due_in <= left]
            if not dues:
                break
            control.advance(min(dues))
            left -= min(dues)
        control.advance(left)

    def _is_busy(self, holdings: Sequence[Holding], consumed: Sequence[str]) -> bool:
        # An event is in a queue until its handlers have ended, and its retry is in a queue before that. So one look at
        # all queues, at one moment, misses nothing.
        return (
            any(publisher.busy for publisher in list(self._session.publishers.values()))
            or any(one.queue in consumed for one in holdings)
            or any(one.due_in is not None and one.due_in <= 0 for one in holdings)
        )

    def _report(self, holdings: Sequence[Holding], consumed: Sequence[str], retrying: Sequence[str]) -> str:
        """What is stuck."""
        lines = [f"Not drained within {self._seconds:g} s."]
        running = [] if self._session.host is None else self._session.host.running()
        if running:
            lines += ["Still running:", listed(running)]
        queues = [
            f"{one.queue}: {counted(one.ready, 'event')} waiting, {one.unready} in hand"
            for one in holdings
            if one.queue in consumed
        ]
        if queues:
            lines += ["In the queues:", listed(queues)]
        retries = [f"{one.queue}: {one.ready}" for one in holdings if one.queue in retrying]
        if retries:
            lines += ["Waiting for a retry:", listed(retries)]
        attempts = self._session.recorder.attempts[self._attempts_before :]
        ended = Counter(f"{one.handler} of {one.app}" for one in attempts)
        if ended:
            most = ", ".join(f"{handler} ({number})" for handler, number in ended.most_common(SHOWN))
            lines.append(f"Finished meanwhile: {most}.")
        if any(number > 100 for number in ended.values()):
            lines.append("Does a handler publish an event that it also handles?")
        elif running:
            lines.append("Provide what the handler waits for before draining, or set a longer drain(timeout=...).")
        return "\n".join(lines)

    def _check_handlers(self) -> None:
        host = self._session.host
        if host is None:
            return
        for app in self._session.apps.all:
            late = set(app.handlers) - host.handlers[app.name]
            if late:
                raise errors.TestBusError(
                    f"handler {sorted(late)[0]!r} of app {app.name!r} was declared after the TestBus had started, so "
                    "it does not run. Declare it earlier."
                )
