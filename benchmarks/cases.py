"""All cases: the contestants, their settings and the number of events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from benchmarks.suite import Result, Row, Suite
from tests import artemis

EQUAL = 100
"""The common prefetch, within RabbitMQ's recommendation for throughput (100 to 300)."""

FASTSTREAM = "retry, handler timeout, dead letters"
BARE = "types and validation, retry, handler timeout, dead letters"
TASKS = "types and validation, dead letters; many apps for one event"
PROTON = "qpid-proton, blocking client"
CELERY = "types and validation, async handlers, dead letters; many apps for one event"


@attrs.frozen
class Case:
    name: str
    title: str
    measure: Callable[[Suite, Row], dict[str, Result]]
    rows: tuple[Row, ...]
    note: str = ""
    rounds: int = 3
    baseline: str = "Lightbus"
    """The label of the row that the others of its group are compared with."""


def _with_limit(measure: Callable[[Suite, Row], dict[str, Result]]) -> Callable[[Suite, Row], dict[str, Result]]:
    return lambda suite, row: suite.limit(row) if row.peer == "limit_" else measure(suite, row)


def _consumers(kind: str, queue_type: str = "quorum", share: float = 1.0) -> tuple[Row, ...]:
    """Contestants with an async handler, or with the closest equivalent."""
    base = {"kind": kind, "queue_type": queue_type}
    same = {**base, "prefetch": EQUAL}

    def count(events: int) -> int:
        return round(events * share)

    return (
        Row("Lightbus", "lightbus_", count(20000), settings=same),
        Row("Lightbus, its own prefetch (200)", "lightbus_", count(20000), settings=base),
        Row("FastStream", "faststream_", count(2500), lacks=FASTSTREAM, settings=same),
        Row("FastStream, its own prefetch (no limit)", "faststream_", count(2500), lacks=FASTSTREAM, settings=base),
        Row("aio-pika", "aio_pika_", count(3500), lacks=BARE, settings=same),
        Row("taskiq", "taskiq_", count(1500), lacks=TASKS, settings=same),
        Row("taskiq, its own prefetch (10)", "taskiq_", count(1500), lacks=TASKS, settings=base),
        Row("Celery, solo", "celery_", count(2000), lacks=CELERY, settings={**same, "handler": "sync"}),
        Row(
            "Celery, solo, its own prefetch (4)",
            "celery_",
            count(1500),
            lacks=CELERY,
            settings={**base, "handler": "sync"},
        ),
    )


READERS = (
    Row("the limit: a byte reader", "limit_", 40000, lacks="decoding, handling, acks", settings={"handler": "read"}),
    *(
        Row(
            f"the limit with acks, prefetch {prefetch}",
            "limit_",
            40000,
            lacks="decoding, handling",
            settings={"handler": "read-ack", "prefetch": prefetch},
        )
        for prefetch in (EQUAL, 200)
    ),
)
WRITER = Row(
    "the limit: a byte writer", "limit_", 40000, lacks="events, encoding, confirms", settings={"handler": "write"}
)
NAMEKO = {"handler": "sync", "queue_type": "classic"}


def _threads(handler: str, threads: int, share: float = 1.0) -> tuple[Row, ...]:
    same = {"handler": handler, "prefetch": EQUAL}
    pool = {**same, "concurrency": threads}
    return (
        Row(f"Celery, {threads} threads", "celery_", round(4000 * share), lacks=CELERY, settings=pool),
        Row(f"Dramatiq, {threads} threads", "dramatiq_", round(4000 * share), lacks=TASKS, settings=pool),
    )


def _publishers(in_flight: int, count: int, queue_type: str = "quorum") -> tuple[Row, ...]:
    settings = {"in_flight": in_flight, "queue_type": queue_type}
    return (
        Row("Lightbus", "lightbus_", count, settings=settings),
        Row(
            "FastStream",
            "faststream_",
            count // 3,
            lacks="type checks (done when the event is built)",
            settings=settings,
        ),
        Row("aio-pika", "aio_pika_", count // 3, lacks="types and validation", settings=settings),
        Row("taskiq", "taskiq_", count // 3, lacks="type checks (done when the event is built)", settings=settings),
    )


def _publish_one() -> tuple[Row, ...]:
    blocking = {"threads": 1}
    return (
        *(attrs.evolve(row, count=1500) for row in _publishers(1, 1500)),
        Row("Lightbus", "lightbus_", 1500, group="sync", settings=blocking),
        Row("Celery", "celery_", 1500, group="sync", lacks="types and validation", settings=blocking),
        Row("Dramatiq", "dramatiq_", 1500, group="sync", lacks="types and validation", settings=blocking),
        Row(
            "Nameko",
            "nameko_",
            1000,
            group="sync",
            lacks="types and validation; quorum queues",
            settings={**blocking, "queue_type": "classic"},
        ),
    )


def _fan_out() -> tuple[Row, ...]:
    rows = []
    for apps, count in ((1, 8000), (4, 3000), (16, 1000)):
        settings = {"apps": apps, "prefetch": EQUAL}
        group = f"{apps} app{'s' if apps > 1 else ''}"
        rows.append(Row("Lightbus", "lightbus_", count, group=group, settings=settings))
        rows.append(Row("FastStream", "faststream_", count // 3, group=group, lacks=FASTSTREAM, settings=settings))
    return tuple(rows)


BODIES = (("100 B", 100, 8000), ("10 KB", 10_000, 3000), ("1 MB", 1_000_000, 60))


def _bodies(publish: bool) -> tuple[Row, ...]:
    rows = []
    for group, size, count in BODIES:
        few = {"warm": 20, "tail": 20} if size >= 1_000_000 else {}
        settings = {"kind": "blob", "size": size, "prefetch": EQUAL, **few}
        if publish:
            settings["in_flight"] = min(500, 20_000_000 // size)
        rows.append(Row("Lightbus", "lightbus_", count, group=group, settings=settings))
        rows.append(
            Row("FastStream", "faststream_", max(60, count // 3), group=group, lacks=FASTSTREAM, settings=settings)
        )
        rows.append(Row("aio-pika", "aio_pika_", max(60, count // 3), group=group, lacks=BARE, settings=settings))
    return tuple(rows)


def _queue_types(publish: bool) -> tuple[Row, ...]:
    rows: list[Row] = []
    for queue_type in ("quorum", "classic"):
        chosen = _publishers(500, 12000, queue_type) if publish else _consumers("order", queue_type, 0.5)
        rows += [
            attrs.evolve(row, group=queue_type) for row in chosen if row.label in ("Lightbus", "FastStream", "aio-pika")
        ]
    return tuple(rows)


def _latency() -> tuple[Row, ...]:
    same = {"prefetch": EQUAL}
    return (
        Row("Lightbus", "lightbus_", settings=same),
        Row("FastStream", "faststream_", lacks=FASTSTREAM, settings=same),
        Row("aio-pika", "aio_pika_", lacks=BARE, settings=same),
        Row("Celery, solo", "celery_", lacks=CELERY, settings={**same, "handler": "sync"}),
        Row("Dramatiq, 8 threads", "dramatiq_", lacks=TASKS, settings={**same, "handler": "sync"}),
    )


def _cold() -> tuple[Row, ...]:
    folder = "benchmarks.peers.cold"
    commands = {
        "Lightbus": ("lightbus_", "python", "-m", "lightbus", "worker", f"{folder}.lightbus_:app"),
        "FastStream": ("faststream_", "faststream", "run", f"{folder}.faststream_:app"),
        "aio-pika": ("aio_pika_", "python", "-m", f"{folder}.aio_pika_"),
        "Celery, solo": (
            "celery_",
            "celery",
            "-A",
            f"{folder}.celery_",
            "worker",
            "--pool",
            "solo",
            "--without-mingle",
            "--without-gossip",
        ),
        "Dramatiq": ("dramatiq_", "dramatiq", f"{folder}.dramatiq_", "--processes", "1"),
        "taskiq": ("taskiq_", "taskiq", "worker", f"{folder}.taskiq_:broker", "--workers", "1"),
    }
    sync = {"handler": "sync"}
    return tuple(
        Row(label, peer, settings={"command": command, **(sync if peer in ("celery_", "dramatiq_") else {})})
        for label, (peer, *command) in commands.items()
    )


def _imports() -> tuple[Row, ...]:
    statements = {
        "Lightbus": ("lightbus_", "from lightbus import Lightbus, Message, Retry"),
        "FastStream": ("faststream_", "from faststream import FastStream; from faststream.rabbit import RabbitBroker"),
        "aio-pika": ("aio_pika_", "import aio_pika"),
        "Celery": ("celery_", "from celery import Celery; app = Celery('a'); app.task(len, name='b')"),
        "Dramatiq": ("dramatiq_", "import dramatiq; from dramatiq.brokers.rabbitmq import RabbitmqBroker"),
        "taskiq": ("taskiq_", "from taskiq_aio_pika import AioPikaBroker"),
        "Nameko": ("nameko_", "from nameko.events import event_handler"),
        "kombu (used by Lightbus and Celery)": ("lightbus_", "import kombu.transport.pyamqp, kombu.entity"),
    }
    return tuple(Row(label, peer, settings={"statement": statement}) for label, (peer, statement) in statements.items())


def _memory() -> tuple[Row, ...]:
    full = {"prefetch": 1000, "handler": "hold"}
    threads = {"prefetch": 1000, "handler": "hold-sync", "concurrency": 8}
    return (
        # With handlers that do not end, a worker holds no more events than may run at once.
        Row("Lightbus", "lightbus_", settings={**full, "concurrency": 1000}),
        Row("FastStream", "faststream_", settings=full),
        Row("aio-pika", "aio_pika_", settings=full),
        Row("taskiq", "taskiq_", settings=full),
        Row("Celery, 8 threads", "celery_", settings=threads),
        Row("Dramatiq, 8 threads", "dramatiq_", settings=threads),
    )


def _processes() -> tuple[Row, ...]:
    rows = []
    for processes in (1, 2):
        settings = {"processes": processes, "prefetch": EQUAL}
        group = f"{processes} process{'es' if processes > 1 else ''}"
        rows += [
            Row("Lightbus", "lightbus_", 24000 + 12000 * processes, group=group, settings=settings),
            Row("FastStream", "faststream_", 4000 + 3000 * processes, group=group, lacks=FASTSTREAM, settings=settings),
            Row("aio-pika", "aio_pika_", 5000 + 4000 * processes, group=group, lacks=BARE, settings=settings),
        ]
    return tuple(rows)


def _embedded() -> tuple[Row, ...]:
    rows = []
    for waiting in (0, 100_000):
        for what, label in (
            ("publish", "publish, 500 in flight"),
            ("publish_many", "publish_many"),
            ("consume", "consume"),
            ("across", "publish and handle, two processes"),
        ):
            group = f"{waiting:,} waiting"
            rows.append(Row(label, "lightbus_", 8000, group=group, settings={"what": what, "waiting": waiting}))
    across = {"what": "across", "waiting": 0, "rabbitmq": True}
    rows.append(
        Row("on RabbitMQ: publish and handle, two processes", "lightbus_", 8000, group="0 waiting", settings=across)
    )
    return tuple(rows)


def _outbox() -> tuple[Row, ...]:
    relay = {"handler": "relay"}
    return (
        Row("publish_many", "lightbus_", 15000, group="relay", settings={"in_flight": 0}),
        Row("1,000 waiting", "outbox_", 20000, group="relay", settings={**relay, "waiting": 1000}),
        Row("100,000 waiting", "outbox_", 20000, group="relay", settings={**relay, "filled": 100_000}),
        Row("1,000,000 waiting", "outbox_", 20000, group="relay", settings={**relay, "filled": 1_000_000}),
        Row("beside an older transaction", "outbox_", 20000, group="relay", settings={**relay, "dead": 200_000}),
        *(
            Row(label, "outbox_", count, group="add", settings={"handler": "add", "in_flight": orders})
            for orders, count, label in ((1, 400, "1 order per transaction"), (10, 4000, "10 orders per transaction"))
        ),
        Row("own session", "outbox_", 4000, group="inbox", settings={"around": "session"}),
        Row("inbox", "outbox_", 4000, group="inbox", settings={"around": "inbox"}),
    )


def _activemq() -> tuple[Row, ...]:
    """Publishing and consuming, of orders and of bodies of 16 MiB."""
    large = {"kind": "blob", "size": 16 * 1024 * 1024, "warm": 2, "tail": 2, "greet": 1, "in_flight": 1}
    many, one = (
        Row(f"Lightbus, {label}", "lightbus_", count, group="publish", settings={"what": "publish", **settings})
        for label, count, settings in (
            ("publish_many", 10000, {"in_flight": 0}),
            ("one by one", 600, {"in_flight": 1}),
        )
    )
    return (
        *(many, one, *_on_artemis("publish", 10000, 600, {"threads": 1})),
        *_on_artemis("consume", 50000, 12000, {"handler": "sync"}, {"prefetch": 500}),
        Row("Lightbus, its own prefetch (200)", "lightbus_", 50000, group="consume", settings={"what": "consume"}),
        *_on_artemis("publish", 8, 8, {"threads": 1}, large),
        *_on_artemis("consume", 8, 8, {"handler": "sync"}, large),
    )


def _on_artemis(
    what: str, count: int, peers_count: int, peers_own: dict[str, Any], own: dict[str, Any] | None = None
) -> tuple[Row, Row]:
    settings = {"what": what, **(own or {})}
    group = f"{what}, 16 MiB" if "size" in settings else what
    lacks = BARE if what == "consume" else "types and validation"
    return (
        Row("Lightbus", "lightbus_", count, group=group, settings=settings),
        Row(PROTON, "proton_", peers_count, group=group, lacks=lacks, settings={**settings, **peers_own}),
    )


CASES = tuple(
    Case(*values)  # type: ignore[arg-type]
    for values in (
        (
            "consume",
            "Consume, async handler",
            _with_limit(Suite.consume),
            (*_consumers("order"), *READERS),
            "Celery has no async handlers: its pool `solo` runs a sync function.",
            4,
        ),
        (
            "consume-sync",
            "Consume, sync handler",
            Suite.consume,
            (
                Row("Lightbus", "lightbus_", 12000, settings={"handler": "sync", "prefetch": EQUAL}),
                *_threads("sync", 8),
                Row(
                    "Dramatiq, 8 threads, its own prefetch (16)",
                    "dramatiq_",
                    4000,
                    lacks=TASKS,
                    settings={"handler": "sync"},
                ),
                Row(
                    "FastStream", "faststream_", 3000, lacks=FASTSTREAM, settings={"handler": "sync", "prefetch": EQUAL}
                ),
                Row("Nameko", "nameko_", 3000, lacks=f"{TASKS}; quorum queues", settings={**NAMEKO, "prefetch": EQUAL}),
            ),
            "The handler runs in a thread; in Nameko, in a green thread.",
            4,
        ),
        (
            "consume-wait",
            "Consume, a handler that awaits 10 ms",
            Suite.consume,
            (
                Row("Lightbus", "lightbus_", 6000, settings={"handler": "wait", "prefetch": EQUAL, "concurrency": 100}),
                Row("Lightbus, its own concurrency (32)", "lightbus_", 5000, settings={"handler": "wait"}),
                Row(
                    "FastStream", "faststream_", 3000, lacks=FASTSTREAM, settings={"handler": "wait", "prefetch": EQUAL}
                ),
                Row("aio-pika", "aio_pika_", 4000, lacks=BARE, settings={"handler": "wait", "prefetch": EQUAL}),
                Row("taskiq", "taskiq_", 3000, lacks=TASKS, settings={"handler": "wait", "prefetch": EQUAL}),
                *_threads("wait-sync", 32, 0.6),
            ),
            "Up to 100 concurrent handlers, or 32 where the label shows it or handlers run in threads.",
        ),
        (
            "consume-commits",
            "Consume real events (2,000 commits)",
            Suite.consume,
            tuple(row for row in _consumers("commit", share=0.7) if "own prefetch" not in row.label),
            "With types, including a date to parse, if the contestant supports types.",
        ),
        (
            "consume-middleware",
            "Consume with middleware and dependencies",
            Suite.around,
            (
                Row("Lightbus", "lightbus_", 500),
                Row("FastStream", "faststream_", 250, lacks=FASTSTREAM),
            ),
            "Without a server: Lightbus on `memory://`, FastStream with its TestRabbitBroker, whose subscriber is "
            "called with one message again and again. CPU of the thread that runs the event loop, lowest of 100 "
            "blocks, which take turns in one process. Added: what a line costs more than the line without.",
            5,
        ),
        (
            "telemetry",
            "Consume with metrics and traces",
            Suite.around,
            (
                Row("Lightbus", "lightbus_", 500, settings={"additions": "telemetry"}),
                Row(
                    "Lightbus, --processes",
                    "lightbus_",
                    500,
                    settings={"additions": "metrics", "multiprocess": True},
                ),
                Row("FastStream", "faststream_", 250, lacks=FASTSTREAM, settings={"additions": "telemetry"}),
            ),
            "Measured as in consume-middleware. Prometheus metrics: `Metrics(app)`, or FastStream's "
            "`RabbitPrometheusMiddleware`, in memory; with --processes, in files that several processes share. "
            "OpenTelemetry spans: `LightbusInstrumentor`, or FastStream's `RabbitTelemetryMiddleware`, with the SDK "
            "and an exporter that drops the spans; the event comes from a trace that is sampled.",
            5,
        ),
        (
            "publish-one",
            "Publish, awaited one by one",
            Suite.publish,
            _publish_one(),
            "Most of the time is spent waiting for the broker's confirm. Group sync: without an event loop.",
            4,
        ),
        (
            "publish-500",
            "Publish, 500 in flight",
            _with_limit(Suite.publish),
            (*_publishers(500, 15000), WRITER),
            "For contestants with blocking calls (Celery, Dramatiq), see publish-threads.",
            4,
        ),
        (
            "publish-threads",
            "Publish from 8 threads",
            Suite.publish,
            (
                Row("Lightbus", "lightbus_", 8000, settings={"threads": 8}),
                Row("Celery", "celery_", 3000, lacks="types and validation", settings={"threads": 8}),
                Row("Dramatiq", "dramatiq_", 3000, lacks="types and validation", settings={"threads": 8}),
            ),
        ),
        (
            "publish-many",
            "Publish in bulk (publish_many)",
            _with_limit(Suite.publish),
            (Row("Lightbus", "lightbus_", 15000, settings={"in_flight": 0}), WRITER),
            "No peer has an equivalent.",
        ),
        (
            "latency",
            "Latency from publish to handler, two processes",
            Suite.latency,
            _latency(),
            "Half of saturation: half of the highest rate that the contestant reached in the same run, so the rates "
            "differ.",
            4,
        ),
        ("cold-start", "Cold start: from the command to the first event handled", Suite.cold_start, _cold()),
        ("import", "Import", Suite.imports, _imports()),
        (
            "memory",
            "Memory of a consumer",
            Suite.memory,
            _memory(),
            "Prefetch 1,000; resident memory, including child processes.",
        ),
        ("queue-types", "Consume from quorum and classic queues", Suite.consume, _queue_types(False)),
        (
            "queue-types-publish",
            "Publish (500 in flight) to quorum and classic queues",
            Suite.publish,
            _queue_types(True),
        ),
        (
            "fan-out",
            "Fan-out: one event, several subscribed apps",
            Suite.fan_out,
            _fan_out(),
            "Each app has its own queue. Publish: events/s, confirmed by all queues. Consume: deliveries/s, all apps "
            "in one process.",
        ),
        (
            "processes",
            "Several processes on one queue",
            Suite.processes,
            _processes(),
            "Measured while all processes are running. CPU is the sum.",
        ),
        ("bodies", "Consume bodies of different sizes", Suite.consume, _bodies(False)),
        ("bodies-publish", "Publish bodies of different sizes", Suite.publish, _bodies(True), "Up to 20 MB in flight."),
        (
            "embedded",
            "The embedded broker (SQLite)",
            Suite.embedded,
            _embedded(),
            "Ratios compare with the row with two processes.",
            3,
            "publish and handle, two processes",
        ),
        (
            "handlers",
            "More handlers and bindings in one app",
            Suite.consume,
            tuple(
                Row(
                    label,
                    "lightbus_",
                    20000,
                    settings={"handlers": handlers, "one_class": one_class, "warm": 2500},
                )
                for handlers, one_class, label in (
                    (1, True, "1 handler"),
                    (100, True, "100 handlers, one class"),
                    (1000, True, "1,000 handlers, one class"),
                    (100, False, "100 handlers, own classes"),
                    (1000, False, "1,000 handlers, own classes"),
                )
            ),
            "Each handler handles a different event; the events arrive in turn. The first event of each name is not "
            "measured, because it looks up the handlers. With one class, the difference is the cost of routing and of "
            "calling the handler; with own classes, each event is also decoded as a different class.",
            4,
            "1 handler",
        ),
        (
            "dead-letters",
            "Reject every event, with dead letters in the queue",
            Suite.dead_letters,
            tuple(
                Row(f"{dead:,} dead letters", "lightbus_", 1500, settings={"dead": dead, "handler": "reject"})
                for dead in (0, 10_000, 50_000)
            ),
            "Each rejected event is copied to the dead-letter queue with a confirm, then acked.",
            3,
            "0 dead letters",
        ),
        (
            "outbox",
            "Outbox and inbox, with SQLAlchemy on PostgreSQL",
            Suite.outbox,
            _outbox(),
            "Group relay: `publish_many`, then a relay from PostgreSQL to RabbitMQ, measured over 20,000 events while "
            "so many rows wait (1,000: 20 transactions, one after the other, from the commit to the last "
            "DELETE); a ratio is `publish_many` over the relay. Dead rows: deleted, but kept by PostgreSQL because of "
            "an older open transaction. Group add: CPU of the publishing process per order (lowest of 20 blocks): with "
            "the order only, with one more ORM row that has the columns and values of an outbox row, and with "
            "`outbox.add`. Added: the last less the second, so what `outbox.add` costs beside its INSERT. Group inbox: "
            "an async handler that inserts one row, in its own transaction or in its inbox's. Add and inbox "
            "use `synchronous_commit = off`.",
            3,
            "publish_many",
        ),
        (
            "activemq",
            "On ActiveMQ Artemis",
            Suite.activemq,
            _activemq(),
            f"Artemis {artemis.VERSION}, "
            "whose confirms wait for the disk. By default, it collects writes for up to 3.3 ms before each sync, "
            "which bounds a client that waits for each confirm. Lightbus has 500 publications in flight unless "
            "the row shows another number, and one of 16 MiB; qpid-proton's blocking client can have only one. "
            "Both consume from the queue of a Lightbus app that `publish_many` has filled, with a credit of 500 "
            "unless the row shows another one; qpid-proton accepts after each event. First, "
            "30,000 events warm the broker up, because Java compiles what runs often.",
        ),
    )
)
