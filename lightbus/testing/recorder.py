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
from lightbus.testing.apps import Apps
from lightbus.testing.messages import counted, hide_lightbus_errors, listed
from lightbus.testing.records import Dead, Failed, Handled, Published
from lightbus.transport import Delivery, Publication
from lightbus.wire import codec, topology

__tracebackhide__ = hide_lightbus_errors


class Recorder:
    """What one TestBus has published, handled, failed and dead-lettered. It is an `overrides.Observer`."""

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

    # --- called by publishers and dispatchers

    def published(self, publication: Publication, routed: bool) -> None:
        delivery = _as_delivery(publication)
        message = codec.read_message("", delivery)
        app = self._apps.get(message.source)
        event_type = None if app is None else app.events.get(message.event)
        payload = _json(delivery.body)
        if event_type is not None:
            with contextlib.suppress(errors.InvalidPayload):
                payload = codec.build_event(event_type, delivery.body)
        self.publishes.append(
            Published(
                event=message.event,
                payload=payload,
                source=message.source,
                delay=topology.delay_of(publication.properties.get("headers") or {}),
                routed=routed,
                message=message,
            )
        )

    def handled(self, app: Lightbus, handler: Handler, delivery: Delivery) -> None:
        message = codec.read_message(app.name, delivery)
        self.attempts.append(
            Handled(
                handler=handler.name,
                event=message.event,
                payload=_payload(handler, delivery),
                attempt=message.attempt,
                app=app.name,
                message=message,
            )
        )

    def failed(self, app: Lightbus, handler: Handler | None, delivery: Delivery, error: BaseException) -> None:
        with contextlib.suppress(errors.DecodeError):  # malformed properties: there is no envelope to show
            message = codec.read_message(app.name, delivery)
            self.attempts.append(
                Failed(
                    handler=None if handler is None else handler.name,
                    event=message.event,
                    payload=_payload(handler, delivery),
                    attempt=message.attempt,
                    error=errors.summary(errors.without_groups(error)),
                    exception=error,
                    app=app.name,
                    message=message,
                )
            )

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
        payload=_payload(handler, letter.delivery),
        attempt=letter.attempt,
        error=f"{letter.error}: {letter.error_message}" if letter.error_message else letter.error,
        error_type=letter.error_type,
        traceback=letter.traceback,
        app=app.name,
        message=message,
    )


def _as_delivery(publication: Publication) -> Delivery:
    no_channel: Any = None
    return Delivery(
        no_channel,
        0,
        False,
        publication.exchange,
        publication.routing_key,
        dict(publication.properties),
        publication.body,
    )


def _payload(handler: Handler | None, delivery: Delivery) -> Any:
    """As the handler gets it. If it gets none, or cannot: the decoded JSON, or the body."""
    if handler is not None:
        with contextlib.suppress(errors.DecodeError):
            for argument in handler.arguments(delivery):
                if not isinstance(argument, Message):
                    return argument
    return _json(delivery.body)


def _json(body: bytes) -> Any:
    try:
        return codec.decode(Any, body)
    except errors.DecodeError:
        return body
