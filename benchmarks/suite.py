"""Measures the cases. Every run uses new processes of one contestant."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import psycopg

from benchmarks import broker
from benchmarks.process import Failed, Process
from tests.artemis import Artemis
from tests.postgres import Postgres

ROOT = Path(__file__).parent.parent
LIMIT = 90.0
"""Maximum seconds for one run of one contestant."""

Result = dict[str, Any]


@attrs.frozen
class Row:
    """One contestant in one case."""

    label: str
    peer: str
    count: int = 0
    """Events to measure."""
    group: str = ""
    """Rows are compared with the baseline of the same group."""
    lacks: str = ""
    """The features of Lightbus that this contestant does not have, or that this case does not use."""
    settings: Mapping[str, Any] = attrs.field(factory=dict)


class Suite:
    """Runs contestants against one node: Lightbus with this Python, the peers with theirs."""

    def __init__(self, url: str, *, own: str, peers: str, folder: Path, scale: float) -> None:
        self.url = url
        self.own, self.peers = own, peers
        self.folder = folder
        self.scale = scale
        self._templates: dict[str, list[broker.Template]] = {}
        self._artemis: Artemis | None = None
        self._declared: set[str] = set()
        """The names of rows whose queue is on Artemis."""
        self._postgres: Postgres | None = None
        self._databases: dict[str, str] = {}

    def close(self) -> None:
        for server in (self._artemis, self._postgres):
            if server is not None:
                server.close()

    # --- plans and processes

    def count(self, row: Row) -> int:
        lowest = 100 if row.count >= 1000 else 10
        return max(min(row.count, lowest), round(row.count * self.scale))

    def plan(self, row: Row, **changes: Any) -> dict[str, Any]:
        count = self.count(row)
        measured = {"count": count, "warm": max(300, count // 8), "tail": max(250, count // 20)}
        # Each row has its own name, because contestants declare queues with different arguments.
        name = f"bench-{zlib.crc32(repr(row).encode()):08x}"
        return {"url": self.url, "name": name, **measured, **row.settings, **changes}

    def python(self, row: Row) -> str:
        return self.own if row.peer in ("lightbus_", "limit_", "outbox_", "proton_") else self.peers

    def start(self, row: Row, plan: Mapping[str, Any], name: str = "run") -> Process:
        known = {field: value for field, value in plan.items() if field in PLAN_FIELDS}
        command = [self.python(row), "-m", "benchmarks.contestant", row.peer, json.dumps(known)]
        return Process(command, root=ROOT, log=self.folder / "logs" / f"{self._slug(row)}.{name}.log")

    def _slug(self, row: Row) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in f"{row.label} {row.group}".lower())

    def queue(self, row: Row, plan: Mapping[str, Any]) -> str:
        return self._queue_of(row, str(plan["name"]))

    def queues(self, row: Row, plan: Mapping[str, Any]) -> list[str]:
        apps = plan.get("apps", 1)
        if apps == 1:
            return [self.queue(row, plan)]
        return [self._queue_of(row, f"{plan['name']}-{index}") for index in range(apps)]

    def _queue_of(self, row: Row, name: str) -> str:
        match row.peer:
            case "lightbus_" | "outbox_":
                return f"{name}.main"
            case "nameko_":
                return f"evt-source-order.placed--{name}.handle"
            case _:
                return name

    def templates(self, row: Row, plan: Mapping[str, Any]) -> list[broker.Template]:
        """Messages that the contestant itself published: the queue is declared, filled and read."""
        key = repr(row)
        if key not in self._templates:
            with self.start(row, {**plan, "role": "seed", "threads": 0}, "seed") as process:
                sent = process.read(LIMIT)["sent"]
            taken, *_ = [broker.take(self.url, queue, sent) for queue in self.queues(row, plan)]
            if not all(template.persistent for template in taken):
                raise Failed("the messages are not persistent")
            self._templates[key] = taken
        return self._templates[key]

    # --- what is measured

    def consume(self, row: Row) -> dict[str, Result]:
        plan = self.plan(row)
        templates = self.templates(row, plan)
        queues = self.queues(row, plan)
        total = plan["warm"] + plan["count"] + plan["tail"]
        for queue in queues:
            broker.purge(self.url, queue)
        broker.fill(self.url, templates, total)
        for queue in queues:
            self._expect(queue, total, "were copied")
        apps = len(queues)
        if apps > 1:
            plan |= {key: plan[key] * apps for key in ("warm", "count", "tail")}
        with self.start(row, plan) as process:
            result = process.read(LIMIT)
        for queue in queues:
            self._expect(queue, 0, "are left unacked")
        if not result.pop("right") or result["handled"] != total * apps:
            raise Failed(f"handled {result['handled']} events, not each of {total * apps} once")
        return {"": _rated(result)}

    def _expect(self, queue: str, count: int, what: str, *, fewer: int = 0) -> None:
        found = broker.until_waiting(self.url, queue, count, fewer=fewer)
        if not count - fewer <= found <= count:
            raise Failed(f"{found} messages {what} in {queue!r}, not {count}")

    def limit(self, row: Row) -> dict[str, Result]:
        """The byte reader and the byte writer."""
        if row.settings["handler"] == "write":
            return self._limit_write(row)
        plan = self.plan(row, role="raw")
        total = plan["warm"] + plan["count"] + plan["tail"]
        queue = plan["name"] = "bench-bytes"
        reference = attrs.evolve(row, label="Lightbus", peer="lightbus_", settings={})
        templates = self.templates(reference, self.plan(reference))
        with broker.channel(self.url) as on:
            arguments = {"x-queue-type": plan.get("queue_type", "quorum")}
            on.queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)
        broker.purge(self.url, queue)
        # The same messages as for Lightbus, with the same exchange and routing key in each delivery.
        with broker.channel(self.url) as on:
            on.queue_bind(queue, templates[0].exchange, templates[0].routing_key)
        broker.fill(self.url, templates, total)
        with broker.channel(self.url) as on:
            on.queue_unbind(queue, templates[0].exchange, templates[0].routing_key)
        self._expect(queue, total, "were copied")
        with self.start(row, plan) as process:
            result = process.read(LIMIT)
        broker.purge(self.url, queue)
        return {"": _rated(result)}

    def _limit_write(self, row: Row) -> dict[str, Result]:
        plan = self.plan(row, role="raw", name="bench-bytes")
        broker.purge(self.url, "bench-bytes")
        with self.start(row, plan) as process:
            result = process.read(LIMIT)
        self._expect("bench-bytes", result["sent"], "arrived")
        broker.purge(self.url, "bench-bytes")
        return {"": _rated(result)}

    def publish(self, row: Row) -> dict[str, Result]:
        plan = self.plan(row, role="publish")
        self.templates(row, plan)
        queues = self.queues(row, plan)
        for queue in queues:
            broker.purge(self.url, queue)
        with self.start(row, plan) as process:
            result = process.read(LIMIT)
        for queue in queues:
            self._expect(queue, result["sent"], "arrived")
            broker.purge(self.url, queue)
        return {"": _rated(result)}

    def around(self, row: Row) -> dict[str, Result]:
        """Middleware and dependencies, in one process and without a server."""
        plan = {**self.plan(row, role="around"), "warm": 100}
        with self.start(row, plan) as process:
            parts: dict[str, Result] = process.read(LIMIT)["parts"]
        return parts

    def fan_out(self, row: Row) -> dict[str, Result]:
        """Publish one event to several apps, then handle it in all of them, in one process."""
        published = self.publish(row)[""]
        consumed = self.consume(row)[""]
        return {"publish": published, "consume": consumed}

    def latency(self, row: Row) -> dict[str, Result]:
        """At 200 events/s, then as fast as possible, then at half of that rate."""
        plan = self.plan(row)
        self.templates(row, plan)
        for queue in self.queues(row, plan):
            broker.purge(self.url, queue)
        slow, fast, half = (max(50, round(count * self.scale)) for count in (1000, 4000, 3000))
        phases = [slow, fast, half]
        with self.start(row, {**plan, "role": "latency", "phases": phases}, "consumer") as consumer:
            consumer.read(LIMIT)
            at_200 = self._phase(row, plan, consumer, 200, slow)
            full = self._phase(row, plan, consumer, 1e9, fast)
            saturation = full["events"] / full["wall"]
            at_half = self._phase(row, plan, consumer, saturation / 2, half)
        return {
            "200 events/s": _only(at_200, "events", "p50_ms", "p99_ms"),
            "half of saturation": {**_only(at_half, "events", "p50_ms", "p99_ms"), "rate": saturation / 2},
        }

    def _phase(self, row: Row, plan: Mapping[str, Any], consumer: Process, rate: float, count: int) -> Result:
        with self.start(row, {**plan, "role": "publish", "rate": rate, "count": count}, "publisher") as publisher:
            result = consumer.read(LIMIT)
            publisher.read(LIMIT)
        return result

    def cold_start(self, row: Row) -> dict[str, Result]:
        """From the start of the command to the first line of the handler, with one event in the queue."""
        plan = self.plan(row)
        templates = self.templates(row, plan)
        broker.purge(self.url, self.queue(row, plan))
        broker.fill(self.url, templates, 1)
        self._expect(self.queue(row, plan), 1, "were copied")
        out = self.folder / "cold"
        out.write_text("")
        environment = {"BENCH_URL": self.url, "BENCH_NAME": plan["name"], "BENCH_OUT": str(out)}
        python = Path(self.python(row))
        command = [str(python.parent / row.settings["command"][0]), *row.settings["command"][1:]]
        with Process(command, root=ROOT, log=self.folder / "logs" / "cold.log", environment=environment) as process:
            deadline = time.monotonic() + 30
            while not out.read_text():
                if process.process.poll() is not None or time.monotonic() > deadline:
                    raise Failed(f"handled nothing. {process._tail()}")
                time.sleep(0.01)
            began = process.started
            time.sleep(0.3)
        return {"": {"seconds": float(out.read_text().split()[0]) - began}}

    def imports(self, row: Row) -> dict[str, Result]:
        """The import statement of an application in a new interpreter; the second run, with compiled files, counts."""
        code = (
            "import time, json; wall, cpu = time.perf_counter(), time.process_time()\n"
            f"{row.settings['statement']}\n"
            "print(json.dumps({'milliseconds': (time.perf_counter() - wall) * 1000,"
            " 'cpu_ms': (time.process_time() - cpu) * 1000}), flush=True)"
        )
        result: Result = {}
        for _ in range(2):
            with Process([self.python(row), "-c", code], root=ROOT, log=self.folder / "logs" / "import.log") as process:
                result = process.read(30)
        return {"": result}

    def memory(self, row: Row) -> dict[str, Result]:
        """Resident memory at rest, then with 1,000 unacknowledged events whose handlers do not end."""
        plan = self.plan(row, role="memory")
        templates = self.templates(row, plan)
        queue = self.queue(row, plan)
        broker.purge(self.url, queue)
        with self.start(row, plan) as process:
            rest = process.read(LIMIT)
            broker.fill(self.url, templates, 1500)
            self._expect(queue, 500, "are ready")
            process.resume()
            full = process.read(LIMIT)
        broker.purge(self.url, queue)
        return {"at rest": _only(rest, "rss_mb"), "1,000 in hand": _only(full, "rss_mb")}

    def processes(self, row: Row) -> dict[str, Result]:
        """Several processes on one queue, measured while all of them are running."""
        plan = self.plan(row, role="share")
        templates = self.templates(row, plan)
        queue = self.queue(row, plan)
        total = plan["count"]
        broker.purge(self.url, queue)
        broker.fill(self.url, templates, total)
        self._expect(queue, total, "were copied")
        with contextlib.ExitStack() as stack:
            started = [
                stack.enter_context(self.start(row, plan, f"run{index}")) for index in range(row.settings["processes"])
            ]
            for process in started:
                process.read(LIMIT)
            broker.until_waiting(self.url, queue, 0, LIMIT)
            time.sleep(1.0)
            for process in started:
                process.resume()
            results = [process.read(LIMIT) for process in started]
        handled = sorted(value for one in results for value in one["values"])
        if len(handled) != total or len(set(handled)) != total:
            raise Failed(
                f"handled {len(handled)} events ({len(set(handled))} different), expected each of {total} once"
            )
        return {"": _rated(_overlap([one["stamps"] for one in results]))}

    def dead_letters(self, row: Row) -> dict[str, Result]:
        """A handler that rejects every event, with a number of dead letters in the queue before."""
        plan = self.plan(row)
        templates = self.templates(row, plan)
        dead = f"{plan['name']}.dead"
        broker.purge(self.url, dead)
        earlier = round(row.settings["dead"] * self.scale)
        copies = [attrs.evolve(one, exchange=f"{plan['name']}.internal", routing_key="dead") for one in templates]
        broker.fill(self.url, copies, earlier)
        self._expect(dead, earlier, "were copied")
        result = self.consume(row)[""]
        self._expect(dead, earlier + plan["warm"] + plan["count"] + plan["tail"], "are dead letters")
        return {"": result}

    def embedded(self, row: Row) -> dict[str, Result]:
        """The embedded broker: publish, consume, and both at the same time from two processes."""
        what, waiting = row.settings["what"], round(row.settings["waiting"] * self.scale)
        folder = Path(tempfile.mkdtemp(prefix="lightbus-bench-"))
        try:
            plan = self.plan(row, url=f"sqlite:///{folder}/bus.db", name="bench")
            if row.settings.get("rabbitmq"):
                plan["url"] = self.url
                self.templates(row, plan)
                broker.purge(self.url, plan["name"])
            elif waiting:
                shutil.copytree(self._filled(row, waiting), folder, dirs_exist_ok=True)
            else:
                self._single(row, plan, "declare", role="declare")
            if what == "across":
                return {"": self._across(row, plan, waiting)}
            if what == "consume":
                return {"": self._consume_embedded(row, plan, waiting)}
            in_flight = 0 if what == "publish_many" else 500
            return {"": _rated(self._single(row, plan, "publish", role="publish", in_flight=in_flight))}
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _single(self, row: Row, plan: Mapping[str, Any], name: str, **changes: Any) -> Result:
        with self.start(row, {**plan, **changes}, name) as process:
            return process.read(2 * LIMIT)

    def _consume_embedded(self, row: Row, plan: dict[str, Any], waiting: int) -> Result:
        total = plan["warm"] + plan["count"] + plan["tail"]
        if not waiting:
            self._single(row, plan, "fill", role="publish", in_flight=0, count=total, greet=0)
        result = self._single(row, plan, "consume")
        if not result.pop("right"):
            raise Failed(f"handled {result['handled']} events, not each of the first {total} once")
        return _rated(result)

    def _across(self, row: Row, plan: dict[str, Any], waiting: int) -> Result:
        """One process publishes while another one handles."""
        count = plan["count"]
        if not waiting:  # from the first publish to the last handler
            with self.start(row, {**plan, "role": "latency", "phases": [count]}, "consumer") as consumer:
                consumer.read(LIMIT)
                self._single(row, plan, "publisher", role="publish", rate=1e9)
                return _rated(_only(consumer.read(LIMIT), "events", "wall"))
        # The lower of the two rates while the publisher is running, so that the backlog does not grow.
        with self.start(row, {**plan, "role": "share"}, "consumer") as consumer:
            consumer.read(LIMIT)
            published = self._single(row, plan, "publisher", role="publish")
            consumer.resume()
            stamps = consumer.read(LIMIT)["stamps"]
        began, ended = published["begun"], published["begun"] + published["wall"]
        if len(stamps) < 2:
            raise Failed("the consumer handled too few events")
        handled = _at(stamps, ended)[0] - _at(stamps, began)[0]
        return {
            **_rated({"events": min(handled, count), "wall": published["wall"]}),
            "published_rate": count / published["wall"],
            "handled_rate": handled / published["wall"],
        }

    def _filled(self, row: Row, waiting: int) -> Path:
        """A folder with a file that contains this number of events. It is created once, and copied for each run."""
        folder = self.folder / f"filled-{waiting}"
        if not folder.exists():
            making = self.folder / "filling"
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            plan = self.plan(row, url=f"sqlite:///{making}/bus.db", name="bench")
            self._single(row, plan, "declare", role="declare")
            self._single(row, plan, "fill", role="publish", in_flight=0, count=waiting, greet=0)
            making.rename(folder)
        return folder

    # --- ActiveMQ Artemis

    def activemq(self, row: Row) -> dict[str, Result]:
        """Publish to, or consume from, the queue of a Lightbus app of the row's name."""
        if self._artemis is None:
            self._artemis = Artemis(sync=True)
            self._artemis.start()
            # Java compiles what runs often. Otherwise the first contestants would measure a slower broker.
            self.activemq(Row("warm-up", "lightbus_", 30000, settings={"what": "consume"}))
        plan = self.plan(row, url=self._artemis.url())
        app = attrs.evolve(row, peer="lightbus_")
        if plan["name"] not in self._declared:
            self._single(app, plan, "declare", role="declare", threads=0)
            self._declared.add(plan["name"])
        self._on_queue(plan, "removeAllMessages")
        if row.settings["what"] == "publish":
            result = self._single(row, plan, "publish", role="publish")
            expected = result["sent"]
        else:
            expected, total = 0, plan["warm"] + plan["count"] + plan["tail"]
            self._single(app, plan, "fill", role="publish", in_flight=0, count=total, greet=0)
            result = self._single(row, plan, "consume")
            if not result.pop("right") or result["handled"] != total:
                raise Failed(f"handled {result['handled']} events, not each of {total} once")
        if (left := self._on_queue(plan, "getMessageCount")) != expected:
            raise Failed(f"{left} messages are left in the queue, not {expected}")
        self._on_queue(plan, "removeAllMessages")
        return {"": _rated(result)}

    def _on_queue(self, plan: Mapping[str, Any], operation: str) -> int:
        assert self._artemis is not None
        with self._artemis.management() as management:
            (answer,) = management.call([(f"queue.{plan['name']}.main", operation, [])])
        return int(answer)

    # --- the outbox and the inbox

    def outbox(self, row: Row) -> dict[str, Result]:
        match row.settings.get("handler"):
            case "add":
                return self._outbox_add(row)
            case "relay":
                return self._outbox_relay(row)
            case _ if "around" in row.settings:
                return self._inbox(row)
            case _:
                return self.publish(row)

    def _outbox_add(self, row: Row) -> dict[str, Result]:
        plan = self._on_database(row)
        with self.start(row, {**plan, "role": "raw"}) as process:
            result = process.read(LIMIT)
        parts: dict[str, Result] = result["parts"]
        parts["with outbox.add"]["added_us"] = result["added_us"]
        return parts

    def _outbox_relay(self, row: Row) -> dict[str, Result]:
        """Rows are sent while so many wait. A queue of one app gets the events."""
        warm = self.count(attrs.evolve(row, count=1000))
        plan = self._on_database(row, role="raw")
        plan["phases"] = [warm, warm + plan["count"]]
        self.templates(row, plan)
        filled = round(row.settings.get("filled", 0) * self.scale) + warm + plan["count"]
        with self._sql(plan) as connection, self._sql(plan) as older:
            if not (dead := round(row.settings.get("dead", 0) * self.scale)):
                return {"": self._relayed(row, plan, connection, filled)}
            older.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            older.execute("SELECT count(*) FROM lightbus_seed")
            first = self._relayed(row, plan, connection, filled)
            self._fill(connection, filled + dead)
            connection.execute(
                b"DELETE FROM lightbus_outbox WHERE id IN (SELECT id FROM lightbus_outbox ORDER BY id LIMIT %d)" % dead
            )
            return {"no dead rows": first, f"{dead:,} dead rows": self._relayed(row, plan, connection, filled)}

    def _relayed(self, row: Row, plan: Mapping[str, Any], connection: psycopg.Connection[Any], filled: int) -> Result:
        queue = self.queue(row, plan)
        broker.purge(self.url, queue)
        if "waiting" not in plan:
            self._fill(connection, filled)
        with self.start(row, plan) as process:
            result = process.read(LIMIT)
        # Each row that is gone was published. The last batch may be published and not deleted.
        left, sent = _single(connection, "SELECT count(*) FROM lightbus_outbox"), result["sent"]
        arrived = broker.until_waiting(self.url, queue, sent + 1000, fewer=1000)
        if ("waiting" not in plan and filled - left != sent) or not sent <= arrived <= sent + 1000:
            raise Failed(f"{filled - left} rows are deleted, {sent} were confirmed, {arrived} are in the queue")
        broker.purge(self.url, queue)
        return _rated(result)

    def _fill(self, connection: psycopg.Connection[Any], count: int) -> None:
        """Have so many rows wait."""
        from benchmarks.peers.outbox_ import COPIES

        there = _single(connection, "SELECT count(*) FROM lightbus_outbox")
        connection.execute(COPIES.format(count=count - there).encode())
        connection.execute("ANALYZE lightbus_outbox")
        connection.execute("CHECKPOINT")  # not while the relay is measured

    def _inbox(self, row: Row) -> dict[str, Result]:
        plan = self._on_database(row)
        with self._sql(plan) as connection:
            connection.execute("TRUNCATE bill, lightbus_inbox")
        result = self.consume(attrs.evolve(row, settings={**row.settings, "database": plan["database"]}))[""]
        if result["rows"] != result["handled"]:
            raise Failed(f"{result['rows']} rows for {plan['count']} events")
        return {"": result}

    def _on_database(self, row: Row, **changes: Any) -> dict[str, Any]:
        """The plan with the row's own database, which has the tables."""
        key = repr(row)
        plan = self.plan(row, **changes)
        if key not in self._databases:
            if self._postgres is None:
                self._postgres = Postgres(POSTGRES, durable=True)
                self._postgres.start()
            url = self._postgres.url(self._postgres.create_database())
            with self.start(row, {**plan, "role": "raw", "handler": "schema", "database": url}, "schema") as process:
                process.read(LIMIT)
            self._databases[key] = url
        return {**plan, "database": self._databases[key]}

    def _sql(self, plan: Mapping[str, Any]) -> psycopg.Connection[Any]:
        return psycopg.connect(plan["database"].replace("+psycopg", ""), autocommit=True)


POSTGRES = "shared_buffers = 256MB\nmax_wal_size = 4GB\n"
"""Its defaults otherwise: each commit waits for the disk, autovacuum runs."""


def _single(connection: psycopg.Connection[Any], query: str) -> int:
    (value,) = connection.execute(query.encode()).fetchone() or (0,)
    return int(value)


PLAN_FIELDS: frozenset[str]


def _plan_fields() -> frozenset[str]:
    from benchmarks.plan import Plan

    return frozenset(field.name for field in dataclasses.fields(Plan))


PLAN_FIELDS = _plan_fields()


def _only(result: Result, *names: str) -> Result:
    return {name: result[name] for name in names}


def _rated(result: Result) -> Result:
    """Add events/s and microseconds of CPU per event."""
    rated = {**result, "rate": result["events"] / result["wall"]}
    if "cpu" in result:
        rated["cpu_us"] = result["cpu"] / result["events"] * 1e6
    return rated


def _overlap(stamps: list[list[tuple[int, float, float]]]) -> Result:
    """Events and CPU of all processes while all of them are running: from the fourth stamp of the one that started last
    to the last stamp of the one that ended first.
    """
    if any(len(one) < 8 for one in stamps):
        raise Failed("one process handled too few events: too few events for this number of processes")
    began = max(one[3][1] for one in stamps)
    ended = min(one[-1][1] for one in stamps)
    if ended <= began:
        raise Failed("the processes did not run at the same time: too few events")
    events = cpu = 0.0
    for one in stamps:
        first, last = _at(one, began), _at(one, ended)
        events += last[0] - first[0]
        cpu += last[1] - first[1]
    return {"events": events, "wall": ended - began, "cpu": cpu}


def _at(stamps: list[tuple[int, float, float]], when: float) -> tuple[float, float]:
    """Events handled and CPU used until then, interpolated between two stamps."""
    for (number, time_, cpu), (next_number, next_time, next_cpu) in itertools.pairwise(stamps):
        if time_ <= when <= next_time:
            share = (when - time_) / max(next_time - time_, 1e-9)
            return number + share * (next_number - number), cpu + share * (next_cpu - cpu)
    return stamps[-1][0], stamps[-1][2]
