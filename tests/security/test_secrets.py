"""No log, banner, error or traceback shows a password, and only the user can read the embedded broker's files."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import pickle
import stat
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from lightbus import Lightbus, errors
from lightbus.connection.declare import declare
from lightbus.connection.dial import BrokerAddresses
from lightbus.dead_letters.queue import DeadQueue
from lightbus.transport import Publication
from lightbus.worker.worker import Worker
from tests.bus import OrderPlaced, running
from tests.conformance.conftest import declare_orders
from tests.patience import wait_until
from tests.rabbitmq import Node

SECRET = "hunter2-Tr0ub4dor"
ENCODED = "hunter2%2DTr0ub4dor"
"""The same in a URL, written differently."""
TRACES = (SECRET, ENCODED, "Tr0ub4dor")

PROGRAM = """
from lightbus import Lightbus

app = Lightbus("billing", publish_timeout=1)

@app.event
class InvoicePaid:
    invoice_id: str

@app.on("invoice.paid")
async def note(payload: dict) -> None:
    await app.publish(InvoicePaid(invoice_id="1"))
    raise ValueError("a failure, with its traceback")
"""


def assert_secret(text: str) -> None:
    for trace in TRACES:
        assert trace not in text, f"the password shows:\n{text[-3000:]}"


@contextmanager
def captured_logs() -> Iterator[io.StringIO]:
    """All log records of all libraries, down to debug, with tracebacks."""
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield logged
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


def with_causes(error: BaseException) -> str:
    """All that a traceback, a log and a debugger show of an error and its causes."""
    lines = ["".join(traceback.format_exception(error)), repr(error), str(error), repr(error.args)]
    if error.__cause__ is not None:
        lines.append(with_causes(error.__cause__))
    if error.__context__ is not None and error.__context__ is not error.__cause__:
        lines.append(with_causes(error.__context__))
    return "\n".join(lines)


UNREACHABLE = f"amqp://billing:{ENCODED}@127.0.0.1:1/vhost"
BAD_URLS = {
    "port": f"amqp://billing:{SECRET}@127.0.0.1:notaport/",
    "port out of range": f"amqp://billing:{SECRET}@127.0.0.1:99999/",
    "scheme": f"redis://billing:{SECRET}@127.0.0.1/",
    "unknown scheme": f"ampq://billing:{SECRET}@127.0.0.1/",
    "option": f"amqp://billing:{SECRET}@127.0.0.1/?heart=3",
    "option's value": f"amqp://billing:{SECRET}@127.0.0.1/?heartbeat=often",
    "password as an option": f"amqp://127.0.0.1/?password={SECRET}",
    "no scheme": f"billing:{SECRET}@127.0.0.1",
    "one slash": f"amqp:/billing:{SECRET}@127.0.0.1",
    "brackets": f"amqp://billing:{SECRET}@[::1/",
    "two": f"amqp://billing:{SECRET}@127.0.0.1/;redis://billing:{SECRET}@127.0.0.1/",
    "a slash in the password": f"amqp://billing:x/{SECRET}@127.0.0.1/",
    "a hash in the password": f"amqp://billing:x#{SECRET}@127.0.0.1/",
    "a question mark in the password": f"amqp://billing:x?{SECRET}@127.0.0.1/",
    "an at sign in the password": f"amqp://billing:x@{SECRET}@127.0.0.1:1/",
    "embedded with a host": f"sqlite://billing:{SECRET}@127.0.0.1/bus.db",
    "embedded with options": f"sqlite:///bus.db?key={SECRET}",
    "key file": f"amqps://billing:{SECRET}@127.0.0.1/?keyfile=/nowhere.pem",
}


@pytest.mark.parametrize("case", BAD_URLS)
def test_an_invalid_url_does_not_show_its_password(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with captured_logs() as logged:
        app = declare_orders(Lightbus("shop", url=BAD_URLS[case], publish_timeout=0.5))
        with pytest.raises(errors.LightbusError) as raised:
            app.publish_sync(OrderPlaced(number=1))
        with pytest.raises(errors.LightbusError) as opened, app:
            pass
    assert_secret(with_causes(raised.value) + with_causes(opened.value) + logged.getvalue() + repr(app))


@pytest.mark.parametrize("case", sorted(BAD_URLS.keys() - {"an at sign in the password"}))  # for it, the worker waits
def test_a_worker_with_an_invalid_url_does_not_show_its_password(case: str, tmp_path: Path) -> None:
    done = _run(tmp_path, BAD_URLS[case], "worker", "program:app", "--log-level", "debug")
    assert done.returncode in (1, 2), done.stderr
    assert_secret(done.stdout + done.stderr)


def test_the_error_of_an_unreachable_broker_does_not_show_its_password() -> None:
    with captured_logs() as logged:
        app = declare_orders(Lightbus("shop", url=UNREACHABLE, publish_timeout=0.5))
        found = []
        for publish in (app.publish_sync, lambda event: app.publish_many_sync([event])):
            with pytest.raises(errors.PublishError) as raised:
                publish(OrderPlaced(number=1))
            found.append(with_causes(raised.value))
        with pytest.raises(errors.BrokerUnreachable) as opened, app:
            pass
    everything = "\n".join([*found, with_causes(opened.value), logged.getvalue()])
    assert "billing:**@127.0.0.1" in everything
    assert_secret(everything)
    app.__exit__(None, None, None)


def test_every_display_of_a_broker_masks_its_password() -> None:
    broker = BrokerAddresses.parse([UNREACHABLE, f"amqps://b:{SECRET}@example.org/?cafile=/ca.pem"])
    assert_secret(f"{broker} {broker!r} {broker.masked} {broker.addresses} {broker.addresses[0]!r}")
    assert_secret(repr(Lightbus("shop", url=UNREACHABLE)))


def _run(folder: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = _start(folder, url, *arguments)
    output, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, output, stderr)


def _start(folder: Path, url: str, *arguments: str) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(PROGRAM)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LIGHTBUS_")}
    return subprocess.Popen(
        [sys.executable, "-m", "lightbus", *arguments],
        cwd=folder,
        env={**kept, "LIGHTBUS_URL": url, "PYTHONPATH": ":".join([str(folder), str(Path(__file__).parents[2])])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.rabbitmq
def test_a_refused_password_is_not_shown(rabbitmq: Node, tmp_path: Path) -> None:
    url = f"amqp://guest:{ENCODED}@127.0.0.1:{rabbitmq.port}/"
    with captured_logs() as logged:
        app = declare_orders(Lightbus("shop", url=url, publish_timeout=60))
        with pytest.raises(errors.PublishRefused) as raised:
            app.publish_sync(OrderPlaced(number=1))
        app.__exit__(None, None, None)
    everything = with_causes(raised.value) + logged.getvalue()
    assert "refused the user name or password" in everything
    assert_secret(everything)
    done = _run(tmp_path, url, "worker", "program:app", "--log-level", "debug")
    assert done.returncode == 1
    assert "guest:**@127.0.0.1" in done.stderr
    assert_secret(done.stdout + done.stderr)


@pytest.mark.rabbitmq
@pytest.mark.anyio
async def test_a_running_worker_does_not_show_its_password(rabbitmq: Node, rabbitmq_url: str, tmp_path: Path) -> None:
    """In its banner, its logs of failures with tracebacks, and its dead letter."""
    vhost = rabbitmq_url.rpartition("/")[2]
    user = f"keeper-{vhost}"

    def make_user() -> None:
        rabbitmq.ctl("add_user", user, SECRET)
        rabbitmq.ctl("set_permissions", "-p", vhost, user, ".*", ".*", ".*")

    await anyio.to_thread.run_sync(make_user)
    url = rabbitmq.vhost_url(vhost, user, ENCODED)
    process = _start(tmp_path, url, "worker", "program:app", "--log-level", "debug")
    logged: list[str] = []
    failed = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            logged.append(line)
            if "failed on" in line:
                failed.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    shop = Lightbus("shop", url=url)

    @shop.event
    class InvoicePaid:
        invoice_id: str

    async with running(shop):
        with anyio.fail_after(60):
            while not failed.is_set():
                await shop.publish(InvoicePaid(invoice_id="1"))
                await anyio.sleep(0.1)
    process.terminate()
    await anyio.to_thread.run_sync(process.wait, 60)
    reader.join(60)
    everything = "".join(logged)
    assert f"{user}:**@127.0.0.1" in everything
    assert_secret(everything)


def test_a_pickled_error_does_not_contain_the_password() -> None:
    app = declare_orders(Lightbus("shop", url=UNREACHABLE, publish_timeout=0.3))
    with pytest.raises(errors.PublishError) as raised:
        app.publish_sync(OrderPlaced(number=1))
    assert SECRET.encode() not in pickle.dumps(raised.value.args)
    app.__exit__(None, None, None)


def taken_apart(thing: Any) -> Iterator[bytes]:
    """The pickles, copies and debugger views of an object."""
    for make in (pickle.dumps, repr, copy.copy, copy.deepcopy, vars):
        with contextlib.suppress(TypeError, AttributeError, NotImplementedError):  # some objects refuse
            made = make(thing)  # type: ignore[operator]
            yield made if isinstance(made, bytes) else repr(made).encode()
            yield repr(getattr(made, "__dict__", "")).encode()


def test_no_pickle_copy_or_debugger_shows_the_password_of_an_app() -> None:
    app = declare_orders(Lightbus("shop", url=UNREACHABLE, publish_timeout=0.3))
    app.on("order.placed")(lambda order: None)
    with pytest.raises(errors.PublishError) as raised:
        app.publish_sync(OrderPlaced(number=1))
    broker = app.broker
    things = [app, broker, broker.addresses[0], app.publisher, Worker(app), app.consumer(), app.handlers, raised.value]
    for thing in things:
        for made in taken_apart(thing):
            assert_secret(made.decode(errors="replace"))
    app.__exit__(None, None, None)


def test_an_app_is_not_pickled_and_its_copies_are_the_app() -> None:
    app = Lightbus("shop", url=UNREACHABLE)
    with pytest.raises(TypeError, match=r"The app 'shop' cannot be pickled: .* Import the app where it is needed\."):
        pickle.dumps({"app": app})
    assert copy.copy(app) is app
    assert copy.deepcopy({"app": app})["app"] is app


@pytest.mark.rabbitmq
def test_no_pickle_copy_or_debugger_shows_the_password_of_a_connection(rabbitmq: Node, rabbitmq_url: str) -> None:
    vhost = rabbitmq_url.rpartition("/")[2]
    user = f"keeper-{vhost}"
    rabbitmq.ctl("add_user", user, SECRET)
    rabbitmq.ctl("set_permissions", "-p", vhost, user, ".*", ".*", ".*")
    app = Lightbus("shop", url=rabbitmq.vhost_url(vhost, user, ENCODED))
    connection = app.broker.connect("tests")
    declare(connection, app.topology())
    channel = connection.channel()
    channel.publish([Publication("shop.internal", "dead", b"{}", {"headers": {}})])
    wait_until(lambda: channel.queue_declare("shop.dead", passive=True).message_count == 1, "a dead letter")
    queue = DeadQueue(app, connection)
    dead_letter = next(queue.dead_letters())
    things = [dead_letter, dead_letter.delivery, queue, queue.channel, connection]
    for thing in things:
        for made in taken_apart(thing):
            assert_secret(made.decode(errors="replace"))
    connection.close()
    for thing in things:
        for made in taken_apart(thing):
            assert_secret(made.decode(errors="replace"))


def _modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_user_can_read_the_embedded_brokers_files(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        app = declare_orders(Lightbus("shop", url=f"sqlite:///{tmp_path}/bus.db"))
        app.on("order.placed")(lambda: None)
        seen: dict[str, int] = {}

        async def use() -> None:
            async with running(app):
                await app.publish(OrderPlaced(number=1), delay=1)
                seen.update(_modes(tmp_path))

        anyio.run(use)
    finally:
        os.umask(before)
    assert seen["bus.db"] == 0o600
    assert "bus.db-wal" in seen
    assert {name: oct(mode) for name, mode in seen.items() if mode & 0o077} == {}


def test_the_default_file_is_in_a_separate_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = os.umask(0)
    try:
        with declare_orders(Lightbus("shop", url="sqlite://")) as app:
            app.publish_sync(OrderPlaced(number=1))
            modes = _modes(tmp_path)
    finally:
        os.umask(before)
    if sys.platform == "linux":
        assert modes["lightbus"] == 0o700
        assert modes["lightbus/bus.db"] == 0o600
