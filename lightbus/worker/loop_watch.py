"""Logs and counts what blocks a worker's event loop.

An async handler that blocks (`time.sleep`, a query without `await`) stops the event loop: no other handler runs, and no
timeout can end it. A thread looks at the loop several times a second, notices that, and logs which handler it is and
where. An event costs nothing.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

import attrs

from lightbus import logs
from lightbus.connection.loop_reader import Schedule, current_loop
from lightbus.consuming.dispatcher import Dispatcher
from lightbus.consuming.slots import described, fields
from lightbus.consuming.stall import shown, user_frames

if TYPE_CHECKING:
    from types import FrameType

    from lightbus.consuming.subscription import HandlerRun, Subscription

logger = logging.getLogger("lightbus")

BLOCKED_AFTER = 1.0
"""Seconds: the default."""
LOOKS = 5
"""Per `blocked_after`. A block is logged after 1 to 1.4 times that."""
SHORTEST_PERIOD = 0.01
"""Seconds between two looks, at least."""
LATE = 1.5
"""Periods after which a look is late: it was held up itself."""

LIFESPAN = "(lifespan)"
"""In `Worker.blocked`: the code of the app's lifespan."""
OTHER = "(other)"
"""In `Worker.blocked`: anything else, such as a task that the lifespan has started."""

_LOOP = frozenset(
    {"selectors", "asyncio.base_events", "asyncio.runners", "uvloop", "trio._core._run", "anyio._core._eventloop"}
)
"""Modules that run an event loop: what calls them is not what the loop runs."""


@attrs.define
class BlockDetector:
    """Decides whether a loop is blocked, from looks at regular intervals. Pure.

    A look that comes late counts little: a process that was stopped (SIGSTOP, a suspended machine) is late in all of
    its threads. It counts in full as far as the loop's thread has used a processor meanwhile: then a call into C that
    keeps Python's lock has held up the looks. Time in which that thread waited for a processor does not count.
    """

    after: float
    """Seconds."""
    _what: object = None
    _blocked: float = 0.0
    _reported: bool = False
    _last: float = 0.0
    _used: float = 0.0
    _waited: float = 0.0

    @property
    def period(self) -> float:
        """Seconds between two looks."""
        return max(SHORTEST_PERIOD, self.after / LOOKS)

    def look(
        self, now: float, what: object, used: float, waited: float, *, ran: float = 0.0, answered: bool = False
    ) -> bool:
        """Returns True once per block.

        Args:
            now: seconds, on the monotonic clock.
            what: the one thing that the loop runs (by identity), if its last answer is not new; else None.
            used: for how many seconds the loop's thread has used a processor, so far.
            waited: for how many seconds it has waited for one, so far; asked only if `what` is not None.
            ran: for how many seconds `what` has run so far, if that is known.
            answered: the loop has answered since the last look.
        """
        since, busy, starved = now - self._last, used - self._used, waited - self._waited
        self._last, self._used, self._waited = now, used, waited
        most = LATE * self.period
        if what is None or answered or what is not self._what:
            self._what, self._reported = what, False
            self._blocked = min(since, busy, ran) if since > most else 0.0  # else it may have begun just now
        else:
            self._blocked += max(0.0, min(since, max(most, busy)) - starved)
        if what is None or self._reported or self._blocked < self.after:
            return False
        self._reported = True
        return True


@attrs.frozen
class Seen:
    """What the loop runs at one look."""

    what: object = None
    """Its identity; None where the loop runs nothing of the user's."""
    handled: tuple[Subscription, HandlerRun] | None = None
    frames: list[FrameType] = attrs.field(factory=list)
    ran: float = 0.0
    """Seconds so far, if that is known."""
    in_lifespan: bool = False


class LoopWatch:
    """A thread that watches the event loop in which this is made, until `stop`."""

    def __init__(self, app: str, consumer: Dispatcher, blocked: Counter[str], after: float) -> None:
        """
        Args:
            blocked: counts by the handler's name.
            after: seconds.
        """
        self.in_lifespan = False
        """Whether the app's lifespan is starting or ending now."""
        self._app = app
        self._consumer = consumer
        self._blocked = blocked
        self._detector = BlockDetector(after)
        self._schedule: Schedule = current_loop().soon_from_thread
        self._thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._thread) if hasattr(time, "pthread_getcpuclockid") else None
        self._waited = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        self._answered, self._answered_at = True, time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="lightbus loop watch", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        detector = self._detector
        detector.look(time.monotonic(), None, self._seconds_used(), 0.0)
        while True:
            if self._answered:
                self._answered = False
                try:
                    self._schedule(self._answer)
                except RuntimeError:  # the loop has ended
                    return
            if self._ended.wait(detector.period):
                return
            now = time.monotonic()
            answered = self._answered
            # Where this look is late, the answer may be from before a block.
            idle = answered and now - self._answered_at < LATE * detector.period
            seen = Seen() if idle else self._look()
            waited = 0.0 if seen.what is None else self._seconds_waited()
            if detector.look(now, seen.what, self._seconds_used(), waited, ran=seen.ran, answered=answered):
                self._report(seen)
            del seen  # a frame keeps its variables alive

    def _answer(self) -> None:
        """Runs in the loop."""
        self._answered, self._answered_at = True, time.monotonic()

    def _look(self) -> Seen:
        running, frames = self._consumer.running_in_loop(), user_frames(self._thread, until=_LOOP)
        if running is not None:
            subscription, run, ran = running
            return Seen(run, (subscription, run), frames, ran)
        if not frames:  # the loop waits, or is about to run: for a processor, probably
            return Seen()
        in_lifespan = self.in_lifespan
        return Seen(frames[0], None, frames, math.inf if in_lifespan else 0.0, in_lifespan)

    def _seconds_used(self) -> float:
        """For how long the loop's thread has used a processor. Not on macOS: there 0."""
        try:
            return 0.0 if self._clock is None else time.clock_gettime(self._clock)
        except OSError:
            return 0.0

    def _seconds_waited(self) -> float:
        """For how long the loop's thread was ready to run and did not get a processor. Linux only; else 0."""
        try:
            with open(self._waited) as file:
                return int(file.read().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0

    def _report(self, seen: Seen) -> None:
        frames = seen.frames
        stack = shown(frames) or "  (unknown)"
        if seen.handled is None:
            name = LIFESPAN if seen.in_lifespan else OTHER
            what = f"lifespan of app {self._app!r}" if seen.in_lifespan else "code that runs beside the handlers"
            self._blocked[name] += 1
            logger.warning(
                "The %s has blocked the event loop for %g s or more: no handler runs meanwhile. Await the blocking "
                "call, or run it in a thread: anyio.to_thread.run_sync. It is at:\n%s",
                what,
                self._detector.after,
                stack,
                extra={logs.ATTRIBUTE: logs.Fields(app=self._app)},
            )
            return
        subscription, run = seen.handled
        handler, middleware = run[1], _middleware(frames)
        self._blocked["" if handler is None else handler.name] += 1
        what = described(subscription, run)
        logger.warning(
            "The %s has blocked the event loop for %g s or more: no other task runs meanwhile, and %s timeout cannot "
            "stop it. %s, or await the blocking call. It is at:\n%s",
            what if middleware is None else f"middleware {middleware!r} around {what}",
            self._detector.after,
            "its" if middleware is None else "the handler's",
            "Use a sync function (def, not async def), which runs in a thread"
            if middleware is None
            else "Run it in a thread (anyio.to_thread.run_sync)",
            stack,
            extra=fields(subscription, run),
        )


def _middleware(frames: list[FrameType]) -> str | None:
    """The middleware that these innermost calls belong to; None if they are the handler's, or a dependency's."""
    caller = frames[0].f_back if frames else None
    if caller is None or caller.f_globals.get("__name__") != "lightbus.middleware" or caller.f_code.co_name != "layer":
        return None
    name = caller.f_locals.get("name")
    return name if isinstance(name, str) else None
