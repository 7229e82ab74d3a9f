"""The state of an app's queues on the broker, read rarely and in a thread: a scrape never waits long for a broker."""

from __future__ import annotations

import logging
import threading
import time

import attrs

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.telemetry.families import DEAD_LETTERS, QUEUE_CONSUMERS, QUEUE_MESSAGES, QUEUE_OLDEST, Family
from lightbus.wire import topology

logger = logging.getLogger("lightbus")

EVERY = 10.0
"""Seconds for which an answer is used."""
LIMIT = 2.0
"""Seconds that a scrape waits for an answer. Then the values are left out."""
REPEAT = 60.0
"""Seconds between two log records about a broker that does not answer."""

Samples = list[tuple[Family, tuple[str, ...], float]]
"""Each with its label values."""


@attrs.frozen
class _Answer:
    at: float
    """On the monotonic clock."""
    samples: Samples


class QueueStates:
    """The depth and the consumers of an app's queues."""

    def __init__(self, app: Lightbus) -> None:
        self._app = app
        self._answer: _Answer | None = None
        self._asking: threading.Thread | None = None
        self._lock = threading.Lock()
        self._next_record = 0.0

    def samples(self) -> Samples:
        """At most `EVERY` seconds old, from any thread; none if the broker does not answer within `LIMIT` seconds."""
        with self._lock:
            asking = self._asking  # it may be alive since an earlier scrape: then the broker is slow
            if not self._is_fresh() and (asking is None or not asking.is_alive()):
                asking = threading.Thread(target=self._ask, name="lightbus metrics: queues", daemon=True)
                asking.start()
                self._asking = asking
        if asking is not None:
            asking.join(LIMIT)
        answer = self._answer
        return answer.samples if answer is not None and self._is_fresh() else []

    def _is_fresh(self) -> bool:
        return self._answer is not None and time.monotonic() - self._answer.at < EVERY

    def _ask(self) -> None:
        try:
            self._answer = _Answer(time.monotonic(), _samples(self._app))
        except errors.LightbusError as error:
            now = time.monotonic()
            if now >= self._next_record:
                self._next_record = now + REPEAT
                logger.warning("/metrics has no numbers of the queues of %r: %s", self._app.name, error)
        except Exception:
            logger.exception("/metrics has no numbers of the queues of %r.", self._app.name)


def _samples(app: Lightbus) -> Samples:
    from lightbus.inspection.states import connected, consumed, oldest_seconds, queue_states

    found: Samples = []
    dead = topology.queue_name(app.name, topology.DEAD_KEY)
    with connected(app, "metrics") as connection:
        for state in queue_states(connection, [*consumed(app), dead]):
            labels = (app.name, state.name)
            if not state.exists:
                continue
            if state.name == dead:
                found.append((DEAD_LETTERS, labels, state.ready))
                continue
            found += [(QUEUE_MESSAGES, labels, state.ready), (QUEUE_CONSUMERS, labels, state.consumers)]
            oldest = oldest_seconds(connection, state.name)
            if oldest is not None:
                found.append((QUEUE_OLDEST, labels, oldest))
    return found
