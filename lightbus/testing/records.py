"""The records that a test reads: one for each event that was published, handled, failed or dead-lettered."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import attrs

from lightbus.message import Message


@attrs.frozen(kw_only=True)
class Published:
    """One event that was published and confirmed."""

    event: str
    payload: Any
    """An instance of the class that its app declared. If the app is not in the test: the JSON as a dict."""
    source: str
    """The app that published it."""
    delay: int
    """Seconds; 0 without a delay."""
    routed: bool
    """False if no queue was bound for it. Always True with a delay: the delay queue takes it."""
    message: Message = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Handled:
    """One event that a handler has handled: the handler returned."""

    handler: str
    event: str
    payload: Any
    """As the handler got it. If it takes only the envelope: the JSON as a dict."""
    attempt: int
    app: str
    message: Message = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Failed:
    """One attempt that failed; a retry or a dead letter followed."""

    handler: str | None
    """None if the app has no handler for the event."""
    event: str
    payload: Any
    attempt: int
    error: str
    """Its type and message: `ValueError: nothing to pay`."""
    exception: BaseException = attrs.field(repr=False)
    app: str
    message: Message = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Dead:
    """One dead letter in the app's dead-letter queue."""

    handler: str | None
    event: str
    payload: Any
    """As the handler would get it. If it cannot be decoded: the JSON as a dict, or the body's bytes."""
    attempt: int
    """Which attempt failed last."""
    error: str
    """Its type and message: `Reject: nothing to pay`."""
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
