"""The metrics by name, with their labels and what they mean. `docs/howto/metrics.md` lists them, too."""

from __future__ import annotations

from typing import Literal

import attrs

HANDLER_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
PUBLISH_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
AGE_BUCKETS = (1, 2, 5, 10, 30, 60, 300, 900, 3600, 21_600, 86_400)
"""Upper bounds in seconds. A time on the wire is in whole seconds."""


@attrs.frozen(eq=False)
class Family:
    """All series of one name."""

    name: str
    """A counter's ends with `_total`."""
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    mode: str = ""
    """How several processes' values of a gauge become one: see prometheus_client's `multiprocess_mode`."""
    bounds: tuple[float, ...] = ()
    """Of a histogram's buckets, without the infinite one."""


EVENTS = Family(
    "lightbus_events_total",
    "counter",
    ("app", "queue", "handler", "outcome"),
    "Attempts of handlers, by what came of them: handled, skipped, retried, dead or redelivered.",
)
HANDLER_SECONDS = Family(
    "lightbus_handler_seconds",
    "histogram",
    ("app", "queue", "handler"),
    "How long an attempt of a handler took, with its middleware.",
    bounds=HANDLER_BUCKETS,
)
EVENT_AGE = Family(
    "lightbus_event_age_seconds",
    "histogram",
    ("app", "queue"),
    "From the publish of an event (or the end of its delay) to the end of its first attempt; up to 100 events per "
    "second are measured.",
    bounds=AGE_BUCKETS,
)
RUNNING = Family("lightbus_running_handlers", "gauge", ("app", "queue"), "Handlers that run now.", mode="livesum")
PREFETCHED = Family(
    "lightbus_prefetched_events",
    "gauge",
    ("app", "queue"),
    "Events that the workers hold and have not settled, including those that run.",
    mode="livesum",
)
PUBLISHED = Family(
    "lightbus_published_total",
    "counter",
    ("app", "event", "outcome"),
    "Publishes, by what came of them: published, unrouted (no queue was bound) or failed.",
)
PUBLISH_SECONDS = Family(
    "lightbus_publish_seconds",
    "histogram",
    ("app",),
    "From a publish to the broker's confirm, or to its failure.",
    bounds=PUBLISH_BUCKETS,
)
CONNECTED = Family(
    "lightbus_connected",
    "gauge",
    ("app", "connection"),
    "1 if the connection (consumer or publisher) is open, or nobody needs it now, else 0; the lowest of all processes.",
    mode="livemin",
)
LOST = Family(
    "lightbus_connections_lost_total",
    "counter",
    ("app", "connection"),
    "How often an open connection was lost.",
)
READY = Family(
    "lightbus_ready",
    "gauge",
    ("app",),
    "1 if /readyz answers 200, else 0; the lowest of all processes.",
    mode="livemin",
)
BLOCKED = Family(
    "lightbus_event_loop_blocked_total",
    "counter",
    ("app", "handler"),
    "How often code has blocked the event loop of a worker for longer than --blocked-after; (lifespan) and (other) "
    "are code outside of handlers.",
)
QUEUE_MESSAGES = Family(
    "lightbus_queue_messages", "gauge", ("app", "queue"), "Events that wait in the queue, and are with no worker."
)
QUEUE_CONSUMERS = Family(
    "lightbus_queue_consumers", "gauge", ("app", "queue"), "Consumers of the queue, of all workers on all machines."
)
QUEUE_OLDEST = Family(
    "lightbus_queue_oldest_seconds",
    "gauge",
    ("app", "queue"),
    "Seconds since the first event that waits in the queue was published, or its delay ended. Embedded broker only.",
)
DEAD_LETTERS = Family("lightbus_dead_letters", "gauge", ("app", "queue"), "Dead letters.")
OUTBOX_ROWS = Family(
    "lightbus_outbox_rows",
    "gauge",
    ("app", "state"),
    "Rows of the outbox: waiting, or failed (set aside, since the broker has refused them).",
    mode="livemostrecent",
)
OUTBOX_OLDEST = Family(
    "lightbus_outbox_oldest_seconds",
    "gauge",
    ("app",),
    "The age of the oldest row that waits in the outbox; 0 if none does.",
    mode="livemostrecent",
)

FAMILIES = (
    EVENTS,
    HANDLER_SECONDS,
    EVENT_AGE,
    RUNNING,
    PREFETCHED,
    PUBLISHED,
    PUBLISH_SECONDS,
    CONNECTED,
    LOST,
    READY,
    BLOCKED,
    QUEUE_MESSAGES,
    QUEUE_CONSUMERS,
    QUEUE_OLDEST,
    DEAD_LETTERS,
    OUTBOX_ROWS,
    OUTBOX_OLDEST,
)
