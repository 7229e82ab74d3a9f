"""Where code hangs: the stack of a handler that runs or waits, and a watch over the event loop.

An async handler that blocks (`time.sleep`, a query without `await`) stops the event loop: no other handler runs, and no
timeout can end it. A thread notices that, and logs which handler it is and where it is.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any, Protocol

from lightbus import errors

logger = logging.getLogger("lightbus")

BLOCKED = 1.0
"""Seconds for which the event loop may be late, before the log names what blocks it."""
LOG_AGAIN = 60.0
"""Seconds between two logs about the same handler that does not end."""


def stack_of_coroutine(coroutine: Any) -> str:
    """Where a coroutine waits, outermost call first; empty where that is not known."""
    frames: list[FrameType] = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is not None:
            frames.append(frame)
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    return _shown(frames)


def stack_of_thread(thread: int) -> str:
    """Where the user's code is in a running thread, outermost call first; empty where it runs none."""
    frame = sys._current_frames().get(thread)  # pyright: ignore[reportPrivateUsage]
    frames: list[FrameType] = []
    users = False
    while frame is not None:
        machinery = errors.is_machinery(frame)
        if users and machinery:
            break
        users |= not machinery
        frames.insert(0, frame)
        frame = frame.f_back
    return _shown(frames) if users else ""


def _shown(frames: list[FrameType]) -> str:
    return "".join(traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames).format()).rstrip()


class WatchedLoop(Protocol):
    """What a `LoopWatch` asks, from its own thread."""

    @property
    def due(self) -> float:
        """When the event loop should run again at the latest (monotonic clock)."""
        ...

    def running_handler(self) -> str | None:
        """What the log calls the handler that the event loop runs right now; None where it runs none."""
        ...


class LoopWatch:
    """A thread that logs what blocks the event loop of the thread that made it. It costs a look a second."""

    def __init__(self, watched: WatchedLoop) -> None:
        self._watched = watched
        self._loop_thread = threading.get_ident()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="lightbus loop watch", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        logged_for, log_again = 0.0, 0.0
        while not self._ended.wait(BLOCKED / 2):
            due, now = self._watched.due, time.monotonic()
            if now - due < BLOCKED or (logged_for == due and now < log_again):
                continue
            handler, stack = self._watched.running_handler(), stack_of_thread(self._loop_thread)
            if due != self._watched.due or handler is None:
                continue  # it ran meanwhile; or it waits for a processor, and no handler is the cause
            logged_for, log_again = due, now + LOG_AGAIN
            logger.warning(
                "The %s has blocked the event loop for %.0f s or more: no other task runs meanwhile, and its timeout "
                "cannot stop it. Use a sync function (def, not async def), which runs in a thread, or await the "
                "blocking call. It is at:\n%s",
                handler,
                now - due,
                stack or "  (unknown)",
            )
