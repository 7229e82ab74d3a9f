"""The health of a worker: the probes over HTTP, and `lightbus health`."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from lightbus import Lightbus
from lightbus.connection.declare import declare
from lightbus.transport import Publication
from lightbus.worker.health import STUCK_LOOP, report
from lightbus.worker.worker import Worker
from tests.bus import connected, eventually
from tests.patience import LIMIT, wait_until
from tests.processes import Program, lightbus, working

BUS = """\
from lightbus import Lightbus, Retry

app = Lightbus("billing", retry=Retry(delays=(5,)))

@app.on("invoice.*")
async def charge(invoice: dict): ...

@app.on("invoice.*", queue="slow")
async def report(invoice: dict): ...
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


FILES = {"billing.py": BUS}


def probe(url: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(url, timeout=LIMIT) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# --- over HTTP --------------------------------------------------------------------------------


def test_a_worker_reports_its_state_on_the_health_port(folder: Path, url: str) -> None:
    with Program("worker", "billing:app", "--health-port", "0", folder=folder, url=url) as worker:
        base = worker.wait_for(r"Health: (http://127\.0\.0\.1:\d+)/livez and /readyz")[1]
        worker.wait_for("Ready")
        wait_until(lambda: probe(f"{base}/readyz")[0] == 200, "ready")
        status, body = probe(f"{base}/livez?verbose")
        assert (status, body["live"], body["ready"], body["problems"]) == (200, True, True, [])
        assert [queue["name"] for queue in body["queues"]] == ["billing.main", "billing.slow"]
        assert all(queue["subscribed"] for queue in body["queues"])
        assert probe(f"{base}/")[0] == 404
        assert worker.end(signal.SIGTERM) == 0
    assert "GET" not in worker.output


def test_a_worker_without_a_broker_is_live_but_not_ready(folder: Path) -> None:
    url = "amqp://ann:s3cr3t@127.0.0.1:1/"
    with Program("worker", "billing:app", "--health-port", "0", folder=folder, url=url) as worker:
        base = worker.wait_for(r"Health: (http://127\.0\.0\.1:\d+)/livez and /readyz")[1]
        wait_until(lambda: "Connection refused" in json.dumps(probe(f"{base}/readyz")[1]), "the reason")
        status, body = probe(f"{base}/readyz")
        assert status == 503
        assert body["problems"][0] == "it has not started yet"
        assert body["problems"][1].startswith("not connected: No connection to amqp://ann:**@127.0.0.1:1/")
        assert probe(f"{base}/livez")[0] == 200  # a restart would not help
        assert "s3cr3t" not in json.dumps(body)


def test_a_port_in_use_is_reported(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        url = f"sqlite:///{tmp_path}/bus.db"
        done = lightbus("worker", "billing:app", "--health-port", str(port), folder=folder, url=url)
    assert done.returncode == 1
    assert f"--health-port: 127.0.0.1:{port} is not available: Address already in use." in done.stderr


def test_each_process_has_its_own_port(folder: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    with Program("worker", "billing:app", "--processes", "2", "--health-port", "0", folder=folder, url=url) as worker:
        bases = {worker.wait_for(r"Health: (http://\S+)/livez")[1] for _ in range(2)}
        assert len(bases) == 2
        for base in bases:
            wait_until(lambda base=base: probe(f"{base}/readyz")[0] == 200, base)  # type: ignore[misc]


# --- the report -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(app: Lightbus, **options: Any) -> AsyncIterator[Worker]:
    worker, stop = Worker(app, **options), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.serve, stop)
        await eventually(lambda: worker.started and worker.consumer.beat is not None)
        yield worker
        stop.set()


@pytest.fixture
def app(url: str) -> Lightbus:
    return Lightbus("billing", url=url)


@pytest.mark.anyio
async def test_a_blocked_event_loop_is_reported_but_not_as_a_stall(app: Lightbus) -> None:
    async with serving(app) as worker:
        await eventually(lambda: report(worker).ready)
        found = report(worker, time.monotonic() + 60)
        assert (found.live, found.ready) == (True, False)
        (problem,) = found.problems
        assert re.fullmatch(r"the event loop has not run for [67]\d s: a handler blocks it", problem)
        assert not report(worker, time.monotonic() + STUCK_LOOP + 5).live


@pytest.mark.anyio
async def test_busy_handlers_are_reported_and_the_worker_stays_ready(app: Lightbus) -> None:
    go_on = anyio.Event()

    @app.on("invoice.paid")
    async def slow(invoice: dict[str, Any]) -> None:
        await go_on.wait()

    class Paid:
        number: int = 0

    app.event("invoice.paid")(Paid)
    event = next(iter(app.events.values())).cls()
    async with serving(app, prefetch=2) as worker:
        for _ in range(4):
            await app.publish(event)
        await eventually(lambda: report(worker).body["handlers"]["running"]["count"], 2)
        found = report(worker, time.monotonic() + 5)
        assert found.ready, found.problems
        assert found.body["queues"][0]["prefetch_full"]
        oldest = found.body["handlers"]["running"]["oldest"]
        assert oldest["handler"] == "slow"
        assert oldest["seconds"] >= 5
        assert found.body["publisher"]["state"] == "connected"
        go_on.set()
        await eventually(lambda: report(worker).body["handlers"]["ended"], 4)


@pytest.mark.anyio
async def test_the_state_of_the_watchdog_is_reported(app: Lightbus) -> None:
    async with serving(app) as worker:
        (queue_consumer,) = worker.consumer.consumers
        assert report(worker).body["queues"][0]["consumption_proven_seconds_ago"] is None
        queue_consumer.watch.interval = queue_consumer.watch.next_look = 0.1
        await eventually(lambda: report(worker).body["queues"][0]["consumption_proven_seconds_ago"] is not None)
        queue_consumer.watch.interval = 3600.0
        queue_consumer.watch.subscribed(time.monotonic())  # no further check
        queue_consumer.watch.suspicion = "7 events wait in the queue 'billing.main', but none is delivered"
        found = report(worker)
        assert (found.live, found.ready) == (True, False)
        assert found.problems[0].startswith("connected but possibly stalled: 7 events wait")


# --- the command ------------------------------------------------------------------------------


def test_health_asks_the_broker_for_consumers(folder: Path, url: str) -> None:
    def health(*options: str) -> Any:
        return lightbus("health", "billing:app", *options, folder=folder, url=url)

    done = health()
    assert done.returncode == 1
    assert "the queue billing.main does not exist. Start a worker: lightbus worker billing:app" in done.stderr
    app = Lightbus("billing", url=url)
    app.on("invoice.*", queue="slow")(lambda body: None)
    with connected(url) as connection:
        declare(connection, app.topology())
    done = health("--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["queues"][0] == {"name": "billing.main", "exists": True, "ready": 0, "consumers": 0}
    with working("billing:app", folder=folder, url=url):
        done = health()
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "billing.main: 0 ready, 1 consuming\nbilling.slow: 0 ready, 1 consuming\nHealthy.\n"


def test_an_app_without_handlers_is_healthy_unless_events_are_waiting(tmp_path: Path, url: str) -> None:
    (tmp_path / "shop.py").write_text('from lightbus import Lightbus\n\napp = Lightbus("shop")\n')
    done = lightbus("health", "shop:app", folder=tmp_path, url=url)
    assert (done.returncode, done.stdout) == (0, "Healthy: shop has no handlers, so it needs no worker.\n")
    with connected(url) as connection:
        declare(connection, Lightbus("shop", url=url).topology())
        channel = connection.channel()
        channel.publish([Publication("shop.internal", "main", b"{}", {})])
        wait_until(lambda: channel.queue_declare("shop.main", passive=True).message_count == 1, "an event")
    done = lightbus("health", "shop:app", folder=tmp_path, url=url)
    assert done.returncode == 1
    assert "no consumer on shop.main (1 ready)" in done.stderr


def test_health_reports_an_unreachable_broker_without_the_password(folder: Path) -> None:
    done = lightbus("health", "billing:app", folder=folder, url="amqp://ann:s3cr3t@127.0.0.1:1/")
    assert done.returncode == 1
    assert "Unhealthy: No connection to amqp://ann:**@127.0.0.1:1/: Connection refused." in done.stderr
    assert "s3cr3t" not in done.stdout + done.stderr
