"""Invalid broker URLs, and brokers that cannot be used: each error has the cause, and never the password."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from lightbus import Lightbus, errors
from tests.bus import OrderPlaced
from tests.conformance.conftest import declare_orders
from tests.patience import LIMIT, within
from tests.rabbitmq import Node, free_port

PASSWORD = "s3cr3t-pa55"


def _app(url: Any) -> Lightbus:
    return declare_orders(Lightbus("shop", url=url, publish_timeout=LIMIT))


def _all_ways_of(app: Lightbus) -> Iterator[Callable[[], object]]:
    """Every way to reach the broker."""
    yield lambda: app.publish_sync(OrderPlaced(number=1))
    yield app.__enter__
    yield lambda: anyio.run(app.consumer().run)


BAD_URLS: dict[str, tuple[Any, type[errors.BrokerError], tuple[str, ...]]] = {
    "no-scheme": ("localhost:5672", errors.InvalidURL, ("not a broker URL", "amqp://", "sqlite:///", "memory://")),
    "password-alone": (f"guest:{PASSWORD}@localhost", errors.InvalidURL, ("not a broker URL",)),
    "bad-port": (f"amqp://u:{PASSWORD}@localhost:port/", errors.InvalidURL, ("'amqp://...'", "port")),
    "port-too-high": (f"amqp://u:{PASSWORD}@localhost:99999/", errors.InvalidURL, ("not a broker URL", "port")),
    "bad-ipv6": (f"amqp://u:{PASSWORD}@[::1/", errors.InvalidURL, ("not a broker URL", "host")),
    "unknown-option": ("amqp://localhost/?hartbeat=5", errors.InvalidURL, ("'hartbeat'", "heartbeat")),
    "option-no-number": ("amqp://localhost/?heartbeat=often", errors.InvalidURL, ("option heartbeat", "seconds")),
    "option-two-dots": ("amqp://localhost/?heartbeat=1.2.3", errors.InvalidURL, ("option heartbeat",)),
    "option-empty": ("amqp://localhost/?heartbeat=", errors.InvalidURL, ("option heartbeat",)),
    "option-only-a-dot": ("amqp://localhost/?connect_timeout=.", errors.InvalidURL, ("option connect_timeout",)),
    "query-no-option": (f"amqp://u:{PASSWORD}@h/?{PASSWORD}", errors.InvalidURL, ("not a broker URL",)),
    "redis": (
        "redis://localhost",
        errors.UnsupportedBroker,
        ("redis://", "no AMQP exchanges", "RabbitMQ", "sqlite://"),
    ),
    "sqs": (f"sqs://key:{PASSWORD}@", errors.UnsupportedBroker, ("sqs://", "no AMQP exchanges")),
    "kafka": ("confluentkafka://localhost", errors.UnsupportedBroker, ("confluentkafka://", "no AMQP exchanges")),
    "unknown": (f"foo://u:{PASSWORD}@localhost", errors.UnsupportedBroker, ("unknown broker type", "amqp://")),
    "http": ("http://localhost:15672", errors.UnsupportedBroker, ("http://", "amqp://")),
    "sqlite-host": ("sqlite://bus.db", errors.InvalidURL, ("'bus.db'", "sqlite:///bus.db")),
    "slash-in-password": (f"amqp://u:{PASSWORD}/x@localhost/", errors.InvalidURL, ("%2F", "password")),
    "question-in-password": (f"amqp://u:1?{PASSWORD}@localhost/", errors.InvalidURL, ("%3F", "password")),
    "question-and-equals": (f"amqp://u:1?{PASSWORD}=2@localhost/", errors.InvalidURL, ("%3F", "password")),
    "hash-in-password": (f"amqp://u:1#{PASSWORD}@localhost/", errors.InvalidURL, ("%23", "password")),
    "empty": ("", errors.InvalidURL, ("not a broker URL",)),
    "no-text": (7, errors.InvalidURL, ("not a broker URL",)),
    "list-of-none": ([], errors.InvalidURL, ("list of broker URLs is empty",)),
    "one-bad-of-two": (["amqp://localhost", "nonsense"], errors.InvalidURL, ("not a broker URL",)),
}


@pytest.mark.parametrize("case", BAD_URLS)
def test_an_invalid_url_is_explained_without_its_password(case: str) -> None:
    url, error, words = BAD_URLS[case]
    for reach in _all_ways_of(_app(url)):
        with within(0), pytest.raises((error, errors.PublishRefused, ExceptionGroup)) as refused:
            reach()
        message = _words(refused.value)
        assert all(word in message for word in words), message
        assert PASSWORD not in message


@pytest.mark.parametrize("case", ["no-scheme", "redis", "unknown-option"])
def test_an_invalid_url_in_the_environment_has_the_same_error(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, error, words = BAD_URLS[case]
    monkeypatch.setenv("LIGHTBUS_URL", url)
    with pytest.raises(error) as refused:
        _app(None).publish_sync(OrderPlaced(number=1))
    assert all(word in str(refused.value) for word in words)


def test_an_app_connects_only_when_it_is_used() -> None:
    app = _app("redis://nowhere")
    app.on(OrderPlaced)(lambda: None)
    assert "shop" in repr(app)


# --- brokers that do not exist, or refuse the connection --------------------------------------


def test_a_port_without_a_listener() -> None:
    url = f"amqp://guest:{PASSWORD}@127.0.0.1:{free_port()}/"
    app = _app(url)
    with pytest.raises(errors.PublishUnreachable) as unreachable:
        app.publish_sync(OrderPlaced(number=1), timeout=5)
    message = str(unreachable.value)
    assert "amqp://guest:**@127.0.0.1:" in message
    assert "Connection refused" in message
    assert "Is the broker running there?" in message
    assert PASSWORD not in _words(unreachable.value)
    app.__exit__(None, None, None)


def test_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> None:  # at once: a real resolver may take seconds
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    app = _app(f"amqp://guest:{PASSWORD}@no-such-host.invalid/")
    with pytest.raises(
        errors.PublishUnreachable, match=r"no-such-host\.invalid.*the host name cannot be resolved"
    ) as unknown:
        app.publish_sync(OrderPlaced(number=1), timeout=5)
    assert PASSWORD not in _words(unknown.value)
    app.__exit__(None, None, None)


def test_the_error_of_each_cluster_node_is_reported() -> None:
    ports = [free_port(), free_port()]
    app = _app([f"amqp://guest:{PASSWORD}@127.0.0.1:{port}" for port in ports])
    with pytest.raises(errors.PublishUnreachable) as unreachable:
        app.publish_sync(OrderPlaced(number=1), timeout=5)
    assert all(f":{port}" in str(unreachable.value) for port in ports)
    app.__exit__(None, None, None)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"AMQP\x00\x01\x00\x00", b"\x01" * 200, b""])
def test_a_port_with_another_protocol(answer: bytes) -> None:
    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                with client:
                    client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        app = _app(f"amqp://guest:{PASSWORD}@127.0.0.1:{server.getsockname()[1]}/")
        with pytest.raises(
            errors.PublishUnreachable, match=r"No connection to amqp://guest:\*\*@127\.0\.0\.1"
        ) as error:
            app.publish_sync(OrderPlaced(number=1), timeout=0.5)
        assert PASSWORD not in _words(error.value)
        server.shutdown(socket.SHUT_RDWR)
        app.__exit__(None, None, None)


def test_a_listener_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        app = _app(f"amqp://guest:{PASSWORD}@127.0.0.1:{server.getsockname()[1]}/?connect_timeout=1")
        no_answer = pytest.raises(errors.PublishUnreachable, match=r"No connection to amqp://guest.*no answer")
        with within(0.3), no_answer:
            app.publish_sync(OrderPlaced(number=1), timeout=0.3)
        with pytest.raises(errors.BrokerUnreachable, match=r"No connection to amqp://guest"):
            app.publisher.open(1.5)
        app.__exit__(None, None, None)


@pytest.mark.rabbitmq
class TestRabbitMQ:
    def _refused(self, url: str, *words: str) -> None:
        """Every way to connect fails at once, with these words in its error."""
        for reach in _all_ways_of(_app(url)):
            with within(0), pytest.raises((errors.AccessRefused, errors.PublishRefused, ExceptionGroup)) as refused:
                reach()
            message = _words(refused.value)
            assert all(word in message for word in words), message
            assert PASSWORD not in message

    def test_a_wrong_password(self, rabbitmq: Node) -> None:
        url = rabbitmq.vhost_url("/", "guest", PASSWORD)
        self._refused(url, "amqp://guest:**@127.0.0.1", "refused the user name or password", "LIGHTBUS_URL")

    def test_an_unknown_user(self, rabbitmq: Node) -> None:
        url = rabbitmq.vhost_url("/", "nobody", PASSWORD)
        self._refused(url, "amqp://nobody:**@127.0.0.1", "refused the user name or password")

    def test_an_unknown_virtual_host(self, rabbitmq: Node) -> None:
        url = rabbitmq.vhost_url("no-such-vhost")
        self._refused(url, "no-such-vhost", "no such virtual host", "rabbitmqctl add_vhost")

    def test_a_user_without_permissions(self, rabbitmq: Node, rabbitmq_url: str) -> None:
        vhost = rabbitmq_url.rpartition("/")[2]
        rabbitmq.ctl(
            "eval",
            f'catch rabbit_auth_backend_internal:add_user(<<"weak">>, <<"{PASSWORD}">>, <<>>), '
            f'rabbit_auth_backend_internal:set_permissions(<<"weak">>, <<"{vhost}">>, '
            '<<"^$">>, <<"^$">>, <<"^$">>, <<>>), ok.',
        )
        url = rabbitmq.vhost_url(vhost, "weak", PASSWORD)
        self._refused(url, "permission missing", "lightbus", "rabbitmqctl set_permissions")


# --- the embedded broker's file ---------------------------------------------------------------


def _file_refused(path: Path, *words: str) -> None:
    for reach in _all_ways_of(_app(f"sqlite:///{path}")):
        with within(0), pytest.raises((errors.BrokerFileError, errors.PublishRefused, ExceptionGroup)) as refused:
            reach()
        message = _words(refused.value)
        assert str(path) in message
        assert all(word in message for word in words), message


def test_the_file_is_a_folder(tmp_path: Path) -> None:
    _file_refused(tmp_path, "cannot")


def test_the_folder_does_not_exist(tmp_path: Path) -> None:
    _file_refused(tmp_path / "missing" / "bus.db", "the folder", "does not exist", "Create it")


def test_the_file_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "bus.db"
    path.write_text("these are my memoirs, not a database\n" * 100)
    _file_refused(path, "not a database")
    assert path.read_text().startswith("these are my memoirs")


def test_the_file_is_another_programs_database(tmp_path: Path) -> None:
    path = tmp_path / "bus.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
    database.close()
    _file_refused(path)
    with sqlite3.connect(path) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master")]
    database.close()
    assert tables == ["recipes"]


def test_the_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "bus.db"
    with _app(f"sqlite:///{path}") as app:
        app.publish_sync(OrderPlaced(number=1))
    for leftover in (path.with_name("bus.db-wal"), path.with_name("bus.db-shm")):
        leftover.unlink(missing_ok=True)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:200] + b"\xa5" * (size - 200))
    _file_refused(path)


def _words(error: BaseException) -> str:
    """All messages in a traceback: of the error, its causes, and the members of a group."""
    parts = [str(error)]
    if isinstance(error, BaseExceptionGroup):
        parts += [_words(one) for one in error.exceptions]
    if error.__cause__ is not None:
        parts.append(_words(error.__cause__))
    return "\n".join(parts)
