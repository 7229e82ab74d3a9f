"""Several nodes, and host names with several addresses: all are tried, however one of them fails."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightbus import Lightbus, errors
from lightbus.connection.dial import BrokerAddresses
from tests.bus import OrderPlaced
from tests.conformance.conftest import declare_orders
from tests.patience import LIMIT, within
from tests.rabbitmq import Node, free_port

SHORT = "?connect_timeout=1"


class Impostor:
    """Listens, but is not a broker. `answer` is called with each client, which stays connected until the end."""

    def __init__(self, host: str, port: int, answer: Callable[[socket.socket], object]) -> None:
        self.clients: list[socket.socket] = []
        self._server = socket.create_server((host, port))
        self.port: int = self._server.getsockname()[1]
        self._answer = answer
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                self.clients.append(client)
                with contextlib.suppress(OSError):
                    self._answer(client)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for client in self.clients:
            client.close()


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def _drip(client: socket.socket) -> None:
    """A frame that never ends, sent one byte at a time."""
    ended = threading.Event()
    client.sendall(struct.pack(">BHI", 1, 0, 4000))
    while not ended.wait(0.1):
        client.sendall(b"\0")


def _starts_with_garbage(client: socket.socket) -> None:
    """A well-formed frame of connection.start without its fields."""
    payload = struct.pack(">HH", 10, 10) + b"\xff" * 20
    client.sendall(struct.pack(">BHI", 1, 0, len(payload)) + payload + b"\xce")


ANSWERS: dict[str, Callable[[socket.socket], object]] = {
    "never answers": lambda client: None,
    "hangs up": lambda client: client.close(),
    "resets": _reset,
    "speaks HTTP": lambda client: client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "speaks AMQP 1.0 only": lambda client: client.sendall(b"AMQP\x00\x01\x00\x00"),
    "begins with garbage": _starts_with_garbage,
    "drips": _drip,
}

Names = dict[str, list[str]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """The addresses of host names, in the order in which DNS returns them."""
    known: Names = {}
    lookup = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **options: Any) -> list[Any]:
        return [found for one in known.get(host, [host]) for found in lookup(one, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


@contextlib.contextmanager
def publishing(url: str | list[str]) -> Iterator[Lightbus]:
    app = declare_orders(Lightbus("shop", url=url, publish_timeout=LIMIT))
    try:
        yield app
    finally:
        app.__exit__(None, None, None)


# --- a host name with several addresses -------------------------------------------------------


@pytest.mark.rabbitmq
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_next_address_of_a_name_is_tried_if_one(
    answer: str, rabbitmq: Node, rabbitmq_url: str, names: Names
) -> None:
    names["rabbit.test"] = ["127.0.0.2", "127.0.0.1"]
    url = rabbitmq_url.replace("127.0.0.1", "rabbit.test") + "?connect_timeout=5"  # for the broker, too
    impostor = Impostor("127.0.0.2", rabbitmq.port, ANSWERS[answer])
    with contextlib.closing(impostor), publishing(url) as app:
        with within(10):
            app.publish_sync(OrderPlaced(number=1))
        assert len(impostor.clients) == 1
        app.publisher.close()
        app.publish_sync(OrderPlaced(number=2))
        assert len(impostor.clients) == 1, "what failed comes last the next time"


@pytest.mark.rabbitmq
def test_the_next_address_of_a_name_is_tried_if_nothing_listens(rabbitmq_url: str, names: Names) -> None:
    names["rabbit.test"] = ["127.0.0.2", "127.0.0.1"]
    with publishing(rabbitmq_url.replace("127.0.0.1", "rabbit.test")) as app:
        app.publish_sync(OrderPlaced(number=1))


def test_the_error_names_the_failure_of_each_address(names: Names) -> None:
    names["rabbit.test"] = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    port = free_port()
    impostor = Impostor("127.0.0.2", port, ANSWERS["never answers"])
    with contextlib.closing(impostor), pytest.raises(errors.BrokerUnreachable) as unreachable, within(1):
        BrokerAddresses.parse(f"amqp://rabbit.test:{port}/{SHORT}").connect("test")
    text = str(unreachable.value)
    assert f"amqp://rabbit.test:{port}/ (127.0.0.1, 127.0.0.3): Connection refused" in text
    assert f"amqp://rabbit.test:{port}/ (127.0.0.2): no answer in time" in text


# --- several nodes ----------------------------------------------------------------------------


@contextlib.contextmanager
def bad_nodes(node: Node) -> Iterator[dict[str, str]]:
    """The URLs of nodes that cannot be used, each for a different reason."""
    with contextlib.ExitStack() as opened:
        urls = {
            name: f"amqp://127.0.0.1:{opened.enter_context(contextlib.closing(Impostor('127.0.0.1', 0, answer))).port}/"
            for name, answer in ANSWERS.items()
        }
        urls["another password"] = node.vhost_url("/", "guest", "other")
        urls["another virtual host"] = node.vhost_url("no-such-vhost")
        urls["no TLS"] = node.url.replace("amqp://", "amqps://")
        urls["an unreadable file"] = node.url.replace("amqp://", "amqps://") + "?cafile=/no/such.pem"
        urls["nobody"] = f"amqp://127.0.0.1:{free_port()}/"
        urls["unknown"] = "amqp://no-such-host.invalid/"
        yield urls


@pytest.mark.rabbitmq
def test_the_only_working_node_is_found(rabbitmq: Node, rabbitmq_url: str, names: Names) -> None:
    names["no-such-host.invalid"] = []
    with bad_nodes(rabbitmq) as bad:
        for why, url in bad.items():
            one = url if "?" in url else url + SHORT
            for _ in range(4):  # their order is random
                BrokerAddresses.parse([one, rabbitmq_url]).connect(f"test: {why}").close()
        every = [url if "?" in url else url + SHORT for url in bad.values()]
        BrokerAddresses.parse([*every, rabbitmq_url]).connect("test: all").close()


@pytest.mark.rabbitmq
def test_if_all_nodes_fail_the_error_has_the_answer_of_each(rabbitmq: Node) -> None:
    refused, missing = rabbitmq.vhost_url("/", "guest", "other"), rabbitmq.vhost_url("no-such-vhost")
    nobody = f"amqp://127.0.0.1:{free_port()}/"
    with pytest.raises(errors.AccessRefused) as fatal:
        BrokerAddresses.parse([refused, missing]).connect("test")
    assert "refused the user name or password" in str(fatal.value)
    assert "/no-such-vhost: no such virtual host" in str(fatal.value)
    with pytest.raises(errors.BrokerUnreachable) as unreachable:  # the node that is down may be the one that would do
        BrokerAddresses.parse([refused, nobody, missing]).connect("test")
    for part in ("refused the user name or password", "no such virtual host", f"{nobody}: Connection refused"):
        assert part in str(unreachable.value)


@pytest.mark.rabbitmq
def test_after_a_node_refuses_what_the_app_declares_another_one_is_used(rabbitmq: Node, rabbitmq_url: str) -> None:
    vhost = rabbitmq_url.rpartition("/")[2]
    rabbitmq.ctl("add_user", f"weak-{vhost}", "weak")
    rabbitmq.ctl("set_permissions", "-p", vhost, f"weak-{vhost}", "^$", "^$", "^$")
    weak = rabbitmq.vhost_url(vhost, f"weak-{vhost}", "weak")
    for _ in range(4):
        with publishing([weak, rabbitmq_url]) as app:
            app.publish_sync(OrderPlaced(number=1))
    with publishing([weak, weak]) as app, pytest.raises(errors.PublisherRefused, match="permission missing"):
        app.publish_sync(OrderPlaced(number=1))
    with publishing([f"amqp://127.0.0.1:{free_port()}/", weak]) as app:  # the one that is down may be the right one
        with pytest.raises(errors.PublishUnreachable) as refused:
            app.publish_sync(OrderPlaced(number=1), timeout=10)
        assert f"amqp://weak-{vhost}:**@127.0.0.1:{rabbitmq.port}/{vhost}: permission missing" in str(refused.value)
    rabbitmq.ctl("delete_user", f"weak-{vhost}")
