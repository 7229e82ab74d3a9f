"""The scenarios: each function causes a fault under load, once or several times, and returns a row of the table.

The parameters, such as `times`, make it long (`make faults`) or short (`make test`).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from lightbus.transport import Publication
from lightbus.transport.amqp import wire as wire
from tests.bus import publish_confirmed
from tests.faults.ledger import CONFIRMED, COUNTED, COUNTING, FAILED, HANDLED, TRIED
from tests.faults.proxy import Proxy
from tests.faults.scene import LIMIT, Process, Row, Scene, id_of
from tests.faults.stage import CannotRun, Stage, connect, vhost_of
from tests.patience import DELAY
from tests.processes import children_of
from tests.rabbitmq import free_port

HEARTBEAT = 2
FRAME_MAX = 131_072
"""The frame size that RabbitMQ and the client negotiate."""
BEATS = f"?heartbeat={HEARTBEAT}"
IDLE = f"amqpIdleTimeout={1000 * 2 * HEARTBEAT}"
"""On Artemis, `BEATS` is the client's limit only. This is the broker's; by default, it has 60 s."""


# --- the worker -------------------------------------------------------------------------------


def worker_killed(stage: Stage, *, times: int, events: int = 0, broker: str = "rabbitmq") -> Row:
    with Scene(stage.url(broker)) as scene:
        worker = scene.worker(work=0.02)
        scene.publisher("--rate", "200")
        for _ in range(times):
            scene.until_handled(max(50, events // times))
            with scene.fault(only_workers=True):
                worker.kill()
                worker = scene.worker(ready=False, work=0.02)
        scene.settle(events=events)
        return scene.row("worker killed (kill -9)", times)


def counting_processes_killed(stage: Stage, *, times: int, events: int) -> Row:
    """`/metrics` of two processes, of which one is killed now and then, agrees with what they have recorded."""
    with Scene(stage.vhost()) as scene:
        port = free_port()
        options = ("--processes", "2", "--health-port", str(port), "--metrics")
        worker = scene.worker(*options, program=("lightbus", "worker", "tests.faults.counted:app"))
        scene.until(lambda: worker.log.count("Ready:") == 2, "both processes are ready", worker)
        dead, chunk = 0, events // (2 * times)
        for first in range(0, events, chunk):
            things = [(f"e-{number}", "" if number % 50 else "fail") for number in range(first, first + chunk)]
            dead += sum(do == "fail" for _, do in things)
            scene.publish_all(things)
            if len(scene.faults) < times and first >= len(scene.faults) * events // times:
                # One or both may still be in the pause before a restart.
                scene.until(lambda: children_of(worker.popen.pid), "a process runs", worker)
                living = children_of(worker.popen.pid)
                with scene.fault(recovers=False):
                    os.kill(living[len(scene.faults) % len(living)], signal.SIGKILL)
        scene.settle(dead=dead, limit=10 * LIMIT)
        counters, before, after = _quiet_counters(scene, port, dead)
        row = scene.row("process killed (kill -9), counters compared", times)
        assert row.times == len(scene.faults)
        for kind in counters.keys() | before.keys():
            assert after[kind] <= counters[kind] <= before[kind], (kind, counters, before, after)
        in_flight = before.total() - after.total()
        # An event loop counts one outcome at a time, so each kill can have cut off one of them.
        assert 0 <= in_flight <= times, f"{in_flight} outcomes were being counted at {times} kills"
        shown = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counters.items()))
        return attrs.evolve(
            row,
            note=f"`/metrics` counted {shown}, which the observers have recorded, too; {in_flight} kills fell between "
            "the two records of an outcome",
        )


def _quiet_counters(scene: Scene, port: int, dead: int) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """The counters, and the recorded outcomes before and after, at a moment at which none is added."""
    found: list[tuple[Counter[str], Counter[str], Counter[str]]] = []

    def recorded(kind: str) -> Counter[str]:
        return Counter(entry.fields[0] for entry in scene.ledger.entries(kind))

    def is_quiet() -> bool:
        before, after = recorded(COUNTING), recorded(COUNTED)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT) as answer:
                text: str = answer.read().decode()
        except OSError:  # the process has just been killed
            return False
        counters: Counter[str] = Counter()
        for outcome, count in re.findall(r'^lightbus_events_total\{.*outcome="(\w+)".*\} (\S+)$', text, re.MULTILINE):
            counters[outcome] += int(float(count))
        found[:] = [(counters, before, after)]
        return (before, after) == (recorded(COUNTING), recorded(COUNTED)) and after["dead"] >= dead

    scene.until(is_quiet, "all outcomes are counted")
    return found[0]


def worker_stopped(stage: Stage, *, times: int, broker: str = "rabbitmq") -> Row:
    with Scene(stage.url(broker)) as scene:
        worker = scene.worker(work=0.5)
        scene.publisher("--rate", "40")
        for _ in range(times):
            scene.until_handled(20)
            with scene.fault(only_workers=True):
                code = worker.stop()
                assert code == 0, f"the worker exited with {code}:\n{worker.log}"
                worker = scene.worker(ready=False, work=0.5)
        scene.settle()
        row = scene.row("worker stopped (SIGTERM), handlers in flight", times)
        assert not row.duplicates, f"a graceful stop must not cause duplicates: {row.duplicates}"
        return row


def serve_cancelled(stage: Stage, *, times: int) -> Row:
    """A program cancels the task of `serve`: running handlers have not failed, and their events are redelivered."""
    with Scene(stage.vhost()) as scene:
        program = ("tests.faults.serve",)
        worker = scene.worker(work=0.5, program=program)
        scene.publisher("--rate", "40")
        for _ in range(times):
            scene.until_handled(20)
            with scene.fault(only_workers=True):
                worker.signal(signal.SIGUSR1)
                scene.until(lambda: not worker.alive, "the program ends")  # noqa: B023
                assert "failed on" not in worker.log, worker.log
                worker = scene.worker(ready=False, work=0.5, program=program)
        scene.settle()
        row = scene.row("serve() cancelled, handlers in flight", times)
        assert not row.dead, f"no handler has failed, but {row.dead} events are dead letters"
        return row


def _consumers(url: str) -> int:
    connection = connect(url)
    try:
        return int(connection.channel().queue_declare("billing.main", passive=True).consumer_count)
    finally:
        connection.close()


def worker_frozen(stage: Stage, *, times: int, broker: str = "rabbitmq") -> Row:
    """SIGSTOP for more than two heartbeats, so that the broker closes the connection; then SIGCONT."""
    with Scene(stage.url(broker, BEATS, acceptor=IDLE)) as scene:
        worker = scene.worker(work=0.02)
        scene.publisher("--rate", "100")
        for number in range(times):
            scene.until_handled(50)
            with scene.fault(only_workers=True):
                worker.signal(signal.SIGSTOP)
                time.sleep(HEARTBEAT * 3.5)
                scene.until(lambda: _consumers(scene.url) == 0, "the broker closes the connection")
                worker.signal(signal.SIGCONT)
            lost = worker.log.count("connection lost")
            assert lost > number, f"the broker did not close the connection of the frozen worker:\n{worker.log}"
        scene.settle()
        note = f"with the acceptor's option {IDLE}" if broker == "artemis" else ""
        return scene.row("worker frozen (SIGSTOP) for 3.5 heartbeats", times, note=note)


def loop_blocked(stage: Stage, *, times: int) -> Row:
    """An async handler blocks the event loop for three heartbeats: the connection stays open."""
    heartbeat = 2 * HEARTBEAT  # a busy machine must not miss two
    with Scene(stage.vhost(f"?heartbeat={heartbeat}")) as scene:
        worker = scene.worker()
        scene.publisher("--rate", "50")
        for number in range(times):
            scene.until_handled(20)
            with scene.fault(only_workers=True):
                scene.publish(f"block-{number}", f"block:{heartbeat * 3 + 1}")
                scene.until(lambda: f"block-{number}" in scene.ledger.ids(HANDLED), "the blocking handler ends")  # noqa: B023
        scene.settle()
        row = scene.row("event loop blocked for 3 heartbeats", times)
        assert "connection lost" not in worker.log, worker.log
        assert not row.duplicates, f"no event must be redelivered: {row.duplicates}"
        return row


def handler_crashes(
    stage: Stage,
    *,
    prefetch: int,
    workers: int = 1,
    limit: int | None = None,
    earlier: int = 0,
    broker: str = "rabbitmq",
) -> Row:
    """A handler crashes its process each time. At the delivery limit, the broker dead-letters its event, and no other.

    Args:
        limit: the delivery limit of a policy; None: the limit of the queue.
        earlier: number of redeliveries before the first crash, so that fewer crashes are left.
    """
    with Scene(stage.url(broker)) as scene:
        if limit is not None:
            definition = f'{{"delivery-limit": {limit}}}'
            vhost = vhost_of(scene.url)
            stage.node.ctl("set_policy", "-p", vhost, "limit", r"^billing\.main$", definition, "--apply-to", "queues")
        _fill_with_poison(scene)
        for _ in range(earlier):
            scene.take_all("billing.main")
        expected = (DELIVERY_LIMIT if limit is None else limit) + 1 - earlier
        crashes = _crash_until_all_is_done(scene, prefetch, workers, expected)
        assert crashes == expected, f"{crashes} crashes, with a delivery limit of {expected - 1}"
        many = "" if workers == 1 else f", {workers} workers"
        fault = f"handler that crashes its worker, prefetch {prefetch}{many}"
        row = scene.row(fault, crashes, recoveries=[])
        assert (row.dead, row.handled) == (1, OTHERS)
        return row


DELIVERY_LIMIT = 20
"""The limit of the queues: redeliveries that the broker allows."""
LIVES = 60
"""Crashes after which the event must be dead-lettered."""
OTHERS = 120


def _fill_with_poison(scene: Scene) -> None:
    scene.declare()
    others = [(f"other-{number}", "") for number in range(OTHERS)]
    scene.publish_all([*others[: OTHERS // 2], ("poison", "crash"), *others[OTHERS // 2 :]])


def _crash_until_all_is_done(scene: Scene, prefetch: int, workers: int, expected: int) -> int:
    """Restart each worker that crashes, at least as often as expected. Return the number of crashes."""

    def start() -> Process:
        return scene.worker("--prefetch", str(prefetch), ready=False, work=0.01)

    def all_is_done() -> bool:
        # The broker may notice the last crash before the process has ended.
        return crashes >= expected and len(scene.ledger.ids(HANDLED) | dead(scene)) > OTHERS

    began = time.monotonic()
    running = [start() for _ in range(workers)]
    crashes = 0
    while not all_is_done():
        scene.until(
            lambda: not all(worker.alive for worker in running) or all_is_done(), "a worker crashes, or all is done"
        )
        for number, worker in enumerate(running):
            if not worker.alive:
                assert worker.popen.returncode == 99, worker.log
                crashes += 1
                assert crashes <= LIVES, "the event that crashes its worker is redelivered forever"
                running[number] = start()
    scene.faults.append((began, time.monotonic()))
    died_with_it = dead(scene) - {"poison"}
    assert not died_with_it, f"{len(died_with_it)} events are dead-lettered with the one that crashes its workers"
    return crashes


def dead(scene: Scene) -> set[str]:
    return {id_of(delivery) for delivery in scene.take_all("billing.dead")}


# --- the broker -------------------------------------------------------------------------------


def broker_killed(stage: Stage, *, times: int, events: int = 0, broker: str = "rabbitmq") -> Row:
    with Scene(stage.url(broker)) as scene:
        server = stage.server(broker)
        scene.worker()
        scene.worker()
        scene.publisher("--rate", "100")
        scene.publisher("--rate", "100", "--timeout", "3")
        for _ in range(times):
            scene.until_handled(max(100, events // times))
            with scene.fault():
                server.kill()
                server.start()
        scene.settle(events=events)
        return scene.row("broker killed (kill -9) and restarted", times)


def broker_away(stage: Stage, *, seconds: float, broker: str = "rabbitmq") -> Row:
    with Scene(stage.url(broker)) as scene:
        scene.worker()
        scene.publisher("--rate", "100", "--timeout", "3")
        scene.until_handled(100)
        with scene.fault():
            server = stage.server(broker)
            server.stop()
            time.sleep(seconds)
            server.start()
        scene.settle()
        return scene.row(f"broker down for {seconds:g} s", 1)


def broker_absent_at_start(stage: Stage, *, broker: str = "rabbitmq") -> Row:
    url = stage.url(broker)
    server = stage.server(broker)
    with Scene(url) as scene:
        if broker == "artemis":  # it confirms events without a queue, too
            scene.declare()
        server.stop()
        with scene.fault():
            worker = scene.worker(ready=False)
            scene.publisher("--rate", "20", "--timeout", "1")
            scene.until(lambda: len(scene.ledger.entries(FAILED)) >= 3, "publishers get errors")
            scene.until(lambda: "Is the broker running there?" in worker.log, "the worker logs why it waits")
            server.start()
        scene.until_handled(20)
        scene.settle()
        return scene.row("broker not running at startup", 1)


def cluster_nodes_killed(stage: Stage, *, rounds: int) -> Row:
    with Scene(stage.cluster_vhost()) as scene:
        scene.worker()
        scene.worker()
        scene.publisher("--rate", "100")
        recoveries: list[float] = []
        for _ in range(rounds):
            for node in stage.cluster:
                scene.until_handled(100)
                with scene.fault():
                    node.kill()
                    down = time.monotonic()
                    scene.until_recovered(down)  # the other two nodes continue
                    after = [entry.time for entry in scene.ledger.entries(HANDLED) if entry.time > down]
                    recoveries.append(_first_new(scene, down) - down)
                    assert after
                    node.start()
        scene.settle()
        return scene.row(
            "cluster of 3: each node killed in turn",
            3 * rounds,
            recoveries=recoveries,
            note="recovery is measured while the node is still down",
        )


def _first_new(scene: Scene, since: float) -> float:
    """The time at which the first event published after `since` was handled."""
    tried = {entry.id for entry in scene.ledger.entries(TRIED) if entry.time > since}
    return next(entry.time for entry in scene.ledger.entries(HANDLED) if entry.id in tried)


def memory_alarm(stage: Stage, *, backlog: int) -> Row:
    """Publishers get an error within the timeout, consumers continue to ack, and everything resumes automatically."""
    timeout = 2.0
    with Scene(stage.vhost()) as scene:
        scene.declare()
        scene.publish_all([(f"backlog-{number}", "") for number in range(backlog)])
        node, vhost = stage.node, vhost_of(scene.url)
        try:
            with scene.fault():
                node.ctl("set_vm_memory_high_watermark", "0.0000001")
                scene.publisher("--rate", "50", "--timeout", str(timeout))
                scene.until(lambda: len(scene.ledger.entries(FAILED)) >= 8, "publishers get errors")
                scene.worker("--concurrency", "4", work=0.005)
                scene.until(
                    lambda: len(scene.ledger.ids(HANDLED)) >= backlog, "the backlog is handled during the alarm"
                )
                scene.until(
                    lambda: "billing.main\t0\n" in node.ctl("list_queues", "-p", vhost, "name", "messages"),
                    "the backlog is acked during the alarm",
                )
                node.ctl("set_vm_memory_high_watermark", "0.6")
        finally:
            node.ctl("set_vm_memory_high_watermark", "0.6")
        tried = {entry.id: entry.time for entry in scene.ledger.entries(TRIED)}
        longest = max(entry.time - tried[entry.id] for entry in scene.ledger.entries(FAILED))
        assert longest < timeout + DELAY, f"an error came after {longest:.1f} s, with a timeout of {timeout:g} s"
        scene.settle()
        note = f"errors after at most {longest:.1f} s, timeout 2 s; backlog of {backlog:,} acked during the alarm"
        return scene.row("memory alarm", 1, note=note)


def queue_deleted(stage: Stage, *, times: int) -> Row:
    """The consumer gets basic.cancel. Events in the queue would be lost with it, so it is empty at that time."""
    with Scene(stage.vhost()) as scene:
        worker = scene.worker()
        scene.publisher("--rate", "100")
        for number in range(times):
            scene.until_handled(50)
            scene.ledger.pause(paused=True)
            scene.until(lambda: _all_is_quiet(scene), "no event is in flight")
            with scene.fault():
                connection = connect(scene.url)
                connection.channel().queue_delete("billing.main")
                connection.close()
                scene.ledger.pause(paused=False)
            assert worker.log.count("cancelled the consumer") > number, worker.log
        scene.settle()
        return scene.row("queue deleted while it is consumed", times)


def retry_queue_deleted(stage: Stage, *, times: int) -> Row:
    """The worker holds other events. The queue is declared again, and no event is handled twice."""
    with Scene(stage.vhost()) as scene:
        worker = scene.worker(work=0.05)
        scene.publisher("--rate", "200")
        for number in range(times):
            scene.until_handled(50)
            with scene.fault():
                connection = connect(scene.url)
                connection.channel().queue_delete("billing.retry.200ms")
                connection.close()
                scene.publish(f"fails-{number}", "fail")
                scene.until(lambda: worker.log.count("Declaring it again") > number, "the worker declares it again")  # noqa: B023
            # Before the queue is deleted again: events that wait in it would be lost.
            scene.until(lambda: _dead_letters(scene) > number, "the last attempt has failed")  # noqa: B023
        scene.settle()
        row = scene.row("retry queue deleted while a worker runs", times)
        assert "connection lost" not in worker.log, worker.log
        assert not row.duplicates, f"no event must be redelivered: {row.duplicates}"
        return row


def _dead_letters(scene: Scene) -> int:
    connection = connect(scene.url)
    try:
        return int(connection.channel().queue_declare("billing.dead", passive=True).message_count)
    finally:
        connection.close()


def _all_is_quiet(scene: Scene) -> bool:
    concluded = len(scene.ledger.entries(CONFIRMED)) + len(scene.ledger.entries(FAILED))
    concluded += len(scene.ledger.entries("unrouted"))
    if concluded < len(scene.ledger.entries(TRIED)):
        return False
    return scene.ledger.ids(CONFIRMED) <= scene.ledger.ids(HANDLED)


def exchange_deleted(stage: Stage, *, times: int) -> Row:
    with Scene(stage.vhost()) as scene:
        scene.worker()
        scene.publisher("--rate", "100")
        for _ in range(times):
            scene.until_handled(50)
            with scene.fault():
                connection = connect(scene.url)
                connection.channel().exchange_delete("shop")
                connection.close()
        scene.settle()
        return scene.row("exchange deleted while publishing", times)


def channel_closed(stage: Stage, *, times: int) -> Row:
    """The broker closes the channel because of a wrong ack (406)."""
    with Scene(stage.vhost()) as scene:
        worker = scene.worker()
        scene.publisher("--rate", "200")
        for number in range(times):
            scene.until_handled(50)
            with scene.fault():
                scene.publish(f"wrong-{number}", "wrong ack")
                scene.until(lambda: worker.log.count("unknown delivery tag") > number, "the broker closes it")  # noqa: B023
        scene.settle()
        return scene.row("channel closed by the broker (406)", times)


def consumer_timeout(stage: Stage, *, seconds: float) -> Row:
    """The broker closes the channel of a consumer that holds a delivery longer than its `consumer_timeout`."""
    node = stage.node
    ticks = min(60.0, seconds / 2)
    _set_consumer_timeout(stage, seconds, ticks)
    try:
        with Scene(stage.vhost()) as scene:
            worker = scene.worker()
            scene.publisher("--rate", "50")
            scene.until_handled(20)
            with scene.fault():
                scene.publish("held", f"hold:{(seconds + ticks) * 3}")
                limit = (seconds + ticks) * 2 + LIMIT
                scene.until(lambda: "subscription to" in worker.log, "the broker closes the channel", limit=limit)
            scene.until(lambda: "held" in scene.ledger.ids(HANDLED), "the held event is handled")
            scene.settle()
            assert "timeout" in worker.log.lower() or "timed out" in worker.log, worker.log
            return scene.row(f"consumer timeout of {seconds:g} s", 1)
    finally:
        _set_consumer_timeout(stage, 1800, 60)
        assert node.answers()


def _set_consumer_timeout(stage: Stage, seconds: float, ticks: float) -> None:
    stage.node.ctl(
        "eval",
        f"application:set_env(rabbit, consumer_timeout, {round(seconds * 1000)}), "
        f"application:set_env(rabbit, channel_tick_interval, {round(ticks * 1000)}).",
    )


def publishing_refused(stage: Stage, *, how: str, events: int) -> Row:
    """The broker refuses new connections of the worker, so it cannot publish copies of failed events.

    `how`: "new password" or "connection limit".
    """
    url, node = stage.vhost(), stage.node
    vhost = vhost_of(url)
    user = f"worker-{vhost}"
    ways = {
        "new password": (("change_password", user, "new"), ("change_password", user, "old")),
        "connection limit": (
            ("set_user_limits", user, '{"max-connections": 1}'),
            ("set_user_limits", user, '{"max-connections": -1}'),
        ),
    }
    refuse, allow = ways[how]
    node.ctl("add_user", user, "old")
    node.ctl("set_permissions", "-p", vhost, user, ".*", ".*", ".*")
    with Scene(url, worker_url=node.vhost_url(vhost, user, "old")) as scene:
        worker = scene.worker()
        with scene.fault(recovers=False):
            node.ctl(*refuse)
            scene.publish_all([(f"once-{number}", "fail once") for number in range(events)])
            scene.until(lambda: "Trying again." in worker.log, "the worker logs why it cannot publish", worker)
            node.ctl(*allow)
        scene.settle()
        row = scene.row(f"publishing refused ({how}), handlers fail", 1)
        assert (row.handled, row.dead) == (events, 0)
        return row


# --- the network ------------------------------------------------------------------------------


def one_node_fails(stage: Stage, *, how: str, times: int) -> Row:
    """One of two nodes `how`: "hangs" (accepts connections, but never answers) or "refuses" (has another password). All
    connections are closed repeatedly.
    """
    url, node = stage.vhost(), stage.node
    bad = url.replace("127.0.0.1", "127.0.0.2") if how == "hangs" else url.replace(":guest@", ":other@")
    both = f"{bad};{url}"
    with socket.create_server(("127.0.0.2", node.port)), Scene(url, worker_url=both, publisher_url=both) as scene:
        scene.worker()
        scene.publisher("--rate", "100", "--timeout", "30")
        for _ in range(times):
            scene.until_handled(50)
            with scene.fault():
                node.ctl("close_all_connections", "--vhost", vhost_of(url), "a fault")
        scene.settle()
        row = scene.row(f"one of two nodes {how}, connections closed", times)
        assert not row.failed
        return row


@contextmanager
def _through_proxies(
    stage: Stage, broker: str = "rabbitmq", options: str = BEATS
) -> Iterator[tuple[Scene, Proxy, Proxy]]:
    """A worker and a publisher, each behind its own proxy."""
    url = stage.url(broker, options, acceptor=IDLE)
    port = stage.server(broker).port
    with Proxy(port) as before_worker, Proxy(port) as before_publisher:

        def through(proxy: Proxy) -> str:
            return url.replace(f"127.0.0.1:{port}", f"127.0.0.1:{proxy.port}")

        with Scene(url, worker_url=through(before_worker), publisher_url=through(before_publisher)) as scene:
            yield scene, before_worker, before_publisher


def connection_broken(stage: Stage, *, how: str, times: int, events: int = 0, broker: str = "rabbitmq") -> Row:
    """`how`: "cut" (RST), "stall" (nothing arrives, no FIN) or "truncate" (in the middle of a frame)."""
    with _through_proxies(stage, broker) as (scene, before_worker, before_publisher):
        scene.worker(work=0.01)
        scene.publisher("--rate", "150", "--timeout", "20")
        for _ in range(times):
            for proxy in (before_worker, before_publisher):
                scene.until_handled(max(50, events // (2 * times)))
                broken = proxy.living
                with scene.fault(only_workers=proxy is before_worker):
                    getattr(proxy, how)()
                    if how != "cut":  # detected by the next bytes, or by missing heartbeats
                        scene.until(lambda: len(proxy.links) > len(broken), "a new connection is made")  # noqa: B023
        scene.settle(events=events)
        begun = [end - begin for begin, end in scene.faults] if how == "stall" else []
        note = f"detected within {max(begun):.1f} s, with a heartbeat of {HEARTBEAT} s" if begun else ""
        names = {"cut": "connection cut", "stall": "connection stalled without FIN", "truncate": "frame truncated"}
        return scene.row(f"{names[how]} (worker, publisher)", 2 * times, note=note)


def connection_slow(stage: Stage, *, seconds: float) -> Row:
    """Half a second of delay in each direction: events are slower, and nothing else changes."""
    with _through_proxies(stage, options="") as (scene, before_worker, before_publisher):
        worker = scene.worker()
        scene.publisher("--rate", "100")
        scene.until_handled(50)
        with scene.fault():
            before_worker.delay = before_publisher.delay = 0.5
            time.sleep(seconds)
            scene.until_handled(20)
            before_worker.delay = before_publisher.delay = 0.0
        scene.settle()
        row = scene.row("connections delayed by 500 ms", 1)
        assert "connection lost" not in worker.log, worker.log
        assert not row.failed
        assert not row.duplicates
        return row


# --- the publisher ----------------------------------------------------------------------------


def publishers_fork(stage: Stage, *, events: int, broker: str = "rabbitmq") -> Row:
    with Scene(stage.url(broker)) as scene:
        scene.worker()
        options = ["--forks", "4", "--threads", "2", "--count", str(events), "--rate", "400"]
        publisher = scene.publisher(*options)
        assert publisher.wait() == 0, publisher.log
        scene.settle()
        row = scene.row("fork after publish (4 children)", 4)
        assert row.confirmed == row.handled == 5 * events, "events of the parent and of its children"
        assert not row.duplicates
        return row


def publishers_exit(stage: Stage, *, times: int, events: int) -> Row:
    """The main thread ends while another thread publishes: its events are confirmed before the process exits."""
    with Scene(stage.vhost()) as scene:
        scene.worker()
        for _ in range(times):
            publisher = scene.publisher("--at-exit", "--count", str(events))
            assert publisher.wait() == 0, publisher.log
            assert "Traceback" not in publisher.log, publisher.log
        scene.settle()
        row = scene.row("publish at interpreter exit", times)
        assert row.confirmed == row.handled == times * events
        return row


def publishers_interrupted(stage: Stage, *, times: int) -> Row:
    """A signal handler raises during publishes: no event is wrongly confirmed, and there are no duplicates."""
    with Scene(stage.vhost()) as scene:
        scene.worker()
        publisher = scene.publisher("--alarms", str(times))
        assert publisher.wait() == 0, publisher.log
        scene.settle()
        row = scene.row("publishes interrupted by a signal handler", times, note=publisher.log.splitlines()[-1])
        assert not row.duplicates, f"no event must be published again: {row.duplicates}"
        return row


def strange_messages(stage: Stage, *, times: int) -> Row:
    """Between normal events: headers that the broker routes by, that fill a frame, or that are not text."""
    fills_a_frame = "x" * (FRAME_MAX - 20 - len(wire.encode_properties({"headers": {"large": ""}})))
    strange = {
        "cc": {"CC": ["main", "retry.200ms"]},
        "bcc": {"BCC": ["main"]},
        "large": {"large": fills_a_frame},
        "bytes": {"note": b"\xff\xfe"},
    }
    with Scene(stage.vhost()) as scene:
        scene.worker()
        scene.publisher("--rate", "200")
        for number in range(times):
            scene.until_handled(20)
            connection = connect(scene.url)
            for kind, headers in strange.items():
                id = f"{kind}-{number}"
                scene.ledger.write(TRIED, id)
                body = json.dumps({"id": id, "do": "fail"}).encode()
                publish_confirmed(connection, Publication("shop", "thing.happened", body, {"headers": headers}))
                scene.ledger.write(CONFIRMED, id)
            connection.close()
        scene.until(lambda: len(dead(scene)) >= times * len(strange), "all of them are dead letters")
        scene.settle(dead=times * len(strange))
        ids = [id_of(delivery) for delivery in scene.take_all("billing.dead")]
        row = scene.row("messages with unusual headers", times * len(strange))
        assert len(ids) == len(set(ids)) == times * len(strange), Counter(ids).most_common(3)
        assert not row.failed, "publishes of others failed"
        return row


def threads_publish(stage: Stage, *, times: int, broker: str = "rabbitmq") -> Row:
    """32 threads publish while the broker restarts."""
    with Scene(stage.url(broker)) as scene:
        scene.worker()
        scene.publisher("--threads", "32", "--rate", "200", "--timeout", "5")
        for _ in range(times):
            scene.until_handled(100)
            with scene.fault():
                stage.server(broker).restart()
        scene.settle()
        return scene.row("32 publishing threads, broker restarts", times)


# --- the embedded broker ----------------------------------------------------------------------


def embedded_killed(stage: Stage, *, times: int, seed: int = 1) -> Row:
    """Publishers and workers are killed at random."""
    chance = random.Random(seed)
    start: list[Callable[[Scene], Process]] = [
        lambda scene: scene.publisher("--rate", "60"),
        lambda scene: scene.publisher("--rate", "60"),
        lambda scene: scene.worker(ready=False, work=0.01),
        lambda scene: scene.worker(ready=False, work=0.01),
    ]
    with Scene(stage.file()) as scene:
        scene.declare()
        processes = [begin(scene) for begin in start]
        scene.until_handled(20)
        for _ in range(times):
            time.sleep(chance.uniform(0, 0.6))
            victim = chance.randrange(4)
            with scene.fault(recovers=False):
                processes[victim].kill()
                processes[victim] = start[victim](scene)
        scene.until_recovered(time.monotonic())
        scene.settle()
        row = scene.row("embedded: publisher or worker killed at random", times)
        assert integrity(scene.url) == "ok"
        return row


def embedded_handler_crashes(stage: Stage, *, workers: int, earlier: int = 0) -> Row:
    """Like `handler_crashes`, on the embedded broker.

    Args:
        earlier: number of redeliveries before the first crash, so that fewer crashes are left.
    """
    with Scene(stage.file()) as scene:
        _fill_with_poison(scene)
        for _ in range(earlier):
            scene.take_all("billing.main")
        expected = DELIVERY_LIMIT + 1 - earlier
        crashes = _crash_until_all_is_done(scene, 200, workers, expected)
        assert crashes == expected, f"{crashes} crashes, expected {expected}"
        many = "" if workers == 1 else f", {workers} workers"
        row = scene.row(f"embedded: handler that crashes its worker{many}", crashes, recoveries=[])
        assert (row.dead, row.handled) == (1, OTHERS)
        return row


def integrity(url: str) -> str:
    database = sqlite3.connect(url.removeprefix("sqlite:///"))
    try:
        return str(database.execute("PRAGMA integrity_check").fetchone()[0])
    finally:
        database.close()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """Mount a tmpfs of this size; yields a function that changes its mount options.

    Raises:
        CannotRun: this user may not mount a tmpfs.
    """
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "lightbus-faults", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        raise CannotRun(f"mounting a small tmpfs is refused: {mounted.stderr.strip()}")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def embedded_disk_full(stage: Stage) -> Row:
    folder = stage.folder()
    with small_disk(folder, "1m") as remount, Scene(f"sqlite:///{folder}/bus.db") as scene:
        scene.declare()
        scene.publisher("--rate", "500", "--timeout", "3", "--tasks", "16")
        scene.until(lambda: len(scene.ledger.entries(FAILED)) >= 20, "publishers get errors", limit=LIMIT)
        confirmed = len(scene.ledger.entries(CONFIRMED))
        with scene.fault(recovers=False):
            remount("size=64m")
        worker = scene.worker()
        scene.until_recovered(scene.faults[-1][1])
        scene.settle()
        row = scene.row(
            "embedded: disk full, then free space again",
            1,
            note=f"{confirmed} events confirmed before the disk was full",
        )
        assert worker.popen.returncode == 0
        assert integrity(scene.url) == "ok"
        return row


def embedded_file_unusable(stage: Stage, *, how: str) -> Row:
    """`how`: "read-only", "corrupted" or "of another version". The worker logs the reason and exits without
    changing the file. After the repair, all confirmed events are there."""
    folder = stage.folder()
    file = folder / "bus.db"
    with Scene(f"sqlite:///{file}") as scene:
        if how == "read-only":
            with small_disk(folder, "64m") as remount:
                _fill(scene)
                with _unchanged(file):
                    remount("ro")
                    _refused(scene, "Check the permissions")
                remount("rw")
                return _repaired(scene, how)
        _fill(scene)
        shutil.copy(file, folder / "copy")
        if how == "corrupted":
            with file.open("r+b") as damaged:
                damaged.write(b"\xff" * 4096)
            reason = "not a database"
        else:
            _set_version(file, 99)
            reason = "schema version 99"
        with _unchanged(file):
            _refused(scene, reason)
        shutil.copy(folder / "copy", file)
        return _repaired(scene, how)


def _fill(scene: Scene) -> None:
    scene.declare()
    publisher = scene.publisher("--count", "200", "--rate", "2000")
    assert publisher.wait() == 0, publisher.log


def _set_version(file: Path, version: int) -> None:
    database = sqlite3.connect(file)
    database.execute(f"PRAGMA user_version = {version}")
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


@contextmanager
def _unchanged(file: Path) -> Iterator[None]:
    before = file.read_bytes()
    yield
    assert file.read_bytes() == before, f"{file} was changed"


def _refused(scene: Scene, reason: str) -> None:
    worker = scene.worker(ready=False)
    code = worker.wait()
    assert code == 1, f"the worker exited with {code}:\n{worker.log}"
    assert reason in worker.log, worker.log
    assert "bus.db" in worker.log
    assert "Traceback" not in worker.log, worker.log
    publisher = scene.publisher("--count", "3", "--timeout", "2")
    assert publisher.wait() == 0, publisher.log
    assert len(scene.ledger.entries(FAILED)) == 3, "publishers get errors"


def _repaired(scene: Scene, how: str) -> Row:
    with scene.fault(recovers=False):
        pass
    scene.worker()
    scene.settle()
    row = scene.row(f"embedded: file {how}, then repaired", 1)
    assert row.confirmed == row.handled == 200
    return row
