"""Where code hangs: the stack of a handler that runs or waits."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Container
from types import FrameType
from typing import Any

from lightbus import errors

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
    return shown(frames)


def stack_of_thread(thread: int) -> str:
    """Where the user's code is in a running thread, outermost call first; empty where it runs none."""
    return shown(user_frames(thread))


def user_frames(thread: int, until: Container[str] = ()) -> list[FrameType]:
    """The user's code that a thread runs, outermost call first: up to the next call of Lightbus or an event loop.

    Args:
        until: look no further than these modules.
    """
    frame = sys._current_frames().get(thread)  # pyright: ignore[reportPrivateUsage]
    frames: list[FrameType] = []
    users = False
    while frame is not None and frame.f_globals.get("__name__", "") not in until:
        machinery = errors.is_machinery(frame)
        if users and machinery:
            break
        users |= not machinery
        frames.insert(0, frame)
        frame = frame.f_back
    return frames if users else []


def shown(frames: list[FrameType]) -> str:
    """These calls as lines of a traceback."""
    return "".join(traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames).format()).rstrip()
