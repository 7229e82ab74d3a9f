"""Whether an event loop runs in this thread: what blocks must not be called there."""

from __future__ import annotations

import anyio.lowlevel

from lightbus import errors

__tracebackhide__ = True  # pytest shows the caller's line instead


def refuse(called: str, instead: str, error: type[errors.LightbusError]) -> None:
    """Refuse a blocking call in the thread of an event loop (asyncio's or trio's).

    Args:
        called: the call, as a user writes it.
        instead: what to write instead.
        error: what to raise.

    Raises:
        errors.LightbusError: of the class `error`, if an event loop runs in this thread.
    """
    try:
        anyio.lowlevel.current_token()
    except RuntimeError:  # no event loop runs in this thread
        return
    raise error(f"{called} would block the event loop that runs here. Use `{instead}`.")
