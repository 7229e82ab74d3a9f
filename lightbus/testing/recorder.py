"""`Recorder`: turns what the apps of a test do into records."""

from __future__ import annotations

import contextlib
from typing import Any

import attrs

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.dead_letters.letter import DeadLetter
from lightbus.dead_letters.queue import opened
from lightbus.handler import Handler
from lightbus.message import Message
from lightbus.outcome import Outcome
from lightbus.testing.apps import Apps
from lightbus.testing.messages import counted, hide_lightbus_errors, listed
from lightbus.testing.records import Dead, Failed, Handled, Published
from lightbus.transport import Delivery
from lightbus.wire import codec

__tracebackhide__ = hide_lightbus_errors


class Recorder:
    """What one TestBus has published, handled, failed and dead-lettered: it observes the apps."""

    def __init__(self, apps: Apps) -> None:
        self._apps = apps
        self.publishes: list[Published] = []
        self.attempts: list[Handled | Failed] = []
        self.dead: list[Dead] = []
        """As of the last `read_dead`."""
        self._checked: set[tuple[str, str | None, str]] = set()
        """The keys of the dead letters that the test asked about."""
        self._drained_at = (0, 0)

    def __str__(self) -> str:
        handled = len(self.handled_attempts())
        failed = len(self.attempts) - handled
        return f"{len(self.publishes)} published, {handled} handled" + (f", {failed} failed" if failed else "")

    def handled_attempts(self) -> list[Handled]:
        return [one for one in list(self.attempts) if isinstance(one, Handled)]

    def failed_attempts(self) -> list[Failed]:
        return [one for one in list(self.attempts) if isinstance(one, Failed)]

    # --- drained or not

    def mark_drained(self) -> None:
        self._drained_at = len(self.publishes), len(self.attempts)

    @property
    def drained(self) -> bool:
        """Whether nothing was published or handled since the last drain."""
        return self._drained_at == (len(self.publishes), len(self.attempts))

    # --- called by the apps' publishers and workers: see `Lightbus.observe`

    def observe(self, outcome: Outcome) -> None:
        match outcome.kind:
            case "published":
                self._published(outcome)
            case "failed":
                pass  # the test's own call of `publish` raises it
            case "handled" | "skipped":
                if outcome.handler is not None:
                    self._handled(outcome, outcome.handler)
            case _:
                with contextlib.suppress(errors.DecodeError):  # malformed properties: there is no envelope to show
                    self._failed(outcome)

    def _published(self, outcome: Outcome) -> None:
        message = outcome.message
        app = self._apps.get(message.source)
        event_type = None if app is None else app.events.get(message.event)
        payload = _json(message.body)
        if event_type is not None:
            with contextlib.suppress(errors.InvalidPayload):
                payload = codec.build_event(event_type, message.body)
        assert outcome.receipt is not None
        self.publishes.append(
            Published(
                event=message.event,
                payload=payload,
                source=message.source,
                delay=int(outcome.delay or 0),
                routed=outcome.receipt.routed,
                message=message,
            )
        )

    def _handled(self, outcome: Outcome, handler: str) -> None:
        self.attempts.append(
            Handled(
                handler=handler,
                event=outcome.message.event,
                payload=self._payload(outcome),
                attempt=outcome.attempt,
                app=outcome.app,
                message=outcome.message,
            )
        )

    def _failed(self, outcome: Outcome) -> None:
        assert outcome.error is not None
        self.attempts.append(
            Failed(
                handler=outcome.handler,
                event=outcome.message.event,
                payload=self._payload(outcome),
                attempt=outcome.attempt,
                error=errors.summary(errors.without_groups(outcome.error)),
                exception=outcome.error,
                app=outcome.app,
                message=outcome.message,
            )
        )

    def _payload(self, outcome: Outcome) -> Any:
        app = self._apps.get(outcome.app)
        handler = None if app is None or outcome.handler is None else app.handlers.get(outcome.handler)
        return _payload(handler, outcome.message.body)

    # --- dead letters

    def read_dead(self) -> None:
        """Read the apps' dead-letter queues. Nothing in them changes.

        Raises:
            errors.BrokerError: a queue cannot be read.
        """
        found: list[Dead] = []
        for app in self._apps.all:
            with opened(app) as queue:
                found += [_dead_record(app, dead_letter) for dead_letter in queue.dead_letters()]
        self.dead = found

    def mark_checked(self, dead: list[Dead]) -> None:
        """The test asked about these dead letters: it expects them."""
        self._checked.update(_key(one) for one in dead)

    def check_dead(self) -> None:
        """
        Raises:
            errors.UnexpectedDeadLetters: the test did not ask about some of the dead letters.
        """
        unchecked = [one for one in self.dead if _key(one) not in self._checked]
        if unchecked:
            first = unchecked[0]
            raise errors.UnexpectedDeadLetters(
                f"{counted(len(unchecked), 'dead letter')} that the test did not check. If they are expected, check "
                f"them: `assert bus.dead({first.handler or first.event!r})`, or pass "
                "TestBus(..., allow_dead=True).\n" + listed([str(one).replace("\n", "\n  ") for one in unchecked])
            )


def _key(dead: Dead) -> tuple[str, str | None, str]:
    return dead.app, dead.handler, dead.message.id


def _dead_record(app: Lightbus, letter: DeadLetter) -> Dead:
    handler = None if letter.handler is None else app.handlers.get(letter.handler)
    message = attrs.evolve(
        codec.read_message(app.name, letter.delivery),
        event=letter.event,
        source=letter.source,
        attempt=letter.attempt,
        redelivered=False,  # reading the dead-letter queue redelivers its messages
    )
    return Dead(
        handler=letter.handler,
        event=letter.event,
        payload=_payload(handler, letter.delivery.body),
        attempt=letter.attempt,
        error=f"{letter.error}: {letter.error_message}" if letter.error_message else letter.error,
        error_type=letter.error_type,
        traceback=letter.traceback,
        app=app.name,
        message=message,
    )


def _payload(handler: Handler | None, body: bytes) -> Any:
    """As the handler gets it. If it gets none, or cannot: the decoded JSON, or the body."""
    if handler is not None:
        no_channel: Any = None
        with contextlib.suppress(errors.DecodeError):
            for argument in handler.arguments(Delivery(no_channel, 0, False, "", "", {}, body)):
                if not isinstance(argument, Message):
                    return argument
    return _json(body)


def _json(body: bytes) -> Any:
    try:
        return codec.decode(Any, body)
    except errors.DecodeError:
        return body
