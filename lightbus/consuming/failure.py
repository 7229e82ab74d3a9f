"""What becomes of a delivery whose handler failed: a copy for a later attempt, or among the dead letters.

`retry.Retry` decides; here the copy is published, and the failure is logged. The runner settles the delivery after it.
"""

from __future__ import annotations

import enum
import logging
import math
import time
from collections import Counter
from typing import Any

import anyio
import attrs

from lightbus import errors
from lightbus.consuming.connection import ConsumerConnection
from lightbus.consuming.routes import Routes
from lightbus.consuming.slots import fields, shown_id
from lightbus.consuming.stall import LOG_AGAIN
from lightbus.consuming.subscription import HandlerRun, Subscription
from lightbus.consuming.tasks import HandlerTasks
from lightbus.handler import Handler
from lightbus.publishing.publisher import Publisher
from lightbus.retry import DeadLetter, Retry, RetryIn
from lightbus.transport import Delivery, Publication
from lightbus.wire import codec, topology

logger = logging.getLogger("lightbus")

COPY_PAUSES = (0.2, 1.0, 5.0)
"""Seconds between attempts to publish a copy; the last one from then on."""
REMEMBERED = 10_000
"""Events that no handler matches and that were logged; forgotten all at once when there are more."""


class Result(enum.Enum):
    """What is to be done with the delivery itself."""

    KEPT = enum.auto()
    """Ack it: a copy is confirmed, or it is not for this queue."""
    REFUSED = enum.auto()
    """Reject it, so that the broker dead-letters it: the broker refuses a copy as it is."""
    REDELIVERED = enum.auto()
    """Leave it: no copy was confirmed, and it is delivered again."""


@attrs.frozen
class Failure:
    """One attempt that failed."""

    subscription: Subscription
    delivery: Delivery
    handler: Handler | None
    attempt: int
    event: str
    decision: RetryIn | DeadLetter
    error: BaseException
    """With its traceback, for the log."""
    reason: BaseException
    """What counts as the cause: without exception groups, or the decision's own."""
    seconds: float | None
    """How long the handler ran; None where none did."""

    def __str__(self) -> str:
        what = "no handler for" if self.handler is None else f"{self.handler.name} failed on"
        return (
            f"{what} {self.event!r} ({shown_id(self.delivery)}) in {self.subscription.name!r}, attempt {self.attempt}: "
            f"{errors.summary(self.reason).rstrip('.')}"
        )

    def fields(self, **more: Any) -> dict[str, Any]:
        """The same as `extra` of a log record."""
        return fields(self.subscription, (self.delivery, self.handler, None), **more)


class Failures:
    """Handles the failures of one worker's queues. Owned by the event loop."""

    def __init__(self, app: str, publisher: Publisher, connection: ConsumerConnection, unmatched: Retry) -> None:
        """
        Args:
            unmatched: the policy for events that no handler matches.
        """
        self._app = app
        self._internal = topology.internal_name(app)
        self._publisher = publisher
        self._connection = connection
        self._unmatched = unmatched
        self._unkept: dict[int, str] = {}
        """Why copies could not be published so far, by the failure's identity."""
        self._logged: dict[tuple[str, str, int], float] = {}
        """When it was last logged that no handler matches: (queue, event, attempt)."""
        self._of_others: Counter[str] = Counter()
        """Events of other apps than the handlers of their queue name, since the start, by the queue's name."""

    @property
    def unkept(self) -> tuple[int, str | None]:
        """How many failed deliveries wait for their copy to be published, after at least one error; the last error.

        From any thread.
        """
        reasons = [*self._unkept.copy().values()]
        return len(reasons), reasons[-1] if reasons else None

    async def handle(
        self,
        subscription: Subscription,
        routes: Routes,
        run: HandlerRun,
        error: BaseException,
        tasks: HandlerTasks,
        seconds: float | None = None,
    ) -> tuple[Result, Failure | None]:
        """Decide what becomes of a failed delivery, keep a copy of it there, log it. The caller settles it then.

        Args:
            seconds: how long the handler ran; None where none did.

        The failure is None where the event is for other apps than those that the handlers name.
        """
        delivery, handler, _ = run
        attempt = codec.attempt_of(self._app, delivery)
        policy = self._unmatched if handler is None else handler.retry
        decision = policy.decide(errors.without_machinery(error), attempt)
        if handler is None and isinstance(decision, DeadLetter) and (named := routes.meant_for_others(delivery)):
            self._count_of_others(subscription, delivery, named)
            return Result.KEPT, None
        reason = errors.without_machinery(errors.without_groups(error))
        error = reason if errors.has_traceback(reason) else error  # the one that shows where it was raised
        name = None if handler is None else handler.name
        match decision:
            case RetryIn(delay, expiration):
                key = topology.retry_key(subscription.config.suffix, delay)
                shorter = expiration if expiration < delay else None
                properties = codec.copy_properties(self._app, delivery, name, attempt + 1, subscription.name, shorter)
            case DeadLetter(cause):
                key = topology.DEAD_KEY
                properties = codec.copy_properties(self._app, delivery, name, attempt, subscription.name)
                properties["headers"] |= codec.error_headers(cause, error)
                reason = cause
        event = self._event_of(delivery)
        failure = Failure(subscription, delivery, handler, attempt, event, decision, error, reason, seconds)
        copy = Publication(self._internal, key, delivery.body, properties)
        result = Result.REDELIVERED
        try:
            result = await self._keep(failure, copy, tasks)
        finally:  # not before it is true, and also where the worker ends meanwhile
            self._log(failure, result)
        return result, failure

    def _event_of(self, delivery: Delivery) -> str:
        """Its name, or what comes closest."""
        if delivery.exchange not in ("", self._internal):  # from the bus
            return delivery.routing_key
        try:
            return codec.read_envelope(self._app, delivery).event
        except errors.DecodeError:
            return delivery.routing_key

    async def _keep(self, failure: Failure, copy: Publication, tasks: HandlerTasks) -> Result:
        """Publish a copy with confirm.

        A failure whose copy cannot be kept waits here and holds the slot: more events could not be retried either.
        """
        pauses = iter(COPY_PAUSES)
        subscription, delivery = failure.subscription, failure.delivery
        try:
            while delivery.channel in subscription.channels and not (tasks.stopping and tasks.ended.is_set()):
                try:
                    receipt = await self._publisher.publish(copy)
                except errors.PublishError as error:
                    if isinstance(error, errors.PublishRefused) and not isinstance(error, errors.PublisherRefused):
                        if codec.ERROR_TRACEBACK in copy.properties["headers"]:  # the largest that Lightbus adds
                            copy = _without_details(copy)
                            continue
                        logger.error(
                            "%s: the copy for %s was refused. %s",
                            subscription.name,
                            copy.routing_key,
                            error,
                            extra=failure.fields(),
                        )
                        return Result.REFUSED
                    if isinstance(error.__cause__, errors.TopologyMissing):
                        self._connection.declare_again(f"the exchange {self._internal} no longer exists")
                    self._unkept[id(failure)] = str(error)
                    logger.error(
                        "%s; its copy for %s.%s is not confirmed yet, trying again. %s",
                        failure,
                        self._app,
                        copy.routing_key,
                        error,
                        extra=failure.fields(),
                    )
                else:
                    if receipt.routed:
                        return Result.KEPT
                    self._connection.declare_again(f"the queue {self._app}.{copy.routing_key} no longer exists")
                await anyio.sleep(next(pauses, COPY_PAUSES[-1]))
            return Result.REDELIVERED
        finally:
            self._unkept.pop(id(failure), None)

    # --- the log

    def _log(self, failure: Failure, result: Result) -> None:
        """Log what failed, and what became of it."""
        handler, error = failure.handler, failure.error
        # A left-over binding brings thousands of events that no handler matches: each is logged once in a while.
        quietly = handler is None and not self._is_news(failure.subscription, failure.event, failure.attempt)
        trace, outcome, wait = None, "dead", None
        match failure.decision, result:
            case _, Result.REDELIVERED:
                level, became = logging.WARNING, "it will be redelivered, because no copy of it was confirmed"
                outcome = "redelivered"
            case RetryIn(delay, _), Result.KEPT:
                level, became = logging.WARNING, f"retry in {delay:g} s"
                outcome, wait = "retried", delay
                if logger.isEnabledFor(logging.DEBUG):  # else the last attempt shows it: one traceback per event
                    trace = error if errors.tells_where(error) else None
            case _, Result.KEPT:
                level, became = logging.ERROR, f"dead-lettered to {self._app}.dead"
                trace = error if errors.tells_where(error) else None
            case _:
                level = logging.ERROR
                became = f"to be dead-lettered to {self._app}.dead by the broker, which refused a copy of it"
        level = logging.DEBUG if quietly else level
        if not logger.isEnabledFor(level):
            return
        exc_info, frames = errors.for_log(trace)
        extra = failure.fields(outcome=outcome, delay=wait, seconds=_rounded(failure.seconds))
        logger.log(level, "%s; %s%s", failure, became, frames, exc_info=exc_info, extra=extra)

    def _count_of_others(self, subscription: Subscription, delivery: Delivery, named: list[str]) -> None:
        self._of_others[subscription.name] += 1
        if not self._is_news(subscription, "", 0):
            return
        envelope = codec.read_envelope(self._app, delivery)
        logger.warning(
            "%s: %r from %r was acknowledged without a handler (%d so far): all handlers of this queue name other "
            "apps with source=. Either the exchange of such an app (%s) is bound to another one, or a binding is "
            "left over: lightbus unbind MODULE:ATTR PATTERN",
            subscription.name,
            envelope.event,
            envelope.source,
            self._of_others[subscription.name],
            ", ".join(named),
            extra=fields(subscription, (delivery, None, None), outcome="skipped"),
        )

    def _is_news(self, subscription: Subscription, event: str, attempt: int) -> bool:
        """Whether to log (again) that no handler matches this event."""
        now, what = time.monotonic(), (subscription.name, event, attempt)
        if now - self._logged.get(what, -math.inf) < LOG_AGAIN:
            return False
        if len(self._logged) >= REMEMBERED:
            self._logged.clear()
        self._logged[what] = now
        return True


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _without_details(copy: Publication) -> Publication:
    """A dead letter's copy without the texts of its error, so that the headers fit a frame."""
    headers = {
        key: value
        for key, value in copy.properties["headers"].items()
        if key not in (codec.ERROR_TRACEBACK, codec.ERROR_MESSAGE)
    }
    return attrs.evolve(copy, properties={**copy.properties, "headers": headers})
