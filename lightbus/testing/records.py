"""What a test reads: one record for each event that was published, handled, failed, or became a dead letter."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import attrs

from lightbus.message import Message


@attrs.frozen(kw_only=True)
class Published:
    """One event that was published and confirmed."""

    event: str
    payload: Any
    """An instance of the class that its app declared; of an app that is not in the test, the JSON as a dict."""
    source: str
    """The app that published it."""
    delay: int
    """Seconds; 0 for at once."""
    routed: bool
    """False where no queue was bound to hear it. Always True with a delay, whose own queue takes it."""
    message: Message = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Handled:
    """One event that a handler has handled: it returned."""

    handler: str
    event: str
    payload: Any
    """As the handler got it. Where it asks for the envelope only: the JSON as a dict."""
    attempt: int
    app: str
    message: Message = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Failed:
    """One attempt that failed; a retry or a dead letter followed."""

    handler: str | None
    """None where the app has no handler for the event."""
    event: str
    payload: Any
    attempt: int
    error: str
    """Its type and what it says: `ValueError: nothing to pay`."""
    exception: BaseException = attrs.field(repr=False)
    app: str
    message: Message = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Dead:
    """One dead letter, as it lies in the app's dead-letter queue."""

    handler: str | None
    event: str
    payload: Any
    """As the handler would have got it; where that cannot be, the JSON as a dict, or the body's bytes."""
    attempt: int
    """Which attempt failed last."""
    error: str
    """Its type and what it says: `Reject: nothing to pay`."""
    error_type: str
    """With its module: `lightbus.errors.Reject`."""
    traceback: str
    app: str
    message: Message

    def __repr__(self) -> str:
        return f"<Dead {self.handler or 'no handler'} on {self.event}, attempt {self.attempt}: {self.error}>"

    def __str__(self) -> str:
        """With the payload and the traceback."""
        trace = self.traceback.rstrip()
        return f"{self!r}\n{self.payload!r}" + (f"\n{trace}" if trace else "")


class _Record(Protocol):
    @property
    def handler(self) -> str | None: ...

    @property
    def event(self) -> str: ...


R = TypeVar("R", bound=_Record)


def clipped(body: bytes) -> str:
    text = body[:200].decode(errors="backslashreplace")
    return text if len(body) <= 200 else f"{text} ..."
