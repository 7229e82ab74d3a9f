"""Exchanges, queues and bindings of AMQP 0-9-1, as Artemis has them: addresses, queues, and a selector for each queue.

A queue has one selector for all its bindings, so that a message comes once. Attaching to a queue that does not exist
creates it with the selector of the attach. Artemis (2.40.0) compares a later attach with the selector that the queue
was created with, even after `updateQueue`, and closes the connection if they differ. Without a selector it does not
compare, but would create a missing queue without one, which then receives every event. So a queue is looked up through
management before, and after.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Any

import attrs
from amqp import exceptions as amqp_errors

from lightbus.transport.activemq import answers, names, selector
from lightbus.transport.activemq.management import Management, Refused

NO_ADMINISTRATOR = (
    f"the broker has no divert to '{names.BUS_ADDRESS}': its broker.xml lacks the part that `lightbus topology "
    "artemis` prints"
)

MAX_SELECTOR = 120_000
"""Bytes. The attach, with the selector, must fit a frame of the broker, which closes the connection otherwise: 1,200
bindings had 126,165 bytes and fitted (seen on 2.40.0)."""


@attrs.frozen
class Counts:
    """Of a queue."""

    ready: int
    consumers: int


class Declarations:
    """What a connection knows of the broker's queues, and how it changes them."""

    def __init__(self, management: Management) -> None:
        self._management = management
        self._is_prepared = False
        self._shows_scheduled: dict[str, str] = {}
        """The retry queue under whose name the scheduled messages of a queue are counted."""
        self.volatile: dict[str, list[str]] = {}
        """The clauses of exclusive queues, which are subscriptions without a queue."""

    # --- exchanges

    def check_bus(self) -> None:
        """
        Raises:
            amqp.exceptions.NotFound: the administrator's part of broker.xml is missing.
        """
        if not self._is_prepared:
            try:
                self._ask("divert.lightbus-bus", "getAddress")
            except Refused as error:
                raise answers.not_found("exchange", names.BUS, NO_ADMINISTRATOR) from error
            self._is_prepared = True

    def exchange_exists(self, exchange: str) -> bool:
        if exchange == names.BUS:
            self.check_bus()
            return True
        if names.delaying_app(exchange) is not None:
            return True
        if exchange.endswith(names.INTERNAL):
            try:
                return self.selector_of(f"{exchange.removesuffix(names.INTERNAL)}.{names.DEAD}") is not None
            except amqp_errors.AccessRefused:  # it exists: otherwise, the broker would not find it
                return True
        try:
            self._ask(f"address.{names.exchange_address(exchange)}", "getQueueNames")
        except Refused:
            return False
        return True

    def _ask(self, resource: str, operation: str, *arguments: Any) -> Any:
        """
        Raises:
            Refused: the broker does not know the resource.
            amqp.exceptions.AccessRefused: this user may not do that.
        """
        try:
            return self._management.invoke(resource, operation, *arguments)
        except Refused as error:
            if answers.is_refused("", str(error)):
                raise answers.access_refused(str(error)) from error
            raise

    # --- queues

    def selector_of(self, queue: str) -> str | None:
        """The selector of a queue; None if there is no such queue.

        Raises:
            amqp.exceptions.AccessRefused: this user may not look at it.
            amqp.exceptions.PreconditionFailed: it has none, so it receives every event.
        """
        try:
            found = self._ask(f"queue.{queue}", "getFilter")
        except Refused:
            return None
        if not found and queue != names.CATALOG:
            raise answers.precondition_failed(
                f"queue '{queue}' has no selector, so it receives every event: delete it, and start its worker"
            )
        return str(found or "")

    def counts(self, queue: str) -> Counts:
        """
        Raises:
            amqp.exceptions.NotFound: there is no such queue.
        """
        if queue in self.volatile:
            return Counts(0, 1)
        retries = names.retry_queue_of(queue)
        if retries is not None:
            main, _ = retries
            self._require(main)
            shown = self._shows_scheduled.setdefault(main, queue)
            return Counts(self._number(main, "getScheduledCount") if shown == queue else 0, 0)
        if names.delaying_app(queue) is not None:
            return Counts(0, 0)
        self._require(queue)
        total = self._number(queue, "getMessageCount")
        away = self._number(queue, "getScheduledCount") + self._number(queue, "getDeliveringCount")
        return Counts(max(0, total - away), self._number(queue, "getConsumerCount"))

    def _require(self, queue: str) -> str:
        """The selector of a queue that exists."""
        found = self.selector_of(queue)
        if found is None:
            raise answers.not_found("queue", queue)
        return found

    def _number(self, queue: str, operation: str) -> int:
        try:
            return int(self._ask(f"queue.{queue}", operation))
        except Refused as error:
            raise answers.not_found("queue", queue, str(error)) from error

    def wanted(self, queue: str, clauses: Iterable[str]) -> str | None:
        """The selector with which an attach creates a queue that does not exist. None: it exists, with these bindings.

        Bindings that it lacks are added; others stay.

        Raises:
            amqp.exceptions.AccessRefused: it lacks some, and this user may not change it.
            amqp.exceptions.PreconditionFailed: its selector is not one of Lightbus.
        """
        if queue.endswith(f".{names.DEAD}"):
            dead = selector.dead_selector(queue.removesuffix(f".{names.DEAD}"))
            return dead if self.selector_of(queue) is None else None
        current = self.selector_of(queue)
        if current is None:
            return _checked(queue, selector.selector(clauses))
        present = self._parsed(queue, current)
        missing = sorted({*clauses} - {*present})
        if missing:
            self._update(queue, [*present, *missing], f"add {' and '.join(missing)}")
        return None

    def unbind(self, queue: str, clause: str) -> None:
        """
        Raises:
            amqp.exceptions.NotFound: there is no such queue.
            amqp.exceptions.AccessRefused: this user may not change it.
        """
        present = self._parsed(queue, self._require(queue))
        if clause in present:
            self._update(queue, [one for one in present if one != clause], f"remove {clause}")

    def bind(self, queue: str, clause: str) -> None:
        """
        Raises:
            amqp.exceptions.NotFound, AccessRefused: as `unbind`.
        """
        present = self._parsed(queue, self._require(queue))
        if clause not in present:
            self._update(queue, [*present, clause], f"add {clause}")

    def _parsed(self, queue: str, current: str) -> list[str]:
        try:
            return selector.clauses_of(current)
        except ValueError as error:
            raise answers.precondition_failed(
                f"queue '{queue}' has a selector that Lightbus did not write: {current}"
            ) from error

    def _update(self, queue: str, clauses: list[str], what: str) -> None:
        change = {"name": queue, "filter-string": _checked(queue, selector.selector(clauses))}
        try:
            self._ask("broker", "updateQueue", json.dumps(change))
        except (Refused, amqp_errors.AccessRefused) as error:
            raise answers.access_refused(
                f"the bindings of queue '{queue}' may be changed by an operator only: {what} ({error})"
            ) from error

    def delete(self, queue: str) -> None:
        if self.selector_of(queue) is not None:
            with contextlib.suppress(Refused):  # it was deleted meanwhile
                self._ask("broker", "destroyQueue", queue, True)

    def purge(self, queue: str) -> int:
        self._require(queue)
        return self._number(queue, "removeAllMessages")


def _checked(queue: str, wanted: str) -> str:
    if len(wanted.encode()) > MAX_SELECTOR:
        raise answers.precondition_failed(
            f"the bindings of queue '{queue}' make a selector of {len(wanted.encode()):,} bytes; {MAX_SELECTOR:,} is "
            "the most: use fewer patterns, or other queues (queue=)"
        )
    return wanted
