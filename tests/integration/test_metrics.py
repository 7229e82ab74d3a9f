"""`/metrics` of real workers and relays: one process, several, after one was killed, and over a reload."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lightbus.telemetry import processes
from tests.integration.test_monitoring import BUS as WITH_OUTBOX
from tests.patience import LIMIT, wait_until
from tests.processes import Program, children_of, environment, lightbus
from tests.rabbitmq import Node, free_port

BUS = """\
import asyncio
import os
import time
from lightbus import Lightbus, Retry
from prometheus_client import Counter, Gauge

signups = Counter("signups", "People who have signed up")
level = Gauge("level", "Of water", multiprocess_mode="max")
app = Lightbus("billing", retry=Retry(delays=()))

@app.event
class InvoicePaid:
    number: int
    note: str = ""

@app.on(InvoicePaid)
async def book(invoice: InvoicePaid):
    signups.inc()
    level.set(invoice.number)
    if invoice.note == "fail":
        raise ValueError
    if invoice.note == "hold":
        await asyncio.sleep(60)
    if invoice.note == "block":
        time.sleep(1)
    if invoice.note == "fork":
        child = os.fork()
        if not child:
            signups.inc(100)
            os._exit(0)
        os.waitpid(child, 0)
"""
FILES = {"billing.py": BUS}

Samples = dict[tuple[str, ...], float]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs create their temporary folders."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def scrape(base: str, accept: str = "text/plain") -> str:
    request = urllib.request.Request(f"{base}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=LIMIT) as answer:
        text: str = answer.read().decode()
    return text


def samples(base: str, name: str) -> Samples:
    """The samples of this name, by the values of their labels in the order of the labels' names, without the app; of
    events those that are not 0."""
    return {
        tuple(value for label, value in sorted(sample.labels.items()) if label != "app"): sample.value
        for metric in text_string_to_metric_families(scrape(base))
        for sample in metric.samples
        if sample.name == name and (sample.value or "_events_total" not in name)
    }


def handled(base: str) -> float:
    return sum(samples(base, "lightbus_events_total").values())


class Worker:
    """`lightbus worker billing:app --metrics`, ready, and the URL of its health port."""

    def __init__(self, program: Program, base: str) -> None:
        self.program, self.base = program, base


@contextlib.contextmanager
def working(
    folder: Path, url: str, *options: str, ready: int = 1, extra: dict[str, str] | None = None
) -> Iterator[Worker]:
    port = free_port(2)
    command = ("worker", "billing:app", "--health-port", str(port), "--metrics", *options)
    with Program(*command, folder=folder, url=url, extra=extra) as program:
        for _ in range(ready):
            program.wait_for("Ready")
        yield Worker(program, f"http://127.0.0.1:{port}")


def publish(folder: Path, url: str, *notes: str) -> None:
    events = "".join(json.dumps({"number": number, "note": note}) + "\n" for number, note in enumerate(notes))
    command = ("publish", "billing:app", "invoice.paid", "--jsonl", "-")
    done = lightbus(*command, folder=folder, url=url, given=events.encode())
    assert done.returncode == 0, done.stderr


# --- one process ------------------------------------------------------------------------------


def test_a_worker_serves_its_metrics_beside_its_health(folder: Path, url: str) -> None:
    with working(folder, url) as worker:
        assert "/livez, /readyz and /metrics" in worker.program.output
        publish(folder, url, "", "", "fail")
        wait_until(lambda: handled(worker.base) == 3, "all are counted")
        assert samples(worker.base, "lightbus_events_total") == {
            ("book", "handled", "billing.main"): 2,
            ("book", "dead", "billing.main"): 1,
        }
        assert samples(worker.base, "signups_total") == {(): 3}
        assert samples(worker.base, "lightbus_ready") == {(): 1}
        assert samples(worker.base, "lightbus_connected")[("consumer",)] == 1
        one = {("billing.main",): 1}
        wait_until(lambda: samples(worker.base, "lightbus_queue_consumers") == one, "the broker answers")
        assert "process_cpu_seconds_total" in scrape(worker.base)
        assert scrape(worker.base, "application/openmetrics-text").endswith("# EOF\n")
        assert worker.program.end(signal.SIGTERM) == 0
    assert "observer" not in worker.program.output


def test_a_blocked_event_loop_is_counted(folder: Path, sqlite_url: str) -> None:
    with working(folder, sqlite_url, "--blocked-after", "0.2") as worker:
        assert samples(worker.base, "lightbus_event_loop_blocked_total") == {("book",): 0}
        publish(folder, sqlite_url, "block")
        worker.program.wait_for("has blocked the event loop")
        wait_until(lambda: samples(worker.base, "lightbus_event_loop_blocked_total") == {("book",): 1}, "it is counted")


@pytest.mark.rabbitmq
def test_dead_letters_and_lost_connections_are_shown(folder: Path, rabbitmq: Node, rabbitmq_url: str) -> None:
    with working(folder, rabbitmq_url) as worker:
        publish(folder, rabbitmq_url, "fail")
        worker.program.wait_for("dead-lettered")
        dead = {("billing.dead",): 1}
        wait_until(lambda: samples(worker.base, "lightbus_dead_letters") == dead, "it is counted")
        assert samples(worker.base, "lightbus_queue_oldest_seconds") == {}
        vhost = rabbitmq_url.rpartition("/")[2]
        rabbitmq.ctl("close_all_connections", "--vhost", vhost, "a test")
        lost = {("consumer",): 1, ("publisher",): 1}
        wait_until(lambda: samples(worker.base, "lightbus_connections_lost_total") == lost, "both are counted")
        wait_until(lambda: samples(worker.base, "lightbus_connected") == lost, "both are open again")


def test_metrics_need_a_port_and_prometheus_client(folder: Path, sqlite_url: str) -> None:
    done = lightbus("worker", "billing:app", "--metrics", folder=folder, url=sqlite_url)
    assert done.returncode == 2
    assert "--metrics needs a port: add --health-port 8080. /metrics is served there." in done.stderr
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys; sys.modules['prometheus_client'] = None\n")
    command = ("billing:app", "--metrics", "--health-port", "0")
    paths = {"PYTHONPATH": os.pathsep.join((str(hidden), str(Path(__file__).parents[2])))}
    for name in ("worker", "relay"):
        done = lightbus(name, *command, folder=folder, url=sqlite_url, extra=paths)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith(
            "--metrics needs prometheus_client: pip install 'lightbus-amqp[prometheus]'"
        )
        done = lightbus(name, *command, "--json-logs", folder=folder, url=sqlite_url, extra=paths)
        assert done.returncode == 1
        assert "--metrics needs prometheus_client" in json.loads(done.stderr)["message"]


ADD = """\
from shop import OrderPlaced, engine, outbox

with engine.begin() as connection:
    outbox.add(connection, OrderPlaced(number=1))
"""


def test_a_relay_serves_the_metrics_of_its_outbox(folder: Path, sqlite_url: str) -> None:
    (folder / "shop.py").write_text(WITH_OUTBOX)
    with Program("relay", "shop:app", "--health-port", "0", "--metrics", folder=folder, url=sqlite_url) as relay:
        base = relay.wait_for(r"Health: (http://\S+)/livez, /readyz and /metrics")[1]
        relay.wait_for("Started")
        assert subprocess.run([sys.executable, "-c", ADD], cwd=folder, env=environment(), check=False).returncode == 0
        sent = ("order.placed", "unrouted")
        wait_until(lambda: samples(base, "lightbus_published_total").get(sent) == 1, "it is sent")
        assert samples(base, "lightbus_outbox_rows").keys() == {("waiting",), ("failed",)}
        assert samples(base, "lightbus_outbox_oldest_seconds").keys() == {()}
        assert samples(base, "lightbus_ready") == {(): 1}
        assert samples(base, "lightbus_connected") == {("publisher",): 1}
        assert samples(base, "lightbus_events_total") == {}
        assert relay.end(signal.SIGTERM) == 0


# --- several processes ------------------------------------------------------------------------


def test_counters_survive_a_killed_process_and_gauges_do_not(folder: Path, sqlite_url: str, scratch: Path) -> None:
    with working(folder, sqlite_url, "--processes", "2", ready=2) as worker:
        wait_until(lambda: samples(worker.base, "lightbus_queue_consumers") == {("billing.main",): 2}, "both consume")
        publish(folder, sqlite_url, *[""] * 50)
        wait_until(lambda: handled(worker.base) == 50, "all are counted")
        (shared,) = scratch.glob(f"{processes.PREFIX}*")
        assert shared.stat().st_mode & 0o777 == 0o700
        supervisor = worker.program.process.pid
        for round in range(3):
            victim = children_of(supervisor)[1]
            # prometheus_client's issue 1199: a process that is killed while it creates a file leaves it empty.
            (shared / "counter_99999.db").touch()
            os.kill(victim, signal.SIGKILL)
            worker.program.wait_for("ended by signal 9")
            assert not [file.name for file in shared.glob("gauge_live*") if file.name.endswith("-2.db")]
            assert handled(worker.base) == 50 + 50 * round
            assert samples(worker.base, "signups_total") == {(): 50 + 50 * round}
            worker.program.wait_for("Ready")
            publish(folder, sqlite_url, *[""] * 50)
            wait_until(lambda: handled(worker.base) == 100 + 50 * round, "all are counted")  # noqa: B023
            (shared / "counter_99999.db").unlink()
        wait_until(lambda: samples(worker.base, "lightbus_ready") == {(): 1}, "the successor is ready")
        owners = {file.stem.rpartition("_")[2] for file in shared.glob("*.db")}
        assert owners == {f"{supervisor}-1", f"{supervisor}-2"}, "a successor continues the files"
        assert handled(other_port(worker.base)) == 200, "each port answers for all"
        assert worker.program.end(signal.SIGTERM) == 0
    assert list(scratch.iterdir()) == []
    assert "Traceback" not in worker.program.output


def other_port(base: str) -> str:
    return re.sub(r"\d+$", lambda port: str(int(port[0]) + 1), base)


def test_a_child_that_a_handler_forks_counts_in_files_of_its_own(folder: Path, sqlite_url: str, scratch: Path) -> None:
    with working(folder, sqlite_url, "--processes", "2", ready=2) as worker:
        publish(folder, sqlite_url, "", "fork", "")
        wait_until(lambda: handled(worker.base) == 3, "all are counted")
        assert samples(worker.base, "signups_total") == {(): 103}


def test_counters_continue_over_a_reload(folder: Path, sqlite_url: str, scratch: Path) -> None:
    with working(folder, sqlite_url, "--reload") as worker:
        publish(folder, sqlite_url, "", "")
        wait_until(lambda: handled(worker.base) == 2, "both are counted")
        (folder / "billing.py").write_text(BUS + "\n# changed\n")
        worker.program.wait_for("changed: starting again")
        worker.program.wait_for("Ready")
        publish(folder, sqlite_url, "")
        wait_until(lambda: handled(worker.base) == 3, "it is counted, too")
        assert worker.program.end(signal.SIGTERM) == 0
    assert list(scratch.iterdir()) == []


def test_the_folder_is_removed_when_the_supervisor_was_killed(folder: Path, sqlite_url: str, scratch: Path) -> None:
    with working(folder, sqlite_url, "--processes", "2", ready=2) as worker:
        assert len(list(scratch.iterdir())) == 1
        worker.program.end(signal.SIGKILL)
        wait_until(lambda: not list(scratch.iterdir()), "the last worker removes it")


def test_the_next_start_removes_what_a_kill_of_all_processes_has_left(
    folder: Path, sqlite_url: str, scratch: Path
) -> None:
    with working(folder, sqlite_url, "--processes", "2", ready=2) as first:
        os.killpg(first.program.process.pid, signal.SIGKILL)
        first.program.end()
    (left,) = scratch.iterdir()
    with working(folder, sqlite_url, "--processes", "2", ready=2) as running:
        assert not left.exists()
        (used,) = scratch.iterdir()
        with working(folder, sqlite_url, "--processes", "2", ready=2) as third:
            assert len(list(scratch.iterdir())) == 2
            assert third.program.end(signal.SIGTERM) == 0
        assert list(scratch.iterdir()) == [used]
        assert running.program.end(signal.SIGTERM) == 0
    assert list(scratch.iterdir()) == []


def test_a_folder_that_the_user_has_chosen_is_used_and_kept(folder: Path, sqlite_url: str, scratch: Path) -> None:
    chosen = {processes.VARIABLE: str(scratch)}
    done = lightbus(
        "worker", "billing:app", "--metrics", "--health-port", "0", folder=folder, url=sqlite_url,
        extra={processes.VARIABLE: str(scratch / "none")},
    )  # fmt: skip
    assert done.returncode == 1
    assert f"{processes.VARIABLE}={scratch / 'none'} is not a folder. Create it, or unset the variable" in done.stderr
    for options, ready in (((), 1), (("--processes", "2"), 2)):
        before = len(list(scratch.glob("counter_*")))
        with working(folder, sqlite_url, *options, ready=ready, extra=chosen) as worker:
            publish(folder, sqlite_url, "", "")
            wait_until(lambda: handled(worker.base) >= 2, "both are counted")
            assert worker.program.end(signal.SIGTERM) == 0
        assert len(list(scratch.glob("counter_*"))) > before
        assert not list(scratch.glob("gauge_live*"))


PUBLISH = """\
from lightbus import Lightbus
from lightbus.telemetry.prometheus import Metrics

app = Lightbus("shop", url="memory://")
Metrics(app)

@app.event
class OrderPlaced:
    pass

app.publish_sync(OrderPlaced())
"""


def test_a_program_that_ends_writes_its_last_second(scratch: Path) -> None:
    extra = {processes.VARIABLE: str(scratch)}
    subprocess.run([sys.executable, "-c", PUBLISH], env=environment(extra), check=True, timeout=LIMIT)
    found = {one.name: one.value for metric in processes.merged(str(scratch)) for one in metric.samples}
    assert found["lightbus_publish_seconds_count"] == 1


def test_the_folder_is_removed_when_all_is_stopped_at_once(folder: Path, sqlite_url: str, scratch: Path) -> None:
    with working(folder, sqlite_url, "--processes", "2", ready=2) as worker:
        publish(folder, sqlite_url, "hold")
        wait_until(lambda: samples(worker.base, "lightbus_running_handlers") == {("billing.main",): 1}, "it is held")

        def is_ended() -> bool:
            worker.program.signal(signal.SIGTERM)  # one that follows at once counts as the same
            return worker.program.process.poll() is not None

        wait_until(is_ended, "a second signal ends it")
        assert worker.program.end() == 128 + signal.SIGTERM
    assert list(scratch.iterdir()) == []


def test_a_start_that_fails_leaves_no_folder(folder: Path, sqlite_url: str, scratch: Path) -> None:
    (folder / "sitecustomize.py").write_text("import sys; sys.modules['watchfiles'] = None\n")
    paths = {"PYTHONPATH": os.pathsep.join((str(folder), str(Path(__file__).parents[2])))}
    command = ("worker", "billing:app", "--reload", "--metrics", "--health-port", "0")
    done = lightbus(*command, folder=folder, url=sqlite_url, extra=paths)
    assert done.returncode == 1
    assert "--reload needs watchfiles" in done.stderr
    assert list(scratch.iterdir()) == []
